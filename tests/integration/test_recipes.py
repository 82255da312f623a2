"""Every recipe and every way to combine parts, for a few real steps on the smallest task; and the README's examples."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import posttrain
import pytest
from integration import small
from posttrain import checkpoint, compose, config, fitting, trainer
from posttrain.data import Counts, Estimate, Loss, MicroBatch, Rollouts, Term, TokenOutputs, Weights
from posttrain.errors import ConfigError
from posttrain.ops import Ops
from posttrain.protocols import Need, Output
from posttrain.recipes import RECIPES
from posttrain.rundir import read_metrics
from posttrain.testing import EstimatorContract, failures

pytest.importorskip("torch")

README = Path(__file__).parents[2] / "README.md"
ROLLOUT: Mapping[str, Any] = {"prompts_per_step": 4, "group_size": 4, "max_new_tokens": 4}
PPO: Mapping[str, Any] = {"recipe": "ppo", "kl": {"use": "adaptive", "placement": "reward", "coef": 0.2}}


def trained(directory: Path, **changes: Any) -> tuple[posttrain.Run, list[dict[str, Any]]]:
    """A finished run of three steps and its lines of metrics, all of them finite."""
    base = {"steps": 3, "evaluate": {"every": 0}, "checkpoint": {"every": 0}, "kl": None,
            "optimizer": {"lr": 1e-2}, **changes}
    settings = {key: value for key, value in small.config(directory / "run", **base).items()
                if key != "kl" or "kl" in changes}
    run = posttrain.train(settings, output="quiet")
    lines = read_metrics(run.directory)
    assert [line["step"] for line in lines] == list(range(1, settings["steps"] + 1))
    for line in lines:
        assert "nonfinite" not in line, line
        assert all(math.isfinite(x) for x in line.values() if isinstance(x, float)), line
        assert line["skipped"] == 0 and line["grad_norm"] > 0
    return run, lines


def watch(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[tuple[Any, ...]]:
    """The arguments of every call of a function of the spine, which goes on as it was."""
    calls: list[tuple[Any, ...]] = []
    real = getattr(module, name)

    def watched(*args: Any, **named: Any) -> Any:
        calls.append((*args, *named.values()))
        return real(*args, **named)

    monkeypatch.setattr(module, name, watched)
    return calls


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_every_recipe_trains(recipe: str, tmp_path: Path) -> None:
    supervised = RECIPES[recipe].settings.get("loop") == "supervised"
    changes: dict[str, Any] = {"batch_size": 8} if supervised else {}
    if recipe in ("dpo", "reward_model"):
        pairs = [{"prompt": f"{a}+4=", "chosen": str(a + 4), "rejected": str(a + 3)} for a in range(5)]
        changes |= {"task": {"use": "rows", "rows": pairs}, "rewards": {}}
    _, lines = trained(tmp_path, recipe=recipe, **changes)
    settings = RECIPES[recipe].settings
    steps = settings.get("update", {})
    optimiser_steps = steps.get("steps_per_rollout", 1) * steps.get("epochs", 1)
    assert all(line["batch/parts"] == optimiser_steps for line in lines), "one part is enough for each optimiser step"
    assert ("reward/mean" in lines[0]) != supervised
    assert ("kl/reference" in lines[0]) == (recipe in ("grpo", "rloo", "ppo"))
    assert ("loss/value" in lines[0]) == (recipe == "ppo")
    assert ("rollout/filtered_groups" in lines[0]) == (recipe == "dapo")


def test_all_recipes_are_listed_in_the_readme() -> None:
    row = next(line for line in README.read_text().splitlines() if line.startswith("| recipe |"))
    assert set(re.findall("`(.+?)`", row)) == set(RECIPES)


def test_a_critic_of_its_own(tmp_path: Path) -> None:
    """Its learning rate is its own, and the policy has no value head."""
    critic = {"use": "torch", "hidden_size": 16, "layers": 1, "heads": 2, "kv_heads": 1, "device": "cpu"}
    run, lines = trained(tmp_path, **PPO, critic=critic, critic_optimizer={"lr": 3e-3})
    assert all(line["critic/loss/value"] > 0 and line["critic/lr"] == 3e-3 for line in lines)
    assert "loss/value" not in lines[0]
    saved = checkpoint.load(run.directory / "checkpoints" / "step-000003")
    assert {"policy", "critic"} <= set(saved.arrays)
    sizes = {name: sum(x.size for x in saved.arrays[name].values()) for name in ("policy", "critic")}
    assert 0 < sizes["critic"] < sizes["policy"]


def test_several_minibatches_and_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = watch(monkeypatch, posttrain.update, "optimiser_step")
    _, lines = trained(tmp_path, **PPO, update={"steps_per_rollout": 2, "epochs": 3}, batching={"use": "first_fit",
                                                                                                "tokens": 24})
    assert len(calls) == 3 * 2 * 3
    for first in range(0, len(calls), 2):
        groups = [set(call[1].group) for call in calls[first: first + 2]]
        assert groups[0] and groups[1] and not groups[0] & groups[1], "minibatches of a pass are disjoint whole groups"
    assert all(line["batch/parts"] > 6 for line in lines), "each optimiser step was cut into several parts"


def test_kl_in_the_reward_is_taken_from_the_actions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = watch(monkeypatch, trainer, "advantages")
    _, lines = trained(tmp_path, **PPO, steps=4)
    penalties = [call[-1] for call in calls]
    assert all(penalty is not None for penalty in penalties)
    assert np.abs(penalties[0]).max() < 1e-5, "before the first update the policy is its reference"
    assert np.abs(penalties[-1]).max() > 1e-3
    assert "loss/kl" not in lines[0] and lines[-1]["kl/reference"] > 0


def test_stale_rollouts_are_corrected_in_the_ratio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sampler lags by two iterations, and the ratio is taken to what it said."""
    calls = watch(monkeypatch, trainer, "update")
    _, lines = trained(tmp_path, recipe="grpo", steps=5, rollout={**ROLLOUT, "staleness": 2})
    versions = [set(call[1].policy_version.tolist()) for call in calls]
    assert versions == [{0}, {0}, {0}, {1}, {2}]
    for _, rollouts, _, _, old, *_ in calls:
        assert old is rollouts.behavior_logprobs
    assert [line["sampler/lag"] for line in lines] == [0, 1, 2, 2, 2]
    assert abs(lines[0]["policy/approx_kl"]) < 1e-6 < lines[-1]["policy/approx_kl"]


