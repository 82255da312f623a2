"""The policy-gradient objective against literal oracles, finite differences, rlax, and the promises of the seam."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from objectives.cases import (
    FRAMEWORKS,
    Case,
    averaged,
    central_differences,
    evaluate,
    micro_batch,
    part_of,
    random_case,
    weighted,
    with_dummy,
)
from posttrain.data import Array, Counts, TokenOutputs
from posttrain.ops import ops_of
from posttrain.protocols import Need, Output
from posttrain_objectives.plugin import components
from posttrain_objectives.policy_gradient import PolicyGradient

BOUNDED = {
    "ppo": PolicyGradient(),
    "grpo": PolicyGradient(denominator="sequence_mean"),
    "dapo": PolicyGradient(clip_high=0.28),
    "dr_grpo": PolicyGradient(denominator="constant", length=7),
    "gspo": PolicyGradient(ratio="sequence", clip_low=3e-4, clip_high=4e-4, denominator="sequence_mean"),
    "gspo_wide": PolicyGradient(ratio="sequence", clip_low=0.1, clip_high=0.12, denominator="sequence_mean"),
    "dual": PolicyGradient(dual_clip=1.3),
    "ppo_dual_clip": PolicyGradient(dual_clip=3.0),
    "cispo": PolicyGradient(surrogate="cispo"),
    "cispo_low": PolicyGradient(surrogate="cispo", cap=1.1),
    "sapo": PolicyGradient(surrogate="sapo", denominator="sequence_mean"),
}
"""Those of which the ratio is bounded, and whose gradient is the plain one where it is 1."""
ALL = {**BOUNDED, "reinforce": PolicyGradient(surrogate="reinforce"), "decoupled_ppo": PolicyGradient(behavior_cap=2.0)}
every_objective = pytest.mark.parametrize("objective", ALL.values(), ids=ALL)
bounded_objective = pytest.mark.parametrize("objective", BOUNDED.values(), ids=BOUNDED)
differentiable = pytest.mark.parametrize("framework", ("torch", "jax"))
# JAX compiles anew for each shape: where shapes differ, it runs the objective that uses all of the batch
every_objective_some_in_jax = pytest.mark.parametrize(
    "framework, objective", [*(("torch", p) for p in ALL.values()), ("jax", ALL["gspo_wide"])],
    ids=[*(f"torch-{name}" for name in ALL), "jax-gspo_wide"])


def prepared(objective: PolicyGradient, case: Case) -> Case:
    return weighted(case, objective.weights(case.counts))


def oracle(p: PolicyGradient, case: Case, at: np.ndarray, around: np.ndarray) -> float:
    """The loss at log-probs `at`, number by number. What the objective detaches is taken at `around`."""
    old, A = case.columns["old_logprobs"], case.columns["advantages"]
    losses = np.zeros(len(at))
    for n in range(len(at)):
        same = [i for i in range(len(at)) if case.episode[i] == case.episode[n]]
        if p.ratio == "token":
            r = math.exp(at[n] - old[n])
        else:
            s = math.exp(sum(around[i] - old[i] for i in same) / len(same))
            r = s * math.exp(at[n] - around[n])
        if p.surrogate == "reinforce":
            losses[n] = -A[n] * at[n]
            continue
        if p.surrogate == "cispo":
            losses[n] = -min(math.exp(around[n] - old[n]), p.cap) * A[n] * at[n]
            continue
        if p.surrogate == "sapo":
            tau = p.tau_positive if A[n] > 0 else p.tau_negative
            losses[n] = -4 / tau / (1 + math.exp(-tau * (r - 1))) * A[n]
            continue
        bounded = min(max(r, 1 - p.clip_low), 1 + p.clip_high)
        losses[n] = -min(r * A[n], bounded * A[n])
        if p.dual_clip and A[n] < 0:
            losses[n] = min(losses[n], -p.dual_clip * A[n])
        if p.behavior_cap:
            losses[n] *= min(p.behavior_cap, math.exp(old[n] - case.columns["behavior_logprobs"][n]))
    return averaged(case.rows(losses), p.denominator, p.length)


@every_objective
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_value_equals_literal_oracle(objective: PolicyGradient, framework: str) -> None:
    for seed in range(3):
        case = random_case(seed)
        x = case.outputs["logprobs"]
        found = evaluate(framework, objective, prepared(objective, case))
        assert found.value == pytest.approx(oracle(objective, case, x, x), rel=1e-12, abs=1e-14)
        assert found.terms == {"policy": pytest.approx(found.value)}


@every_objective
@differentiable
def test_gradient_equals_finite_differences_of_the_oracle(objective: PolicyGradient, framework: str) -> None:
    for seed in range(3):
        case = random_case(seed)
        x = case.outputs["logprobs"]
        expected = central_differences(lambda at, case=case, x=x: oracle(objective, case, at, x), x)
        found = evaluate(framework, objective, prepared(objective, case))
        np.testing.assert_allclose(found.gradients["logprobs"], expected, rtol=1e-6, atol=1e-8)
        assert not found.gradients["values"].any() and not found.gradients["entropy"].any()


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised by the libraries that rlax imports
def test_value_and_gradient_equal_rlax() -> None:
    rlax, jax = pytest.importorskip("rlax"), pytest.importorskip("jax")
    case = random_case(4)
    with jax.enable_x64(True):
        A, old = (jax.numpy.asarray(case.columns[n]) for n in ("advantages", "old_logprobs"))
        loss = lambda x: rlax.clipped_surrogate_pg_loss(jax.numpy.exp(x - old), A, 0.2)
        value, gradient = jax.value_and_grad(loss)(jax.numpy.asarray(case.outputs["logprobs"]))
        value, gradient = float(value), np.asarray(gradient)
    for framework in ("torch", "jax"):
        found = evaluate(framework, PolicyGradient(), prepared(PolicyGradient(), case))
        assert found.value == pytest.approx(value, rel=1e-13)
        np.testing.assert_allclose(found.gradients["logprobs"], gradient, rtol=1e-13, atol=1e-15)


@differentiable
def test_gradient_is_zero_exactly_where_the_clip_holds(framework: str) -> None:
    ratio = np.resize([1.5, 1.5, 0.5, 0.5, 1.1, 0.9, 3.5], 13)
    A = np.resize([1.0, -1.0, 1.0, -1.0, 1.0, -1.0, -1.0], 13)
    case = random_case(0)
    case = case.with_outputs(logprobs=case.columns["old_logprobs"] + np.log(ratio)).with_columns(advantages=A)
    def moves(p: PolicyGradient) -> list[bool]:
        moved = [bool(g) for g in evaluate(framework, p, prepared(p, case)).gradients["logprobs"]]
        assert moved[7:] == moved[:6], "the pattern repeats"
        return moved[:7]
    assert moves(PolicyGradient()) == [False, True, True, False, True, True, True]
    assert moves(PolicyGradient(dual_clip=3.0)) == [False, True, True, False, True, True, False]
    assert moves(PolicyGradient(clip_high=0.6)) == [True, True, True, False, True, True, True]
    assert moves(PolicyGradient(surrogate="reinforce")) == [True] * 7


@bounded_objective
@differentiable
def test_gradient_at_ratio_one_is_the_plain_policy_gradient(objective: PolicyGradient, framework: str) -> None:
    case = prepared(objective, random_case(1))
    expected = -case.columns["weight"] * case.columns["advantages"]
    for old in (None, case.outputs["logprobs"]):
        found = evaluate(framework, objective, case.with_columns(old_logprobs=old))
        np.testing.assert_allclose(found.gradients["logprobs"], expected, rtol=1e-13, atol=1e-15)


@every_objective_some_in_jax
def test_any_split_into_parts_equals_the_whole(objective: PolicyGradient, framework: str) -> None:
    case = prepared(objective, random_case(2))
    for parts in [[[4, 0], [3, 2]]] if framework == "jax" else [[[0], [2], [3], [4]], [[4], [], [0, 3, 2]]]:
        _assert_parts_equal_the_whole(framework, objective, case, parts)


def _assert_parts_equal_the_whole(framework: str, objective: PolicyGradient, case: Case,
                                  parts: list[list[int]]) -> None:
    whole = evaluate(framework, objective, part_of(case, [e for part in parts for e in part]))
    found = [evaluate(framework, objective, part_of(case, part)) for part in parts]
    summed = sum(found[1:], found[0])
    assert summed.value == pytest.approx(whole.value, rel=1e-12, abs=1e-13)
    np.testing.assert_allclose(summed.gradients["logprobs"], whole.gradients["logprobs"], rtol=1e-12, atol=1e-15)
    assert summed.metrics == {n: pytest.approx(pair, rel=1e-12, abs=1e-13) for n, pair in whole.metrics.items()}


def test_unit_action_may_split_an_episode() -> None:
    objective = PolicyGradient(denominator="sequence_mean")
    assert objective.unit == "action"
    case = prepared(objective, random_case(2))
    whole = evaluate("torch", objective, case)
    actions = np.arange(sum(case.lengths)) + 1
    pieces = [Case((1,), {n: x[..., i - 1:i] for n, x in case.outputs.items()},
                   {n: x[..., i - 1:i] for n, x in case.columns.items()}) for i in actions]
    found = [evaluate("torch", objective, piece) for piece in pieces]
    summed = sum(found[1:], found[0])
    assert summed.value == pytest.approx(whole.value, rel=1e-12)
    np.testing.assert_allclose(summed.gradients["logprobs"], whole.gradients["logprobs"], rtol=1e-12)


@every_objective_some_in_jax
def test_zero_weight_dummy_actions_change_nothing(objective: PolicyGradient, framework: str) -> None:
    case = prepared(objective, random_case(3))
    plain, padded = (evaluate(framework, objective, c) for c in (case, with_dummy(case, 6)))
    assert padded.value == pytest.approx(plain.value, rel=1e-13)
    assert padded.metrics == {n: pytest.approx(pair, rel=1e-13) for n, pair in plain.metrics.items()}
    for name, gradient in plain.gradients.items():
        np.testing.assert_allclose(padded.gradients[name][..., :-6], gradient, rtol=1e-13, atol=1e-16)
        assert not padded.gradients[name][..., -6:].any()


def test_works_under_a_jax_trace() -> None:
    jax = pytest.importorskip("jax")
    objective = ALL["gspo_wide"]
    case = prepared(objective, random_case(3))
    with jax.enable_x64(True):
        batch = micro_batch(case, jax.numpy.asarray)
        def loss(x: Array) -> Array:
            return objective(ops_of(x), TokenOutputs(x), batch, {}).terms["policy"].total
        gradient = np.asarray(jax.jit(jax.grad(loss))(jax.numpy.asarray(case.outputs["logprobs"])))
    expected = evaluate("torch", objective, case).gradients["logprobs"]
    np.testing.assert_allclose(gradient, expected, rtol=1e-12, atol=1e-16)


@every_objective
@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_finite_at_extreme_log_ratios(objective: PolicyGradient, framework: str, dtype: type) -> None:
    case = random_case(5)
    moved = case.columns["old_logprobs"] + np.resize([100.0, -100.0, 100.0, -100.0, 100.0, 100.0], 13)
    case = prepared(objective, case.with_outputs(logprobs=moved))
    advantages = np.resize([1.0, 1.0, -1.0, -1.0, -1.0, -1.0], 13)
    found = evaluate(framework, objective, case.with_columns(advantages=advantages), dtype)
    assert np.isfinite([found.value, *(x for pair in found.metrics.values() for x in pair)]).all()
    assert all(np.isfinite(g).all() for g in found.gradients.values())


@every_objective
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_dtype_of_the_outputs_is_kept(objective: PolicyGradient, framework: str) -> None:
    case = prepared(objective, random_case(6))
    single, double = (evaluate(framework, objective, case, dtype) for dtype in (np.float32, np.float64))
    assert single.value == pytest.approx(double.value, rel=2e-5, abs=2e-6)
    assert all(g.dtype == np.float32 for name, g in single.gradients.items() if name == "logprobs")


@differentiable
@pytest.mark.parametrize("low, high", [(3e-4, 4e-4), (0.1, 0.12)])
def test_gspo_token_form_has_the_gradient_of_the_sequence_form(framework: str, low: float, high: float) -> None:
    """For advantages that are constant over an episode (Zheng et al. 2025, arXiv 2507.18071)."""
    objective = PolicyGradient(ratio="sequence", clip_low=low, clip_high=high, denominator="sequence_mean")
    case = random_case(7, spread=0.1)
    case = case.with_columns(advantages=np.array([0.8, 0.0, -1.2, 0.5, -0.3])[case.episode])
    old, A = case.rows(case.columns["old_logprobs"]), case.rows(case.columns["advantages"])
    def sequence_form(flat: np.ndarray) -> float:
        losses = []
        for x, x_old, a in zip(case.rows(flat), old, A):
            if len(x):
                s = math.exp(float(np.mean(x - x_old)))
                losses.append(-min(s * a[0], min(max(s, 1 - low), 1 + high) * a[0]))
        return sum(losses) / len(losses)
    x = case.outputs["logprobs"]
    found = evaluate(framework, objective, prepared(objective, case))
    assert found.value == pytest.approx(sequence_form(x), rel=1e-12)
    expected = central_differences(sequence_form, x, 1e-7)
    np.testing.assert_allclose(found.gradients["logprobs"], expected, rtol=1e-6, atol=1e-8)
    assert expected.any()


def test_presets_coincide_where_their_difference_vanishes() -> None:
    case = random_case(8, lengths=(4,) * 12)
    def gradient(p: PolicyGradient, c: Case) -> np.ndarray:
        return evaluate("torch", p, prepared(p, c)).gradients["logprobs"]
    ppo = gradient(PolicyGradient(), case)
    same = {
        "grpo, equal lengths": (PolicyGradient(denominator="sequence_mean"), case),
        "dr_grpo, equal lengths of its constant": (PolicyGradient(denominator="constant", length=4), case),
        "dual clip that never binds": (PolicyGradient(dual_clip=1e6), case),
    }
    for name, (p, c) in same.items():
        np.testing.assert_allclose(gradient(p, c), ppo, rtol=1e-13, err_msg=name)
    single = random_case(9, lengths=(1, 1, 1, 1))
    np.testing.assert_allclose(gradient(PolicyGradient(ratio="sequence"), single), gradient(PolicyGradient(), single),
                               rtol=1e-12, err_msg="gspo, episodes of one action")
    higher = gradient(PolicyGradient(clip_high=0.28), case)
    ratio = np.exp(case.outputs["logprobs"] - case.columns["old_logprobs"])
    differs = (ratio > 1.2) & (ratio < 1.28) & (case.columns["advantages"] > 0)
    assert ((higher != ppo) == differs).all() and differs.any(), "dapo differs from ppo in its band alone"


@differentiable
def test_each_slot_is_the_objective_of_its_own_advantages(framework: str) -> None:
    case = random_case(10)
    rows = np.stack([case.columns["advantages"], -2.0 * np.roll(case.columns["advantages"], 1)])
    single = PolicyGradient()
    both = replace(single, slots=("accuracy", "brevity"))
    case = prepared(single, case)
    alone = [evaluate(framework, single, case.with_columns(advantages=row)) for row in rows]
    found = evaluate(framework, both, case.with_columns(advantages=rows))
    assert found.terms == {"policy/accuracy": pytest.approx(alone[0].value), "policy/brevity":
                           pytest.approx(alone[1].value)}
    np.testing.assert_allclose(found.gradients["logprobs"], sum(a.gradients["logprobs"] for a in alone), rtol=1e-13)
    for name in ("policy/clip_low", "policy/clip_high"):
        assert found.metrics[name] == pytest.approx(tuple(np.sum([a.metrics[name] for a in alone], axis=0)))


def test_terms_carry_their_slots() -> None:
    case = prepared(PolicyGradient(), random_case(0))
    out = TokenOutputs(case.outputs["logprobs"])
    loss = PolicyGradient()(ops_of(out.logprobs), out, micro_batch(case, np.asarray), {})
    assert {name: (t.slot, t.coef) for name, t in loss.terms.items()} == {"policy": ("main", 1.0)}
    rows = case.with_columns(advantages=np.ones((1, 13)))
    loss = PolicyGradient(slots=("a",))(ops_of(out.logprobs), out, micro_batch(rows, np.asarray), {})
    assert {name: t.slot for name, t in loss.terms.items()} == {"policy/a": "a"}


def test_metrics_are_fractions_and_means_over_actions_whatever_the_denominator() -> None:
    for p in (PolicyGradient(dual_clip=1.3), PolicyGradient(dual_clip=1.3, denominator="sequence_mean")):
        case = prepared(p, random_case(11, lengths=(9, 0, 30)))
        r = np.exp(case.outputs["logprobs"] - case.columns["old_logprobs"])
        A = case.columns["advantages"]
        expected = {"clip_low": ((A < 0) & (r < 0.8)).mean(), "clip_high": ((A > 0) & (r > 1.2)).mean(),
                    "clip_dual": ((A < 0) & (r > 1.3)).mean(), "ratio": r.mean(),
                    "approx_kl": (r - 1 - np.log(r)).mean()}
        found = evaluate("numpy", p, case).metrics
        assert {n: t / w for n, (t, w) in found.items()} == {f"policy/{n}": pytest.approx(x)
                                                             for n, x in expected.items()}
        assert {w for _, w in found.values()} == {39.0}
        assert min(expected.values()) > 0


def test_weights_of_two_ranks_add_up_to_the_average_over_both() -> None:
    whole = random_case(12, lengths=(3, 0, 5, 2, 4, 1))
    halves = [part_of(whole, (0, 1, 2)), part_of(whole, (3, 4, 5))]
    total = whole.counts
    for p in ALL.values():
        expected = evaluate("torch", p, prepared(p, whole))
        ranks = [weighted(half, p.weights(Counts(total.actions, total.episodes, half.counts.episode_actions)))
                 for half in halves]
        found = sum((evaluate("torch", p, rank) for rank in ranks[1:]), evaluate("torch", p, ranks[0]))
        assert found.value == pytest.approx(expected.value, rel=1e-12, abs=1e-14)
        np.testing.assert_allclose(found.gradients["logprobs"], expected.gradients["logprobs"], rtol=1e-12, atol=1e-15)


def test_kl_weight_is_positive_on_every_kept_action_and_not_corrected() -> None:
    for p in ALL.values():
        weights = p.weights(Counts(9, 2, np.array([4, 0, 5])))
        assert weights.weight is not None and weights.kl_weight is not None and weights.value_weight is None
        assert weights.kl_weight.shape == (9,) and (weights.kl_weight > 0).all()
        assert weights.weight.dtype == np.float64
        np.testing.assert_array_equal(weights.weight, weights.kl_weight)


def test_needs_outputs_unit_and_hash() -> None:
    for p in ALL.values():
        assert p.needs - {Need.BEHAVIOR_LOGPROBS} == {Need.ADVANTAGES}
        assert (Need.BEHAVIOR_LOGPROBS in p.needs) == p.corrects_for_sampler == bool(p.behavior_cap)
        assert p.outputs == {Output.LOGPROBS}
        assert p.unit == ("episode" if p.ratio == "sequence" else "action")
        assert p.slots == ("main",) and hash(p) == hash(replace(p))


def test_presets_of_the_plugin_are_the_objectives_tested_here() -> None:
    for component in components():
        if component.target.endswith(":PolicyGradient"):
            fields = dict(component.defaults)
            if component.name == "dr_grpo":
                with pytest.raises(ValueError, match="max_new_tokens"):
                    PolicyGradient(**fields)
                fields["length"] = 7
            assert PolicyGradient(**fields) == ALL[component.name]


@pytest.mark.parametrize("fields, message", [
    ({"ratio": "tokn"}, "did you mean 'token'"),
    ({"surrogate": "clipp"}, "did you mean 'clip'"),
    ({"denominator": "mean"}, "token_mean, sequence_mean, constant"),
    ({"clip_low": 0.0}, "clip_low"),
    ({"clip_low": 1.2}, "clip_low"),
    ({"clip_high": -0.1}, "clip_high"),
    ({"clip_high": math.nan}, "clip_high"),
    ({"dual_clip": 0.9}, "dual_clip"),
    ({"dual_clip": math.nan}, "dual_clip"),
    ({"dual_clip": math.inf}, "dual_clip must be above 1 and finite"),
    ({"surrogate": "reinforce", "ratio": "sequence"}, "no ratio"),
    ({"surrogate": "reinforce", "dual_clip": 3.0}, "no ratio"),
    ({"surrogate": "cispo", "dual_clip": 3.0}, "no clip that dual_clip"),
    ({"surrogate": "sapo", "dual_clip": 3.0}, "no clip that dual_clip"),
    ({"cap": 0.9}, "cap is a ratio"),
    ({"cap": math.nan}, "cap is a ratio"),
    ({"tau_positive": math.inf}, "tau_positive and tau_negative are positive and finite"),
    ({"tau_negative": math.inf}, "tau_positive and tau_negative are positive and finite"),
    ({"tau_positive": 0.0}, "tau_positive"),
    ({"tau_negative": math.nan}, "tau_negative"),
    ({"behavior_cap": 0.5}, "behavior_cap"),
    ({"behavior_cap": math.nan}, "behavior_cap"),
    ({"denominator": "constant"}, "max_new_tokens"),
    ({"length": 8}, "denominator constant"),
    ({"slots": ()}, "slots"),
    ({"slots": ("a", "a")}, "slots"),
])
def test_fields_without_meaning_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PolicyGradient(**fields)


def test_advantages_of_the_wrong_number_of_slots_are_refused() -> None:
    case = prepared(PolicyGradient(), random_case(0)).with_columns(advantages=np.ones((2, 13)))
    with pytest.raises(ValueError):
        evaluate("numpy", PolicyGradient(), case)
