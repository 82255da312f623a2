"""Seconds of y[t] = x[t] + decay[t] y[t+1] over 1024 episodes of 4096 float32 numbers, ours and its peers in one run.

CPU seconds of the process on one thread, median over repeats, since wall time on a shared machine lies. All results
are asserted equal first. `reverse_recurrence` is timed as users call it, with its checks; the peers check nothing, and
all but BLAS and the JAX scan rely on episodes of equal length (lfilter and the blocked form also on one decay for all).

    python tools/bench/recurrence.py [--episodes 1024] [--length 4096] [--repeats 9]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402  (the threads above are read once, at import)
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from posttrain.ops import reverse_recurrence  # noqa: E402
from scipy.linalg import blas  # noqa: E402
from scipy.signal import lfilter  # noqa: E402

DECAY = 0.99 * 0.95
BLOCK = 64
Columns = tuple[np.ndarray, np.ndarray, np.ndarray, int, int]
"""decay [N], x [N], offsets [E+1], episodes, length"""


def loop_over_columns(decay: np.ndarray, x: np.ndarray, offsets: np.ndarray, E: int, T: int) -> np.ndarray:
    """The usual form: rows of equal length, one step after the other for all of them."""
    a, b = decay.reshape(E, T), x.reshape(E, T)
    y, following = np.empty_like(b), np.zeros(E, np.float32)
    for t in range(T - 1, -1, -1):
        following = b[:, t] + a[:, t] * following
        y[:, t] = following
    return y.ravel()


def torch_loop_over_columns(decay: np.ndarray, x: np.ndarray, offsets: np.ndarray, E: int, T: int) -> np.ndarray:
    """The same in torch, as trainers write it."""
    a, b = torch.from_numpy(decay).view(E, T), torch.from_numpy(x).view(E, T)
    steps, following = [], torch.zeros(E)
    for t in range(T - 1, -1, -1):
        following = b[:, t] + a[:, t] * following
        steps.append(following)
    return torch.stack(steps[::-1], 1).view(-1).numpy()


def scipy_lfilter(decay: np.ndarray, x: np.ndarray, offsets: np.ndarray, E: int, T: int) -> np.ndarray:
    """A recursive filter over reversed rows."""
    numerator, denominator = np.ones(1, np.float32), np.array([1.0, -decay[0]], np.float32)
    y: np.ndarray = lfilter(numerator, denominator, x.reshape(E, T)[:, ::-1], axis=1)[:, ::-1].ravel()
    return y


def bare_blas(decay: np.ndarray, x: np.ndarray, offsets: np.ndarray, E: int, T: int) -> np.ndarray:
    """The solve alone, without checks."""
    band = np.zeros((len(x), 2), np.float32)
    np.negative(decay[:-1], out=band[1:, 0])
    band[offsets[1:-1], 0] = 0.0
    y: np.ndarray = blas.stbsv(1, band.T, x, diag=1)
    return y


def blocked_triangular(decay: np.ndarray, x: np.ndarray, offsets: np.ndarray, E: int, T: int) -> np.ndarray:
    """Blocks by one product with the powers of the decay, then a carry from block to block."""
    q, i = float(decay[0]), torch.arange(BLOCK)
    power = i[:, None] - i[None]
    within = torch.where(power >= 0, q ** power.double(), 0.0).float()
    y = (torch.from_numpy(x).view(-1, BLOCK) @ within).view(E, T // BLOCK, BLOCK)
    carried = (q ** (BLOCK - i).double()).float()
    for block in range(T // BLOCK - 2, -1, -1):
        y[:, block].addcmul_(y[:, block + 1, :1], carried)
    return y.view(-1).numpy()


@jax.jit
def _scan(decay: jax.Array, x: jax.Array) -> jax.Array:
    def compose(right: tuple[jax.Array, jax.Array], left: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return left[0] * right[0], left[1] + left[0] * right[1]

    y: jax.Array = jax.lax.associative_scan(compose, (decay, x), reverse=True)[1]
    return y


def jax_associative_scan(decay: np.ndarray, x: np.ndarray, offsets: np.ndarray, E: int, T: int) -> np.ndarray:
    """Compiled once, outside the timing; decays are 0 at the ends."""
    cut = decay.copy()
    cut[offsets[1:] - 1] = 0.0
    return np.asarray(_scan(jnp.asarray(cut), jnp.asarray(x)))


def ours(decay: np.ndarray, x: np.ndarray, offsets: np.ndarray, E: int, T: int) -> np.ndarray:
    """`posttrain.ops.reverse_recurrence`."""
    y: np.ndarray = reverse_recurrence(decay, x, offsets)
    return y


FORMS: dict[str, Callable[..., np.ndarray]] = {
    "loop over columns": loop_over_columns, "torch loop over columns": torch_loop_over_columns,
    "scipy lfilter": scipy_lfilter, "jax associative_scan": jax_associative_scan,
    "blocked triangular (torch)": blocked_triangular, "BLAS alone": bare_blas, "reverse_recurrence": ours}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--episodes", type=int, default=1024)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=9)
    given = parser.parse_args()
    if given.length % BLOCK:
        parser.error(f"--length must be a multiple of {BLOCK}, for the blocked form")
    torch.set_num_threads(1)
    N = given.episodes * given.length
    x = np.random.default_rng(0).standard_normal(N, dtype=np.float32)
    decay, offsets = np.full(N, DECAY, np.float32), np.arange(0, N + 1, given.length)
    columns: Columns = (decay, x, offsets, given.episodes, given.length)
    reference = loop_over_columns(decay.astype(np.float64), x.astype(np.float64), *columns[2:])
    for name, form in FORMS.items():
        np.testing.assert_allclose(form(*columns), reference, rtol=1e-4, atol=1e-4, err_msg=name)
    seconds: dict[str, list[float]] = {name: [] for name in FORMS}
    for _ in range(given.repeats):  # in turns, so that a busy machine is busy for all
        for name, form in FORMS.items():
            start = time.process_time()
            form(*columns)
            seconds[name].append(time.process_time() - start)
    usual = statistics.median(seconds["loop over columns"])
    print(f"{given.episodes} episodes x {given.length}, float32, one thread, median of {given.repeats}")
    for name, taken in seconds.items():
        print(f"{name:28s} {statistics.median(taken) * 1e3:8.1f} ms   {usual / statistics.median(taken):5.1f} x")


if __name__ == "__main__":
    main()
