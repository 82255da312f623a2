"""Matrices of layers in 8 or 4 bits, as ONNX Runtime's MatMulNBits takes them; packed here, in NumPy.

Each row falls into blocks of 32 inputs with one scale. The scale puts the entry of largest magnitude on the lowest
integer, so that it is exact: s = x_max / -2^(bits-1), q = round(x / s) + 2^(bits-1), clipped to the bits. The input is
rounded to int8, too, block by block (accuracy level 4), which is what its kernels are fast at. Embedding and output
matrix, norms and biases stay in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import final

import numpy as np

from posttrain_backends._onnx.decoder import EMBEDDING, OUTPUT, Gemm
from posttrain_backends._onnx.tape import ORT, Tape

BLOCK = 32
"""Inputs with a scale of their own."""
_INT8_INPUTS = 4
"""Accuracy level: products in int8. Level 0, in float32, unpacks the matrix in each call."""
_PACKED, _SCALES = ".packed", ".scales"


def pack(matrix: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """[O, I] float32 -> [O, blocks, 32 bits / 8] uint8, at 4 bits the earlier entry in the lower half, and scales
    [O, blocks] float32. The last block is filled up with zeros.

    >>> packed, scales = pack(np.array([[8.0, 4.0, 1.0]], np.float32), 4)
    >>> packed[0, 0, :2].tolist(), scales.tolist()
    ([64, 135], [[-1.0]])
    """
    O, I = matrix.shape
    blocks, middle = -(-I // BLOCK), 2 ** (bits - 1)
    x = np.zeros((O, blocks * BLOCK), np.float32)
    x[:, :I] = matrix
    x = x.reshape(O, blocks, BLOCK)
    low, high = x.min(axis=-1), x.max(axis=-1)
    scales = np.where(np.abs(high) > np.abs(low), high, low) / np.float32(-middle)
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    q = np.clip(np.floor(x * inverse[..., None] + np.float32(middle + 0.5)), 0, 2 * middle - 1).astype(np.uint8)
    return (q[..., ::2] | q[..., 1::2] << 4 if bits == 4 else q), scales


def unpack(packed: np.ndarray, scales: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """The matrix [O, columns] that `pack` made these of, rounded."""
    q = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:2], -1) if bits == 4 else packed
    x: np.ndarray = (q.astype(np.float32) - 2 ** (bits - 1)) * scales[..., None]
    return x.reshape(len(x), -1)[:, :columns]


@final
@dataclass(frozen=True, slots=True)
class NBits:
    """How x @ W.T + b is written with such a matrix; the output matrix stays a `Gemm`."""

    bits: int

    def __call__(self, tape: Tape, x: str, name: str, rows: int, columns: int, *, bias: bool = False) -> str:
        if not _is_packed(f"{name}.weight"):
            return Gemm()(tape, x, name, rows, columns, bias=bias)
        blocks = -(-columns // BLOCK)
        packed = tape.input(name + _PACKED, [rows, blocks, BLOCK * self.bits // 8], np.uint8)
        scales = tape.input(name + _SCALES, [rows, blocks])
        y = tape("MatMulNBits", x, packed, scales, domain=ORT, K=columns, N=rows, bits=self.bits, block_size=BLOCK,
                 accuracy_level=_INT8_INPUTS)
        return tape("Add", y, tape.weight(f"{name}.bias", [rows])) if bias else y

    def constants(self, weights: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
        """What the graph reads in place of `weights`."""
        for name, x in weights.items():
            if _is_packed(name):
                packed, scales = pack(x, self.bits)
                layer = name.removesuffix(".weight")
                yield from ((layer + _PACKED, packed), (layer + _SCALES, scales))
            else:
                yield name, x


def _is_packed(name: str) -> bool:
    """Whether a parameter is the matrix of a layer."""
    return name.endswith("_proj.weight") and name not in (EMBEDDING, OUTPUT)
