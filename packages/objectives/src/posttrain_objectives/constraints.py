"""Methods that keep costs under limits by multipliers: max J_R subject to J_Ci <= d_i.

Each turns the violations of one rollout into the weights lambda_i of the costs' advantages; core mixes them as
(w A_R - sum_i lambda_i A_Ci) / (w + sum_i lambda_i), with w the state's `reward_weight`. Here
v = (J_C - d) / |d|, the violation relative to the limit (`multipliers.py` says why, and holds the state). Rules that
remember v count it within [-1, 1]. A cost that is absent from a rollout, or no finite number, leaves all that is
remembered of it as it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import final

from posttrain_objectives.choices import require_positive
from posttrain_objectives.multipliers import (
    Memory,
    Multipliers,
    bounded,
    require_not_negative,
    started,
    stepped,
    violations,
)


@final
@dataclass(frozen=True, slots=True)
class Lagrangian:
    """Dual ascent: lambda <- [lambda + eta v]+ (Arrow, Hurwicz and Uzawa 1958).

    A pure integrator: lambda and the cost circle around the optimum, and only their averages reach it. `pid_lagrangian`
    is this with damping.

    >>> rule = Lagrangian(eta=0.1)
    >>> state = rule.update(rule.init({"length": 40.0}), {"length": 60.0})
    >>> round(state.multipliers["length"], 6), state.status["length"]
    (0.05, 'converging')
    """

    eta: float = 0.05
    """Step of lambda per rollout, for a cost of twice its limit or more."""
    lambda_max: float = 10.0
    """Cap of lambda. At 10 the reward has an eleventh of the step; a constraint that stays broken there is reported as
    infeasible."""
    scale: Mapping[str, float] = field(default_factory=dict)
    """Unit of a cost's violation; its limit's size where none is given. Needed for a limit of 0."""

    def __post_init__(self) -> None:
        require_positive(eta=self.eta, lambda_max=self.lambda_max)

    def init(self, limits: Mapping[str, float]) -> Multipliers:
        return started(limits, self.scale)

    def update(self, state: Multipliers, costs: Mapping[str, float]) -> Multipliers:
        return stepped(state, violations(state, costs), self._rule, self.lambda_max)

    def _rule(self, v: float, memory: Memory) -> tuple[float, Memory]:
        lam = min(max(memory.get("lambda", 0.0) + self.eta * bounded(v), 0.0), self.lambda_max)
        return lam, {"lambda": lam}


@final
@dataclass(frozen=True, slots=True)
class LogLagrangian:
    """Dual ascent on log lambda: lambda <- lambda e^(eta v), within [lambda_min, lambda_max].

    Exponentiated gradient (Kivinen and Warmuth 1997); Safe-RLHF (Dai et al. 2023, arXiv 2310.12773) also updates
    log lambda. It finds the order of magnitude of lambda quickly, and cannot reach 0.
    """

    eta: float = 0.1
    """Step of log lambda per rollout, for a cost of twice its limit or more."""
    lambda_init: float = 0.1
    """lambda before the first rollout."""
    lambda_min: float = 0.01
    """Least lambda: what an inactive constraint keeps."""
    lambda_max: float = 10.0
    """Cap of lambda; a constraint that stays broken there is reported as infeasible."""
    scale: Mapping[str, float] = field(default_factory=dict)
    """Unit of a cost's violation; its limit's size where none is given. Needed for a limit of 0."""

    def __post_init__(self) -> None:
        require_positive(eta=self.eta, lambda_min=self.lambda_min, lambda_max=self.lambda_max)
        if not self.lambda_min <= self.lambda_init <= self.lambda_max:
            raise ValueError(f"lambda_init must lie in [lambda_min, lambda_max], got {self.lambda_init} in "
                             f"[{self.lambda_min}, {self.lambda_max}]")

    def init(self, limits: Mapping[str, float]) -> Multipliers:
        return started(limits, self.scale, self.lambda_init)

    def update(self, state: Multipliers, costs: Mapping[str, float]) -> Multipliers:
        return stepped(state, violations(state, costs), self._rule, self.lambda_max)

    def _rule(self, v: float, memory: Memory) -> tuple[float, Memory]:
        log_min, log_max = math.log(self.lambda_min), math.log(self.lambda_max)
        u = memory.get("log_lambda", math.log(self.lambda_init)) + self.eta * bounded(v)
        u = min(max(u, log_min), log_max)
        return math.exp(u), {"log_lambda": u}


@final
@dataclass(frozen=True, slots=True)
class PIDLagrangian:
    """lambda = [K_P v + I + K_D D]+ with I <- [I + K_I v]+ (Stooke et al. 2020, arXiv 2007.03964, algorithm 2).

    D is the rise of the cost since the last rollout, 0 where it falls; P and D read a running mean, I the measurement
    itself. The proportional term damps the circles of dual ascent, so the last iterate reaches the optimum. I is kept
    within [0, lambda_max], so it does not wind up behind the cap. With kp = kd = 0 it is `lagrangian`.
    """

    kp: float = 2.0
    """K_P: lambda for a cost of twice its limit or more, at once."""
    ki: float = 0.1
    """K_I: step of I per rollout, for a cost of twice its limit or more."""
    kd: float = 0.5
    """K_D: lambda for a cost that rises by its limit's size in one rollout."""
    ema: float = 0.5
    """Decay of the running mean that P and D read, in [0, 1)."""
    lambda_max: float = 10.0
    """Cap of lambda and of I; a constraint that stays broken there is reported as infeasible."""
    scale: Mapping[str, float] = field(default_factory=dict)
    """Unit of a cost's violation; its limit's size where none is given. Needed for a limit of 0."""

    def __post_init__(self) -> None:
        require_positive(ki=self.ki, lambda_max=self.lambda_max)
        require_not_negative(self, "kp", "kd")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must lie in [0, 1), got {self.ema}")

    def init(self, limits: Mapping[str, float]) -> Multipliers:
        return started(limits, self.scale)

    def update(self, state: Multipliers, costs: Mapping[str, float]) -> Multipliers:
        return stepped(state, violations(state, costs), self._rule, self.lambda_max)

    def _rule(self, v: float, memory: Memory) -> tuple[float, Memory]:
        v = bounded(v)
        before = memory.get("mean", v)
        mean = self.ema * before + (1 - self.ema) * v
        integral = min(max(memory.get("integral", 0.0) + self.ki * v, 0.0), self.lambda_max)
        lam = max(self.kp * mean + integral + self.kd * max(mean - before, 0.0), 0.0)
        return lam, {"mean": mean, "integral": integral}


