"""`reverse_recurrence` as a Triton kernel, for columns of torch on a CUDA device. Imports no framework.

A training run does not need it: there the estimators compute on the host. It serves those who call estimators, or
`reverse_recurrence` itself, with tensors that are on the card already.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

from posttrain.data import Array
from posttrain.ops import framework_of

from posttrain_backends.kernels.availability import require_sizes, require_triton, runs_on

_MOST_ACTIONS = 2**31
"""Positions are 32-bit numbers."""


@final
@dataclass(frozen=True, slots=True)
class TritonRecurrence:
    """y[t] = x[t] + decay[t] y[t+1] within each episode, as one segmented scan over the whole flat column.

    (decay[N], x[N], offsets[E+1]) -> y[N], float32 or float64, nothing padded: its time depends on N alone, not on how
    long the episodes are. Blocks are scanned on their own, then their carries; then a carry is added where an episode
    goes on in the next block. That moves 14 bytes per float32 action, and 12 more for each that gets a carry (half of
    them where episodes are as long as blocks); 12 are the least possible. The same numbers in every call: no atomics.

    Used within `posttrain.ops.use_kernels`:

        with use_kernels([TritonRecurrence()]):
            estimate = GAE()(episodes)  # of CUDA tensors

    Source: Blelloch 1990, "Prefix sums and their applications", section 1.4 (recurrences as scans of pairs) and 1.5
    (segments); needs `pip install 'posttrain-backends[triton]'`. Raises `PluginError` when called without Triton.
    """

    block: int = 4096
    """Actions that one program scans; a power of 2."""
    warps: int = 8
    """Warps of one program; a power of 2 up to 32."""
    device: Literal["cuda", "cpu"] = "cuda"
    """`cpu` is for tests: Triton's interpreter, which the variable TRITON_INTERPRET=1 turns on before Triton is
    imported."""

    def __post_init__(self) -> None:
        require_sizes(self.block, self.warps)

    @property
    def op(self) -> str:
        return "reverse_recurrence"

    @property
    def framework(self) -> str:
        return "torch"

    def supports(self, *args: Array) -> bool:
        """Flat columns of one floating-point dtype on one device of this kind; never without Triton."""
        decay, x, _ = args
        return (runs_on(self.device) and framework_of(x) == framework_of(decay) == "torch"
                and x.ndim == 1 and decay.shape == x.shape and decay.dtype == x.dtype
                and str(x.dtype) in ("torch.float32", "torch.float64")
                and x.device.type == self.device and decay.device == x.device
                and len(x) + self.block < _MOST_ACTIONS)

    def __call__(self, *args: Array) -> Array:
        require_triton("triton_recurrence")
        from posttrain_backends.kernels._triton import segmented_scan

        decay, x, offsets = args
        return segmented_scan(decay, x, offsets, self.block, self.warps)
