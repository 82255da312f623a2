"""Contract of backends, which load a model, score tokens with it and train it.

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
from posttrain.comm import Comm, SingleProcess
from posttrain.data import Metrics, Rollouts, TokenOutputs
from posttrain.errors import Diverged, PosttrainError
from posttrain.protocols import (
    Adapted,
    Backend,
    Comparing,
    Learner,
    LoadRequest,
    Optimization,
    Output,
    Scorer,
    TokenizerSource,
)
from posttrain.testing.contract import ComponentContract
from posttrain.testing.tiny_models import (
    LOGPROBS,
    PLAIN,
    STEP,
    TRAINING,
    Named,
    Probe,
    TwoAlike,
    accumulate,
    all_continuations,
    disturbed,
    flat,
    floats_of,
    is_float,
    log_table,
    loss_of,
    move,
    random_rollouts,
    refused,
    sequences_apart,
    step_data,
    unequal,
    weights_of,
    with_actions_changed_behind,
)
from posttrain.tokenizers import Characters

_COLUMNS: Mapping[Output, str] = {
    Output.LOGPROBS: "logprobs", Output.ENTROPY: "entropy", Output.VALUES: "values",
    Output.BOOTSTRAP_VALUES: "bootstrap_values", Output.ACTION_VALUES: "action_values",
    Output.EXPECTED_ACTION_VALUES: "expected_action_values", Output.REFERENCE_KL: "reference_kl"}
"""Field of `TokenOutputs` that each output stands for."""
_POLICY = frozenset({Output.LOGPROBS, Output.ENTROPY})
_VALUES = frozenset({Output.VALUES, Output.BOOTSTRAP_VALUES})
_TRAINED = _POLICY | {Output.VALUES, Output.REFERENCE_KL}
"""What a loss is made of here."""
_PARTS: tuple[list[list[int]], ...] = (
    [[0, 1, 2, 3], [4, 5, 6, 7]], [[7, 2], [], [0, 4, 1], [5, 3, 6]], [[e] for e in range(8)])
"""Splits of eight episodes: in halves, in another order with an empty part, and one by one."""


class OnModels(ComponentContract):
    """What backends and engines are tried with."""

    tokenizer: ClassVar[TokenizerSource] = Characters("abcdef")
    """Its vocabulary is the model's; every token of it is scored, so it should be small."""
    spread: ClassVar[float] = 0.3
    """Standard deviation of the noise that is added to all weights first: what is 0 or uniform hides mistakes."""

    def disturbed_learner(self, component: Any, request: LoadRequest) -> Any:
        """A learner whose weights are noise around what was loaded; equal for equal requests."""
        learner = component.load(request)
        learner.load_params(disturbed(weights_of(learner), 1, self.spread).items(), 0)
        return learner


