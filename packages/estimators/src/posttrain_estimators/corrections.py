"""Correction of a batch for having been drawn by the sampler and not by the policy: weights, rejection, diagnostics.

Knows the two log-probs of each action; no reward, no advantage and no loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, final

import numpy as np
from posttrain.data import Array, Episodes, Metric, Metrics, to_numpy
from posttrain.ops import ops_of
from posttrain.protocols import Corrected, Need

from posttrain_estimators.fields import check_choice
from posttrain_estimators.importance import Unit, log_ratios, unit_needs

Scope = Literal["none", "token", "turn", "sequence"]
"""What has one ratio, each action, all actions of a turn or all of an episode; `none` switches the treatment off."""


@final
@dataclass(frozen=True, slots=True)
class ImportanceCorrection:
    """w = min(rho, C) for actions with low <= rho_bar <= high, the others are rejected; rho = pi_old / mu.

    Weights and rejection are independent. The rho of a turn or a sequence that weights is the product over its
    actions; the rho_bar that rejects is their geometric mean, exp(mean log rho), which does not grow with length.

    - Truncated importance sampling: `weight` token, cap 2 (Yao et al. 2025, "Your Efficient RL Framework Secretly
      Brings You Off-Policy RL Training"); with `weight: sequence` unbiased before the cap, and of high variance.
    - IcePop: `weight` token without a cap, `reject` token in 0.5 .. 5 (Ring-1T, arXiv 2510.18855).
    - Geometric mask: `weight` none, `reject` sequence in 0.99 .. 1.01 (Liu, Li et al. 2025, "When Speed Kills
      Stability").

    A rejected action has weight 1 and `keep` false: it leaves the counts that a loss divides by, which a weight of 0
    would not do. All bounds are of pi/mu, not of its inverse. With `none` and `none` it only measures.

    Metrics are over all actions unless said: `correction/rho_mean` and `correction/rho_max`, rho as it weights, before
    the cap (per action where `weight` is none); `correction/clipped`, fraction of actions that stay and whose weight
    the cap cut; `correction/rejected`, fraction of actions; `correction/rejected_episodes`, fraction of episodes that
    have no action left; `correction/ess`, (sum w)^2 / (n sum w^2) over the n actions that stay; `correction/k1` and
    `correction/k3`, the means of -d and exp(d) - 1 - d with d = log pi_old - log mu, both estimates of
    KL(mu || pi_old) per action. Log-ratios of units are clamped to +-20 throughout.

    Raises `ValueError` on construction where fields do not fit each other, and on a batch without the log-probs or the
    turns that it needs.

    >>> episodes = Episodes.from_rows([[0.0, 0.0, 0.0]], logprobs=[[-1.0, -1.0, -3.0]],
    ...                               behavior_logprobs=[[-1.0, -3.0, -1.0]])
    >>> corrected = ImportanceCorrection(reject="token", low=0.5)(episodes)
    >>> corrected.weight, corrected.keep
    (array([1., 2., 1.]), array([ True,  True, False]))
    """

    weight: Scope = "token"
    """What is weighted by one ratio: each action, or all actions of a turn or a sequence by the product of theirs;
    `none` leaves all weights at 1."""
    cap: float = 2.0
    """C, ceiling of the ratio that weights, at least 1; `.inf` is none. Not read where `weight` is none."""
    self_normalise: bool = False
    """Divide the weights by their mean over the actions of the batch that stay; after the cap, so a weight may be above
    it."""
    reject: Scope = "none"
    """What is rejected by one ratio: each action, or all actions of a turn or a sequence by their geometric mean."""
    low: float = 0.0
    """Least ratio pi/mu that is not rejected, in [0, 1]; 0 is no bound."""
    high: float = math.inf
    """Largest ratio pi/mu that is not rejected, at least 1; `.inf` is no bound."""

    def __post_init__(self) -> None:
        for name in ("weight", "reject"):
            check_choice(name, getattr(self, name), Scope.__args__)  # type: ignore[attr-defined]  # a Literal has them
        if not self.cap >= 1.0:
            raise ValueError(f"cap must be at least 1, the weight where pi equals mu, or .inf for none; got {self.cap}")
        if self.self_normalise and self.weight == "none":
            raise ValueError("self_normalise divides weights by their mean and weight is 'none'; leave it out, or "
                             "choose weight 'token', 'turn' or 'sequence'")
        if not 0.0 <= self.low <= 1.0 <= self.high:
            raise ValueError("low and high must enclose 1, the ratio where pi equals mu: 0 <= low <= 1 <= high; got "
                             f"{self.low} and {self.high}")
        bounded = (self.low, self.high) != (0.0, math.inf)
        if bounded and self.reject == "none":
            raise ValueError(f"low {self.low} and high {self.high} bound what is rejected and reject is 'none'; leave "
                             "them out, or choose reject 'token', 'turn' or 'sequence'")
        if not bounded and self.reject != "none":
            raise ValueError(f"reject {self.reject!r} rejects nothing between low 0 and high .inf; set low (0.5), high "
                             "(5), or both")

    @property
    def needs(self) -> frozenset[Need]:
        """Both log-probs, and turns where they are weighted or rejected."""
        return unit_needs(_unit(self.weight)) | unit_needs(_unit(self.reject))

    @property
    def corrects_for_sampler(self) -> bool:
        """Rejection alone leaves the weights at 1; see `posttrain.protocols.OffPolicy`."""
        return self.weight != "none"

    def __call__(self, episodes: Episodes, /) -> Corrected:
        """[N] weights and `keep`."""
        d = log_ratios(episodes, "token", "sum")
        xp = ops_of(d).xp
        rho = xp.exp(log_ratios(episodes, _unit(self.weight), "sum"))
        rho_bar = xp.exp(log_ratios(episodes, _unit(self.reject), "mean"))
        keep = (rho_bar >= self.low) & (rho_bar <= self.high)
        weighted = keep & (self.weight != "none")
        w = xp.where(weighted, xp.clip(rho, 0.0, self.cap), 1.0)
        if self.self_normalise:
            w = _over_mean(w, keep)
        cut = weighted & (rho > self.cap)
        return Corrected(w, keep, _diagnostics(
            episodes, *(to_numpy(column) for column in (w, keep, cut)),
            *(to_numpy(column).astype(np.float64) for column in (rho, d))))


def _unit(scope: Scope) -> Unit:
    """What ratios are taken of; those of actions where nothing is done with them but measuring."""
    return "token" if scope == "none" else scope


def _over_mean(w: Array, keep: Array) -> Array:
    """[N] the kept weights over their mean, 1 for the others."""
    xp = ops_of(w).xp
    kept = int(xp.sum(keep))
    return xp.where(keep, w / (xp.sum(xp.where(keep, w, 0.0)) / kept), 1.0) if kept else xp.ones_like(w)


def _diagnostics(episodes: Episodes, w: np.ndarray, keep: np.ndarray, cut: np.ndarray, rho: np.ndarray,
                 d: np.ndarray) -> Metrics:
    """What `ImportanceCorrection` says of a batch; all but `ess` add up over parts."""
    N, E = len(d), episodes.n_episodes
    stays = np.bincount(episodes.episode, keep, E) > 0
    def mean(total: float, of: int = N) -> Metric:
        return Metric(float(total), float(of))
    return Metrics(
        rho_mean=mean(rho.sum()), rho_max=Metric(float(rho.max(initial=0.0)), reduction="max"),
        clipped=mean(cut.sum()), rejected=mean(N - keep.sum()), rejected_episodes=mean(E - stays.sum(), E),
        k1=mean(-d.sum()), k3=mean((np.expm1(d) - d).sum()), **_effective_sample_size(w[keep].astype(np.float64)),
    ).prefixed("correction")


def _effective_sample_size(w: np.ndarray) -> dict[str, Metric]:
    """(sum w)^2 / (n sum w^2), in [1/n, 1]: the fraction of n samples that weighs alike; nothing where there is none
    (Kish 1965, Survey Sampling)."""
    if len(w) == 0:
        return {}
    return {"ess": Metric(float(w.sum() ** 2 / (len(w) * np.square(w).sum())), reduction="last")}
