"""Contract of backends whose model scores tokens and learns nothing, and what those that learn owe beside it.

All is asked through `Scorer`, in NumPy; what a model looks like inside, nobody knows here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from posttrain.comm import Comm, SingleProcess
from posttrain.data import Rollouts, TokenOutputs
from posttrain.protocols import Backend, Frozen, LoadRequest, Optimization, Output, Scorer, TokenizerSource
from posttrain.testing.contract import ComponentContract
from posttrain.testing.tiny_models import (
    LOGPROBS,
    TRAINING,
    all_continuations,
    disturbed,
    is_float,
    log_table,
    random_rollouts,
    refused,
    sequences_apart,
    unequal,
    weights_of,
    with_actions_changed_behind,
)
from posttrain.tokenizers import Characters

COLUMNS: Mapping[Output, str] = {
    Output.LOGPROBS: "logprobs", Output.ENTROPY: "entropy", Output.VALUES: "values",
    Output.BOOTSTRAP_VALUES: "bootstrap_values", Output.ACTION_VALUES: "action_values",
    Output.EXPECTED_ACTION_VALUES: "expected_action_values", Output.REFERENCE_KL: "reference_kl"}
"""Field of `TokenOutputs` that each output stands for."""
POLICY = frozenset({Output.LOGPROBS, Output.ENTROPY})
VALUES = frozenset({Output.VALUES, Output.BOOTSTRAP_VALUES})


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


class ModelContract(OnModels):
    """What every backend owes, whether its model learns or not: tests of loading, scoring and weights."""

    kind = "backend"
    protocol = Backend
    tolerance: ClassVar[float] = 0.0
    """Of gradients, relative to the largest, and of scores in nats; 0 takes 5e-6 for weights in float32 and 1e-11 in
    float64. Wider only where the arithmetic is coarser, as with quantised weights."""
    seeded: ClassVar[bool] = True
    """Whether `LoadRequest.seed` decides some of the first weights; tested both ways."""

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

    def test_what_it_lacks_is_refused_by_name(self, component: Any) -> None:
        """A missing capability is found when it is asked for, not as an attribute error in the middle of a run."""
        scorer = self._moving(component)
        assert scorer.provides <= component.provides, \
            f"the model provides {sorted(scorer.provides - component.provides)}, which the component does not say"
        for output in (o for o in Output if o not in scorer.provides):
            with refused(f"scoring {output} without providing it", output):
                scorer.score(self._rollouts(), frozenset({Output.LOGPROBS, output}), 1.0)
        if not component.provides >= VALUES:
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
            assert (learner.provides >= VALUES) == (heads > 0), \
                f"with {heads} value heads the learner provides {sorted(learner.provides)}"
            for asked in (LOGPROBS, learner.provides):
                out = learner.score(data, asked, 1.0)
                for output, field in COLUMNS.items():
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
        outputs, prefixes = learner.provides & POLICY, self._prefixes()
        for temperature in (0.5, 1.0, 2.0):
            table = log_table(learner, prefixes, V, temperature)
            assert (table <= self._allowed(learner)).all(), \
                f"log-probs up to {table.max():.3g} at temperature {temperature}"
            off = float(np.abs(np.exp(table).sum(axis=1) - 1).max())
            assert off < 10 * self._allowed(learner), \
                f"probabilities of the vocabulary sum to 1 {off:+.3g} at temperature {temperature}"
            if Output.ENTROPY in outputs:
                first = behind(prefixes)
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
        outputs = learner.provides & POLICY
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
        """Asked twice it says the same."""
        scorer, data = self._moving(component), self._rollouts()
        before = weights_of(scorer)
        a, b = (scorer.score(data, scorer.provides, 0.9).logprobs for _ in range(2))
        assert np.array_equal(a, b), "a second call gives other log-probs"
        assert not (wrong := unequal(before, weights_of(scorer))), f"scoring changed {wrong}"

    # ---- weights

    def test_weights_carry_over_to_another_model(self, component: Any) -> None:
        """`params` into `load_params` gives equal scores, after an update too and with all buffers; not the same
        memory."""
        data = self._rollouts()
        first, second = self._moving(component), self._load(component, None)
        for version in (1, 2):
            self._move(first, version)
            second.load_params(first.params(), version)
            a, b = (x.score(data, LOGPROBS, 0.9).logprobs for x in (first, second))
            self._assert_close(second, b, a, f"scores differ after load_params, {version} updates later")
        self._move(first, 3)
        assert np.array_equal(second.score(data, LOGPROBS, 0.9).logprobs, b), \
            "load_params keeps the arrays it was given: an update of one model moves the other"
        assert not np.array_equal(first.score(data, LOGPROBS, 0.9).logprobs, a), "an update does not change scores"
        names = [name for name, _ in first.params()]
        assert len(names) == len(set(names)), "params() says a name twice"
        assert unequal(weights_of(first), weights_of(second)), "params() does not show what an update changed"
        given = weights_of(first)
        second.load_params(given.items(), 4)
        b = second.score(data, LOGPROBS, 0.9).logprobs
        for x in given.values():
            x[...] = 0
        assert np.array_equal(second.score(data, LOGPROBS, 0.9).logprobs, b), \
            "load_params keeps the NumPy arrays it was given: what is written to them later moves the model"

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

    def _moving(self, component: Any) -> Any:
        """A model whose weights change in the course of a run: of one that learns, a learner."""
        return self._load(component, None)

    def _move(self, model: Any, seed: int) -> None:
        """One update of what `_moving` gives."""
        model.load_params(disturbed(weights_of(model), 10 + seed, self.spread).items(), seed)

    def _trained(self, component: Any, optimization: Optimization | None, heads: int) -> Any:
        """A model whose value heads say something."""
        return self._load(component, optimization, heads)

    def _heads(self, component: Any, counts: Sequence[int]) -> list[int]:
        return [n for n in counts if n == 0 or component.provides >= VALUES]

    def _rollouts(self, seed: int = 0) -> Rollouts:
        return random_rollouts(self._vocab, seed)

    def _prefixes(self) -> list[list[int]]:
        rng = np.random.default_rng(2)
        return [rng.integers(0, self._vocab, n).tolist() for n in (1, 2, 5, 5, 9)]

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


class ScorerContract(ModelContract):
    """Tests of a backend whose model only scores: a reference, and no policy.

    An author lists tiny models as components:

        class TestMine(ScorerContract):
            components = (Mine(weights="tiny"), Mine(weights="tiny", precision="int8"))
            seeded = False
    """

    def test_asked_to_train_it_refuses(self, component: Any) -> None:
        """Before a run begins, by what it says of itself (`posttrain.protocols.Frozen`), and when it is loaded."""
        says = isinstance(component, Frozen) and bool(component.frozen)
        assert says, (f"{type(component).__name__} does not say that it is no policy: give it a property `frozen` with "
                      "the reason and what to do (posttrain.protocols.Frozen)")
        with refused("a load with an optimizer", "train", "learn", "gradient"):
            component.load(self._request(TRAINING))


def behind(prefixes: Sequence[Sequence[int]]) -> Rollouts:
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