@final
@dataclass(frozen=True, slots=True)
class AugmentedLagrangian:
    """mu = [lambda + rho v]+ weighs the cost; every M rollouts lambda <- [lambda + rho v]+ (Hestenes 1969, Powell 1969;
    Rockafellar 1973 for inequalities).

    The penalty rho v damps as the proportional term of `pid_lagrangian` does, and lambda moves when the policy had M
    rollouts to answer: by their mean v, since the last alone is noise.
    """

    rho: float = 2.0
    """Weight of the penalty: mu for a cost of twice its limit or more, at once."""
    every: int = 10
    """M, rollouts between two steps of lambda."""
    growth: float = 1.0
    """Factor of rho at such a step where the limit is still broken; 1 keeps rho."""
    rho_max: float = 10.0
    """Largest rho."""
    lambda_max: float = 10.0
    """Cap of lambda and mu; a constraint that stays broken there is reported as infeasible."""
    scale: Mapping[str, float] = field(default_factory=dict)
    """Unit of a cost's violation; its limit's size where none is given. Needed for a limit of 0."""

    def __post_init__(self) -> None:
        require_positive(rho=self.rho, rho_max=self.rho_max, lambda_max=self.lambda_max)
        if self.every < 1:
            raise ValueError(f"every must be at least 1, got {self.every}")
        if not 1 <= self.growth < math.inf:
            raise ValueError(f"growth must be finite and at least 1, got {self.growth}")
        if self.rho > self.rho_max:
            raise ValueError(f"rho must be at most rho_max, got {self.rho} > {self.rho_max}")

    def init(self, limits: Mapping[str, float]) -> Multipliers:
        return started(limits, self.scale)

    def update(self, state: Multipliers, costs: Mapping[str, float]) -> Multipliers:
        return stepped(state, violations(state, costs), self._rule, self.lambda_max)

    def _rule(self, v: float, memory: Memory) -> tuple[float, Memory]:
        v = bounded(v)
        lam, rho = memory.get("lambda", 0.0), memory.get("rho", self.rho)
        n, total = memory.get("n", 0.0) + 1, memory.get("sum", 0.0) + v
        mu = max(lam + rho * v, 0.0)
        if n < self.every:
            return mu, {"lambda": lam, "rho": rho, "n": n, "sum": total}
        lam = min(max(lam + rho * total / n, 0.0), self.lambda_max)
        return mu, {"lambda": lam, "rho": min(rho * self.growth, self.rho_max) if total > 0 else rho}


