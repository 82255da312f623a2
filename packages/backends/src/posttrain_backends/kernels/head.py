"""The output head on a CUDA device: log-probs, entropies and gradients of logits, by Triton. Imports no framework.

What the head costs is three products of matrices, 6NHV operations in one pass and 8NHV in two, and what is done to
their N V logits between them. A kernel that does all of it itself, as cut-cross-entropy (Wijmans et al. 2024, arXiv
2411.09009) and verl's do, keeps logits out of memory altogether, but it must multiply as fast as cuBLAS does, add up
two gradients across programs, and compute logits anew in its second pass even where a loss could do with one. Here the
products stay cuBLAS's, over chunks of rows (`_torch/head.py`), and two kernels do the rest: one reads a chunk, the
other writes its gradient over it, with the loss between them. That is 6 bytes per logit in bf16, 7.5 GB for N = 8192
and V = 151936: by arithmetic 1.7 ms at 4.3 TB/s, beside 39 ms of products at 790 TFLOP/s. torch's own operations move
some ten times as much. The same two kernels serve logits that are given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, final

from posttrain.data import Array
from posttrain.ops import framework_of

from posttrain_backends.kernels.availability import require_sizes, require_triton, runs_on

if TYPE_CHECKING:
    from posttrain_backends._torch.logits import Reading, Slopes

_LARGEST_VOCABULARY = 2**31
"""Places in a row are 32-bit numbers, and so is the number of tiles; rows begin at 64-bit ones."""
_TYPES = frozenset({"torch.float16", "torch.bfloat16", "torch.float32", "torch.float64"})


@final
@dataclass(frozen=True, slots=True)
class TritonHead:
    """log p(chosen) and the entropy of p = softmax(logits / temperature), and the gradient of both, for CUDA tensors.

    (logits[N, V], chosen[N], temperature) -> [2, N] in float32, or float64 where the logits are: one pass over the
    logits, one more for the gradient. Logits of -inf are probabilities of 0. The same numbers in every call: no
    atomics.

    Backends on torch use it by themselves where it is installed (`head_kernel: auto`), chunk by chunk between the
    products with the output matrix, and write the gradient over the logits. The KL to a reference over the whole
    vocabulary is left to torch.

    Source: Milakov & Gimelshein 2018, arXiv 1805.02867, algorithm 3 (one pass); needs
    `pip install 'posttrain-backends[triton]'`. Raises `PluginError` when called without Triton.
    """

    block: int = 4096
    """Logits of one row that a program looks at together; a power of 2."""
    warps: int = 8
    """Warps of one program; a power of 2 up to 32."""
    device: Literal["cuda", "cpu"] = "cuda"
    """`cpu` is for tests: Triton's interpreter, which the variable TRITON_INTERPRET=1 turns on before Triton is
    imported."""

    def __post_init__(self) -> None:
        require_sizes(self.block, self.warps)

    @property
    def op(self) -> str:
        return "selective_log_softmax"

    @property
    def framework(self) -> str:
        return "torch"

    def supports(self, *args: Array) -> bool:
        """Floating-point logits [N, V] whose rows are contiguous, and ids [N], on one device of this kind; never
        without Triton."""
        logits, chosen, _ = args
        return (runs_on(self.device) and framework_of(logits) == framework_of(chosen) == "torch"
                and logits.ndim == 2 and tuple(chosen.shape) == tuple(logits.shape[:1])
                and str(logits.dtype) in _TYPES and str(chosen.dtype) == "torch.int64"
                and logits.device.type == self.device and chosen.device == logits.device
                and 0 < logits.shape[1] < _LARGEST_VOCABULARY - self.block
                and (logits.stride(1) == 1 or logits.shape[1] == 1)
                and logits.shape[0] * -(-logits.shape[1] // self.block) < _LARGEST_VOCABULARY)

    def __call__(self, *args: Array) -> Array:
        require_triton("triton_head")
        import torch

        from posttrain_backends._torch.logits import logprobs_of

        logits, chosen, temperature = args
        logprobs, entropy = logprobs_of(logits, chosen, temperature=temperature, entropy=True, form=self,
                                        in_place=False)
        assert entropy is not None
        return torch.stack([logprobs, entropy])

    def read(self, logits: Array, chosen: Array, temperature: float = 1.0, *, entropy: bool = False,
             reference: Array | None = None) -> Reading:
        """See `_torch.logits.read`."""
        from posttrain_backends._torch import logits as plain
        from posttrain_backends.kernels import _triton_head

        if reference is not None:
            return plain.read(logits, chosen, temperature, entropy=entropy, reference=reference)
        return _triton_head.read(logits, chosen, temperature, entropy, self.block, self.warps)

    def write_gradient(self, logits: Array, chosen: Array, reading: Reading, by: Slopes, temperature: float = 1.0, *,
                       reference: Array | None = None, kept: Array | None = None) -> Array:
        """See `_torch.logits.write_gradient`."""
        from posttrain_backends._torch import logits as plain
        from posttrain_backends.kernels import _triton_head

        if by.kl is not None:
            return plain.write_gradient(logits, chosen, reading, by, temperature, reference=reference, kept=kept)
        return _triton_head.write_gradient(logits, chosen, reading, by, temperature, kept, self.block, self.warps)