def test_replayed_episodes_keep_the_versions_that_wrote_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = watch(monkeypatch, trainer, "update")
    _, lines = trained(tmp_path, recipe="grpo", steps=4, replay={"capacity": 32, "reuse": 8, "max_age": 2})
    assert lines[0]["sampler/lag"] == 0 and all(0 < line["sampler/lag"] < 1 for line in lines[1:])
    fresh = 16
    for step, (_, rollouts, _, _, old, *_) in enumerate(calls):
        assert rollouts.n_episodes == fresh + (8 if step else 0)
        version = rollouts.policy_version[np.cumsum(rollouts.episode_actions) - 1]
        assert set(version[:fresh]) == {step}
        assert all(step - 2 <= v < step for v in version[fresh:]), "older, and not older than max_age"
        assert old is rollouts.behavior_logprobs


def digits(completions: Sequence[str], **columns: Any) -> list[float]:
    return [sum(map(str.isdigit, c)) / 4 for c in completions]


def brevity(completions: Sequence[str], answer: Sequence[str], **columns: Any) -> list[float | None]:
    """Applies to sums below five only."""
    return [-len(c) / 4 if int(a) < 5 else None for c, a in zip(completions, answer, strict=True)]


def test_several_rewards_are_weighed_and_one_may_not_apply(tmp_path: Path) -> None:
    rewards = {"digits": {"use": digits}, "brevity": {"use": brevity, "weight": 0.5},
               "measured": {"use": digits, "weight": 0.0}}
    _, lines = trained(tmp_path, recipe="rloo", rewards=rewards)
    assert 0 < sum(line["reward/brevity/excluded"] for line in lines) < 3 * 16
    for line in lines:
        assert line["reward/excluded"] == 0 and line["reward/measured/mean"] == line["reward/digits/mean"]
        share = 1 - line["reward/brevity/excluded"] / 16
        applicable = 0.0 if share == 0 else 0.5 * share * line["reward/brevity/mean"]
        assert line["reward/mean"] == pytest.approx(line["reward/digits/mean"] + applicable)


