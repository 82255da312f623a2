"""The contracts of backends and engines catch wrong ones: the toy policy with one bug each, and the test to find it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import numpy as np
import posttrain.toy
import pytest
from posttrain.data import FINISH, Metrics, offsets_of
from posttrain.errors import ConfigError
from posttrain.protocols import LoadRequest, Output
from posttrain.testing import BackendContract, EngineContract, ScorerContract, failures
from posttrain.testing.scorers import ModelContract
from posttrain.toy.engine import ToyEngine, ToySampler
from posttrain.toy.policy import TABLE, VALUES, Toy, ToyLearner

HEADS = frozenset({Output.VALUES, Output.BOOTSTRAP_VALUES, Output.ACTION_VALUES, Output.EXPECTED_ACTION_VALUES})


class OnToy(BackendContract):
    plugins = (posttrain.toy,)
    seeded = False
    spread = 1.0
    tolerance = 1e-9

    def reloaded(self, component: Any, folder: Path) -> Any:
        return type(component)(weights=str(folder))


class OnToyScorer(ScorerContract):
    plugins = (posttrain.toy,)
    seeded = False
    spread = 1.0
    tolerance = 1e-9


class OnToyEngine(EngineContract):
    plugins = (posttrain.toy,)
    backend = Toy()
    spread = 1.0
    tolerance = 1e-6


def backend(promises: frozenset[Output] = frozenset(), **members: Any) -> Any:
    """The toy backend, whose learner has other members; it promises more outputs than it has."""
    learner = type("BrokenLearner", (ToyLearner,), members)

    @final
    @dataclass(frozen=True, slots=True)
    class Broken:
        """The toy policy with a bug."""

        weights: str = ""
        """A folder."""
        framework = property(lambda self: "numpy")
        provides = property(lambda self: Toy().provides | promises)

        def load(self, request: LoadRequest) -> ToyLearner:
            made = learner(request.vocab_size, request.value_heads, request.optimization, request.comm)
            if self.weights:
                made.read(Path(self.weights))
            return made
    return Broken()


def scorer(frozen: str = "use: the toy is no policy here", refuses: bool = True, **members: Any) -> Any:
    """The toy backend as one whose model only scores; its model has other members."""
    model = type("BrokenScorer", (ToyLearner,), members)
    why = frozen

    @final
    @dataclass(frozen=True, slots=True)
    class Broken:
        """The toy reference with a bug."""

        framework = property(lambda self: "numpy")
        provides = property(lambda self: Toy().provides - HEADS)
        frozen = property(lambda self: why)

        def load(self, request: LoadRequest) -> ToyLearner:
            if refuses and request.optimization is not None:
                raise ConfigError(["this model computes no gradients"])
            if request.value_heads:
                raise ConfigError(["this model has no value heads"])
            return model(request.vocab_size, 0, request.optimization, request.comm)
    return Broken()


def engine(start: Callable[..., Any] | None = None, **members: Any) -> Any:
    """The toy engine, whose sampler has other members, or which starts otherwise."""
    sampler = type("BrokenSampler", (ToySampler,), members)

    @final
    @dataclass(frozen=True, slots=True)
    class Broken:
        """The toy engine with a bug."""

        def start(self, policy: Any, tokenizer: Any, *, shared: bool) -> Any:
            if start is not None:
                return start(policy, tokenizer, shared)
            right = ToyEngine().start(policy, tokenizer, shared=shared)
            return sampler(right.policy, right.tokenizer)
    return Broken()


def score(change: Callable[..., Any]) -> Any:
    """`change(out, rollouts, learner, temperature)` of what the right one says."""
    def changed(self: Any, rollouts: Any, outputs: Any, temperature: float) -> Any:
        return change(ToyLearner.score(self, rollouts, outputs, temperature), rollouts, self, temperature)
    return changed


# ---- wrong backends


def shifted_outputs(self: Any, tokens: Any, source: Any, last: Any, outputs: Any, temperature: float) -> Any:
    out = ToyLearner._outputs(self, tokens, np.maximum(source - 1, 1), last, outputs, temperature)
    logp = self.log_softmax(tokens[np.maximum(source - 2, 0)], temperature)
    return replace(out, logprobs=logp[np.arange(len(source)), tokens[source]])


def without_temperature(self: Any, before: Any, temperature: float) -> Any:
    return ToyLearner.log_softmax(self, before, 1.0)


def unnormalised(self: Any, before: Any, temperature: float) -> Any:
    z = self.parameters[TABLE][before] / temperature
    return z - z.max(axis=1, keepdims=True)


def of_next(out: Any, rollouts: Any, *_: Any) -> Any:
    following = rollouts.tokens[np.minimum(rollouts.source + 1, len(rollouts.tokens) - 1)]
    return replace(out, logprobs=out.logprobs - 0.01 * following)


def mean_of_part(self: Any, batch: Any, objective: Any, coef: Any) -> Metrics:
    share = 8 / max(1, batch.count.shape[0])
    return ToyLearner.accumulate(self, replace(batch, weight=share * batch.weight), objective, coef)


def no_empty_part(self: Any, batch: Any, objective: Any, coef: Any) -> Metrics:
    return ToyLearner.accumulate(self, batch, objective, coef) if batch.weight.max() >= 0 else Metrics()


def twice_for_empty(self: Any, batch: Any, objective: Any, coef: Any) -> Metrics:
    if len(batch.source) == 0:
        for sums in self._gradients.values():
            sums[TABLE] *= 1.5
    return ToyLearner.accumulate(self, batch, objective, coef)


def forgetful_entropy(self: Any, slot: str, columns: Mapping[str, Any], batch: Any) -> None:
    ToyLearner._add(self, slot, {name: x for name, x in columns.items() if name != "entropy"}, batch)


def gradient_without_temperature(self: Any, slot: str, columns: Mapping[str, Any], batch: Any) -> None:
    hot = {name: x * batch.temperature for name, x in columns.items()}
    ToyLearner._add(self, slot, hot, batch)


def forgetful_values(self: Any, slot: str, columns: Mapping[str, Any], batch: Any) -> None:
    ToyLearner._add(self, slot, {**columns, **({"values": 2 * columns["values"]} if "values" in columns else {})},
                    batch)


def keeps_gradients(self: Any, weights: Any = None) -> Metrics:
    kept = {slot: {name: g.copy() for name, g in sums.items()} for slot, sums in self._gradients.items()}
    metrics = ToyLearner.apply(self, weights)
    self._gradients = kept
    return metrics


def ignores_weights(self: Any, weights: Any = None) -> Metrics:
    return ToyLearner.apply(self)


def unnamed_is_zero(self: Any, weights: Any = None) -> Metrics:
    return ToyLearner.apply(self, None if weights is None else dict.fromkeys(self._gradients, 0.0) | {"shared": 1.0}
                            | weights)


def cosines(self: Any, slots: Sequence[str], parameters: str = "") -> Any:
    G = ToyLearner.gramian(self, slots, parameters)
    return G / np.sqrt(np.outer(np.diag(G), np.diag(G)))


def all_parameters(self: Any, slots: Sequence[str], parameters: str = "") -> Any:
    return ToyLearner.gramian(self, slots)


def clips_rows(self: Any, name: str, p: Any, g: Any, lr: float, settings: Any) -> None:
    """Each shard by its own norm, as RL2 did with the ranks of FSDP."""
    norms = np.linalg.norm(g, axis=1, keepdims=True)
    limit = settings.clip_norm or np.inf
    ToyLearner._adam(self, name, p, g * np.minimum(1.0, limit / 4 / (norms + 1e-9)), lr, settings)


def no_bias_correction(self: Any, name: str, p: Any, g: Any, lr: float, settings: Any) -> None:
    m, v, (b1, b2) = self._moments["m", name], self._moments["v", name], settings.betas
    m[:], v[:] = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    p -= lr * m / (np.sqrt(v) + settings.eps)


def steps_on_nan(self: Any, weights: Any = None) -> Metrics:
    for sums in self._gradients.values():
        for name in sums:
            sums[name] = np.nan_to_num(sums[name])
    return ToyLearner.apply(self, weights)


def counts_skipped(self: Any, weights: Any = None) -> Metrics:
    metrics = ToyLearner.apply(self, weights)
    self.version += int(metrics["skipped"].value)
    return metrics


def never_diverges(self: Any, weights: Any = None) -> Metrics:
    self.bad_steps = min(self.bad_steps, 1)
    return ToyLearner.apply(self, weights)


def remembers_bad_steps(self: Any, weights: Any = None) -> Metrics:
    bad = self.bad_steps
    metrics = ToyLearner.apply(self, weights)
    self.bad_steps = max(bad, self.bad_steps)
    return metrics


def late_warmup(self: Any, weights: Any = None) -> Metrics:
    self.steps += 1
    metrics = ToyLearner.apply(self, weights)
    self.steps -= 1
    return metrics


def without_moments(self: Any) -> Any:
    return {name: x for name, x in ToyLearner.state(self).items() if not name.startswith(("m.", "v."))}


def loads_without_moments(self: Any, arrays: Any) -> None:
    """What a resume of RL2 did: a fresh optimiser beside the saved weights."""
    ToyLearner.load_state(self, ToyLearner.state(self) | arrays)


def loads_any_state(self: Any, arrays: Any) -> None:
    own = ToyLearner.state(self)
    ToyLearner.load_state(self, own | {n: x for n, x in arrays.items() if n in own and x.shape == own[n].shape})


def views(self: Any) -> Any:
    return ToyLearner.state(self) | {f"weights.{name}": p for name, p in self.parameters.items()}


def aliases(self: Any, items: Any, version: int) -> None:
    given = dict(items)
    ToyLearner.load_params(self, given.items(), version)
    if isinstance(given[TABLE], np.ndarray):
        self.parameters[TABLE] = given[TABLE]


def ignores_unknown(self: Any, items: Any, version: int) -> None:
    ToyLearner.load_params(self, [(name, x) for name, x in items if name == TABLE], version)


def writes_in_part(self: Any, items: Any, version: int) -> None:
    given = dict(items)
    if TABLE not in given:
        raise ConfigError([f"{TABLE} is missing"])
    for name, x in given.items():
        if name != TABLE or np.shape(x) != self.parameters[TABLE].shape:
            raise ConfigError([f"{name} does not fit"])
        self.parameters[TABLE][:] = x
    self.version = version


def keeps_version(self: Any, items: Any, version: int) -> None:
    ToyLearner.load_params(self, items, self.version)


def saves_halves(self: Any, directory: Path) -> None:
    own = self.parameters
    self.parameters = {name: p.astype(np.float16) for name, p in own.items()}
    ToyLearner.save(self, directory)
    self.parameters = own


def saves_no_values(self: Any, directory: Path) -> None:
    own = self.parameters
    self.parameters = own | {VALUES: np.zeros_like(own[VALUES])}
    ToyLearner.save(self, directory)
    self.parameters = own


def always_moments(self: Any) -> Any:
    return {**ToyLearner.state(self), "m.logits": np.zeros_like(self.parameters[TABLE])}


def averages_ranks(self: Any) -> None:
    ToyLearner._sum_over_ranks(self)
    if self._comm.size > 1:
        for sums in self._gradients.values():
            for g in sums.values():
                g /= self._comm.size


def sums_twice(self: Any) -> None:
    self._summed = False
    ToyLearner._sum_over_ranks(self)


def draws_globally(self: Any, *arguments: Any) -> None:
    ToyLearner.__init__(self, *arguments)
    self.parameters[TABLE] += np.random.normal(size=self.parameters[TABLE].shape)


def attribute_error(self: Any, outputs: Any) -> None:
    if outputs - self.provides:
        raise AttributeError("'NoneType' object has no attribute 'weight'")


def discards_when_scoring(out: Any, rollouts: Any, learner: Any, temperature: float) -> Any:
    learner.discard()
    return out


def noisy_entropy(out: Any, *_: Any) -> Any:
    return out if out.entropy is None else replace(out, entropy=out.entropy / np.log(2))


def transposed(out: Any, *_: Any) -> Any:
    return out if out.values is None else replace(out, values=out.values.T)


def of_the_neighbour(out: Any, *_: Any) -> Any:
    b = out.bootstrap_values
    return out if b is None else replace(out, bootstrap_values=np.roll(b, -1, axis=1))


BROKEN_BACKENDS = [
    ("batch statistics reach every row", "test_an_episode_is_scored_alike_in_any_company",
     {"score": score(lambda out, *_: replace(out, logprobs=out.logprobs + 1e-3 * out.logprobs.mean()))}),
    ("the next trajectory's bootstrap value (pytorch/rl 4209)", "test_an_episode_is_scored_alike_in_any_company",
     {"score": score(of_the_neighbour)}),
    ("positions are shifted by one", "test_depends_on_the_token_before", {"_outputs": shifted_outputs}),
    ("a later token is seen", "test_sees_no_future_and_no_other_sequence", {"score": score(of_next)}),
    ("temperature is ignored", "test_temperature_divides_the_logits", {"log_softmax": without_temperature}),
    ("positive log-probs (verl 2656)", "test_scores_are_logarithms_of_probabilities",
     {"score": score(lambda out, *_: replace(out, logprobs=out.logprobs + 5))}),
    ("no normalisation", "test_scores_are_logarithms_of_probabilities", {"log_softmax": unnormalised}),
    ("entropy in bits", "test_scores_are_logarithms_of_probabilities", {"score": score(noisy_entropy)}),
    ("values [N, k]", "test_says_what_it_provides_and_only_what_is_asked", {"score": score(transposed)}),
    ("mean of each micro-batch (trl 2617)", "test_any_split_gives_the_same_gradient", {"accumulate": mean_of_part}),
    ("an empty part is an error", "test_any_split_gives_the_same_gradient", {"accumulate": no_empty_part}),
    ("an empty part adds something", "test_any_split_gives_the_same_gradient", {"accumulate": twice_for_empty}),
    ("entropy has no gradient", "test_gradients_are_derivatives", {"_add": forgetful_entropy}),
    ("gradient at another temperature", "test_gradients_are_derivatives", {"_add": gradient_without_temperature}),
    ("twice the gradient of values", "test_the_loss_falls_as_the_gradient_says", {"_add": forgetful_values}),
    ("discard forgets nothing", "test_discard_forgets_the_step", {"discard": lambda self: None}),
    ("apply forgets nothing", "test_an_applied_step_is_forgotten", {"apply": keeps_gradients}),
    ("slots are summed", "test_slots_mix_linearly", {"apply": ignores_weights}),
    ("a slot without a weight is dropped", "test_slots_mix_linearly", {"apply": unnamed_is_zero}),
    ("gramian holds cosines", "test_gramian_holds_inner_products", {"gramian": cosines}),
    ("gramian ignores the pattern", "test_gramian_holds_inner_products", {"gramian": all_parameters}),
    ("clipped by shard (RL2 2)", "test_clips_by_the_norm_of_all", {"_adam": clips_rows}),
    ("Adam without bias correction", "test_steps_are_those_of_adamw", {"_adam": no_bias_correction}),
    ("NaN becomes 0", "test_a_bad_gradient_is_skipped_and_counted", {"apply": steps_on_nan}),
    ("a skipped step is a version", "test_a_bad_gradient_is_skipped_and_counted", {"apply": counts_skipped}),
    ("never diverges", "test_a_bad_gradient_is_skipped_and_counted", {"apply": never_diverges}),
    ("bad steps are not in a row", "test_a_bad_gradient_is_skipped_and_counted", {"apply": remembers_bad_steps}),
    ("the warm-up begins at its second step", "test_the_rate_follows_its_schedule", {"apply": late_warmup}),
    ("moments are not restored (RL2 4)", "test_resumes_bit_for_bit",
     {"state": without_moments, "load_state": loads_without_moments}),
    ("state is not copied", "test_resumes_bit_for_bit", {"state": views}),
    ("any state is accepted", "test_refuses_the_state_of_another_model", {"load_state": loads_any_state}),
    ("load_params keeps the arrays", "test_weights_carry_over_to_another_model", {"load_params": aliases}),
    ("unknown weights are ignored", "test_refuses_weights_that_do_not_fit", {"load_params": ignores_unknown}),
    ("weights are written before they are checked", "test_refuses_weights_that_do_not_fit",
     {"load_params": writes_in_part}),
    ("load_params keeps the version", "test_version_counts_steps", {"load_params": keeps_version}),
    ("saved in half precision (RL2 15)", "test_saved_weights_load_again", {"save": saves_halves}),
    ("value heads are not saved", "test_saved_weights_load_again", {"save": saves_no_values}),
    ("a reference holds moments", "test_a_model_for_scoring_refuses_to_train", {"state": always_moments}),
    ("gradients are averaged over ranks", "test_ranks_are_summed_once", {"_sum_over_ranks": averages_ranks}),
    ("ranks are summed twice", "test_ranks_are_summed_once", {"_sum_over_ranks": sums_twice}),
    ("weights from the global generator", "test_equal_seeds_load_equal_weights", {"__init__": draws_globally}),
    ("what is lacking is an attribute error", "test_what_it_lacks_is_refused_by_name", {"_require": attribute_error}),
    ("scoring ends the step", "test_scoring_leaves_a_step_alone", {"score": score(discards_when_scoring)}),
]


@pytest.mark.parametrize(("bug", "test", "members"), BROKEN_BACKENDS, ids=[b[0] for b in BROKEN_BACKENDS])
def test_a_broken_backend_is_found(bug: str, test: str, members: dict[str, Any], tmp_path: Path) -> None:
    assert [name for name, _ in failures(OnToy, backend(**members), only=test, tmp_path=tmp_path)] == [test], bug


# ---- wrong scorers


def keeps_given(self: Any, items: Any, version: int) -> None:
    given = dict(items)
    ToyLearner.load_params(self, given.items(), version)
    self.parameters[TABLE] = given[TABLE]


OF_HEADS = ("values", "bootstrap value")
BROKEN_SCORERS = [
    ("trains", "test_asked_to_train_it_refuses", {"refuses": False}),
    ("does not say that it is no policy", "test_asked_to_train_it_refuses", {"frozen": ""}),
    ("load_params keeps NumPy arrays", "test_weights_carry_over_to_another_model", {"load_params": keeps_given}),
    *((bug, test, members) for bug, test, members in BROKEN_BACKENDS
      if hasattr(ModelContract, test) and not any(word in bug for word in OF_HEADS))]


@pytest.mark.parametrize(("bug", "test", "members"), BROKEN_SCORERS, ids=[b[0] for b in BROKEN_SCORERS])
def test_a_broken_scorer_is_found(bug: str, test: str, members: dict[str, Any]) -> None:
    assert [name for name, _ in failures(OnToyScorer, scorer(**members), only=test)] == [test], bug


# ---- wrong engines


def rollout(change: Callable[..., Any]) -> Any:
    """`change(rollouts, sampler)` of what the right one draws."""
    def changed(self: Any, prompts: Any, sampling: Any, seed: Any) -> Any:
        found = ToySampler.rollout(self, prompts, sampling, seed)
        return change(found, self) if len(prompts) else found
    return changed


def rng_of(key: Callable[[Sequence[int], int], Sequence[int]]) -> Any:
    """Random numbers of episode i from another key than (seed, i)."""
    def changed(self: Any, prompts: Any, sampling: Any, seed: Any) -> Any:
        parts = [ToySampler.rollout(self, [prompt], sampling, key(seed, i)) for i, prompt in enumerate(prompts)]
        return parts[0].concat(parts) if parts else ToySampler.rollout(self, prompts, sampling, seed)
    return changed


def one_stream(self: Any, prompts: Any, sampling: Any, seed: Any) -> Any:
    """Random numbers depend on how many tokens were drawn before."""
    parts: list[Any] = []
    for prompt in prompts:
        drawn = sum(len(part.tokens) for part in parts)
        parts.append(ToySampler.rollout(self, [prompt], sampling, (*seed, drawn)))
    return parts[0].concat(parts) if parts else ToySampler.rollout(self, prompts, sampling, seed)


def reversed_order(self: Any, prompts: Any, sampling: Any, seed: Any) -> Any:
    return ToySampler.rollout(self, prompts[::-1], sampling, seed)


def one_more(self: Any, prompts: Any, sampling: Any, seed: Any) -> Any:
    return ToySampler.rollout(self, prompts, replace(sampling, max_new_tokens=sampling.max_new_tokens + 1), seed)


def at_another(temperature: Callable[[float], float]) -> Any:
    """Tokens drawn at another temperature; log-probs of the right one."""
    def changed(self: Any, prompts: Any, sampling: Any, seed: Any) -> Any:
        other = replace(sampling, temperature=temperature(sampling.temperature))
        found = ToySampler.rollout(self, prompts, other, seed)
        logp = self.policy.log_softmax(found.tokens[found.source - 1], sampling.temperature or 1.0)
        recorded = logp[np.arange(len(logp)), found.tokens[found.source]] * (sampling.temperature > 0)
        return replace(found, sampling=sampling, behavior_logprobs=recorded.astype(np.float32))
    return changed


def unscaled(found: Any, sampler: Any) -> Any:
    logp = sampler.policy.log_softmax(found.tokens[found.source - 1], 1.0)
    return replace(found, behavior_logprobs=logp[np.arange(len(logp)), found.tokens[found.source]].astype(np.float32))


def ignoring(**settings: Any) -> Any:
    """Accepts what it does not do."""
    def changed(self: Any, prompts: Any, sampling: Any, seed: Any) -> Any:
        return replace(ToySampler.rollout(self, prompts, replace(sampling, **settings), seed), sampling=sampling)
    return changed


def without_eos(found: Any, sampler: Any) -> Any:
    """eos is cut from the answers, so ending is never learned."""
    ends = (found.tokens == sampler.tokenizer.eos) & found.is_action
    starts = found.offsets[:-1]
    lengths = np.diff(found.offsets) - np.add.reduceat(ends.astype(int), starts)
    keep = ~ends[found.source]
    return replace(found, tokens=found.tokens[~ends], is_action=found.is_action[~ends], offsets=offsets_of(lengths),
                   behavior_logprobs=found.behavior_logprobs[keep], policy_version=found.policy_version[keep],
                   turn=found.turn[keep])


def first_only(self: Any, prompts: Any, sampling: Any) -> None:
    for prompt in prompts:
        ToySampler.check(self, [prompt], sampling)


def index_error(self: Any, prompts: Any, sampling: Any) -> None:
    if any(prompt.tokens == () for prompt in prompts):
        raise IndexError("list index out of range")


def keeps_number(self: Any, params: Any, version: int) -> None:
    self.policy.load_params(params, self.policy.version)


def never_synced(self: Any, params: Any, version: int) -> None:
    self.policy.version = version


def disturbs(found: Any, sampler: Any) -> Any:
    sampler.policy.parameters[TABLE] += 1e-6
    return found


def always_shared(policy: Any, tokenizer: Any, shared: bool) -> Any:
    return ToyEngine().start(policy, tokenizer, shared=True)


def always_copied(policy: Any, tokenizer: Any, shared: bool) -> Any:
    return ToyEngine().start(policy, tokenizer, shared=False)


def any_policy(policy: Any, tokenizer: Any, shared: bool) -> Any:
    return ToySampler(policy, tokenizer) if policy.parameters else None


BUDGET, EOS = FINISH.index("budget"), FINISH.index("eos")
BROKEN_ENGINES = [
    ("prompts in another order", "test_one_episode_per_prompt_in_order", engine(rollout=reversed_order)),
    ("one token too many", "test_ends_at_eos_or_at_the_budget", engine(rollout=one_more)),
    ("the seed is ignored", "test_repeats_with_the_seed", engine(rollout=rng_of(lambda seed, i: (0, i)))),
    ("a new seed each time", "test_repeats_with_the_seed",
     engine(rollout=rng_of(lambda seed, i: (*seed, i, int(np.random.default_rng().integers(2**31)))))),
    ("all answers share their random numbers", "test_an_answer_does_not_depend_on_its_neighbours",
     engine(rollout=rng_of(lambda seed, i: tuple(seed)))),
    ("one stream for the whole batch", "test_an_answer_does_not_depend_on_its_neighbours", engine(rollout=one_stream)),
    ("log-probs at temperature 1", "test_records_the_log_probs_of_the_policy", engine(rollout=rollout(unscaled))),
    ("drawn at half the temperature", "test_draws_what_is_likely", engine(rollout=at_another(lambda t: t / 2))),
    ("greedy draws", "test_greedy_takes_the_likeliest_token", engine(rollout=at_another(lambda t: t or 1.0))),
    ("truncated is terminated", "test_ends_at_eos_or_at_the_budget",
     engine(rollout=rollout(lambda x, _: replace(x, terminated=np.ones(x.n_episodes, bool))))),
    ("finish is always the budget", "test_ends_at_eos_or_at_the_budget",
     engine(rollout=rollout(lambda x, _: replace(x, finish=np.full(x.n_episodes, BUDGET, np.int8))))),
    ("eos is no action", "test_ends_at_eos_or_at_the_budget", engine(rollout=rollout(without_eos))),
    ("stop strings are ignored", "test_stop_strings_end_an_answer", engine(rollout=ignoring(stop=()))),
    ("top_k and others do not enter the ratio (vllm 42259)", "test_truncated_sampling_records_its_own_log_probs",
     engine(rollout=ignoring(top_k=0, top_p=1.0, min_p=0.0))),
    ("the first bad prompt only", "test_check_names_every_prompt_that_does_not_fit", engine(check=first_only)),
    ("an empty prompt is an index error (RL2)", "test_check_names_every_prompt_that_does_not_fit",
     engine(check=index_error)),
    ("sync keeps the number of the weights", "test_sees_new_weights_when_it_should", engine(sync=keeps_number)),
    ("sync keeps the weights", "test_sees_new_weights_when_it_should", engine(sync=never_synced)),
    ("reads the policy's memory", "test_sees_new_weights_when_it_should", engine(always_shared)),
    ("copies what is shared", "test_sees_new_weights_when_it_should", engine(always_copied)),
    ("drawing changes the weights", "test_drawing_leaves_the_policy_alone", engine(rollout=rollout(disturbs))),
    ("another policy is an attribute error", "test_another_policy_is_refused", engine(any_policy)),
]


@pytest.mark.parametrize(("bug", "test", "component"), BROKEN_ENGINES, ids=[b[0] for b in BROKEN_ENGINES])
def test_a_broken_engine_is_found(bug: str, test: str, component: Any) -> None:
    assert [name for name, _ in failures(OnToyEngine, component, only=test)] == [test], bug


# ---- and nothing else


def test_a_comparison_that_is_promised_and_not_there_is_found() -> None:
    """What a comparison itself may do wrong is tried on a backend that has one, in `test_models.py`."""
    test = "test_the_kl_to_a_reference_is_that_of_the_vocabulary"
    (found, message), = failures(OnToy, backend(promises=frozenset({Output.REFERENCE_KL})), only=test)
    assert found == test and "has no compare_with(reference)" in message


def test_the_right_ones_pass(tmp_path: Path) -> None:
    """The same toy without a bug, made in the same way."""
    for contract, right in ((OnToy, Toy()), (OnToyEngine, ToyEngine())):
        assert not list(failures(contract, right, tmp_path=tmp_path))
    found = {name for name, _ in failures(OnToy, backend(), tmp_path=tmp_path)}
    assert found <= {"test_is_found_by_its_name", "test_can_be_sent_to_another_process"}  # made inside a function
    found = {name for name, _ in failures(OnToyScorer, scorer())}
    assert found <= {"test_is_found_by_its_name", "test_can_be_sent_to_another_process"}


def test_what_an_author_must_say(tmp_path: Path) -> None:
    """Without it the contract says what is missing."""
    silent = type("Silent", (BackendContract,), {"components": (Toy(),), "seeded": False})
    (_, message), = failures(silent, only="test_saved_weights_load_again", tmp_path=tmp_path)
    assert "def reloaded(self, component, folder)" in message
    lost = type("Lost", (EngineContract,), {"components": (ToyEngine(),)})
    (_, message), = failures(lost, only="test_greedy_takes_the_likeliest_token")
    assert "backend names no backend" in message
    claims = type("Claims", (OnToy,), {"components": (Toy(),), "seeded": True})
    (_, message), = failures(claims, only="test_equal_seeds_load_equal_weights")
    assert "seeded = True" in message
