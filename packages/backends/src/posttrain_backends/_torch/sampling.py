"""From logits to tokens: the sampler's processing, and drawing by the inverse distribution function.

Order as in transformers: temperature, top-k, top-p, min-p, each on what the one before left. Every one of the three
keeps the tokens whose score reaches a threshold, so tokens equal to the last one kept are kept too and at least one
token always stays; what is kept is renormalised. Knows nothing about models, prompts or episodes.

Sources: top-k Fan et al. 2018 (1805.04833), top-p Holtzman et al. 2020 (1904.09751, sec. 3.1), min-p Nguyen et al. 2024
(2407.01082, eq. 3).
"""

from __future__ import annotations

import math

import torch
from posttrain.data import Sampling
from torch import Tensor

_CELLS = {"cpu": 1 << 18}
"""Entries of [B, V] handled at once: what stays in a CPU's cache; elsewhere `_MANY_CELLS`."""
_MANY_CELLS = 1 << 28
_FIRST_WIDTH = 64
"""Tokens first tried as the nucleus."""
_UNIT = 2.0**52
"""Probability 1 as an integer. Sums of V probabilities stay exact in int64, and their total exact in float64."""


def sample(logits: Tensor, sampling: Sampling, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [B] int64 drawn from logits [B, V] by uniforms [B], and their log-probs [B] after the processing.

    Greedy (temperature 0) records log-prob 0: its distribution has one token. Where the logits are NaN, so is the
    log-prob, and the token is a valid but meaningless id.
    """
    if sampling.temperature == 0:
        best, tokens = logits.max(dim=-1)
        return tokens, (best - best).float()
    rows = max(1, _CELLS.get(logits.device.type, _MANY_CELLS) // logits.shape[1])
    if rows >= len(logits):
        return _sample_rows(logits, sampling, uniforms)
    parts = [_sample_rows(z, sampling, u)
             for z, u in zip(torch.split(logits, rows), torch.split(uniforms, rows), strict=True)]
    return torch.cat([tokens for tokens, _ in parts]), torch.cat([logprobs for _, logprobs in parts])


def _sample_rows(logits: Tensor, sampling: Sampling, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    logprobs = process(logits, sampling)
    tokens = draw(logprobs, uniforms)
    return tokens, logprobs.gather(-1, tokens[:, None]).squeeze(-1)


def process(logits: Tensor, sampling: Sampling) -> Tensor:
    """Log-probs [B, V] of the sampler's distribution, -inf where a token is truncated; float32, or float64 as given.

    Temperature 0 is the limit: all mass on the first of the largest logits.

    >>> process(torch.tensor([[2.0, 1.0, 0.0]]), Sampling(top_k=2)).exp()
    tensor([[0.7311, 0.2689, 0.0000]])
    """
    scores = logits if logits.dtype == torch.float64 else logits.float()
    if sampling.temperature == 0:
        return torch.full_like(scores, -math.inf).scatter_(-1, scores.argmax(dim=-1, keepdim=True), 0.0)
    if sampling.temperature != 1:
        scores = scores / sampling.temperature
    if 0 < sampling.top_k < scores.shape[1]:
        scores = _keep(scores, scores.topk(sampling.top_k).values[:, -1:])
    if sampling.top_p < 1:
        scores = _keep(scores, _nucleus_threshold(scores, sampling.top_p))
    if sampling.min_p > 0:
        scores = _keep(scores, scores.amax(dim=-1, keepdim=True) + math.log(sampling.min_p))
    return scores.log_softmax(dim=-1)


def _keep(scores: Tensor, threshold: Tensor) -> Tensor:
    return scores.masked_fill(scores < threshold, -math.inf)


def _nucleus_threshold(scores: Tensor, top_p: float) -> Tensor:
    """[B, 1] the score of the token with which the most probable tokens first hold the mass `top_p`.

    Looks at the few largest scores, and at more only where those do not hold the mass: no sort of the vocabulary.
    """
    V = scores.shape[1]
    width, normaliser = min(_FIRST_WIDTH, V), scores.logsumexp(dim=-1, keepdim=True)
    while True:
        largest = scores.topk(width).values
        mass = (largest - normaliser).exp().cumsum(dim=-1, dtype=torch.float64)
        if width == V or bool((mass[:, -1] >= top_p).all()):
            break
        width = min(8 * width, V)
    last = (mass < top_p).sum(dim=-1, keepdim=True)
    return largest.gather(-1, last.clamp_(max=width - 1))


def draw(logprobs: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens [B] from log-probs [B, V]: the first token at which the distribution function exceeds u [B], float64.

    The distribution function is summed in integers of 2^-52. Such sums are exact, so a parallel scan gives what a
    serial one gives, and a token of probability 0 adds exactly nothing: it is never drawn, not even at u = 1.

    >>> draw(torch.tensor([[0.25, 0.0, 0.75]]).log().expand(3, 3), torch.tensor([0.2, 0.3, 1.0], dtype=torch.float64))
    tensor([0, 2, 2])
    """
    cdf = logprobs.exp().mul_(_UNIT).long().cumsum_(dim=-1)
    total = cdf[:, -1:]
    target = torch.minimum((uniforms[:, None] * total).long(), total - 1)
    return torch.searchsorted(cdf, target, right=True).squeeze(-1).clamp_(max=logprobs.shape[1] - 1)