def test_a_step_to_which_no_reward_applies_makes_no_update(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    steps = iter(range(10))

    def sometimes(completions: Sequence[str], **columns: Any) -> Sequence[float | None]:
        return [None] * len(completions) if next(steps) == 1 else digits(completions)

    run = posttrain.train(small.config(tmp_path / "run", steps=3, rewards={"some": sometimes},
                                       evaluate={"every": 0}), output="quiet")
    lines = read_metrics(run.directory)
    assert [line["step"] for line in lines if "grad_norm" in line] == [1, 3]
    assert lines[1]["reward/excluded"] == 16
    assert "step 2: no episode is left to learn from" in caplog.text


def test_groups_without_variance_are_drawn_anew(tmp_path: Path) -> None:
    """Half of the prompts have equal rewards whatever the answer; others take their place."""
    def half(completions: Sequence[str], answer: Sequence[str], **columns: Any) -> list[float]:
        return [0.5 if int(a) % 2 else d for d, a in zip(digits(completions), answer, strict=True)]

    run, lines = trained(tmp_path, recipe="dapo", rewards={"half": half}, update={"steps_per_rollout": 1},
                         rollout={**ROLLOUT, "filter_zero_variance": True, "max_refills": 8})
    assert all(line["rollout/filtered_groups"] > 0 for line in lines)
    assert run.state.cursor == 3 * 4 + sum(line["rollout/filtered_groups"] for line in lines)


def test_a_step_whose_groups_are_all_filtered_is_named_and_the_run_goes_on(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    calls = iter(range(100))

    def flat_at_first(completions: Sequence[str], **columns: Any) -> list[float]:
        return [1.0] * len(completions) if next(calls) < 3 else digits(completions)

    rollout = {**ROLLOUT, "filter_zero_variance": True, "max_refills": 2}
    with caplog.at_level(logging.WARNING):
        run = posttrain.train(small.config(tmp_path / "run", recipe="dapo", steps=3, rollout=rollout, kl="none",
                                           rewards={"flat": flat_at_first}, evaluate={"every": 0}), output="quiet")
    assert "step 1: no episode is left to learn from" in caplog.text
    first, *others = read_metrics(run.directory)
    assert first["rollout/filtered_groups"] == 12 and first["reward/mean"] == 1.0 and "nonfinite" not in first
    assert "grad_norm" not in first and all(line["grad_norm"] > 0 for line in others)


@dataclass(frozen=True)
class Shares:
    """A toy combiner: fixed shares of the columns' advantages; counts its calls in its state."""

    shares: tuple[float, ...]

    def init(self, columns: Sequence[str]) -> None:
        assert tuple(columns) == ("digits", "brevity")

    def combine(self, estimates: Mapping[str, Estimate], state: None) -> Estimate:
        return Estimate(sum(s * e.advantages for s, e in zip(self.shares, estimates.values(), strict=True)))


@dataclass(frozen=True)
class Counted:
    """State of `Inverse`: how often it was asked."""

    calls: int = 0


@dataclass(frozen=True)
class Inverse:
    """A toy combiner of gradients: each slot by the inverse of its norm."""

    def init(self, slots: Sequence[str]) -> Counted:
        assert tuple(slots) == ("digits", "brevity")
        return Counted()

    def weights(self, gramian: np.ndarray, state: Counted) -> tuple[np.ndarray, Counted]:
        assert gramian.shape == (2, 2) and np.allclose(gramian, gramian.T) and gramian.dtype == np.float64
        return 1 / np.sqrt(np.diag(gramian) + 1e-12), Counted(state.calls + 1)


def lengths(completions: Sequence[str], **columns: Any) -> list[float]:
    return [-float(len(c)) for c in completions]


BOTH = {"digits": digits, "brevity": lengths}


def test_a_combiner_of_advantages_from_python(tmp_path: Path) -> None:
    """With all of the weight on one column it is the run that has no other."""
    _, mixed = trained(tmp_path / "a", rewards=BOTH, combiner=Shares((1.0, 0.0)))
    _, alone = trained(tmp_path / "b", rewards={"digits": digits})
    assert [line["grad_norm"] for line in mixed] == pytest.approx([line["grad_norm"] for line in alone], rel=1e-5)
    _, other = trained(tmp_path / "c", rewards=BOTH, combiner=Shares((0.5, 0.5)))
    assert other[-1]["grad_norm"] != pytest.approx(alone[-1]["grad_norm"], rel=1e-3)


def test_a_combiner_of_gradients_from_python(tmp_path: Path) -> None:
    run, lines = trained(tmp_path, rewards=BOTH, gradient_combiner=Inverse(), update={"steps_per_rollout": 2},
                         kl={"use": "fixed", "placement": "loss", "coef": 0.1})
    assert run.state.gradient_combiner == Counted(6)
    for line in lines:
        assert line["combiner/digits"] > 0 < line["combiner/brevity"] and line["combiner/shared"] == 1
        assert line["gradient/digits/norm"] > 0 < line["gradient/brevity/norm"]
        assert -1 <= line["gradient/cosine/digits/brevity"] <= 1


@dataclass(frozen=True)
class OneSlot:
    """An objective as an author's first one: one term, weights for it alone, no field for slots."""

    term: str = "policy"

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.ADVANTAGES})

    @property
    def outputs(self) -> frozenset[Output]:
        return frozenset({Output.LOGPROBS})

    @property
    def unit(self) -> str:
        return "action"

    @property
    def slots(self) -> tuple[str, ...]:
        return ("main",)

    def weights(self, counts: Counts) -> Weights:
        return Weights(np.full(int(counts.episode_actions.sum()), 1 / counts.actions))

    def __call__(self, ops: Ops, out: TokenOutputs, batch: MicroBatch, coef: Mapping[str, Any]) -> Loss:
        return Loss({self.term: Term(-ops.xp.sum(batch.weight * batch.advantages * out.logprobs))})


