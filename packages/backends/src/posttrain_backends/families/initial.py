"""The first weights of a new model, in NumPy: those that torch's decoder has for the same seed.

Matrices are N(0, 0.02^2) from torch's generator on the host, an MT19937 whose stream NumPy has, too; norms are 1 and
biases 0. torch's vectorised logarithm and cosine round otherwise: numbers are equal to 1e-6 of the deviation or so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

STD = 0.02
"""Standard deviation of a matrix's numbers."""
_BLOCK = 16
"""Numbers that torch makes from as many uniform ones."""
_DRAWN = ("q_proj", "o_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
"""Matrices of a layer, in the order in which torch's decoder registers, and so draws them."""


def initial(sizes: Mapping[str, tuple[int, ...]], seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """name -> float32, of parameters of these names and shapes.

    >>> {name: x.round(4).tolist() for name, x in initial({"norm.weight": (2,), "q_proj.bias": (1,)}, 0)}
    {'norm.weight': [1.0, 1.0], 'q_proj.bias': [0.0]}
    """
    stream = np.random.RandomState(seed % 2**32)
    for name in sorted(sizes, key=_drawn):
        size = sizes[name]
        if len(size) > 1:
            yield name, (STD * normal(stream, int(np.prod(size)))).astype(np.float32).reshape(size)
        else:
            yield name, np.full(size, float(not name.endswith("bias")), np.float32)


def _drawn(name: str) -> tuple[int, int, int]:
    """Where a parameter stands in the order of drawing; those that are not drawn stand anywhere."""
    parts = name.split(".")
    if "layers" not in parts:
        return (1, 0, 0) if name.startswith("lm_head") else (-1, 0, 0)
    return 0, int(parts[parts.index("layers") + 1]), _DRAWN.index(parts[-2]) if parts[-2] in _DRAWN else len(_DRAWN)


def normal(stream: np.random.RandomState, n: int) -> np.ndarray:
    """[n] of N(0, 1) in float32, as torch's `normal_` fills a float32 tensor on the host: Box and Muller 1958, in
    blocks of 16; the last 16 are drawn anew where they are no whole block. Of an odd number below 16 torch keeps the
    spare one for its next, which is not done here: the matrices of a model have an even number, as widths are even."""
    if n < _BLOCK:
        return np.concatenate([np.zeros(0), *(_pair(stream) for _ in range(-(-n // 2)))])[:n].astype(np.float32)
    u = _uniform(stream, n)
    whole = n - n % _BLOCK
    found = np.empty(n, np.float32)
    found[:whole] = _in_blocks(u[:whole])
    if whole < n:
        found[-_BLOCK:] = _in_blocks(_uniform(stream, _BLOCK))
    return found


def _uniform(stream: np.random.RandomState, n: int) -> np.ndarray:
    """[n] of [0, 1), 24 bits each."""
    return (stream.randint(0, 2**32, n, np.uint32) & np.uint32(2**24 - 1)).astype(np.float32) * np.float32(2.0**-24)


def _in_blocks(u: np.ndarray) -> np.ndarray:
    u = u.reshape(-1, 2, _BLOCK // 2)
    radius, angle = np.sqrt(-2 * np.log(1 - u[:, 0])), np.float32(2 * np.pi) * u[:, 1]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()


def _pair(stream: np.random.RandomState) -> np.ndarray:
    """[2], in float64 of 53 bits each: torch's way with few numbers."""
    high, low = stream.randint(0, 2**32, (2, 2), np.uint32).astype(np.uint64).T
    u1, u2 = ((high << np.uint64(32) | low) & np.uint64(2**53 - 1)).astype(np.float64) * 2.0**-53
    return float(np.sqrt(-2 * np.log1p(-u2))) * np.array([np.cos(2 * np.pi * u1), np.sin(2 * np.pi * u1)])
