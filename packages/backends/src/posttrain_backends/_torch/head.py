"""What output matrices say of hidden states, without ever holding all logits: log-probs and entropies of chosen tokens,
the KL to another model over the whole vocabulary, action values of chosen tokens, and action values averaged under the
policy.

Rows go through the output matrix in chunks; the backward pass computes each chunk's logits anew (8NHV operations where
logits in memory would need 6NHV), so the peak is one kept chunk and its gradient instead of several [N, V] arrays.
A model to compare with adds 4NHV, its own logits forwards and anew backwards, and two arrays of one chunk.
Knows no model and no loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_CELLS: Mapping[str, int] = {"cpu": 2**22, "cuda": 2**27}
"""Logits of one chunk by device type: a chunk that stays near the cache there, and one that fills the device here."""


def chunk_rows(vocab_size: int, device: torch.device) -> int:
    """Rows of one chunk where the user leaves them open."""
    return max(1, CHUNK_CELLS.get(device.type, 2**22) // vocab_size)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Readout:
    """What a model's logits are made of: hidden @ weight.T, multiplied in `compute`. Carries no gradient."""

    hidden: Tensor
    """[N, H]; H is the model's own."""
    weight: Tensor
    """[V, H]"""
    compute: torch.dtype


def chosen_logprobs(hidden: Tensor, weight: Tensor, chosen: Tensor, *, temperature: float = 1.0, rows: int = 0,
                    entropy: bool = False, compute: torch.dtype | None = None) -> tuple[Tensor, Tensor | None]:
    """log p(chosen) and, where asked, the entropy of p = softmax(hidden @ weight.T / temperature).

    hidden [N, H], weight [V, H], chosen [N] -> logprobs [N] (at most 0) and entropy [N], in float32, or float64 where
    `weight` is. Both are differentiable in `hidden` and `weight`; gradients of `weight` add up over chunks in its own
    type. Matrices are multiplied in `compute` (default: the type of `weight`).
    """
    rows = rows or chunk_rows(len(weight), weight.device)
    logprobs, entropies, _ = _ChosenLogProbs.apply(  # type: ignore[no-untyped-call]  # torch leaves it untyped
        hidden, weight, chosen, float(temperature), rows, entropy, compute or weight.dtype, None, None, None)
    return logprobs, entropies if entropy else None


def compared_logprobs(hidden: Tensor, weight: Tensor, chosen: Tensor, reference: Readout, *, temperature: float = 1.0,
                      rows: int = 0, entropy: bool = False,
                      compute: torch.dtype | None = None) -> tuple[Tensor, Tensor | None, Tensor]:
    """What `chosen_logprobs` gives, and KL(p || q) = sum_a p_a (log p_a - log q_a) of each row over the whole
    vocabulary, q = softmax(reference.hidden @ reference.weight.T / temperature).

    The KL [N] is differentiable in `hidden` and `weight` as the others are, and in nothing of the reference. Beside
    what the others need, log p - log q of one chunk is kept, and one more chunk exists for a time.
    """
    rows = rows or chunk_rows(len(weight), weight.device)
    logprobs, entropies, kl = _ChosenLogProbs.apply(  # type: ignore[no-untyped-call]  # torch leaves it untyped
        hidden, weight, chosen, float(temperature), rows, entropy, compute or weight.dtype,
        reference.hidden, reference.weight, reference.compute)
    return logprobs, entropies if entropy else None, kl


def chosen_action_values(hidden: Tensor, q_weight: Tensor, q_bias: Tensor, chosen: Tensor) -> Tensor:
    """Q_j(s, c) = q_weight[j, c] . h(s) + q_bias[j, c] of each state and its chosen token c, for the k heads j.

    hidden [N, H], q_weight [k, V, H], q_bias [k, V], chosen [N] -> [k, N] in the type of `q_weight`; differentiable in
    all three. Only the chosen rows are read: memory is [k, N, H], in the backward pass also one gradient of the size of
    `q_weight`, and nothing is as large as [N, V].
    """
    k, V, H = q_weight.shape
    rows = chosen + V * torch.arange(k, device=chosen.device)[:, None]
    weight = F.embedding(rows, q_weight.reshape(k * V, H))
    bias = F.embedding(rows, q_bias.reshape(k * V, 1))[..., 0]
    values: Tensor = torch.linalg.vecdot(weight, hidden.to(q_weight.dtype))
    return values + bias