@final
@dataclass(frozen=True, slots=True)
class CRPO:
    """While a limit is broken the step is against its cost alone, otherwise along the reward alone (Xu et al. 2021,
    arXiv 2011.05869, algorithm 1).

    There is no dual variable: `reward_weight` is 0 while some v > tol, and 1 otherwise. Where several limits are
    broken the paper takes any one of them; here each has weight 1, the mean of all such choices. The cost hovers at its
    limit; averages keep it up to `tol` and the size of a step.
    """

    tol: float = 0.0
    """v up to which a limit counts as kept, by the status too. The paper's output is the average of the iterates within
    it."""
    scale: Mapping[str, float] = field(default_factory=dict)
    """Unit of a cost's violation; its limit's size where none is given. Needed for a limit of 0."""

    def __post_init__(self) -> None:
        require_not_negative(self, "tol")

    def init(self, limits: Mapping[str, float]) -> Multipliers:
        return started(limits, self.scale)

    def update(self, state: Multipliers, costs: Mapping[str, float]) -> Multipliers:
        after = stepped(state, violations(state, costs), self._rule, 1.0, self.tol)
        return replace(after, reward_weight=0.0 if any(after.multipliers.values()) else 1.0)

    def _rule(self, v: float, memory: Memory) -> tuple[float, Memory]:
        return float(v > self.tol), memory


@final
@dataclass(frozen=True, slots=True)
class P3O:
    """Exact penalty: the loss carries kappa max(0, J_C - d) (Zhang et al. 2022, arXiv 2205.11814, equation 12).

    The hinge's derivative is a constant of the step, read from the rollout: lambda is kappa where v > 0, else 0. The
    optimum is that of the constrained problem if kappa is larger than every optimal multiplier; otherwise the
    constraint stays broken, and is reported as infeasible.
    """

    kappa: float = 5.0
    """Weight of the penalty. Advantages are normalised, so optimal multipliers are of the order of 1."""
    scale: Mapping[str, float] = field(default_factory=dict)
    """Unit of a cost's violation; its limit's size where none is given. Needed for a limit of 0."""

    def __post_init__(self) -> None:
        require_positive(kappa=self.kappa)

    def init(self, limits: Mapping[str, float]) -> Multipliers:
        return started(limits, self.scale)

    def update(self, state: Multipliers, costs: Mapping[str, float]) -> Multipliers:
        return stepped(state, violations(state, costs), self._rule, self.kappa)

    def _rule(self, v: float, memory: Memory) -> tuple[float, Memory]:
        return self.kappa if v > 0 else 0.0, memory