def test_an_objective_that_knows_nothing_of_kl_gets_it_all_the_same(tmp_path: Path) -> None:
    _, lines = trained(tmp_path, objective=OneSlot(), kl={"use": "fixed", "placement": "loss", "coef": 0.1})
    assert all(line["policy/entropy"] > 0 for line in lines)
    assert lines[-1]["kl/reference"] > 0 and lines[-1]["loss/kl"] > 0


def test_a_term_called_as_cores_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="two parts of the loss have a term or metric called 'kl'"):
        trained(tmp_path, objective=OneSlot("kl"), kl={"use": "fixed", "placement": "loss", "coef": 0.1})


def test_rewards_that_are_estimated_apart_take_no_weights_and_an_objective_with_slots(tmp_path: Path) -> None:
    weighed = {"digits": {"use": digits, "weight": 2.0}, "brevity": brevity}
    settings = small.config(tmp_path / "run", objective=OneSlot(), rewards=weighed, gradient_combiner=Inverse())
    with pytest.raises(ConfigError) as error:
        posttrain.train(settings, output="quiet")
    assert "rewards.digits.weight is 2, but each reward is estimated by itself" in str(error.value)
    assert "has no field slots, so its gradients cannot be taken per reward" in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_column_may_apply_to_no_episode_of_a_step(tmp_path: Path) -> None:
    """The other column still teaches."""
    steps = iter(range(10))

    def sometimes(completions: Sequence[str], **columns: Any) -> Sequence[float | None]:
        return [None] * len(completions) if next(steps) == 1 else lengths(completions)

    settings = small.config(tmp_path / "run", steps=3, rewards={"digits": digits, "brevity": sometimes},
                            combiner=Shares((0.5, 0.5)), evaluate={"every": 0})
    lines = read_metrics(posttrain.train(settings, output="quiet").directory)
    assert lines[1]["reward/brevity/excluded"] == 16 and all(line["grad_norm"] > 0 for line in lines)