@torch.no_grad()
def expected_values(hidden: Tensor, weight: Tensor, q_weight: Tensor, q_bias: Tensor, *, temperature: float = 1.0,
                    rows: int = 0, compute: torch.dtype | None = None) -> Tensor:
    """E_pi Q_j(s, .) = sum_a pi(a|s) Q_j(s, a) over the whole vocabulary, with pi = softmax(h @ weight.T / temperature)
    and Q_j(s, a) = q_weight[j, a] . h(s) + q_bias[j, a]; carries no gradient.

    hidden [N, H], weight [V, H], q_weight [k, V, H], q_bias [k, V] -> [k, N] in the type of `q_weight`. Logits are
    multiplied in `compute` (default: the type of `weight`), so that pi is the one of `chosen_logprobs`; action values
    in their own type, as in `chosen_action_values`, so that Q - E_pi Q is not the rounding of one of them.

    The average is taken of the rows of `q_weight` before they meet the state, (pi @ q_weight[j]) . h + pi . q_bias[j]:
    as many operations, and the [rows, V] action values never exist. Peak memory is one chunk of logits and its softmax,
    2 [rows, V] arrays, and [rows, H], whatever k.
    """
    rows = rows or chunk_rows(len(weight), weight.device)
    exact = torch.promote_types(weight.dtype, torch.float32)
    matrix = weight.to(compute or weight.dtype)
    expected = torch.empty(len(q_weight), len(hidden), dtype=q_weight.dtype, device=hidden.device)
    p = torch.empty(0)
    for start in range(0, len(hidden), rows):
        part = slice(start, start + rows)
        del p  # before the next chunk exists
        p = _log_softmax(hidden[part], matrix, temperature, exact).exp_().to(q_weight.dtype)
        state = hidden[part].to(q_weight.dtype)
        for j, (W, b) in enumerate(zip(q_weight, q_bias)):
            expected[j, part] = torch.linalg.vecdot(p @ W, state) + p @ b
    return expected


