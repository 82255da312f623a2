"""Contract of backends that load a model, score tokens with it and train it; what concerns scoring is in `scorers.py`.

All is asked through `Learner`, in NumPy; what a model looks like inside, nobody knows here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from posttrain.batching import StepData
from posttrain.comm import SingleProcess
from posttrain.data import Metrics
from posttrain.errors import Diverged, PosttrainError
from posttrain.protocols import (
    Adapted,
    Comparing,
    Learner,
    Optimization,
    Output,
    Scorer,
)
from posttrain.testing.scorers import COLUMNS, POLICY, ModelContract, behind
from posttrain.testing.tiny_models import (
    LOGPROBS,
    PLAIN,
    STEP,
    TRAINING,
    Named,
    Probe,
    TwoAlike,
    accumulate,
    disturbed,
    flat,
    floats_of,
    is_float,
    log_table,
    loss_of,
    move,
    refused,
    step_data,
    unequal,
    weights_of,
)

_TRAINED = POLICY | {Output.VALUES, Output.REFERENCE_KL}
"""What a loss is made of here."""
_PARTS: tuple[list[list[int]], ...] = (
    [[0, 1, 2, 3], [4, 5, 6, 7]], [[7, 2], [], [0, 4, 1], [5, 3, 6]], [[e] for e in range(8)])
"""Splits of eight episodes: in halves, in another order with an empty part, and one by one."""


class BackendContract(ModelContract):
    """Tests of a backend, and of the `Learner` that it loads.

    An author lists tiny models as components, and says how what one of them saved is loaded:

        class TestMine(BackendContract):
            components = (Mine(layers=1), Mine(layers=1, precision="float64"))

            def reloaded(self, component, folder):
                return Mine(weights=str(folder))
    """

    frozen: ClassVar[str] = ""
    """Part of the names in `params()` that no gradient reaches (buffers); tested both ways. Empty: none."""

    def reloaded(self, component: Any, folder: Path) -> Any:
        """A component that loads what `Learner.save` wrote to `folder`."""
        pytest.fail(f"{type(self).__name__} does not say how saved weights are loaded: def reloaded(self, component, "
                    "folder): return Mine(weights=str(folder))", pytrace=False)

    # ---- loading

    def test_a_model_for_scoring_refuses_to_train(self, component: Any) -> None:
        """A reference costs neither gradients nor moments, and a call that would train it says what is wrong."""
        scorer = self._load(component, None)
        with refused("accumulate on a model loaded without an optimizer", "optimization", "optimizer"):
            accumulate(scorer, self._data(), Probe())
        with refused("apply on a model loaded without an optimizer", "optimization", "optimizer"):
            scorer.apply()
        held, own = floats_of(scorer.state()), floats_of(weights_of(scorer))
        assert held <= own, f"a model loaded for scoring holds {held} numbers, its weights are {own}: no moments there"

    def test_an_objective_that_needs_what_it_lacks_is_refused_by_name(self, component: Any) -> None:
        """A missing capability is found when it is asked for, not as an attribute error in the middle of a run."""
        learner = self._load(component, TRAINING)
        for output in (o for o in Output if o not in learner.provides):
            with refused(f"an objective that needs {output}", output):
                accumulate(learner, self._data(heads=1), Probe(frozenset({Output.LOGPROBS, output})))

    # ---- scoring

    def test_scoring_leaves_a_step_alone(self, component: Any) -> None:
        """A step that is under way goes on as if nobody had asked."""
        learner, data = self._load(component, TRAINING), self._data()
        before = dict(learner.state())
        learner.score(data.rollouts, learner.provides, 0.9)
        assert not (wrong := unequal(before, learner.state())), f"scoring changed {wrong}"
        once = self._stepped(self._load(component, TRAINING), data)
        probe = self._probe(learner)
        accumulate(learner, data, probe, [range(4)])
        learner.score(data.rollouts, LOGPROBS, 1.0)
        accumulate(learner, data, probe, [range(4, 8)])
        learner.apply()
        self._assert_same_move(learner, before=weights_of(self._load(component, None)), got=weights_of(learner),
                               want=weights_of(once), what="scoring in the middle of a step changes the step")

    # ---- gradients

    def test_gradients_are_derivatives(self, component: Any) -> None:
        """Of every parameter, by differences of the loss along a random direction and along the gradient itself."""
        self._assert_derivatives(self._load(component, PLAIN), self._load(component, None))

    def test_the_kl_to_a_reference_is_that_of_the_vocabulary(self, component: Any) -> None:
        """Its value by scoring every continuation with both models, its gradient by differences; where the component
        says that it provides it."""
        if Output.REFERENCE_KL not in component.provides:
            return
        learner, scorer, reference = (self._load(component, how) for how in (PLAIN, None, None))
        reference.load_params(disturbed(weights_of(reference), 2, self.spread).items(), 0)
        for x in (learner, scorer):
            comparing = isinstance(x, Comparing)
            assert comparing, \
                f"{type(component).__name__} provides {Output.REFERENCE_KL}; its learner has no compare_with(reference)"
            x.compare_with(reference)
            assert Output.REFERENCE_KL in x.provides, f"compared with a reference, it does not provide " \
                f"{Output.REFERENCE_KL}"
        V, prefixes, asked = self._vocab, self._prefixes(), frozenset({Output.REFERENCE_KL})
        for temperature in (0.5, 1.0):
            logp, logq = (log_table(x, prefixes, V, temperature).astype(np.float64) for x in (learner, reference))
            self._assert_close(learner, learner.score(behind(prefixes), asked, temperature).reference_kl,
                               (np.exp(logp) * (logp - logq)).sum(axis=1),
                               f"the KL to the reference is not sum p (log p - log q) at temperature {temperature}")
        self._assert_derivatives(learner, scorer)

    def _assert_derivatives(self, learner: Learner, scorer: Scorer) -> None:
        """Of a learner loaded with `PLAIN`, by an equal model to score with."""
        data, probe, before = self._data(), self._probe(learner), weights_of(learner)
        gradients = self._gradients(learner, data, probe)
        exact = all(x.dtype == np.float64 for x in before.values() if is_float(x))
        step, allowed = (1e-5, 1e-5) if exact else (1e-3, 0.05)
        size, rng = float(np.linalg.norm(flat(gradients))), np.random.default_rng(0)
        assert size > 1e-4, "no parameter of params() has a gradient"

        def along(name: str, direction: np.ndarray) -> float:
            def loss(sign: float) -> float:
                moved = before | {name: (before[name] + sign * step * direction).astype(before[name].dtype)}
                scorer.load_params(moved.items(), 0)
                return loss_of(scorer, data, probe)
            return (loss(1.0) - loss(-1.0)) / (2 * step)
        for name, g in gradients.items():
            own = float(np.linalg.norm(g))
            if self._is_frozen(name):
                assert own == 0, f"the contract says that no gradient reaches {name}; a step moved it"
                continue
            directions = [rng.choice([-1.0, 1.0], g.shape)]
            if own > 0.01 * size:
                directions.append(g / own * math.sqrt(g.size))
            for direction in directions:
                measured, computed = along(name, direction), float((g * direction).sum())
                slack = allowed * max(own, 0.02 * size) * math.sqrt(max(1, g.size))
                assert abs(measured - computed) <= slack + 1e-9, (
                    f"the loss changes by {measured:.6g} along a direction in {name}, the gradient says {computed:.6g}")

    def test_the_loss_falls_as_the_gradient_says(self, component: Any) -> None:
        """By the step times the squared norm, everything that is trained included, value heads too."""
        for heads in self._heads(component, (0, 2)):
            small = replace(PLAIN, lr=PLAIN.lr / STEP * 1e-3)
            learner = self._trained(component, small, heads)
            data, probe = self._data(heads=heads), self._probe(learner)
            above = loss_of(learner, data, probe)
            accumulate(learner, data, probe)
            square = float(learner.gramian(["main"])[0, 0])
            learner.apply()
            fallen = (above - loss_of(learner, data, probe)) / 1e-3
            assert abs(fallen - square) <= 0.05 * square, \
                f"a small step lowers the loss by {fallen:.5g} of its length; the squared gradient is {square:.5g}"

    def test_any_split_gives_the_same_gradient(self, component: Any) -> None:
        """Micro-batches are a matter of memory (trl 2617, ms-swift 10117, verl 7110); empty parts add nothing."""
        for heads in self._heads(component, (0, 2))[-1:]:
            data, found = self._data(heads=heads), []
            for parts in (None, *_PARTS):
                learner = self._trained(component, PLAIN, heads)
                before, probe = weights_of(learner), self._probe(learner)
                metrics = accumulate(learner, data, probe, parts)
                gramian = learner.gramian(["main"])
                learner.apply()
                found.append((gramian, move(before, weights_of(learner)), learner, metrics))
            (gramian, whole, learner, metrics), *others = found
            for parts, (other_gramian, moved, other, other_metrics) in zip(_PARTS, others):
                self._assert_close_gradient(learner, moved, whole, f"the parts {parts} give another gradient")
                assert np.allclose(other_gramian, gramian, rtol=self._allowed(learner) * 10), \
                    f"the parts {parts} give another Gramian: {other_gramian} and {gramian}"
                self._assert_metrics_add(metrics, other_metrics, parts)
                if heads:
                    values = [x.score(data.rollouts, frozenset({Output.VALUES}), 1.0).values for x in (other, learner)]
                    assert np.abs(values[0] - values[1]).max() <= 1e-3 * np.abs(values[1]).max(), \
                        f"the parts {parts} move the value heads elsewhere"

    def test_discard_forgets_the_step(self, component: Any) -> None:
        """After running out of memory the same step is done again, bit for bit."""
        data, learner = self._data(), self._load(component, TRAINING)
        probe, before = self._probe(learner), dict(learner.state())
        accumulate(learner, data, probe, [[0, 1, 5]])
        learner.discard()
        assert not (wrong := unequal(before, learner.state())), f"accumulate and discard changed {wrong}"
        again = self._stepped(learner, data).state()
        fresh = self._stepped(self._load(component, TRAINING), data).state()
        assert not (wrong := unequal(again, fresh)), f"a step after discard differs from the step alone in {wrong}"

    def test_an_applied_step_is_forgotten(self, component: Any) -> None:
        """The next step begins without gradients: weights move as those of a learner that never took the first."""
        data, learner = self._data(), self._load(component, PLAIN)
        start = weights_of(learner)
        self._stepped(learner, data)
        learner.load_params(start.items(), 0)
        other = self._data(seed=5)
        got = self._gradients(learner, other, self._probe(learner))
        want = self._gradients(self._load(component, PLAIN), other, self._probe(learner))
        self._assert_close_gradient(learner, got, want, "a gradient of the step before is still there")

    def test_slots_mix_linearly(self, component: Any) -> None:
        """apply(w) moves by w[a] g_a + w[b] g_b, what is shared once; without weights by the sum. A slot without a
        weight is refused."""
        data = self._data(slots=2)
        both, moves = ("a", "b"), {}
        for weights in ({"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 1.0}, {"a": 0.3, "b": 2.0}, None):
            learner = self._load(component, PLAIN)
            moves[str(weights)] = self._gradients(learner, data, self._probe(learner, both), weights)
        only_a, only_b, mixed, total = (flat(m) for m in moves.values())
        alone = replace(data, columns={**data.columns, "advantages": np.zeros_like(data.columns["advantages"])})
        shared = flat(self._gradients(self._load(component, PLAIN), alone, self._probe(learner, both)))
        a, b = only_a - shared, only_b - shared
        largest = max(float(np.abs(a).max()), float(np.abs(b).max()))
        assert largest > 0, "no slot has a gradient"
        for got, want, what in ((mixed, 0.3 * a + 2.0 * b + shared, "apply({a: 0.3, b: 2})"),
                                (total, a + b + shared, "apply()")):
            off = float(np.abs(got - want).max())
            assert off <= 20 * self._allowed(learner) * largest, \
                f"{what} does not move the weights by the weighted sum of the slots' gradients: off by {off:.3g}"
        learner = self._load(component, PLAIN)
        accumulate(learner, data, self._probe(learner, both))
        with refused("apply({'a': 1.0}) where slot b has a gradient", "'b'", " b "):
            learner.apply({"a": 1.0})

    def test_gramian_holds_inner_products(self, component: Any) -> None:
        """[m, m] in float64, of the gradients that `apply` would mix; a pattern selects parameters by name."""
        data, slots = self._data(slots=2), ("a", "b")
        probe = Probe(LOGPROBS, slots)
        learner = self._load(component, PLAIN)
        accumulate(learner, data, probe)
        G = learner.gramian(slots)
        rows = [self._gradients(self._load(component, PLAIN), data, probe, dict(zip(slots, w)))
                for w in ((1.0, 0.0), (0.0, 1.0))]
        assert isinstance(G, np.ndarray) and G.shape == (2, 2) and G.dtype == np.float64, \
            "gramian must be a [2, 2] NumPy array of float64"
        self._assert_gramian(learner, G, rows, list(rows[0]), "gramian(['a', 'b'])")
        self._assert_gramian(learner, learner.gramian(slots[::-1]), rows[::-1], list(rows[0]), "gramian(['b', 'a'])")
        largest = max(rows[0], key=lambda name: float(np.abs(rows[0][name]).max()))
        pattern = f"^{largest}$"
        self._assert_gramian(learner, learner.gramian(slots, pattern), rows, [largest], f"gramian(.., {pattern!r})")
        with refused("a pattern that matches no parameter", "no_such_parameter"):
            learner.gramian(slots, "no_such_parameter")

    def test_ranks_are_summed_once(self, component: Any) -> None:
        """Weights already carry the counts of all ranks, so gradients are summed, never averaged, and never twice."""
        data, moves = self._data(), []
        for comm in (SingleProcess(), TwoAlike()):
            learner = self._load(component, PLAIN, comm=comm)
            before, probe = weights_of(learner), self._probe(learner)
            accumulate(learner, data, probe)
            gramian = learner.gramian(["main"])
            learner.apply()
            moves.append((move(before, weights_of(learner)), gramian))
        (one, G1), (two, G2) = moves
        self._assert_close_gradient(learner, two, {name: 2 * g for name, g in one.items()},
                                    "with two equal ranks the gradient is not twice that of one")
        assert np.allclose(G2, 4 * G1, rtol=1e-5), "gramian is not that of the sum over ranks"

    # ---- the step

    def test_clips_by_the_norm_of_all(self, component: Any) -> None:
        """One factor for all parameters, and only above `clip_norm`; `grad_norm` is the norm before it (RL2 clipped
        every rank on its own)."""
        data = self._data()
        plain = self._load(component, PLAIN)
        g = self._gradients(plain, data, self._probe(plain))
        for factor in (0.5, 10.0):
            learner = self._load(component, replace(PLAIN, clip_norm=factor * float(np.linalg.norm(flat(g)))))
            before = weights_of(learner)
            accumulate(learner, data, self._probe(learner))
            norm = math.sqrt(learner.gramian(["main"])[0, 0])
            metrics = learner.apply()
            got = {name: x / STEP for name, x in move(before, weights_of(learner)).items()}
            want = {name: min(1.0, factor) * x for name, x in g.items()}
            off = float(np.abs(flat(got) - flat(want)).max()) / float(np.abs(flat(want)).max())
            assert off < 1e-4, f"clip_norm at {factor:g} times the norm does not scale all by {min(1.0, factor):g}"
            assert math.isclose(metrics["grad_norm"].value, norm, rel_tol=1e-4), \
                f"metric grad_norm is {metrics['grad_norm'].value:.6g}, the gradient's norm before clipping {norm:.6g}"

    def test_steps_are_those_of_adamw(self, component: Any) -> None:
        """Three steps against the formulas of Loshchilov and Hutter 2019 (1711.05101), algorithm 2."""
        settings = Optimization(lr=0.02, betas=(0.8, 0.95), eps=0.01, weight_decay=0.1, clip_norm=0.0)
        try:
            learner = self._load(component, settings)
        except PosttrainError as error:
            assert "weight_decay" in str(error), f"weight decay is refused without naming weight_decay: {error}"
            settings = replace(settings, weight_decay=0.0)
            learner = self._load(component, settings)
        observer = self._load(component, PLAIN)
        m: dict[str, Any] = {}
        v: dict[str, Any] = {}
        for t in range(1, 4):
            data, before = self._data(seed=t), weights_of(learner)
            observer.load_params(before.items(), 0)
            g = self._gradients(observer, data, self._probe(learner))
            self._stepped(learner, data)
            after = weights_of(learner)
            for name in (n for n in g if not self._is_frozen(n)):
                m[name] = 0.8 * m.get(name, 0.0) + 0.2 * g[name]
                v[name] = 0.95 * v.get(name, 0.0) + 0.05 * g[name] ** 2
                moved = m[name] / (1 - 0.8**t) / (np.sqrt(v[name] / (1 - 0.95**t)) + 0.01)
                decay = settings.weight_decay * before[name] if before[name].ndim >= 2 else 0.0
                off = float(np.abs(after[name] - (before[name] - 0.02 * (moved + decay))).max())
                assert off < 1e-4 * 0.02 * max(1.0, float(np.abs(moved).max())) + 1e-6, \
                    f"step {t} moves {name} elsewhere than AdamW, off by {off:.3g} at a rate of 0.02"

    def test_the_rate_follows_its_schedule(self, component: Any) -> None:
        """Linear warm-up from 0, then constant, linear or cosine down to `lr * min_lr_ratio`; metric `lr` says it."""
        def after_warmup(shape: Callable[[float], float]) -> list[float]:
            return [0.0, *(0.2 + 0.8 * shape(p) for p in (0.0, 0.25, 0.5, 0.75, 1.0, 1.0))]
        schedules: list[tuple[Optimization, list[float]]] = [
            (Optimization(lr=0.01), [1.0, 1.0]), (Optimization(lr=0.01, warmup_steps=2), [0.0, 0.5, 1.0, 1.0])]
        for name, shape in (("linear", lambda p: 1 - p), ("cosine", lambda p: 0.5 * (1 + math.cos(math.pi * p)))):
            settings = Optimization(lr=0.01, schedule=name, warmup_steps=1, total_steps=5, min_lr_ratio=0.2)  # type: ignore[arg-type]  # one of the literals
            schedules.append((settings, after_warmup(shape)))
        data = self._data()
        for settings, expected in schedules:
            settings = replace(settings, betas=(0.0, 0.0), eps=1e-30, clip_norm=0.0)
            try:
                learner = self._load(component, settings)
            except PosttrainError as error:
                assert "schedule" in str(error), f"{settings.schedule} is refused without naming schedule: {error}"
                continue
            for t, factor in enumerate(expected):
                before, probe = weights_of(learner), self._probe(learner)
                accumulate(learner, data, probe)
                metrics = learner.apply()
                largest = float(np.abs(flat(move(before, weights_of(learner)))).max())
                rate = 0.01 * factor
                where = f"step {t} of schedule {settings.schedule}, warm-up {settings.warmup_steps}"
                assert abs(largest - rate) < 1e-3 * 0.01, f"{where}: the weights moved by {largest:.5g}, not {rate:.5g}"
                assert math.isclose(metrics["lr"].value, rate, rel_tol=1e-6, abs_tol=1e-12), \
                    f"{where}: metric lr says {metrics['lr'].value:.5g}, not {rate:.5g}"

    def test_version_counts_steps(self, component: Any) -> None:
        """Tokens are numbered by the weights that drew them."""
        learner, data = self._load(component, TRAINING), self._data()
        assert learner.version == 0, f"version is {learner.version} after a load"
        for expected in (1, 2):
            self._stepped(learner, data)
            assert learner.version == expected, f"version is {learner.version} after {expected} steps"
        learner.load_params(weights_of(learner).items(), 40)
        assert learner.version == 40, "load_params does not set the version it is given"

    def test_a_bad_gradient_is_skipped_and_counted(self, component: Any) -> None:
        """One NaN costs a step, not the weights; a run of them is `Diverged`."""
        learner, data = self._load(component, replace(TRAINING, max_bad_steps=2)), self._data()
        self._stepped(learner, data)
        bad = replace(self._probe(learner), spoil=float("nan"))
        for rounds in range(2):
            before = weights_of(learner)
            for _ in range(2):
                skipped = self._applied(learner, data, bad)["skipped"].value
                assert skipped == 1, f"metric skipped is {skipped} after a gradient that is not finite"
                assert not unequal(before, weights_of(learner)), "a gradient that is not finite changed the weights"
                assert learner.version == 1 + rounds, "a skipped step counts as a version"
            assert self._applied(learner, data, self._probe(learner))["skipped"].value == 0
            assert unequal(before, weights_of(learner)), "no step was taken after a skipped one"
            assert all(np.isfinite(x).all() for x in weights_of(learner).values()), "weights are not finite"
        before, version = weights_of(learner), learner.version
        for _ in range(2):
            self._applied(learner, data, bad)
        try:
            self._applied(learner, data, bad)
        except Diverged:
            assert learner.version == version and not unequal(before, weights_of(learner)), \
                "Diverged was raised after the weights or the version had changed"
        else:
            pytest.fail("max_bad_steps 2 and three bad gradients in a row: raise posttrain.errors.Diverged",
                        pytrace=False)

    # ---- weights and state

    def test_resumes_bit_for_bit(self, component: Any) -> None:
        """Weights, moments, schedule and counters (RL2 lost the moments, verl 2653 the controllers); copies, not
        views."""
        settings = Optimization(lr=0.05, warmup_steps=4)
        for heads in self._heads(component, (0, 2)):
            first, data = self._load(component, settings, heads), self._data(heads=heads)
            for seed in (0, 1):
                self._stepped(first, self._data(heads=heads, seed=seed))
            saved = dict(first.state())
            assert all(isinstance(x, np.ndarray) for x in saved.values()), "state() must hold NumPy arrays"
            kept = {name: x.copy() for name, x in saved.items()}
            self._stepped(first, data)
            assert not (wrong := unequal(kept, saved)), f"a later step changed what state() had returned: {wrong}"
            other = self._load(component, settings, heads, seed=9)
            accumulate(other, data, self._probe(other), [[2]])  # of a step that is given up
            other.load_state(kept)
            assert not (wrong := unequal(kept, other.state())), f"load_state does not bring back {wrong}"
            assert other.version == 2, f"version is {other.version} after load_state, it was saved at 2"
            self._stepped(other, data)
            assert not (wrong := unequal(first.state(), other.state())), \
                f"a step after load_state differs from the step without it in {wrong}"

    def test_refuses_the_state_of_another_model(self, component: Any) -> None:
        """A checkpoint of other sizes is an error that names what does not fit."""
        learner = self._load(component, TRAINING)
        state = dict(learner.state())
        name = max(state, key=lambda n: state[n].size)
        for wrong in ({n: x for n, x in state.items() if n != name}, state | {name: state[name][:-1]}):
            with refused(f"a state with another {name}, or none", name):
                learner.load_state(wrong)
        assert not unequal(state, learner.state()), "a refused state was loaded in part"

    def test_saved_weights_load_again(self, component: Any, tmp_path: Path) -> None:
        """What `save` wrote scores the same in a later run, values included."""
        data = self._rollouts()
        for heads in self._heads(component, (0, 2)):
            learner, folder = self._trained(component, TRAINING, heads), tmp_path / f"heads{heads}"
            self._stepped(learner, self._data(heads=heads))
            learner.save(folder)
            again = self.reloaded(component, folder).load(self._request(heads=heads, seed=7))
            a, b = (x.score(data, learner.provides, 0.9) for x in (learner, again))
            for output in learner.provides:
                self._assert_close(learner, getattr(b, COLUMNS[output]), getattr(a, COLUMNS[output]),
                                   f"{output} differ after save and load")

    def test_the_base_of_an_adapter_stays_as_it_was(self, component: Any) -> None:
        """The reference of a run that trains an adapter: the same before and after a step, and the adapter is back when
        it has been asked (a reference must not drift: NeMo-RL 3722). A learner without an adapter has no base."""
        learner, data = self._load(component, TRAINING), self._rollouts()
        base = learner.base() if isinstance(learner, Adapted) else None
        if base is None:
            return
        own, before = (x.score(data, LOGPROBS, 1.0).logprobs for x in (learner, base))
        assert np.array_equal(own, learner.score(data, LOGPROBS, 1.0).logprobs), "asking the base changes the learner"
        assert not np.allclose(own, before, atol=1e-3), "the base is scored with the adapter"
        self._stepped(learner, self._data())
        assert np.array_equal(before, base.score(data, LOGPROBS, 1.0).logprobs), "a step changes the base"
        again = learner.score(data, LOGPROBS, 1.0).logprobs
        assert not np.array_equal(own, again), "a step behind the base's scores does not change the adapter"

    # ---- what the tests are made of

    def _moving(self, component: Any) -> Any:
        return self._load(component, TRAINING)

    def _move(self, model: Any, seed: int) -> None:
        self._stepped(model, self._data(seed=seed))

    def _trained(self, component: Any, optimization: Optimization | None, heads: int) -> Any:
        """Two steps behind the load where there are value heads: those begin at 0, and nothing is read off zeros."""
        if not heads:
            return self._load(component, optimization)
        before = self._load(component, TRAINING, heads)
        for seed in (0, 1):
            self._stepped(before, self._data(heads=heads, seed=seed))
        learner = self._load(component, optimization or TRAINING, heads)
        learner.load_state(before.state())
        return learner

    def _data(self, slots: int = 1, heads: int = 0, seed: int = 0) -> StepData:
        return step_data(self._rollouts(seed), slots, heads, seed)

    def _probe(self, learner: Learner, slots: tuple[str, ...] = ("main",)) -> Probe:
        return Probe(learner.provides & _TRAINED, slots)

    def _applied(self, learner: Learner, data: StepData, probe: Probe) -> Metrics:
        accumulate(learner, data, probe)
        return learner.apply()

    def _stepped(self, learner: Any, data: StepData) -> Any:
        self._applied(learner, data, self._probe(learner))
        return learner

    def _gradients(self, learner: Learner, data: StepData, probe: Probe,
                   weights: Mapping[str, float] | None = None) -> Named:
        """By parameter, from a plain step of a learner that was loaded with `PLAIN`."""
        before = weights_of(learner)
        accumulate(learner, data, probe)
        learner.apply(weights)
        return {name: x / STEP for name, x in move(before, weights_of(learner)).items()}

    def _is_frozen(self, name: str) -> bool:
        return bool(self.frozen) and self.frozen in name

    def _assert_close_gradient(self, learner: Scorer, got: Named, want: Named, message: str) -> None:
        a, b = flat(got), flat(want)
        largest = float(np.abs(b).max())
        off = float(np.abs(a - b).max()) / largest
        assert off <= self._allowed(learner), f"{message}: off by {off:.3g} of the largest gradient"

    def _assert_same_move(self, learner: Scorer, before: Named, got: Named, want: Named, what: str) -> None:
        a, b = flat(move(before, got)), flat(move(before, want))
        assert np.abs(a - b).max() <= 1e-3 * np.abs(b).max(), what

    def _assert_gramian(self, learner: Scorer, G: np.ndarray, rows: Sequence[Named], names: Sequence[str],
                        what: str) -> None:
        J = np.stack([flat({name: row[name] for name in names}) for row in rows])
        want, bound = J @ J.T, 50 * self._allowed(learner) * float((J * J).sum())
        assert np.abs(G - want).max() <= bound, f"{what} is {G.tolist()}, the gradients' inner products are " \
            f"{want.tolist()}"

    def _assert_metrics_add(self, whole: Metrics, parts: Metrics, split: Any) -> None:
        for name, metric in whole.items():
            assert math.isclose(metric.value, parts[name].value, rel_tol=1e-4, abs_tol=1e-5), (
                f"metric {name} is {parts[name].value:.6g} over the parts {split}, {metric.value:.6g} over the whole")
