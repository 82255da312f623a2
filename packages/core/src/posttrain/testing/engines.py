"""Contract of rollout engines, which draw answers from a model.

All is asked through `Sampler`, in NumPy; what a model looks like inside, nobody knows here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest

from posttrain.data import FINISH, Prompt, Rollouts, Sampling
from posttrain.errors import DataError, PosttrainError
from posttrain.protocols import Engine, LoadRequest, Sampler, Scorer, Tokenizer
from posttrain.testing.scorers import OnModels
from posttrain.testing.tiny_models import (
    LOGPROBS,
    TRAINING,
    Probe,
    accumulate,
    disturbed,
    log_table,
    pasts,
    random_rollouts,
    refused,
    step_data,
    unequal,
    weights_of,
)
from posttrain.tokenizers import prompt_ids


class EngineContract(OnModels):
    """Tests of a rollout engine, and of the `Sampler` that it starts.

    An author names a backend with a tiny model beside the engines:

        class TestMine(EngineContract):
            components = (Mine(), Mine(slots=3))
            backend = Torch(hidden_size=16, layers=1)
    """

    kind = "engine"
    protocol = Engine
    backend: ClassVar[Any] = None
    """What loads the policy."""
    tolerance: ClassVar[float] = 1e-4
    """In nats, between the log-probs that are recorded and those that the policy scores: the engine's arithmetic."""
    max_positions: ClassVar[int] = 0
    """Longest prompt and answer of `backend`'s model; 0 where there is no limit."""

    def test_one_episode_per_prompt_in_order(self, component: Any) -> None:
        """Prompts, groups, tokens and flags stand where the rest of the loop looks for them."""
        prompts, T = self._prompts(), self._tokenizer
        found = self._sampler(component).rollout(prompts, Sampling(max_new_tokens=5), (1,))
        assert found.n_episodes == len(prompts) and found.prompts == tuple(prompts), \
            "there must be one episode per prompt, in the prompts' order"
        assert found.group.tolist() == [p.group for p in prompts], "group must be the prompts' own"
        assert found.behavior_logprobs is not None and found.policy_version is not None and found.turn is not None, \
            "behavior_logprobs, policy_version and turn are missing"
        for e, prompt in enumerate(prompts):
            ids, own = prompt_ids(prompt, T), found.select(np.array([e]))
            assert own.tokens[:len(ids)].tolist() == ids, f"episode {e} does not begin with its prompt's ids {ids}"
            assert own.is_action.tolist() == [False] * len(ids) + [True] * (len(own.tokens) - len(ids)), \
                f"in episode {e} all tokens of the answer, and no others, must be actions"
            assert 1 <= own.is_action.sum() <= 5, f"episode {e} has {own.is_action.sum()} actions, max_new_tokens is 5"
        assert (found.tokens >= 0).all() and (found.tokens < T.vocab_size).all(), "token ids outside the vocabulary"
        assert len(self._sampler(component).rollout([], Sampling(), (1,)).tokens) == 0

    def test_repeats_with_the_seed(self, component: Any) -> None:
        """Equal prompts, weights and seed give equal answers, from the same sampler and from another; another seed
        gives others, and no global generator is touched."""
        prompts, sampling = self._prompts(), Sampling(max_new_tokens=6)
        before = str(np.random.get_state(legacy=False))
        sampler = self._sampler(component)
        first, again, other = (sampler.rollout(prompts, sampling, seed) for seed in ((3, 1), (3, 1), (3, 2)))
        for x in (again, self._sampler(component).rollout(prompts, sampling, (3, 1))):
            assert np.array_equal(first.tokens, x.tokens), "a second rollout with the same seed differs"
            assert np.array_equal(_recorded(first), _recorded(x)), "log-probs of a second rollout differ"
        assert not np.array_equal(first.tokens, other.tokens), "seeds (3, 1) and (3, 2) give the same answers"
        assert str(np.random.get_state(legacy=False)) == before, "NumPy's global generator was used"

    def test_an_answer_does_not_depend_on_its_neighbours(self, component: Any) -> None:
        """Only on its place in the list: so an answer can be drawn again alone, and batches may be cut anywhere."""
        sampler, prompts, sampling = self._sampler(component), self._prompts(), Sampling(max_new_tokens=6)
        whole = sampler.rollout(prompts, sampling, (5,))
        others = [p if i == 2 else Prompt(text="dd" + "ab" * (i % 3)) for i, p in enumerate(prompts)]
        for changed, what in ((prompts[:3], "fewer"), (others, "other")):
            part = sampler.rollout(changed, sampling, (5,))
            a, b = whole.select(np.array([2])), part.select(np.array([2]))
            assert np.array_equal(a.tokens, b.tokens), f"an answer changes with {what} prompts beside it"
            self._assert_close(_recorded(b), _recorded(a), f"log-probs change with {what} prompts beside them")
        twins = sampler.rollout([prompts[0]] * 12, sampling, (5,))
        answers = {twins.select(np.array([e])).tokens.tobytes() for e in range(12)}
        assert len(answers) > 1, "twelve answers to one prompt are all the same: draw each with its own random numbers"

    def test_records_the_log_probs_of_the_policy(self, component: Any) -> None:
        """What is recorded is what the trainer scores for the same tokens, at every temperature."""
        for temperature in (0.7, 1.0, 1.4):
            policy = self._policy()
            sampling = Sampling(temperature=temperature, max_new_tokens=6)
            found = component.start(policy, self._tokenizer, shared=True).rollout(self._prompts(), sampling, (7,))
            scored = policy.score(found, LOGPROBS, temperature).logprobs
            self._assert_close(_recorded(found), scored, f"recorded log-probs are not the policy's at {temperature}")
            assert found.sampling == sampling, "Rollouts.sampling must be what was asked for"

    def test_draws_what_is_likely(self, component: Any) -> None:
        """Frequencies of the first two tokens against the policy's probabilities (chi-square, p > 1e-4)."""
        from scipy.stats import chisquare

        policy, V, n, eos = self._policy(), self._tokenizer.vocab_size, 1500, self._tokenizer.eos
        prompt, sampling = Prompt(text="ab"), Sampling(temperature=0.8, max_new_tokens=2)
        found = component.start(policy, self._tokenizer, shared=True).rollout([prompt] * n, sampling, (11,))
        ids = prompt_ids(prompt, self._tokenizer)
        first = np.exp(log_table(policy, [ids], V, 0.8))[0]
        second = np.exp(log_table(policy, [[*ids, t] for t in range(V)], V, 0.8))
        joint = first[:, None] * np.where(np.arange(V)[:, None] == eos, np.eye(V)[0], second)
        counts, starts = np.zeros((V, V)), found.offsets[:-1] + len(ids)
        for a, b in zip(starts, found.offsets[1:]):
            t = int(found.tokens[a])
            counts[t, 0 if t == eos else int(found.tokens[b - 1])] += 1
        expected = (n * joint / joint.sum()).ravel()
        rare = expected < 5
        seen, wanted = ([*x[~rare], x[rare].sum()] for x in (counts.ravel(), expected))
        keep = np.array(wanted) > 0
        p = float(chisquare(np.array(seen)[keep], np.array(wanted)[keep]).pvalue)
        assert p > 1e-4, f"the tokens drawn are not distributed as the policy says (chi-square, p = {p:.2g})"

    def test_greedy_takes_the_likeliest_token(self, component: Any) -> None:
        """Temperature 0; the log-prob of the only choice is 0."""
        policy = self._policy()
        sampling = Sampling(temperature=0.0, max_new_tokens=5)
        found = component.start(policy, self._tokenizer, shared=True).rollout(self._prompts()[:4], sampling, (0,))
        table = log_table(policy, pasts(found), self._tokenizer.vocab_size, 1.0)
        chosen = table[np.arange(len(table)), found.tokens[found.source]]
        assert (chosen >= table.max(axis=1) - self.tolerance).all(), "temperature 0 does not take the likeliest token"
        assert np.abs(_recorded(found)).max() < 1e-6, "log-probs of greedy tokens are 0: nothing else could be drawn"

    def test_ends_at_eos_or_at_the_budget(self, component: Any) -> None:
        """eos is an action and ends the answer; what runs out of tokens is truncated, not terminated."""
        eos, budget, T = FINISH.index("eos"), FINISH.index("budget"), self._tokenizer
        for most in (1, 6):
            prompts = [Prompt(text="abc"[: 1 + i % 3]) for i in range(96)]
            found = self._sampler(component).rollout(prompts, Sampling(max_new_tokens=most), (13,))
            for e in range(len(prompts)):
                own = found.select(np.array([e]))
                answer = own.tokens[own.source].tolist()
                assert answer, f"episode {e} has no action: eos is one, and belongs to the answer"
                ended = answer[-1] == T.eos
                assert T.eos not in answer[:-1], f"episode {e} goes on behind eos"
                assert own.finish[0] == (eos if ended else budget), \
                    f"episode {e} ends with token {answer[-1]}, its finish is {FINISH[own.finish[0]]}"
                assert bool(own.terminated[0]) == ended, (
                    f"terminated is {own.terminated[0]} where eos was {'' if ended else 'not '}drawn: an answer cut by "
                    "the budget is truncated")
                assert ended or len(answer) == most, f"episode {e} ends by budget after {len(answer)} of {most} tokens"
                assert own.completions[0] == T.decode(answer[:-1] if ended else answer), \
                    f"completion {own.completions[0]!r} is not the text of the answer {answer} without eos"
            assert set(found.finish.tolist()) == {eos, budget}, \
                f"of 96 answers some must end at eos and some at the budget of {most}; where the policy hardly ever " \
                "draws eos, take another `spread`"

    def test_stop_strings_end_an_answer(self, component: Any) -> None:
        """They are cut from the completion, and the answer is terminated; or they are refused by name."""
        sampler, prompts = self._sampler(component), [Prompt(text="ab")] * 48
        sampling, stop = Sampling(max_new_tokens=8, stop=("b", "fa")), FINISH.index("stop")
        if (found := self._drawn(sampler, prompts, sampling, "stop")) is None:
            return
        assert (found.finish == stop).any(), "of 48 answers none stopped at 'b' or 'fa'"
        for e in range(len(prompts)):
            own = found.select(np.array([e]))
            text, stopped = self._tokenizer.decode(own.tokens[own.source].tolist()), own.finish[0] == stop
            assert stopped == ("b" in text or "fa" in text), f"answer {text!r} has finish {FINISH[own.finish[0]]}"
            assert "b" not in own.completions[0] and "fa" not in own.completions[0], \
                f"completion {own.completions[0]!r} holds a stop string"
            if stopped:
                assert bool(own.terminated[0]), "an answer that reached its stop string is terminated"
                assert text.startswith(own.completions[0]) and text.endswith(("b", "fa")), \
                    f"answer {text!r} goes on behind its stop string, or was cut to {own.completions[0]!r} elsewhere"

    def test_truncated_sampling_records_its_own_log_probs(self, component: Any) -> None:
        """top_k, top_p and min_p enter the ratio (vllm 42259): log-probs are those of what was kept, or the setting is
        refused by name."""
        for name, sampling in (("top_k", Sampling(top_k=3)), ("top_p", Sampling(top_p=0.7)),
                               ("min_p", Sampling(min_p=0.3))):
            sampling, policy = replace(sampling, temperature=0.9, max_new_tokens=4), self._policy()
            sampler = component.start(policy, self._tokenizer, shared=True)
            if (found := self._drawn(sampler, self._prompts(), sampling, name)) is None:
                continue
            rows = np.exp(log_table(policy, pasts(found), self._tokenizer.vocab_size, 0.9))
            for row, token, logprob in zip(rows, found.tokens[found.source], _recorded(found)):
                kept = _kept(row, sampling)
                assert token in kept, f"{name}: a token was drawn that the setting removes"
                want = math.log(row[token] / row[kept].sum())
                assert abs(want - logprob) < 10 * self.tolerance, \
                    f"{name}: recorded {logprob:.5g}, the log-prob among what was kept is {want:.5g}"

    def test_text_messages_and_ids_are_the_same_prompt(self, component: Any) -> None:
        """A prompt may come in three forms."""
        forms = [Prompt(text="abc"), Prompt(messages=({"role": "user", "content": "abc"},)),
                 Prompt(tokens=tuple(self._tokenizer.encode("abc")))]
        found = [self._sampler(component).rollout([form], Sampling(max_new_tokens=6), (2,)) for form in forms
                 if prompt_ids(form, self._tokenizer) == prompt_ids(forms[0], self._tokenizer)]
        assert all(np.array_equal(found[0].tokens, x.tokens) for x in found), \
            "the same ids as text, as messages and as tokens give different answers"
        asked = self._sampler(component).rollout(forms, Sampling(max_new_tokens=2), (2,))
        assert asked.prompts == tuple(forms), "the prompts come back as they were asked"

    def test_check_names_every_prompt_that_does_not_fit(self, component: Any) -> None:
        """One `DataError` before training, with every row in it; rollout refuses them as well."""
        V, sampler, sampling = self._tokenizer.vocab_size, self._sampler(component), Sampling(max_new_tokens=4)
        bad = [Prompt(tokens=(), where="rows.jsonl:2"), Prompt(tokens=(2, V), where="rows.jsonl:4"),
               Prompt(tokens=(-1, 2), where="rows.jsonl:5")]
        if self.max_positions:
            bad.append(Prompt(tokens=(2,) * (self.max_positions - 3), where="rows.jsonl:8"))
            sampler.check([Prompt(tokens=(2,) * (self.max_positions - 4))], sampling)
        good = self._prompts()
        sampler.check(good, sampling)
        for call in (lambda: sampler.check([*good, *bad], sampling),
                     lambda: sampler.rollout([*good, *bad], sampling, (0,))):
            try:
                call()
            except DataError as error:
                missing = [p.where for p in bad if p.where not in str(error)]
                assert not missing, f"the DataError does not name {missing}; name all rows at once:\n{error}"
            except Exception as error:
                pytest.fail(f"prompts that do not fit end in {type(error).__name__}: {error}; raise one DataError that "
                            "names all of them", pytrace=False)
            else:
                pytest.fail("an empty prompt and ids outside the vocabulary are accepted; raise one DataError that "
                            f"names {[p.where for p in bad]}", pytrace=False)

    def test_sees_new_weights_when_it_should(self, component: Any) -> None:
        """Shared, at once and without a copy; else with `sync` and not before, and never the policy's own memory."""
        sampling, prompts = Sampling(max_new_tokens=5), self._prompts()
        for shared in (True, False):
            policy, old = self._policy(), self._policy()
            sampler = component.start(policy, self._tokenizer, shared=shared)
            changed = disturbed(weights_of(policy), 2, self.spread)
            policy.load_params(changed.items(), 3)
            self._assert_from(sampler, policy if shared else old, sampling, prompts, "before sync",
                              "reads the policy's weights at once" if shared else "keeps its weights until sync")
            sampler.sync(policy.params(), 3)
            found = self._assert_from(sampler, policy, sampling, prompts, "after sync", "has the weights given to sync")
            assert set(found.policy_version.tolist()) == {3}, \
                f"policy_version is {set(found.policy_version.tolist())} after sync with version 3"
            if not shared:
                old = self._policy()
                old.load_params(changed.items(), 3)
                policy.load_params(disturbed(changed, 4, self.spread).items(), 4)
                self._assert_from(sampler, old, sampling, prompts, "behind a sync", "keeps its weights until sync")
                with refused("sync with weights that do not fit", "no_such_weight"):
                    sampler.sync([*policy.params(), ("no_such_weight", np.zeros(3, np.float32))], 5)

    def test_drawing_leaves_the_policy_alone(self, component: Any) -> None:
        """Weights, version and the state of the learner are as before."""
        policy = self.disturbed_learner(self.backend, LoadRequest(self._tokenizer.vocab_size, optimization=TRAINING))
        before = {name: x.copy() for name, x in policy.state().items()}
        component.start(policy, self._tokenizer, shared=True).rollout(self._prompts(), Sampling(max_new_tokens=4), (0,))
        assert not (wrong := unequal(before, policy.state())), f"drawing changed {wrong}"
        accumulate(policy, step_data(random_rollouts(self._tokenizer.vocab_size)), Probe())
        policy.apply()
        assert unequal(before, policy.state()), "the policy cannot be trained after drawing"

    def test_another_policy_is_refused(self, component: Any) -> None:
        """An engine that cannot draw from a policy says so when it is started."""
        class Unknown:
            """A policy of a framework that nobody knows."""

            provides = LOGPROBS

        with refused("a policy of an unknown class", "policy", "Unknown"):
            component.start(Unknown(), self._tokenizer, shared=True)

    # ---- what the tests are made of

    @property
    def _tokenizer(self) -> Tokenizer:
        return self.tokenizer.load()

    def _policy(self) -> Any:
        if self.backend is None:
            pytest.fail(f"{type(self).__name__}.backend names no backend: one of a tiny model", pytrace=False)
        return self.disturbed_learner(self.backend, LoadRequest(self._tokenizer.vocab_size))

    def _sampler(self, component: Any) -> Sampler:
        started: Sampler = component.start(self._policy(), self._tokenizer, shared=True)
        return started

    def _prompts(self) -> list[Prompt]:
        texts = ("ab", "f", "abcdef", "ca")
        return [Prompt(text=text, group=5 + i, where=f"rows.jsonl:{20 + i}") for i, text in enumerate(texts)
                for _ in range(3)]

    def _drawn(self, sampler: Sampler, prompts: Sequence[Prompt], sampling: Sampling, name: str) -> Rollouts | None:
        """None where the setting `name` is refused by its name."""
        try:
            return sampler.rollout(prompts, sampling, (17,))
        except PosttrainError as error:
            assert name in str(error), f"{name} is refused without its name: {error}"
            return None

    def _assert_from(self, sampler: Sampler, policy: Scorer, sampling: Sampling, prompts: Sequence[Prompt], when: str,
                     what: str) -> Any:
        found = sampler.rollout(prompts, sampling, (19,))
        self._assert_close(_recorded(found), policy.score(found, LOGPROBS, 1.0).logprobs, f"{when} a sampler {what}")
        return found

    def _assert_close(self, got: np.ndarray, want: np.ndarray, message: str) -> None:
        assert np.shape(got) == np.shape(want), f"{message}: shapes {np.shape(got)} and {np.shape(want)}"
        off = float(np.max(np.abs(np.asarray(got, np.float64) - want), initial=0.0))
        assert off <= self.tolerance, f"{message}: off by {off:.3g}, allowed {self.tolerance:.3g}"


def _recorded(rollouts: Rollouts) -> np.ndarray:
    """[N] log-probs of the sampler."""
    assert rollouts.behavior_logprobs is not None, "Rollouts.behavior_logprobs is missing"
    return rollouts.behavior_logprobs


def _kept(row: np.ndarray, sampling: Sampling) -> list[int]:
    """Tokens that truncation leaves, likeliest first: top-k, then top-p, then min-p, each on what is left."""
    kept = list(np.argsort(-row))
    if sampling.top_k:
        kept = kept[:sampling.top_k]
    mass = np.cumsum(row[kept]) / row[kept].sum()
    kept = kept[:1 + int((mass < sampling.top_p).sum())]
    return [int(t) for t in kept if row[t] >= sampling.min_p * row[kept[0]]]
