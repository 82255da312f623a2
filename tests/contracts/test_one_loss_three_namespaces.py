"""One loss, three namespaces: what the registry holds of losses, estimators and what mixes them says the same in NumPy,
torch and JAX. A component that is registered is covered, as its preset and as other choices of its fields make it.

In JAX a loss runs as a backend runs it: compiled once with the objective as a constant, coefficients traced, and every
part of a step filled up to one shape by episodes that weigh nothing. That a gradient is the formula's is the business
of the contracts, which compare with loops and finite differences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
from frameworks import FRAMEWORKS, in_float64
from posttrain.data import Array, Counts, Loss, MicroBatch, Term, TokenOutputs, Weights, to_numpy
from posttrain.hookspecs import Component, hookimpl
from posttrain.loss import KLTerm, Measured, Sum
from posttrain.ops import Ops, ops_of
from posttrain.protocols import Compared, Need, Objective, Output
from posttrain.testing.losses import (
    COEF,
    Evaluated,
    Part,
    Step,
    converted,
    evaluate,
    outputs_of,
    part_of,
    split,
    step_of,
    total_of,
)
from posttrain.testing.mixing import drawn_estimates
from posttrain.testing.random_data import episodes_of, in_framework
from registered import registered

for package in ("posttrain_estimators", "posttrain_objectives"):
    pytest.importorskip(package)

LENGTHS, PAIRS = [3, 1, 5, 2, 4, 1], [0, 0, 1, 1, 2, 2]
"""Actions of each episode, and its group: pairs, of which one is preferred, so that all have what they compare."""
TOLERANCE = 1e-10
"""Relative and absolute, in float64."""
DIFFERENTIATING = pytest.mark.parametrize("framework", ["torch", "jax"])


def objectives() -> dict[str, Objective]:
    """All of the registry; those that take several gradient slots also with two; and core's sum of one with each KL
    that is placed in the loss, with value, entropy and what is measured."""
    alone: dict[str, Objective] = registered("objective", changes=2)
    found = dict(alone)
    for name, objective in alone.items():
        if Need.ADVANTAGES in objective.needs and "slots" in {f.name for f in fields(objective)}:
            found[f"{name} in two slots"] = replace(objective, slots=("first", "second"))
    for name, kl in registered("kl", changes=2).items():
        if kl.placement == "loss":
            found[f"ppo + kl {name}"] = Sum((alone["ppo"], KLTerm(kl)))
    found["a whole loss"] = Sum((alone["ppo"], KLTerm(registered("kl", 2)["fixed placement=loss"]), alone["value"],
                                 alone["entropy"], Measured(reference=True)))
    return found


OBJECTIVES = objectives()
KLS, ESTIMATORS, CORRECTIONS = registered("kl", changes=2), registered("estimator"), registered("correction")
COMBINERS = registered("combiner")


def step(objective: Objective) -> Step:
    """A step with everything a loss may read; with two slots there are two rows of advantages."""
    drawn = step_of(11, LENGTHS, PAIRS, reject=False, heads=2)
    if len(objective.slots) == 1:
        return drawn
    A = drawn.columns["advantages"]
    return replace(drawn, columns={**drawn.columns, "advantages": np.stack([A, -2.0 * np.roll(A, 1)])})


# --- losses -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_loss_is_the_same(name: str, framework: str) -> None:
    assert_same_loss(OBJECTIVES[name], framework)


def assert_same_loss(objective: Objective, framework: str) -> None:
    """Value, terms, metrics and gradients of a whole step; filled up to a bucket; and summed over parts."""
    whole = part_of(step(objective), objective)
    expected, slopes = evaluate(objective, whole), evaluate(objective, whole, "torch").gradients
    parts = split(step(objective), objective, np.random.default_rng(5), parts=3)
    assert len(parts) > 1
    for case in ([whole], [filled(whole, BUCKET)], parts):
        said = [SAID[framework](objective, part) for part in case]
        assert_same(sum(one.value for one in said), expected.value, "the loss")
        for term, total in expected.terms.items():
            assert_same(sum(one.terms.get(term, 0.0) for one in said), total, f"term {term}")
        for metric, pair in expected.metrics.items():
            assert_same(np.sum([one.metrics[metric] for one in said], axis=0), pair, f"metric {metric}")
        for output, slope in slopes.items() if framework != "numpy" else ():
            summed = np.zeros((*slope.shape[:-1], sum(LENGTHS)))
            for one, part in zip(said, case):
                n = len(part.rows)
                summed[..., part.rows] += one.gradients[output][..., :n]
                assert not one.gradients[output][..., n:].any(), f"what weighs nothing has a gradient in {output}"
            assert_same(summed[..., whole.rows], slope, f"the gradient in {output}")


def test_a_loss_is_compiled_once_for_all_parts_of_a_shape() -> None:
    """Equal objectives are one, whatever their coefficients."""
    objective = OBJECTIVES["a whole loss"]
    compiled.cache_clear()
    for part in split(step(objective), objective, np.random.default_rng(6), parts=3):
        in_jax(objective, part)
        in_jax(replace(objective), part, {name: 2 * x for name, x in COEF.items()})
    assert len(compiled().traced) == 1


@dataclass(frozen=True)
class Mine:
    """A new objective in which something may be wrong."""

    fault: Literal["none", "mean", "number", "numpy", "unweighted"] = "none"
    slots: tuple[str, ...] = ("main",)
    needs: ClassVar[frozenset[Need]] = frozenset({Need.ADVANTAGES})
    outputs: ClassVar[frozenset[Output]] = frozenset({Output.LOGPROBS})
    unit: ClassVar[Literal["action"]] = "action"

    def weights(self, counts: Counts) -> Weights:
        return Weights(weight=np.full(counts.episode_actions.sum(), 1 / counts.actions))

    def __call__(self, ops: Ops, out: TokenOutputs, batch: MicroBatch, coef: Mapping[str, Array]) -> Loss:
        loss = -batch.advantages * (np.exp(out.logprobs) if self.fault == "numpy" else ops.xp.exp(out.logprobs))
        if self.fault == "number" and float(ops.xp.sum(loss)) > 100:
            loss = 2 * loss
        total = {"mean": lambda: ops.xp.mean(loss), "unweighted": lambda: ops.xp.sum(loss)}.get(
            self.fault, lambda: ops.xp.sum(batch.weight * loss))()
        return Loss({"mine": Term(total, slot=self.slots[0])})


class MyPlugin:
    @hookimpl
    def components(self) -> list[Component]:
        return [Component("objective", "mine", f"{__name__}:Mine", "a new one")]


def test_a_new_objective_is_covered_and_its_faults_are_seen() -> None:
    found = {name: made for name, made in registered("objective", 1, MyPlugin()).items() if name.startswith("mine")}
    assert found.keys() - OBJECTIVES.keys() == {"mine", *(f"mine fault={f}" for f in (
        "mean", "number", "numpy", "unweighted"))}
    for framework in FRAMEWORKS:
        assert_same_loss(found["mine"], framework)
    for fault in ("mean", "number", "numpy", "unweighted"):
        with pytest.raises(Exception, match=r"the loss|[Tt]racer|grad"):
            for framework in FRAMEWORKS:
                assert_same_loss(found[f"mine fault={fault}"], framework)


# --- what is not differentiated ---------------------------------------------------------------------------------------

@DIFFERENTIATING
@pytest.mark.parametrize("name", KLS)
def test_a_kl_is_the_same(name: str, framework: str) -> None:
    """Of each action, wherever it is placed."""
    kl, given = KLS[name], part_of(step(OBJECTIVES["ppo"]), OBJECTIVES["ppo"])

    def divergence(make: Any) -> Array:
        batch, logprobs = converted(given.batch, make, np.float64), make(given.out.logprobs)
        return kl.divergence(ops_of(logprobs), logprobs, Compared(
            batch.ref_logprobs, batch.episode, batch.count, batch.old_logprobs, make(given.out.reference_kl)))
    with in_float64(framework):
        assert_same(to_numpy(divergence(FRAMEWORKS[framework])), divergence(np.asarray), "the KL of each action")


@DIFFERENTIATING
@pytest.mark.parametrize("name", [*ESTIMATORS, *CORRECTIONS])
def test_an_estimator_is_the_same(name: str, framework: str) -> None:
    """Advantages, targets, weights and what is kept; metrics too."""
    component = {**ESTIMATORS, **CORRECTIONS}[name]
    given = episodes_of(3, LENGTHS, PAIRS, component.needs)
    expected = component(given)
    with in_float64(framework):
        assert_same_fields(component(in_framework(given, FRAMEWORKS[framework])), expected)


@DIFFERENTIATING
@pytest.mark.parametrize("name", COMBINERS)
def test_a_combiner_is_the_same(name: str, framework: str) -> None:
    """Mixed advantages."""
    combiner, given = COMBINERS[name], drawn_estimates(4, 9, ("accuracy", "brevity", "style"))
    state = combiner.init(tuple(given))
    with in_float64(framework):
        made = {column: replace(estimate, advantages=FRAMEWORKS[framework](estimate.advantages),
                                targets=FRAMEWORKS[framework](estimate.targets)) for column, estimate in given.items()}
        assert_same_fields(combiner.combine(made, state), combiner.combine(given, state))


def assert_same(found: Any, expected: Any, what: str) -> None:
    np.testing.assert_allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE, err_msg=what)


def assert_same_fields(found: Any, expected: Any) -> None:
    """Two estimates, or two corrections, and what they measured."""
    for f in fields(expected):
        ours, numpys = getattr(found, f.name), getattr(expected, f.name)
        if f.name == "metrics":
            assert ours.keys() == numpys.keys()
            for metric, value in numpys.values_by_name().items():
                assert_same(ours[metric].value, value, f"metric {metric}")
        elif numpys is None:
            assert ours is None, f.name
        else:
            assert_same(to_numpy(ours), numpys, f.name)


# --- one shape for all parts ------------------------------------------------------------------------------------------

@dataclass(frozen=True, slots=True)
class Shape:
    """Lengths of the axes of a batch."""

    tokens: int
    actions: int
    episodes: int


BUCKET = Shape(128, 32, 16)


def filled(part: Part, to: Shape) -> Part:
    """The part and, behind it, episodes that weigh nothing: of one action, and a last one of all the rest."""
    b, N, M, E = part.batch, len(part.rows), len(part.batch.tokens), len(part.batch.count)
    new = to.episodes - E
    actions = np.array([1] * (new - 1) + [to.actions - N - (new - 1)])
    tokens = np.array([2] * (new - 1) + [to.tokens - M - 2 * (new - 1)])
    ends = M + np.cumsum(tokens)
    behind: dict[str, np.ndarray] = {
        "tokens": np.zeros(tokens.sum(), np.int32), "token_weight": np.zeros(tokens.sum()),
        "sequence": np.max(b.sequence) + 1 + np.repeat(np.arange(new), tokens),
        "positions": np.concatenate([np.arange(n) for n in tokens]),
        "source": np.concatenate([np.arange(end - n, end) for end, n in zip(ends, actions)]),
        "episode": E + np.repeat(np.arange(new), actions), "group": np.max(b.group) + 1 + np.arange(new),
        "count": actions, "last": ends - 1}
    def longer(name: str, x: Any) -> Any:
        if not isinstance(x, np.ndarray):
            return x
        weighs = name.endswith("weight") or name == "preferred"
        more = behind.get(name, np.full((*x.shape[:-1], to.actions - N), 0.0 if weighs else -3.0))
        return np.concatenate([x, more.astype(x.dtype)], axis=-1)
    batch = replace(b, **{f.name: longer(f.name, getattr(b, f.name)) for f in fields(b)})
    out = replace(part.out, **{name: longer(name, x) for name, x in outputs_of(part.out).items()})
    return Part(out, batch, part.rows)


# --- a loss in each framework -----------------------------------------------------------------------------------------

class Compiled:
    """Loss and gradient in the outputs, compiled for each objective and shape."""

    def __init__(self) -> None:
        self.traced: list[Objective] = []
        self.run = pytest.importorskip("jax").jit(self._run, static_argnums=0)

    def _run(self, objective: Objective, out: Mapping[str, Array], arrays: Mapping[str, Array],
             coef: Mapping[str, Array]) -> Any:
        import jax
        self.traced.append(objective)
        def loss(out: Mapping[str, Array]) -> tuple[Array, Any]:
            batch = MicroBatch(**arrays)
            found: Loss = objective(ops_of(batch.weight), TokenOutputs(**out), batch, coef)
            return total_of(found), ({name: term.total for name, term in found.terms.items()}, dict(found.metrics))
        return jax.value_and_grad(loss, has_aux=True)(out)


@cache
def compiled() -> Compiled:
    return Compiled()


def in_jax(objective: Objective, part: Part, coef: Mapping[str, float] = COEF) -> Evaluated:
    """As a JAX backend does it: every part in the same shape."""
    part, make = filled(part, BUCKET) if len(part.batch.tokens) < BUCKET.tokens else part, FRAMEWORKS["jax"]
    with in_float64("jax"):
        batch = converted(part.batch, make, np.float64)
        arrays = {f.name: x for f in fields(batch) if hasattr(x := getattr(batch, f.name), "dtype")}
        out = {name: make(np.asarray(x)) for name, x in outputs_of(part.out).items()}
        (value, (terms, metrics)), gradients = compiled().run(
            objective, out, arrays, {name: make(np.asarray(x)) for name, x in coef.items()})
        return Evaluated(float(value), {name: float(x) for name, x in terms.items()}, {},
                         {name: (float(x), float(w)) for name, (x, w) in metrics.items()},
                         {name: np.asarray(x) for name, x in gradients.items()}, {})


SAID = {"numpy": evaluate, "torch": lambda objective, part: evaluate(objective, part, "torch"), "jax": in_jax}
"""Framework -> what an objective says of a part."""
