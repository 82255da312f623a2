"""What this package offers, as data: listing it imports neither the components nor a framework."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from posttrain.hookspecs import Component, hookimpl

_POLICY_GRADIENT = "posttrain_objectives.policy_gradient:PolicyGradient"
_SCHEDULED = "posttrain_objectives.kl_schedules:ScheduledKL"
_CONSTRAINTS = "posttrain_objectives.constraints"
_SUM = "posttrain_objectives.combiners:WeightedSum"
_SCALARIZATION = "posttrain_objectives.combiners:Scalarization"
_GRADIENTS = "posttrain_objectives.gradients"
_PID = "velocity form with anti-windup: Astrom and Hagglund 1995, PID Controllers"


@hookimpl
def components() -> Iterable[Component]:
    """Objectives, KL control, constraints, and what mixes several rewards."""
    return (*_policy_gradients(), *_other_objectives(), *_kls(), *_constraints(), *_combiners(), *_gradient_combiners())


@hookimpl
def commands(app: Any) -> None:
    """`posttrain pareto`."""
    from posttrain_objectives.command import pareto

    app.command("pareto")(pareto)


def _policy_gradients() -> Iterable[Component]:
    return (
        Component("objective", "ppo", _POLICY_GRADIENT, "clipped token ratios, mean over actions",
                  source="Schulman et al. 2017, arXiv 1707.06347, section 3"),
        Component("objective", "ppo_dual_clip", _POLICY_GRADIENT, "PPO, the loss of a negative advantage bounded, too",
                  defaults={"dual_clip": 3.0}, source="Ye et al. 2019, arXiv 1912.09729"),
        Component("objective", "decoupled_ppo", _POLICY_GRADIENT, "PPO, actions weighed by a capped pi_old / mu",
                  defaults={"behavior_cap": 2.0}, source="Hilton et al. 2021, arXiv 2110.00641, section 3"),
        Component("objective", "grpo", _POLICY_GRADIENT, "PPO's clip, mean over episodes of their means",
                  defaults={"denominator": "sequence_mean"}, source="Shao et al. 2024, arXiv 2402.03300, section 4.1"),
        Component("objective", "dapo", _POLICY_GRADIENT, "PPO with a higher upper clip, mean over actions",
                  defaults={"clip_high": 0.28}, source="Yu et al. 2025, arXiv 2503.14476, section 3"),
        Component("objective", "dr_grpo", _POLICY_GRADIENT, "PPO's clip, sum over episodes by a constant length",
                  defaults={"denominator": "constant"}, source="Liu et al. 2025, arXiv 2503.20783, section 3"),
        Component("objective", "gspo", _POLICY_GRADIENT, "one clipped ratio per episode, mean over episodes",
                  defaults={"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "denominator": "sequence_mean"},
                  source="Zheng et al. 2025, arXiv 2507.18071, token form"),
        Component("objective", "cispo", _POLICY_GRADIENT, "-A log pi weighed by a capped ratio, mean over actions",
                  defaults={"surrogate": "cispo"}, source="MiniMax 2025, arXiv 2506.13585, section 3.1"),
        Component("objective", "sapo", _POLICY_GRADIENT, "a soft gate in place of the clip, mean over episodes",
                  defaults={"surrogate": "sapo", "denominator": "sequence_mean"},
                  source="Gao et al. 2025, arXiv 2511.20347"),
        Component("objective", "reinforce", _POLICY_GRADIENT, "plain policy gradient, -A log pi, mean over actions",
                  defaults={"surrogate": "reinforce"}, source="Williams 1992, Machine Learning 8"),
    )


def _other_objectives() -> Iterable[Component]:
    return (
        Component("objective", "sft", "posttrain_objectives.likelihood:SFT",
                  "negative log-likelihood of given answers"),
        Component("objective", "dpo", "posttrain_objectives.preference:DPO",
                  "preferred answers against rejected ones, relative to a reference",
                  source="Rafailov et al. 2023, arXiv 2305.18290, equation 7"),
        Component("objective", "bradley_terry", "posttrain_objectives.preference:BradleyTerry",
                  "a reward model from preferred and rejected answers",
                  source="Bradley and Terry 1952, Biometrika 39; Ouyang et al. 2022, arXiv 2203.02155, equation 1"),
        Component("objective", "value", "posttrain_objectives.value:Value", "squared error of a critic, optional clip",
                  source="Schulman et al. 2017, arXiv 1707.06347, section 6"),
        Component("objective", "action_value", "posttrain_objectives.value:ActionValue",
                  "squared error of a critic's action values", source="Wang et al. 2017, arXiv 1611.01224"),
        Component("objective", "entropy", "posttrain_objectives.entropy:Entropy", "entropy bonus",
                  source="Williams and Peng 1991, Connection Science 3"),
    )


def _kls() -> Iterable[Component]:
    return (
        Component("kl", "fixed", "posttrain_objectives.kl:FixedKL", "constant coefficient",
                  source="estimators: Schulman 2020, Approximating KL divergence"),
        Component("kl", "linear", _SCHEDULED, "coefficient on a straight line over rollouts"),
        Component("kl", "cosine", _SCHEDULED, "coefficient on half a cosine over rollouts",
                  defaults={"shape": "cosine"}, source="Loshchilov and Hutter 2017, arXiv 1608.03983, equation 5"),
        Component("kl", "adaptive", "posttrain_objectives.kl:AdaptiveKL", "coefficient that holds the KL at a target",
                  source="Ziegler et al. 2019, arXiv 1909.08593, section 2.2"),
        Component("kl", "pi", "posttrain_objectives.kl:PIDKL", "PI control of the log-coefficient, at a target",
                  defaults={"kd": 0.0}, source=_PID),
        Component("kl", "pid", "posttrain_objectives.kl:PIDKL", "PID control of the log-coefficient, at a target",
                  source=_PID),
        Component("kl", "band", "posttrain_objectives.kl:BandKL",
                  "coefficient that moves only while the KL is out of a band",
                  source="Schulman et al. 2017, arXiv 1707.06347, section 4"),
        Component("kl", "dual", "posttrain_objectives.kl:DualKL", "multiplier of the constraint KL <= target",
                  source="dual ascent on the logarithm: Peters et al. 2010, Relative Entropy Policy Search"),
        Component("kl", "entropy", "posttrain_objectives.kl:EntropyKL", "KL only while the policy's entropy is low",
                  source="He et al. 2025, arXiv 2505.22312"),
        Component("kl", "constrained", "posttrain_objectives.kl:ConstrainedKL",
                  "a cost that a constraint keeps below a limit",
                  source="mixed as the costs of Stooke et al. 2020, arXiv 2007.03964"),
    )


def _constraints() -> Iterable[Component]:
    return (
        Component("constraint", "lagrangian", f"{_CONSTRAINTS}:Lagrangian", "dual ascent on each multiplier",
                  source="Arrow, Hurwicz and Uzawa 1958"),
        Component("constraint", "log_lagrangian", f"{_CONSTRAINTS}:LogLagrangian", "dual ascent on log multipliers",
                  source="Dai et al. 2023, arXiv 2310.12773"),
        Component("constraint", "pid_lagrangian", f"{_CONSTRAINTS}:PIDLagrangian",
                  "multipliers by a PID controller, which come to rest",
                  source="Stooke et al. 2020, arXiv 2007.03964, algorithm 2"),
        Component("constraint", "augmented_lagrangian", f"{_CONSTRAINTS}:AugmentedLagrangian",
                  "multipliers and a penalty of the violation", source="Rockafellar 1973, JOTA 12"),
        Component("constraint", "crpo", f"{_CONSTRAINTS}:CRPO", "steps against broken limits alone, or for the reward",
                  source="Xu et al. 2021, arXiv 2011.05869, algorithm 1"),
        Component("constraint", "p3o", f"{_CONSTRAINTS}:P3O", "exact penalty: constant weight while a limit is broken",
                  source="Zhang et al. 2022, arXiv 2205.11814"),
    )


def _combiners() -> Iterable[Component]:
    return (
        Component("combiner", "sum", _SUM, "weighted sum of advantages"),
        Component("combiner", "normalised_sum", _SUM, "weighted sum of advantages of equal size",
                  defaults={"scale": "column"}),
        Component("combiner", "mo_grpo", _SUM, "sum of columns that estimator grpo normalised by group",
                  source="Ichihara et al. 2025, arXiv 2509.22047"),
        Component("combiner", "gdpo", _SUM, "that sum, then standardised over the batch", defaults={"whiten": True},
                  source="Liu et al. 2026, arXiv 2601.05242"),
        Component("combiner", "tchebycheff", _SCALARIZATION, "all weight on the reward that lags most",
                  defaults={"form": "tchebycheff"}, source="Bowman 1976"),
        Component("combiner", "smooth_tchebycheff", _SCALARIZATION, "more weight on rewards that lag",
                  source="Lin et al. 2024, arXiv 2402.19078, equation 6"),
        Component("combiner", "achievement", _SCALARIZATION, "weight on the reward that is furthest from its aim",
                  defaults={"form": "achievement"}, source="Wierzbicki 1980"),
    )


def _gradient_combiners() -> Iterable[Component]:
    return (
        Component("gradient_combiner", "upgrad", f"{_GRADIENTS}:UPGrad", "mean of gradients that object to none",
                  source="Quinton and Rey 2024, arXiv 2406.16232"),
        Component("gradient_combiner", "dual_proj", f"{_GRADIENTS}:DualProjection",
                  "mean gradient, turned until it objects to none",
                  source="Lopez-Paz and Ranzato 2017, arXiv 1706.08840"),
        Component("gradient_combiner", "mgda", f"{_GRADIENTS}:MGDA", "shortest vector of the gradients' convex hull",
                  source="Sener and Koltun 2018, arXiv 1810.04650"),
        Component("gradient_combiner", "pcgrad", f"{_GRADIENTS}:PCGrad", "conflicting components are taken off",
                  source="Yu et al. 2020, arXiv 2001.06782"),
        Component("gradient_combiner", "cagrad", f"{_GRADIENTS}:CAGrad", "best for the worst off, near their mean",
                  source="Liu et al. 2021, arXiv 2110.14048"),
        Component("gradient_combiner", "imtl_g", f"{_GRADIENTS}:IMTLG", "equal projections on all gradients",
                  source="Liu et al. 2021, ICLR"),
        Component("gradient_combiner", "nash_mtl", f"{_GRADIENTS}:NashMTL", "Nash's bargaining solution",
                  source="Navon et al. 2022, arXiv 2202.01017"),
        Component("gradient_combiner", "mean", f"{_GRADIENTS}:MeanGradient", "mean of the gradients"),
    )
