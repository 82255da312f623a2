"""Holds what a chunked head says of chosen tokens against what is known of it: log-probs are at most 0, and every so
many versions of the weights some rows are those of the plain form.

A head that is wrong trains towards nonsense, and nothing else of a run shows why: log-probs above 0 have done so before
(verl issue 2656). Knows no model and no loss.
"""

from __future__ import annotations

import torch
from posttrain.errors import Diverged
from torch import Tensor

EVERY = 64
"""Versions of the weights from one comparison to the next; the first is at the start of a run."""
SAMPLED = 8
"""Rows of a comparison, spread evenly."""

_ADVICE = ("Training stops, since the gradient would be wrong too. This is a fault of the head or of the machine: try "
           "policy.head_kernel=torch, another policy.head_chunk or precision, and report it.")


@torch.no_grad()
def require_logprobs(logprobs: Tensor) -> None:
    """Raise `Diverged` where a log-prob [N] is above 0. NaN passes: a gradient that is not finite is skipped anyway."""
    if len(wrong := (logprobs > 0).nonzero()):
        row = int(wrong[0])
        raise Diverged(f"{len(wrong)} of {len(logprobs)} log-probs are above 0, as {float(logprobs[row]):.6g} in row "
                       f"{row}. {_ADVICE}")


@torch.no_grad()
def require_plain_form(hidden: Tensor, weight: Tensor, chosen: Tensor, logprobs: Tensor, entropy: Tensor | None, *,
                       temperature: float, compute: torch.dtype) -> None:
    """Compare some rows with log_softmax(hidden @ weight.T / temperature), multiplied in `compute`, all logits of a row
    at once. Raises `Diverged` where they differ by more than rounding."""
    rows = torch.linspace(0, len(hidden) - 1, min(SAMPLED, len(hidden)), device=hidden.device).long()
    z = (hidden[rows].to(compute) @ weight.to(compute).t()).to(logprobs.dtype) / temperature
    log_p = torch.log_softmax(z, dim=-1)
    found = {"log-prob": (logprobs[rows], log_p.gather(1, chosen[rows, None])[:, 0])}
    if entropy is not None:
        found["entropy"] = entropy[rows], -(log_p.exp() * log_p).sum(-1)
    allowed = _rounding(z, compute)
    for name, (ours, plain) in found.items():
        gap = (ours - plain).abs()
        if len(wrong := (gap > allowed * plain.abs().clamp_min(1.0)).nonzero()):
            row = int(wrong[0])
            raise Diverged(f"the {name} of row {int(rows[row])} is {float(ours[row]):.6g}, and {float(plain[row]):.6g} "
                           f"where it is computed plainly. {_ADVICE}")


def _rounding(z: Tensor, compute: torch.dtype) -> Tensor:
    """How far logits may move where products of `compute` are summed in another order: a place of their last digit in
    that type, and some more of those that sums are kept in."""
    eps = 4 * torch.finfo(compute).eps + 64 * torch.finfo(z.dtype).eps
    return eps * z.abs().amax().clamp_min(1.0)