class BackendContract(OnModels):
    """Tests of a backend, and of the `Learner` that it loads.

    An author lists tiny models as components, and says how what one of them saved is loaded:

        class TestMine(BackendContract):
            components = (Mine(layers=1), Mine(layers=1, precision="float64"))

            def reloaded(self, component, folder):
                return Mine(weights=str(folder))
    """

    kind = "backend"
    protocol = Backend
    tolerance: ClassVar[float] = 0.0
    """Of gradients, relative to the largest, and of scores in nats; 0 takes 5e-6 for weights in float32 and 1e-11 in
    float64. Wider only where the arithmetic is coarser, as with quantised weights."""
    seeded: ClassVar[bool] = True
    """Whether `LoadRequest.seed` decides some of the first weights; tested both ways."""
    frozen: ClassVar[str] = ""
    """Part of the names in `params()` that no gradient reaches (buffers); tested both ways. Empty: none."""

    def reloaded(self, component: Any, folder: Path) -> Any:
        """A component that loads what `Learner.save` wrote to `folder`."""
        pytest.fail(f"{type(self).__name__} does not say how saved weights are loaded: def reloaded(self, component, "
                    "folder): return Mine(weights=str(folder))", pytrace=False)

    # ---- loading

    def test_equal_seeds_load_equal_weights(self, component: Any) -> None:
        """A run can be repeated; another seed is another run wherever something is drawn."""
        before = np.random.get_state(legacy=False)
        first, same, other = (weights_of(component.load(self._request(seed=seed))) for seed in (3, 3, 4))
        assert not unequal(first, same), f"two loads with seed 3 differ in {unequal(first, same)}"
        assert bool(unequal(first, other)) == self.seeded, \
            f"loads with seeds 3 and 4 are {'equal' if self.seeded else 'different'}, the contract says seeded = " \
            f"{self.seeded}"
        assert str(before) == str(np.random.get_state(legacy=False)), \
            "loading draws from NumPy's global generator; make one of LoadRequest.seed"

    def test_a_model_for_scoring_refuses_to_train(self, component: Any) -> None:
        """A reference costs neither gradients nor moments, and a call that would train it says what is wrong."""
        scorer = self._load(component, None)
        with refused("accumulate on a model loaded without an optimizer", "optimization", "optimizer"):
            accumulate(scorer, self._data(), Probe())
        with refused("apply on a model loaded without an optimizer", "optimization", "optimizer"):
            scorer.apply()
        held, own = floats_of(scorer.state()), floats_of(weights_of(scorer))
        assert held <= own, f"a model loaded for scoring holds {held} numbers, its weights are {own}: no moments there"

    def test_what_it_lacks_is_refused_by_name(self, component: Any) -> None:
        """A missing capability is found when it is asked for, not as an attribute error in the middle of a run."""
        learner = self._load(component, TRAINING)
        asked = [output for output in Output if output not in learner.provides and output != Output.LOGPROBS]
        assert learner.provides <= component.provides, \
            f"the learner provides {sorted(learner.provides - component.provides)}, which the component does not say"
        for output in asked:
            with refused(f"scoring {output} without providing it", output):
                learner.score(self._rollouts(), frozenset({Output.LOGPROBS, output}), 1.0)
            with refused(f"an objective that needs {output}", output):
                accumulate(learner, self._data(heads=1), Probe(frozenset({Output.LOGPROBS, output})))
        if not component.provides >= _VALUES:
            with refused("a load with value heads", "values", "value_heads", "value heads"):
                component.load(self._request(heads=1))

    # ---- scoring

    def test_says_what_it_provides_and_only_what_is_asked(self, component: Any) -> None:
        """[N] numbers of each kind in the rollout's order, [k, N] values and [k, E] bootstrap values; nothing is
        computed that nobody asked for."""
        data = self._rollouts()
        N, E = len(data.source), data.n_episodes
        for heads in self._heads(component, (0, 1, 3)):
            learner = self._load(component, None, heads)
            assert (learner.provides >= _VALUES) == (heads > 0), \
                f"with {heads} value heads the learner provides {sorted(learner.provides)}"
            for asked in (LOGPROBS, learner.provides):
                out = learner.score(data, asked, 1.0)
                for output, field in _COLUMNS.items():
                    found, shape = getattr(out, field), self._shape(output, heads, N, E)
                    if output in asked:
                        assert isinstance(found, np.ndarray) and found.shape == shape, \
                            f"{output} must be a NumPy array of shape {shape}, got {getattr(found, 'shape', found)}"
                        assert np.isfinite(found).all(), f"{output} are not finite"
                    elif output != Output.LOGPROBS:
                        assert found is None, f"{output} were computed, though nobody asked for them"

    def test_scores_are_logarithms_of_probabilities(self, component: Any) -> None:
        """Over the whole vocabulary they sum to 1, and the entropy is theirs (a fused kernel once returned positive
        log-probs: verl 2656)."""
        learner, V = self._load(component, None), self._vocab
        outputs, prefixes = learner.provides & _POLICY, self._prefixes()
        for temperature in (0.5, 1.0, 2.0):
            table = log_table(learner, prefixes, V, temperature)
            assert (table <= self._allowed(learner)).all(), \
                f"log-probs up to {table.max():.3g} at temperature {temperature}"
            off = float(np.abs(np.exp(table).sum(axis=1) - 1).max())
            assert off < 10 * self._allowed(learner), \
                f"probabilities of the vocabulary sum to 1 {off:+.3g} at temperature {temperature}"
            if Output.ENTROPY in outputs:
                first = _behind(prefixes)
                got = learner.score(first, outputs, temperature).entropy
                want = -(np.exp(table) * table).sum(axis=1)
                self._assert_close(learner, got, want, f"entropy is not -sum p log p at temperature {temperature}")
                assert (got >= -1e-6).all() and (got <= math.log(V) + 1e-6).all(), "entropy lies outside [0, log V]"

    def test_temperature_divides_the_logits(self, component: Any) -> None:
        """Sampler and trainer mean the same distribution."""
        learner, V, prefixes = self._load(component, None), self._vocab, self._prefixes()
        plain = log_table(learner, prefixes, V, 1.0)
        for temperature in (0.5, 1.7):
            z = plain / temperature
            want = z - np.logaddexp.reduce(z, axis=1, keepdims=True)
            self._assert_close(learner, log_table(learner, prefixes, V, temperature), want,
                               f"log-probs at temperature {temperature} are not those of logits / temperature")

    def test_an_episode_is_scored_alike_in_any_company(self, component: Any) -> None:
        """Batch, order, split into calls, packing and padding change nothing."""
        for heads in self._heads(component, (0, 2))[-1:]:
            learner = self._trained(component, None, heads)
            data = self._rollouts()
            whole = _by_episode(learner.score(data, learner.provides, 0.8), data)
            for order in ([3], [7, 6, 5, 4, 3, 2, 1, 0], [2, 0], [1, 5, 0]):
                part = data.select(np.array(order))
                got = _by_episode(learner.score(part, learner.provides, 0.8), part)
                for place, e in enumerate(order):
                    for name, rows in whole.items():
                        self._assert_close(learner, got[name][place], rows[e], f"{name} of episode {e} depend on which "
                                           f"episodes are scored beside it (here {order})")

    def test_sees_no_future_and_no_other_sequence(self, component: Any) -> None:
        """A log-prob depends on the tokens before it in its own sequence."""
        learner, data = self._load(component, None), self._rollouts()
        outputs = learner.provides & _POLICY
        changed, before = with_actions_changed_behind(data, self._vocab)
        a, b = (learner.score(x, outputs, 1.0).logprobs for x in (data, changed))
        self._assert_close(learner, a[before], b[before], "log-probs depend on a later token")
        self._assert_close(learner, learner.score(sequences_apart(data), outputs, 1.0).logprobs, a,
                           "log-probs depend on the other sequence of their episode")

    def test_depends_on_the_token_before(self, component: Any) -> None:
        """Otherwise the positions are shifted: log-probs would be those of the neighbour."""
        learner, V = self._load(component, None), self._vocab
        table = log_table(learner, [[2, token] for token in range(V)], V, 1.0)
        spread = float(np.ptp(table, axis=0).max())
        assert spread > 0.01, "the same log-probs follow on every token; is the right position read?"

    def test_scoring_changes_nothing(self, component: Any) -> None:
        """Asked twice it says the same, and a step that is under way goes on as if nobody had asked."""
        learner, data = self._load(component, TRAINING), self._data()
        before = dict(learner.state())
        a, b = (learner.score(data.rollouts, learner.provides, 0.9).logprobs for _ in range(2))
        assert np.array_equal(a, b), "a second call gives other log-probs"
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
            self._assert_close(learner, learner.score(_behind(prefixes), asked, temperature).reference_kl,
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

    def test_weights_carry_over_to_another_learner(self, component: Any) -> None:
        """`params` into `load_params` gives equal scores, after an update too and with all buffers; not the same
        memory."""
        data = self._rollouts()
        first, second = self._load(component, TRAINING), self._load(component, None)
        for version in (1, 2):
            self._stepped(first, self._data(seed=version))
            second.load_params(first.params(), version)
            a, b = (x.score(data, LOGPROBS, 0.9).logprobs for x in (first, second))
            self._assert_close(second, b, a, f"scores differ after load_params, {version} updates later")
        self._stepped(first, self._data(seed=3))
        assert np.array_equal(second.score(data, LOGPROBS, 0.9).logprobs, b), \
            "load_params keeps the arrays it was given: a step of one learner moves the other"
        assert not np.array_equal(first.score(data, LOGPROBS, 0.9).logprobs, a), "a step does not change scores"
        names = [name for name, _ in first.params()]
        assert len(names) == len(set(names)), "params() says a name twice"
        assert unequal(weights_of(first), weights_of(second)), "params() does not show what a step changed"

    def test_refuses_weights_that_do_not_fit(self, component: Any) -> None:
        """By name, and nothing is written: half of another model's weights is no model."""
        learner, data = self._load(component, None), self._rollouts()
        own = weights_of(learner)
        before = learner.score(data, LOGPROBS, 1.0).logprobs
        name = sorted(own)[-1]
        doubled = {n: 2 * x for n, x in own.items()}
        for wrong, what in (({n: x for n, x in doubled.items() if n != name}, name),
                            (doubled | {"no_such_weight": np.zeros(3, np.float32)}, "no_such_weight"),
                            (doubled | {name: np.zeros((3, 1), np.float32)}, name)):
            with refused(f"a set of weights with {what} wrong", what):
                learner.load_params(wrong.items(), 1)
            assert np.array_equal(before, learner.score(data, LOGPROBS, 1.0).logprobs), \
                "a refused set of weights was loaded in part"

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
                self._assert_close(learner, getattr(b, _COLUMNS[output]), getattr(a, _COLUMNS[output]),
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

    @property
    def _vocab(self) -> int:
        return self.tokenizer.load().vocab_size

    def _request(self, optimization: Optimization | None = None, heads: int = 0, seed: int = 0,
                 comm: Comm = SingleProcess()) -> LoadRequest:
        return LoadRequest(self._vocab, heads, seed=seed, optimization=optimization, comm=comm)

    def _load(self, component: Any, optimization: Optimization | None, heads: int = 0, seed: int = 0,
              comm: Comm = SingleProcess()) -> Any:
        return self.disturbed_learner(component, self._request(optimization, heads, seed, comm))

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

    def _heads(self, component: Any, counts: Sequence[int]) -> list[int]:
        return [n for n in counts if n == 0 or component.provides >= _VALUES]

    def _rollouts(self, seed: int = 0) -> Rollouts:
        return random_rollouts(self._vocab, seed)

    def _data(self, slots: int = 1, heads: int = 0, seed: int = 0) -> StepData:
        return step_data(self._rollouts(seed), slots, heads, seed)

    def _prefixes(self) -> list[list[int]]:
        rng = np.random.default_rng(2)
        return [rng.integers(0, self._vocab, n).tolist() for n in (1, 2, 5, 5, 9)]

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

    def _shape(self, output: Output, heads: int, N: int, E: int) -> tuple[int, ...]:
        return {Output.VALUES: (heads, N), Output.BOOTSTRAP_VALUES: (heads, E)}.get(output, (N,))

    def _allowed(self, learner: Scorer) -> float:
        if self.tolerance:
            return self.tolerance
        exact = all(x.dtype == np.float64 for x in weights_of(learner).values() if is_float(x))
        return 1e-11 if exact else 5e-6

    def _assert_close(self, learner: Scorer, got: np.ndarray, want: np.ndarray, message: str) -> None:
        off = float(np.max(np.abs(np.asarray(got, np.float64) - want), initial=0.0))
        bound = 5 * self._allowed(learner) * max(1.0, float(np.max(np.abs(want), initial=0.0)))
        assert np.shape(got) == np.shape(want) and off <= bound, f"{message}: off by {off:.3g}, allowed {bound:.3g}"

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


def _behind(prefixes: Sequence[Sequence[int]]) -> Rollouts:
    """Token 0 behind every prefix."""
    return all_continuations(prefixes, 1)


def _by_episode(out: TokenOutputs, rollouts: Rollouts) -> dict[str, list[np.ndarray]]:
    """Column -> its numbers by episode."""
    episode = rollouts.action_episode
    found: dict[str, list[np.ndarray]] = {}
    for name in ("logprobs", "entropy", "values"):
        if (column := getattr(out, name)) is not None:
            found[name] = [np.asarray(column)[..., episode == e] for e in range(rollouts.n_episodes)]
    if out.bootstrap_values is not None:
        found["bootstrap_values"] = [np.asarray(out.bootstrap_values)[:, e] for e in range(rollouts.n_episodes)]
    return found