class _ChosenLogProbs(torch.autograd.Function):
    """With z the logits of a row over the temperature, l = z - logsumexp(z), p = exp(l), q the reference's
    probabilities, d = l - log q, H = -sum(p l), K = sum(p d), c chosen:

    d l_c / d z_j = [j = c] - p_j, d H / d z_j = -p_j (l_j + H) and d K / d z_j = p_j (d_j - K).
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, chosen: Tensor, temperature: float, rows: int, entropy: bool,
                compute: torch.dtype, ref_hidden: Tensor | None, ref_weight: Tensor | None,
                ref_compute: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
        exact = torch.promote_types(weight.dtype, torch.float32)
        N = len(hidden)
        logprobs, entropies, kl = (torch.empty(n, dtype=exact, device=hidden.device) for n in (
            N, N if entropy else 0, N if ref_hidden is not None else 0))
        matrix, ref_matrix = weight.to(compute), None if ref_weight is None else ref_weight.to(ref_compute)
        log_p = log_ratio = torch.empty(0)
        for start in range(0, N, rows):
            part = slice(start, start + rows)
            del log_p, log_ratio  # before the next chunk exists
            log_p, log_ratio = _log_softmax(hidden[part], matrix, temperature, exact), torch.empty(0)
            logprobs[part] = log_p.gather(1, chosen[part, None])[:, 0].clamp_max_(0.0)
            if entropy:
                entropies[part] = -torch.linalg.vecdot(log_p.exp(), log_p)
            if ref_hidden is not None and ref_matrix is not None:
                log_ratio = _log_ratio(log_p, ref_hidden[part], ref_matrix, temperature)
                kl[part] = torch.linalg.vecdot(log_p.exp(), log_ratio)
        ctx.save_for_backward(  # the last chunk is kept, so one never recurs
            hidden, weight, chosen, entropies, kl, log_p, log_ratio, ref_hidden, ref_weight)
        ctx.temperature, ctx.rows, ctx.compute, ctx.ref_compute = temperature, rows, compute, ref_compute
        ctx.set_materialize_grads(False)
        return logprobs, entropies, kl

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, chosen, entropies, kl, kept, kept_ratio, ref_hidden, ref_weight = ctx.saved_tensors
        by_logprob, by_entropy, by_kl = (None if g is None else g[:, None] for g in grads)
        exact, N = torch.promote_types(weight.dtype, torch.float32), len(hidden)
        matrix, ref_matrix = weight.to(ctx.compute), ref_weight if by_kl is None else ref_weight.to(ctx.ref_compute)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for start in range(0, N, ctx.rows):
            part = slice(start, start + ctx.rows)
            last = start + ctx.rows >= N
            log_p = kept if last else _log_softmax(hidden[part], matrix, ctx.temperature, exact)
            slopes = []
            if by_entropy is not None:
                slopes.append((log_p + entropies[part, None]).mul_(-by_entropy[part]))
            if by_kl is not None:
                log_ratio = kept_ratio.clone() if last else _log_ratio(
                    log_p, ref_hidden[part], ref_matrix, ctx.temperature)
                slopes.append(log_ratio.sub_(kl[part, None]).mul_(by_kl[part]))
                del log_ratio
            d_logits = _logit_gradient(log_p, chosen[part], None if by_logprob is None else by_logprob[part], slopes)
            del log_p, slopes
            d_logits = d_logits.div_(ctx.temperature).to(ctx.compute)
            if d_hidden is not None:
                d_hidden[part] = d_logits @ matrix
            if d_weight is not None:
                _add_outer(d_weight, d_logits, hidden[part].to(ctx.compute))
        return d_hidden, d_weight, *[None] * 8


def _log_softmax(hidden: Tensor, matrix: Tensor, temperature: float, exact: torch.dtype) -> Tensor:
    """[C, H] -> log p [C, V]. Only the logits and the result are alive together."""
    logits = (hidden.to(matrix.dtype) @ matrix.t()).to(exact)
    return torch.log_softmax(logits.div_(temperature) if temperature != 1.0 else logits, dim=-1)


def _log_ratio(log_p: Tensor, ref_hidden: Tensor, ref_matrix: Tensor, temperature: float) -> Tensor:
    """[C, V], [C, H] -> log p - log q [C, V], in the type of `log_p`, which is left as it is."""
    return _log_softmax(ref_hidden, ref_matrix, temperature, log_p.dtype).neg_().add_(log_p)


def _logit_gradient(log_p: Tensor, chosen: Tensor, by_logprob: Tensor | None, slopes: Sequence[Tensor]) -> Tensor:
    """[C, V] gradient of the logits from that of the log-prob [C, 1] and from `slopes` [C, V], of which p is left out
    and which are used up; `log_p` is left as it is."""
    p = log_p.exp()
    factor = None if by_logprob is None else -by_logprob
    for slope in slopes:
        factor = slope if factor is None else slope.add_(factor)
    gradient = p.zero_() if factor is None else p.mul_(factor)
    return gradient if by_logprob is None else gradient.scatter_add_(1, chosen[:, None], by_logprob)


def _add_outer(total: Tensor, d_logits: Tensor, hidden: Tensor) -> None:
    """total[V, H] += d_logits.T @ hidden, in the type of `total`."""
    if d_logits.dtype == total.dtype:
        total.addmm_(d_logits.t(), hidden)
    else:
        total.add_(d_logits.t() @ hidden)