USER_MODEL = """\
import torch

class Bag(torch.nn.Module):
    '''Embeddings and a causal mean of them: the smallest module that fits.'''

    def __init__(self, vocab_size, width=16):
        super().__init__()
        self.embed = torch.nn.Embedding(vocab_size, width)
        self.mix = torch.nn.Linear(2 * width, width)
        self.lm_head = torch.nn.Linear(width, vocab_size, bias=False)

    def forward(self, tokens, positions):
        x = self.embed(tokens)
        mean = x.cumsum(1) / torch.arange(1, x.shape[1] + 1).view(1, -1, 1)
        return torch.tanh(self.mix(torch.cat([x, mean], -1)))

def build(vocab_size):
    return Bag(vocab_size)
"""


def test_a_module_of_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(USER_MODEL)
    run, _ = trained(tmp_path, policy={"use": "torch", "file": f"{tmp_path / 'model.py'}:build", "device": "cpu"})
    assert {"embed.weight", "lm_head.weight"} <= set(dict(compose_policy(run).params()))
    assert posttrain.sample(run.directory, "1+2=", n=2)


def compose_policy(run: posttrain.Run) -> Any:
    """The policy of a finished run, loaded anew."""
    loaded = config.load(run.directory / "config.yaml", [], posttrain.discover())
    return compose.build(loaded).policy


MESSAGES = [{"messages": [{"role": "user", "content": f"{a}+{b}"}], "answer": str(a + b)}
            for a in range(3) for b in range(3)]
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"


def bytes_tokenizer(folder: Path) -> dict[str, Any]:
    return {"use": "bytes", "bos": True, "template": TEMPLATE}


def json_tokenizer(folder: Path) -> dict[str, Any]:
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(
        {token: i for i, token in enumerate(["<eos>", "<unk>", "user", *"0123456789+[]>"])}, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"user|."), "isolated")
    made.save(str(folder / "tokenizer.json"))
    return {"use": "json", "path": str(folder), "eos": "<eos>", "chat_template": TEMPLATE}


@pytest.mark.parametrize("tokenizer", [bytes_tokenizer, json_tokenizer])
def test_conversations_through_a_chat_template(tokenizer: Any, tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    calls = watch(monkeypatch, trainer, "update")
    run, _ = trained(tmp_path, steps=2, task={"use": "rows", "rows": MESSAGES}, tokenizer=tokenizer(tmp_path))
    rollouts: Rollouts = calls[0][1]
    chosen = compose.open_task(run.settings)[0]
    asked = rollouts.prompts[0].messages
    assert asked is not None
    expected = chosen.encode(f"[user]{asked[0]['content']}>")
    assert rollouts.tokens[: len(expected)].tolist() == expected and not rollouts.is_action[: len(expected)].any()


def test_truncated_sampling_shows_its_gap_to_the_trainer(tmp_path: Path) -> None:
    _, cut = trained(tmp_path / "a", recipe="reinforce", rollout={**ROLLOUT, "top_p": 0.7})
    assert all(line["sampler/gap"] > 0.1 for line in cut)
    _, whole = trained(tmp_path / "b", recipe="ppo")
    assert all(line["sampler/gap"] < 1e-5 for line in whole)


# The README -------------------------------------------------------------------------------------------------------


def example(language: str, mark: str) -> str:
    """The one block of the README in this language that holds `mark`."""
    block, = (b for b in re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL) if mark in b)
    return str(block)


