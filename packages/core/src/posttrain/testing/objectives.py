"""Contract of objectives: what a loss owes, so that its gradient is the formula's however a run is cut into parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given

from posttrain.data import Counts, MicroBatch, TokenOutputs
from posttrain.ops import ops_of
from posttrain.protocols import Need, Objective, Output
from posttrain.testing import random_data
from posttrain.testing.contract import EXAMPLES, ComponentContract, assert_close, config_fields, named
from posttrain.testing.losses import (
    COEF,
    COLUMN,
    OUTPUT,
    WEIGHTS,
    Evaluated,
    Part,
    Step,
    central_differences,
    converted,
    evaluate,
    outputs_of,
    part_of,
    require_one_per_kept_action,
    split,
    step_of,
    total_of,
    with_columns,
    with_dummy,
    with_outputs,
)
from posttrain.testing.random_data import in_float64, installed_frameworks

Shape = tuple[int, list[int], list[int]]
"""Seed, actions of each episode, group of each."""
BEFORE = {"old_logprobs": "logprobs", "old_values": "values"}
"""Columns that say what the model said before the update -> the output that they are compared with."""


class ObjectiveContract(ComponentContract):
    """Contract of objectives (`posttrain.protocols.Objective`).

    An author supplies `oracle` and `average`, and `clipped` where the objective cuts gradients.
    """

    kind = "objective"
    protocol = Objective
    hashable = True
    group_size: ClassVar[int] = 0
    """Answers in each group, where the objective compares a fixed number (2 for pairs); 0 draws any. With a size, no
    action is rejected."""
    tolerance: ClassVar[float] = 1e-10
    """Relative and absolute, in float64, of values; gradients by finite differences are compared at 1e-6."""

    def oracle(self, component: Any, out: TokenOutputs, held: TokenOutputs, batch: MicroBatch,
               coef: Mapping[str, float]) -> float:
        """What is to be minimised, sum(coef * term) over the batch, written as plainly as possible: loops over actions.

        Everything is NumPy in float64; weights are those of the batch. Finite differences move `out`; `held` are the
        same outputs, not moved: read them where the objective stops the gradient.
        """
        pytest.fail(f"{type(self).__name__} has no oracle; write one as plain loops: "
                    "def oracle(self, component, out, held, batch, coef) -> float: ...", pytrace=False)

    def average(self, component: Any, column: str, rows: list[list[float]]) -> float:
        """The average that the weights of `column` (`weight`, `kl_weight` or `value_weight`) stand for, of one number
        per action: a list per episode, empty where all of its actions were rejected."""
        pytest.fail(f"{type(self).__name__} has no average; write what its denominator means, for one row of numbers "
                    "per episode: def average(self, component, column, rows) -> float: ...", pytrace=False)

    def clipped(self, component: Any, out: TokenOutputs, batch: MicroBatch) -> Sequence[bool] | None:
        """[N] whether the objective claims to cut the gradient of an action; None where it never does."""
        return None

    # ---- how it averages, first: a mean makes every formula wrong

    def test_weights_are_one_number_per_kept_action(self, component: Objective) -> None:
        """Shapes and signs; core tells real actions from padding by `kl_weight > 0`."""
        for lengths in ([3, 0, 2], [1], [0, 0], []):
            n = np.array(lengths, int)
            columns = _columns(component, Counts(int(n.sum()), int((n > 0).sum()), n))
            assert columns, f"{named(component)}.weights gives no column, so every action weighs nothing"
            for name, column in columns.items():
                assert column.dtype == np.float64, f"{name} is {column.dtype}, weights are made in float64"
                assert np.isfinite(column).all() and (column >= 0).all(), f"{name} must be finite and not negative"
                assert name != "kl_weight" or (column > 0).all(), "kl_weight must be positive on every kept action"

    def test_does_not_average_by_itself(self, component: Objective) -> None:
        """Twice the weights, twice the loss: averaging is the business of `weights` alone."""
        part = part_of(self._step(3, *LARGER), component)
        scaled = with_columns(part, **{n: 3.7 * getattr(part.batch, n) for n in WEIGHTS})
        one, more = evaluate(component, part), evaluate(component, scaled)
        for name, total in one.terms.items():
            assert_close(more.terms[name], 3.7 * total, self.tolerance,
                          f"term {name} is not sum(weight * x): weights scaled by 3.7 scale it otherwise")
        for name, value in _values(one).items():
            assert_close(_values(more)[name], value, self.tolerance, f"metric {name} depends on the scale of weights")

    def test_actions_without_weight_change_nothing(self, component: Objective) -> None:
        """A bucket that a backend fills up with a dummy episode gives the same loss, and one that holds nothing else
        gives 0."""
        framework = next(iter(_frameworks()), "numpy")
        step = self._step(4, *LARGER)
        part, nothing = part_of(step, component), part_of(step, component, np.zeros(len(step.keep), bool))
        plain, padded = (evaluate(component, p, framework) for p in (part, with_dummy(part, 5)))
        hint = ": every sum, of metrics too, runs over weighted actions (kl_weight > 0 or value_weight > 0 marks " \
               "them), and nothing is a mean(), which divides by how many there are"
        assert_close(padded.value, plain.value, self.tolerance, f"zero-weight actions change the loss{hint}")
        for name, pair in plain.metrics.items():
            assert_close(padded.metrics[name], pair, self.tolerance, f"zero-weight actions change metric {name}{hint}")
        for name, gradient in padded.gradients.items():
            assert_close(gradient[..., :-5], plain.gradients[name], self.tolerance,
                          f"zero-weight actions change the gradient in {name}{hint}")
            assert not gradient[..., -5:].any(), f"zero-weight actions have a gradient in {name}{hint}"
        with np.errstate(divide="ignore", invalid="ignore"):
            empty = evaluate(component, with_dummy(nothing, 4), framework)
        assert empty.value == 0 and not any(g.any() for g in empty.gradients.values()), \
            f"a part of zero-weight actions alone has the loss {empty.value}, and a gradient"
        assert all(pair == (0.0, 0.0) for pair in empty.metrics.values()), \
            f"a part of zero-weight actions alone has the metrics {dict(empty.metrics)}"

    # ---- the formula

    def test_equals_its_oracle(self, component: Objective) -> None:
        """The value of the loss, against the slow form that the author supplies."""
        @EXAMPLES
        @given(random_data.shapes())
        def holds(shape: Shape) -> None:
            part = part_of(self._step(*shape), component)
            expected = self.oracle(component, part.out, part.out, part.batch, COEF)
            assert_close(evaluate(component, part).value, expected, self.tolerance,
                          "the loss and its oracle differ; where the loss calls mean(), "
                          "test_actions_without_weight_change_nothing and test_does_not_average_by_itself fail, too")
        holds()

    def test_gradient_is_that_of_its_oracle(self, component: Objective) -> None:
        """The step that is taken is the formula's: central differences of the oracle, in each output of the model."""
        for framework in differentiating():
            for part in self._parts(framework, component):
                found = evaluate(component, part, framework)
                for name, x in outputs_of(part.out).items():
                    def moved(at: np.ndarray, name: str = name, part: Part = part) -> float:
                        out = with_outputs(part, **{name: at}).out
                        return self.oracle(component, out, part.out, part.batch, COEF)
                    expected = central_differences(moved, np.asarray(x))
                    assert_close(found.gradients[name], expected, 1e-6,
                                  f"the gradient in {name} ({framework}) and finite differences of the oracle differ; "
                                  "where the objective stops a gradient, the oracle reads `held`")

    def test_gradient_is_zero_where_it_clips(self, component: Objective) -> None:
        """Clipping leaves an action alone: its gradient is 0, not small."""
        framework, seen = differentiating()[0], set[bool]()
        for part in self._parts(framework, component):
            claimed = self.clipped(component, part.out, part.batch)
            if claimed is None:
                return
            cut = np.asarray(claimed, bool)
            seen |= set(cut.tolist())
            for name, gradient in evaluate(component, part, framework).gradients.items():
                left = np.flatnonzero(cut & (gradient != 0).reshape(-1, len(cut)).any(axis=0))
                assert not len(left), f"{named(component)} claims to clip action {left[0]}, whose gradient in {name} " \
                                      f"is {gradient[..., left[0]]}"
        assert seen == {True, False}, f"`clipped` of the contract always says {seen.pop()}: it claims too little or all"

    # ---- any split, any rank, any padding

    def test_any_split_gives_the_same(self, component: Objective) -> None:
        """Parts that keep `unit` together add up to the whole: memory, accumulation and retries change no gradient
        (the error of TRL, ms-swift and verl: means of means)."""
        framework = next(iter(_frameworks()), "numpy")
        for seed in range(6):
            step = self._step(seed, *LARGER)
            whole = part_of(step, component)
            parts = split(step, component, np.random.default_rng(seed), parts=3)
            expected, found = evaluate(component, whole, framework), [evaluate(component, p, framework) for p in parts]
            hint = f"; split by {component.unit}: an objective that compares more names a coarser unit and reduces " \
                   "by weights alone, never by mean()"
            assert_close(sum(f.value for f in found), expected.value, self.tolerance,
                          f"the losses of the parts do not add up to the whole{hint}")
            for name, gradient in expected.gradients.items():
                summed = np.zeros((*gradient.shape[:-1], len(step.keep)))
                for f, p in zip(found, parts, strict=True):
                    summed[..., p.rows] += f.gradients[name]
                assert_close(summed[..., whole.rows], gradient, self.tolerance,
                              f"gradients in {name} depend on the split{hint}")
            for name, pair in expected.metrics.items():
                assert_close(np.sum([f.metrics[name] for f in found], axis=0), pair, self.tolerance,
                              f"metric {name} does not add up over parts: give (total, weight), not a mean{hint}")

    def test_ranks_add_up(self, component: Objective) -> None:
        """Two ranks that know the counts of both weigh as one does: the global counts are a scale and no more."""
        counts = Counts(12, 4, np.array([3, 0, 5, 1, 3]))
        whole = _columns(component, counts)
        ranks = [_columns(component, replace(counts, episode_actions=counts.episode_actions[part]))
                 for part in (slice(0, 2), slice(2, 5))]
        larger = _columns(component, replace(counts, actions=30, episodes=9))
        for name, column in whole.items():
            assert_close(np.concatenate([rank[name] for rank in ranks]), column, 1e-14,
                          f"{name} of two ranks are not those of one: use counts.actions and counts.episodes, which "
                          "are global, wherever a total is meant")
            at = int(np.argmax(column))
            assert_close(larger[name] * column[at], column * larger[name][at], 1e-12,
                          f"global counts change the proportions within {name}, not only their scale")

    def test_weights_average_as_said(self, component: Objective) -> None:
        """sum(weight * x) is the average that the author describes, whatever the lengths of episodes."""
        @EXAMPLES
        @given(random_data.shapes())
        def holds(shape: Shape) -> None:
            step = self._step(*shape)
            n, x = step.counts.episode_actions, np.random.default_rng(shape[0]).normal(size=int(step.keep.sum()))
            rows = [row.tolist() for row in np.split(x, np.cumsum(n)[:-1])]
            for name, column in _columns(component, step.counts).items():
                assert_close(column @ x, self.average(component, name, rows), self.tolerance,
                              f"sum({name} * x) is not the author's average of rows of lengths {n.tolist()}")
        holds()

    # ---- numbers

    def test_survives_extreme_log_ratios(self, component: Objective) -> None:
        """Log-ratios of ±100 with either sign of the advantage: loss, gradient and metrics stay finite."""
        for framework in ("numpy", *_frameworks()):
            for size in (100.0, -100.0):
                step = self._step(5, *LARGER, fixed=True)
                far = {name: np.full(len(step.keep), -0.5 - max(size, 0.0)) for name in
                       ("old_logprobs", "ref_logprobs", "behavior_logprobs")}
                near = np.full(len(step.keep), -0.5 + min(size, 0.0))
                part = part_of(replace(step, columns={**step.columns, **far},
                                       outputs={**step.outputs, "logprobs": near}), component)
                for dtype in (np.float64, np.float32):
                    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
                        found = evaluate(component, part, framework, dtype=dtype)
                    where = f"at a log-ratio of {size:g} ({framework}, {np.dtype(dtype)})"
                    hint = "; clamp log-ratios before exp, use ops.log_sigmoid and expm1"
                    assert np.isfinite(found.value), f"the loss is {found.value} {where}{hint}"
                    for name, gradient in found.gradients.items():
                        assert np.isfinite(gradient).all(), f"the gradient in {name} is not finite {where}{hint}"
                    for name, pair in found.metrics.items():
                        assert np.isfinite(pair).all(), f"metric {name} is {pair} {where}{hint}"

    def test_equal_in_every_framework(self, component: Objective) -> None:
        """Value, metrics and gradients in NumPy, torch and JAX, in float64."""
        frameworks = differentiating()
        part = self._parts("jax", component)[0]
        expected, first = evaluate(component, part), evaluate(component, part, frameworks[0])
        for framework in frameworks:
            found = evaluate(component, part, framework)
            assert_close(found.value, expected.value, 1e-12, f"the loss in {framework} and NumPy differ")
            assert found.metrics.keys() == expected.metrics.keys(), f"metrics in {framework} and NumPy differ"
            for name, pair in expected.metrics.items():
                assert_close(found.metrics[name], pair, 1e-12, f"metric {name} in {framework} and NumPy differs")
            for name, gradient in first.gradients.items():
                assert_close(found.gradients[name], gradient, 1e-12,
                              f"gradients in {name} of {framework} and {frameworks[0]} differ")

    def test_float32_stays_float32(self, component: Objective) -> None:
        """No silent widening, which some devices refuse and JAX ignores."""
        part = self._parts("jax", component)[0]
        expected = evaluate(component, part)
        for framework in ("numpy", *_frameworks()):
            found = evaluate(component, part, framework, dtype=np.float32)
            for name, dtype in found.dtypes.items():
                assert dtype == np.float32, f"term {name} of float32 columns is {dtype} in {framework}"
                assert_close(found.terms[name], expected.terms[name], 1e-4, f"term {name} in {framework}, float32")

    # ---- what it reads and says

    def test_data_carries_no_gradient(self, component: Objective) -> None:
        """Advantages, targets and log-probs of other policies are data, also where they come with a gradient."""
        framework = differentiating()[0]
        part = part_of(self._step(2, *LARGER), component)
        for name, gradient in evaluate(component, part, framework, columns=COLUMN.values()).gradients.items():
            assert not name.startswith("batch.") or not gradient.any(), \
                f"the loss is differentiated in {name}; pass it through ops.stop_gradient"

    def test_reads_what_it_names_and_nothing_else(self, component: Objective) -> None:
        """The loop computes exactly what is named; what is named and missing is a `ValueError` that says so."""
        assert component.needs <= set(Need) and component.outputs <= set(Output), \
            f"{named(component)} names needs or outputs that there are not: {component.needs}, {component.outputs}"
        assert component.unit in ("action", "episode", "group"), f"unit is {component.unit!r}"
        part = part_of(self._step(1, *LARGER), component)
        expected = evaluate(component, part)
        unused = {COLUMN[n] for n in set(COLUMN) - component.needs} - {"old_logprobs"}
        cases = {f"MicroBatch.{n}": with_columns(part, **{n: None}) for n in sorted(unused)}
        cases |= {f"TokenOutputs.{OUTPUT[o]}": _without_output(part, OUTPUT[o])
                  for o in OUTPUT if o not in component.outputs}
        for name, without in cases.items():
            try:
                found = evaluate(component, without)
            except Exception as error:
                raise AssertionError(f"{named(component)} reads {name}, which neither needs nor outputs name: "
                                     f"{type(error).__name__}: {error}") from error
            assert found.value == expected.value, f"the loss depends on {name}, which neither needs nor outputs name"
        missing = {COLUMN[n]: with_columns(part, **{COLUMN[n]: None})
                   for n in component.needs if n in COLUMN and COLUMN[n] not in BEFORE}
        missing |= {OUTPUT[o]: _without_output(part, OUTPUT[o])
                    for o in component.outputs if o in OUTPUT and o != Output.LOGPROBS}
        for name, without in missing.items():
            try:
                evaluate(component, without)
            except ValueError as error:
                assert name in str(error), f"the error of a missing {name} does not name it: {error}"
            except Exception as error:
                raise AssertionError(f"a missing {name} must be a ValueError that names it, got "
                                     f"{type(error).__name__}: {error}") from error
            else:
                pytest.fail(f"{named(component)} names {name} and does not miss it")

    def test_without_old_columns_nothing_has_moved(self, component: Objective) -> None:
        """With one step per rollout the loop scores nothing beforehand: a missing `old_logprobs` or `old_values` means
        the model's own, without gradient. A `ValueError` is right where `needs` names the column."""
        framework = next(iter(_frameworks()), "numpy")
        part = part_of(self._step(6, *LARGER), component)
        for column, output in BEFORE.items():
            same = with_columns(part, **{column: getattr(part.out, output)})
            expected = evaluate(component, same, framework)
            need = next(n for n, c in COLUMN.items() if c == column)
            try:
                found = evaluate(component, with_columns(part, **{column: None}), framework)
            except ValueError:
                assert need in component.needs, f"{named(component)} refuses a missing {column} and does not name " \
                                                f"it: add Need.{need.name} to needs, or take the outputs themselves"
                continue
            assert_close(found.value, expected.value, self.tolerance,
                          f"without {column} the loss is not that of a model which has not moved")
            for name, gradient in expected.gradients.items():
                assert_close(found.gradients[name], gradient, self.tolerance,
                              f"without {column} the gradient in {name} is not that of a model which has not moved: "
                              f"take ops.stop_gradient(out.{output})")

    def test_slots_are_those_given(self, component: Objective) -> None:
        """Where gradients of several rewards are combined, each slot holds the loss of its own advantages."""
        part = part_of(self._step(7, *LARGER), component)
        alone = evaluate(component, part)
        assert alone.terms, f"{named(component)} gives no term"
        stray = set(alone.slots.values()) - set(component.slots)
        assert not stray, f"terms stand in slots {stray}, slots are {component.slots}"
        if "slots" not in {f.name for f in config_fields(component)} or Need.ADVANTAGES not in component.needs:
            return
        names, A = ("first", "second"), np.asarray(part.batch.advantages)
        several = replace(component, slots=names)  # type: ignore[type-var]  # components are dataclasses
        assert several.slots == names, f"slots={names} gives {several.slots}"
        rows = np.stack([A, -2.0 * np.roll(A, 1)])
        both = with_columns(part, advantages=rows)
        framework = next(iter(_frameworks()), "numpy")
        assert set(evaluate(several, both).slots.values()) == set(names), "every slot must have a term"
        for name, row in zip(names, rows, strict=True):
            expected = evaluate(component, with_columns(part, advantages=row), framework)
            found = evaluate(several, both, framework, slot=name)
            assert_close(found.value, expected.value, self.tolerance, f"slot {name} is not the loss of its advantages")
            for output, gradient in expected.gradients.items():
                assert_close(found.gradients[output], gradient, self.tolerance,
                              f"the gradient of slot {name} in {output} is not that of its advantages")

    def test_metrics_are_totals_with_weights(self, component: Objective) -> None:
        """A metric is (total, weight), numbers outside the gradient, so that parts and ranks add up."""
        part = part_of(self._step(8, *LARGER), component)
        loss = component(ops_of(part.out.logprobs), part.out, part.batch, COEF)
        for name, term in loss.terms.items():
            assert np.shape(term.total) == (), f"term {name} has shape {np.shape(term.total)}: sum it by weight"
        for name, pair in loss.metrics.items():
            assert np.shape(pair) == (2,), \
                f"metric {name} must be (total, weight), two numbers, got {pair!r}"
            assert np.isfinite([float(x) for x in pair]).all() and float(pair[1]) >= 0, f"metric {name} is {pair}"
        for framework in _frameworks()[:1]:
            evaluate(component, part, framework)  # refuses metrics that carry a gradient

    def test_is_pure(self, component: Objective) -> None:
        """It changes nothing it is given, and says the same when asked again: parts may be done twice."""
        part = part_of(self._step(9, *LARGER), component)
        arrays = {**outputs_of(part.out), **{name: x for name in (*COLUMN.values(), *WEIGHTS, "count", "episode")
                                             if (x := getattr(part.batch, name)) is not None}}
        before = {name: np.copy(x) for name, x in arrays.items()}
        first, second = (component(ops_of(part.out.logprobs), part.out, part.batch, COEF) for _ in range(2))
        for name, x in arrays.items():
            assert np.array_equal(x, before[name]), f"{named(component)} changed {name}"
        for name, term in first.terms.items():
            assert np.array_equal(term.total, second.terms[name].total), f"term {name} differs when asked again"

    def test_may_be_a_static_argument(self, component: Objective) -> None:
        """A compiled function takes it as a constant: an equal one compiles nothing again, and inside a trace it needs
        no number of the batch, only shapes."""
        equal = replace(component)  # type: ignore[type-var]  # components are dataclasses
        assert equal == component and hash(equal) == hash(component), f"equal {named(component)} have unequal hashes"
        make = installed_frameworks().get("jax")
        if make is None:
            pytest.skip("not measured: JAX is not installed")
        part, traces = self._parts("jax", component)[0], list[int]()

        def compiled(objective: Objective, out: dict[str, Any], arrays: dict[str, Any]) -> Any:
            traces.append(1)
            batch = replace(part.batch, **arrays)
            return total_of(objective(ops_of(out["logprobs"]), TokenOutputs(**out), batch, COEF))
        with in_float64("jax"):
            out = {name: make(x) for name, x in outputs_of(part.out).items()}
            batch = converted(part.batch, make, np.float64)
            arrays = {name: x for name in batch.__dataclass_fields__
                      if name not in ("temperature", "constants") and (x := getattr(batch, name)) is not None}
            run = import_module("jax").jit(compiled, static_argnums=0)
            try:
                found = [float(run(objective, out, arrays)) for objective in (component, equal)]
            except Exception as error:
                raise AssertionError(f"{named(component)} cannot be compiled; in a trace it may look at shapes, at no "
                                     f"number: {type(error).__name__}: {error}") from error
        assert len(traces) == 1, f"an equal {type(component).__name__} was compiled again"
        assert_close(found[0], evaluate(component, part).value, 1e-12, "the compiled loss differs")

    # ---- steps

    def _step(self, seed: int, lengths: Sequence[int], group: Sequence[int], *, fixed: bool = False) -> Step:
        """A random step; `fixed` rejects nothing and has two value heads, so that JAX compiles one shape."""
        if self.group_size:
            lengths = list(lengths) * self.group_size
            group = [e // self.group_size for e in range(len(lengths))]
        return step_of(seed, lengths, group, reject=not (fixed or self.group_size), heads=2 if fixed else 0)

    def _parts(self, framework: str, component: Objective) -> list[Part]:
        """Steps whose gradients are looked at: many in torch, few of one shape in JAX, which compiles for each."""
        seeds, fixed = (range(2), True) if framework == "jax" else (range(8), False)
        return [part_of(self._step(seed, *LARGER, fixed=fixed), component) for seed in seeds]


LARGER: tuple[list[int], list[int]] = [3, 1, 5, 2, 4, 1], [0, 0, 1, 2, 1, 2]
"""Lengths and groups of fixed steps."""


def _frameworks() -> list[str]:
    """Frameworks that differentiate and are installed, the quickest first."""
    return sorted(installed_frameworks(), reverse=True)


def differentiating() -> list[str]:
    """The same; without one the test is not measured."""
    return _frameworks() or pytest.skip("not measured: neither torch nor JAX is installed")


def _columns(component: Objective, counts: Counts) -> dict[str, np.ndarray]:
    """The weight columns that the objective gives."""
    weights = component.weights(counts)
    require_one_per_kept_action(weights, counts, component)
    return {name: column for name in WEIGHTS if (column := getattr(weights, name)) is not None}


def _without_output(part: Part, name: str) -> Part:
    """Without an output; log-probs are always there, so others take their place."""
    return with_outputs(part, **{name: part.out.logprobs - 1.0 if name == "logprobs" else None})


def _values(found: Evaluated) -> dict[str, float]:
    """What metrics show."""
    return {name: total / weight for name, (total, weight) in found.metrics.items() if weight}