def test_the_readmes_plugin_of_one_file(tmp_path: Path) -> None:
    block = example("python", "# clipped.py")
    assert sum(bool(line.strip()) for line in block.splitlines()) <= 25, "the README promises a short one"
    path = tmp_path / "clipped.py"
    path.write_text(block)
    trained(tmp_path, recipe="reinforce", plugins=[str(path)], estimator={"use": "clipped", "limit": 0.5})
    made = posttrain.discover([path]).create("estimator", "clipped", limit=2.0)
    episodes = posttrain.Episodes.from_rows(rewards=[[0.0, 6.0], [0.5], [1.0]], group=[0, 0, 0])
    assert made(episodes).advantages.tolist() == [2.0, 2.0, -2.0, -1.5]

    class Contract(EstimatorContract):
        components, plugins, scope = (made,), (path,), "group"

        def oracle(self, component: Any, episodes: posttrain.Episodes) -> list[float]:
            s = [sum(episodes.rewards[a:b]) for a, b in zip(episodes.offsets, episodes.offsets[1:])]
            means = [np.mean([s[o] for o in range(len(s)) if episodes.group[o] == g]) for g in episodes.group]
            return [min(max(s[e] - means[e], -2.0), 2.0) for e, n in enumerate(episodes.lengths) for _ in range(n)]

    assert not list(failures(Contract)), "the README shows what keeps the contract"


def test_the_readmes_estimator_alone(capsys: pytest.CaptureFixture[str]) -> None:
    block = example("python", '"gae"')
    exec(compile(block, str(README), "exec"), {})
    last = 0.5 + (1 - 1) + 0.4 - 0.3
    second = 1.0 - 0.2
    first = 0.0 + 0.2 - 0.1 + 0.95 * second
    printed = [float(x) for x in re.findall(r"-?\d+\.?\d*", capsys.readouterr().out)]
    assert printed == pytest.approx([first, second, last])


def test_the_readmes_run_from_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                     capsys: pytest.CaptureFixture[str]) -> None:
    """As it stands there, but for fewer steps and one thread."""
    monkeypatch.chdir(tmp_path)
    block = example("python", '"runs/brevity"')
    assert '"steps": 20,' in block
    exec(compile(block.replace('"steps": 20,', '"steps": 2, "threads": 1,'), str(README), "exec"), {})
    assert capsys.readouterr().out.splitlines()[-1] == "runs/brevity 2"
    lines = read_metrics(tmp_path / "runs" / "brevity")
    assert len(lines) == 2 and all(0 < line["reward/brevity/mean"] <= 1 for line in lines)
    assert json.loads((tmp_path / "runs/brevity/manifest.json").read_text())["threads"] == 1


def test_the_readmes_configuration(tmp_path: Path) -> None:
    """It is right as it stands, for the files it names."""
    folder = tmp_path / "examples" / "addition"
    for name in ("train.jsonl", "held_out.jsonl"):
        (folder / "data").mkdir(parents=True, exist_ok=True)
        (folder / "data" / name).write_text((small.DATA / "rows.jsonl").read_text())
    (tmp_path / "runs" / "addition-sft" / "policy").mkdir(parents=True)
    (folder / "rl.yaml").write_text(example("yaml", "addition-sft"))
    loaded = config.load(folder / "rl.yaml", [], posttrain.discover())
    fitting.check(loaded)
    assert compose.open_task(loaded.settings)[1].rows == 25


def test_the_readmes_real_model(tmp_path: Path) -> None:
    """Its keys are right; the folder it names is any model's."""
    if missing := [name for name in ("transformers", "peft", "reasoning_gym", "mlflow") if find_spec(name) is None]:
        pytest.skip(f"{missing} are not installed")
    (tmp_path / "path" / "to" / "folder").mkdir(parents=True)
    (tmp_path / "real.yaml").write_text(example("yaml", "path/to/folder"))
    fitting.check(config.load(tmp_path / "real.yaml", [], posttrain.discover()))
