"""Learning from pairs of answers: real runs of `dpo` and `reward_model`, held-out measures, resume, errors, and
`docs/losses.md`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import posttrain
import pytest
import yaml
from posttrain.config import derived, load
from posttrain.data import Rollouts
from posttrain.errors import ConfigError, DataError
from posttrain.export import export
from posttrain.protocols import Output, RowRules
from posttrain.registry import discover
from posttrain.run import opened
from posttrain.supervised import demonstrated
from posttrain.tasks.formats import CHOSEN, REJECTED
from posttrain.tasks.rows import Rows
from posttrain.tokenizers import Characters

pytestmark = pytest.mark.needs("torch")
PAIRS = [{"prompt": f"{a}{b}=", "chosen": str(max(a, b)), "rejected": str(min(a, b))}
         for i in range(100) for a, b in [divmod((37 * i + 11) % 100, 10)] if a != b]
"""The larger of two digits is the better answer, in a mixed order."""
HELD_OUT, TRAIN = PAIRS[:20], PAIRS[20:]
DOCS = Path(__file__).parents[2] / "docs" / "losses.md"


def config(run: Path, recipe: str, **changes: Any) -> dict[str, Any]:
    """Sixty steps in about two seconds."""
    return {
        "recipe": recipe, "steps": 60, "threads": 1, "run": str(run), "seed": 7, "batch_size": 16,
        "policy": {"use": "torch", "hidden_size": 32, "layers": 2, "heads": 2, "kv_heads": 1, "max_positions": 32,
                   "device": "cpu"},
        "tokenizer": {"use": "characters", "alphabet": "0123456789+="},
        "task": {"use": "rows", "rows": TRAIN, "held_out_rows": HELD_OUT},
        "optimizer": {"lr": 1e-2}, "evaluate": {"every": 30}, "checkpoint": {"every": 2, "keep": 0},
        "trackers": {"console": None, "jsonl": None}, **changes}


def trained(run: Path, recipe: str, **changes: Any) -> list[dict[str, float]]:
    posttrain.train(config(run, recipe, **changes), output="quiet")
    return metrics(run)


def metrics(run: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: x for name, x in row.items() if not name.startswith("timing")} for row in rows]


def scored(run: Path, output: Output) -> tuple[Rollouts, np.ndarray]:
    """The held-out pairs, and what the newest checkpoint says of their actions."""
    _, parts = opened(run, ())
    pairs = demonstrated(parts.source.held_out(), parts.tokenizer, (CHOSEN, REJECTED))
    out = parts.policy.score(pairs, frozenset({output}), 1.0)
    return pairs, np.asarray(out.logprobs if output == Output.LOGPROBS else out.values[0], np.float64)


def by_answer(pairs: Rollouts, column: np.ndarray) -> list[np.ndarray]:
    """One row per answer: better, worse, better, worse, ..."""
    return np.split(column, np.cumsum(pairs.episode_actions)[:-1])


@pytest.mark.parametrize("recipe", ["dpo", "reward_model"])
def test_held_out_pairs_come_into_the_right_order(recipe: str, tmp_path: Path) -> None:
    lines = trained(tmp_path / "run", recipe)
    first, middle, last = (line for line in lines if "eval/loss" in line)
    assert first["eval/loss"] == pytest.approx(math.log(2)) and first["eval/preference/margin"] == 0.0
    assert last["eval/preference/accuracy"] >= 0.85
    assert last["eval/loss"] < 0.35
    assert 0 < middle["eval/preference/margin"] < last["eval/preference/margin"]
    assert last["eval/preference/chosen"] > last["eval/preference/rejected"]
    assert last["eval/preference/margin"] == pytest.approx(
        last["eval/preference/chosen"] - last["eval/preference/rejected"], abs=1e-9)


@pytest.mark.parametrize("objective", [{"use": "dpo", "loss": "ipo", "beta": 0.2, "length_normalised": True},
                                       {"use": "dpo", "loss": "hinge"}, {"use": "dpo", "label_smoothing": 0.1}])
def test_the_other_losses_of_pairs_learn_too(objective: Mapping[str, Any], tmp_path: Path) -> None:
    lines = trained(tmp_path / "run", "dpo", objective=objective, steps=30)
    assert lines[-1]["eval/preference/accuracy"] >= 0.8 and lines[-1]["eval/loss"] < lines[0]["eval/loss"]


def test_held_out_measures_of_dpo_are_those_of_its_equation(tmp_path: Path) -> None:
    """Rafailov et al. 2023, equation 7, from log-probs of the policy before and after training."""
    run = tmp_path / "run"
    last = trained(run, "dpo", steps=6, objective={"use": "dpo", "beta": 0.3}, evaluate={"every": 6})[-1]
    pairs, logprobs = scored(run, Output.LOGPROBS)
    posttrain.train(config(tmp_path / "start", "dpo", steps=1, optimizer={"lr": 1e-30}), output="quiet")
    _, reference = scored(tmp_path / "start", Output.LOGPROBS)
    ratios = [float(row.sum()) for row in by_answer(pairs, logprobs - reference)]
    Delta = [good - bad for good, bad in zip(ratios[::2], ratios[1::2], strict=True)]
    n = len(Delta)
    assert n == len(HELD_OUT)
    assert last["eval/loss"] == pytest.approx(sum(math.log1p(math.exp(-0.3 * x)) for x in Delta) / n, rel=1e-5)
    assert last["eval/preference/accuracy"] == sum(x > 0 for x in Delta) / n
    assert last["eval/preference/margin"] == pytest.approx(0.3 * sum(Delta) / n, rel=1e-5)
    assert last["eval/preference/chosen"] == pytest.approx(0.3 * sum(ratios[::2]) / n, rel=1e-5)
    assert last["eval/preference/rejected"] == pytest.approx(0.3 * sum(ratios[1::2]) / n, rel=1e-5)
    total = [float(row.sum()) for row in by_answer(pairs, logprobs)]
    assert last["eval/preference/chosen_logprob"] == pytest.approx(sum(total[::2]) / n, rel=1e-5)


@pytest.mark.parametrize("recipe", ["dpo", "reward_model"])
def test_how_a_step_is_split_changes_nothing(recipe: str, tmp_path: Path) -> None:
    """One pair in a part at a time, or all."""
    whole = trained(tmp_path / "whole", recipe, steps=3)
    split = trained(tmp_path / "split", recipe, steps=3, batching={"use": "first_fit", "tokens": 10})
    assert whole[1]["batch/parts"] == 1 and split[1]["batch/parts"] == 16
    for a, b in zip(whole, split, strict=True):
        assert {**a, "batch/parts": 0} == {**{name: pytest.approx(x, rel=2e-4, abs=1e-5) for name, x in b.items()},
                                           "batch/parts": 0}


@pytest.mark.parametrize("recipe", ["dpo", "reward_model"])
def test_resume_is_exact(recipe: str, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    expected = trained(whole, recipe, steps=6, evaluate={"every": 2})
    trained(cut, recipe, steps=4, evaluate={"every": 2})
    posttrain.resume(cut, ["steps=6"], output="quiet")
    assert metrics(cut) == expected
    weights = sorted((whole / "policy").glob("*.safetensors"))
    assert len(weights) == (2 if recipe == "reward_model" else 1)
    for file in weights:
        assert file.read_bytes() == (cut / "policy" / file.name).read_bytes()


@pytest.mark.needs("torch", "transformers")
def test_an_exported_reward_model_scores_as_it_was_trained(tmp_path: Path) -> None:
    reward_models = pytest.importorskip("posttrain_backends.reward_models")
    pytest.importorskip("transformers")
    run = tmp_path / "run"
    trained(run, "reward_model")
    folder = export(run)
    judge = reward_models.RewardModel(weights=str(folder), device="cpu").load(1)
    found = judge(prompts=[p["prompt"] for p in HELD_OUT for _ in "ab"],
                  completions=[p[name] for p in HELD_OUT for name in ("chosen", "rejected")])
    pairs, values = scored(run, Output.VALUES)
    np.testing.assert_allclose(found, [row[-1] for row in by_answer(pairs, values)], rtol=1e-4, atol=1e-4)
    assert np.mean(np.array(found[::2]) > np.array(found[1::2])) >= 0.85
    card = (folder / "README.md").read_text()
    assert "use: reward_model" in card and "text-classification" in card
    chat = judge(prompts=[[{"role": "user", "content": "37="}]] * 2, completions=["7", "3"])
    assert np.isfinite(chat).all()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny Llamas `policy` and `judge`, of one tokenizer of characters."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("folders")
    ids = {"<eos>": 0, **{c: i for i, c in enumerate("0123456789+=", 1)}, "<pad>": 13, "<unk>": 14}
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    library.decoder = tokenizers.decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=library, eos_token="<eos>", pad_token="<pad>")
    torch.manual_seed(1)
    sizes = transformers.LlamaConfig(
        vocab_size=15, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, pad_token_id=13, num_labels=1)
    for name, model in (("policy", transformers.LlamaForCausalLM(sizes)),
                        ("judge", transformers.LlamaForSequenceClassification(sizes))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def hf(folder: Path, **policy: Any) -> dict[str, Any]:
    return {"policy": {"use": "hf", "weights": str(folder), "device": "cpu", **policy},
            "tokenizer": {"use": "hf", "weights": str(folder)}, "steps": 40, "evaluate": {"every": 40}}


@pytest.mark.needs("torch", "transformers")
@pytest.mark.parametrize(("adapter", "margin"), [(None, 0.2), ({"use": "lora", "rank": 8}, 0.03)])
def test_dpo_of_a_model_of_transformers(adapter: Any, margin: float, folders: Path, tmp_path: Path) -> None:
    """The reference is a second copy, or the model without its adapter."""
    if adapter:
        pytest.importorskip("peft")
    lines = trained(tmp_path / "run", "dpo", **hf(folders / "policy", **({"adapter": adapter} if adapter else {})))
    assert lines[0]["eval/preference/margin"] == 0.0
    assert lines[-1]["eval/preference/accuracy"] >= 0.8 and lines[-1]["eval/preference/margin"] > margin


@pytest.mark.needs("torch", "transformers")
@pytest.mark.parametrize("start", ["policy", "judge"])
def test_a_reward_model_of_transformers(start: str, folders: Path, tmp_path: Path) -> None:
    """A causal model gets a value head, a classification model trains its own read-out; both become rewards."""
    reward_models = pytest.importorskip("posttrain_backends.reward_models")
    lines = trained(tmp_path / "run", "reward_model", **hf(folders / start))
    assert lines[-1]["eval/preference/accuracy"] >= 0.8
    judge = reward_models.RewardModel(weights=str(export(tmp_path / "run")), device="cpu").load(1)
    found = judge(prompts=["37="] * 2, completions=["7", "3"])
    assert found[0] > found[1]
    if start == "judge":
        with pytest.raises(ConfigError, match="scores answers and gives no log-probs, so it writes none"):
            posttrain.sample(tmp_path / "run", "37=")


# ---- rows

CHAT = [{"chosen": [{"role": "user", "content": p["prompt"]}, {"role": "assistant", "content": p["chosen"]}],
         "rejected": [{"role": "user", "content": p["prompt"]}, {"role": "assistant", "content": p["rejected"]}]}
        for p in TRAIN]


def rows(*changed: Mapping[str, Any], base: list[dict[str, Any]] = TRAIN) -> list[dict[str, Any]]:
    """Good rows, and others behind them."""
    return [*base[:6], *(dict(row) for row in changed)]


@pytest.mark.parametrize("form", [
    CHAT, [{**row, "prompt": "of no use"} for row in CHAT],
    [{"prompt": [{"role": "user", "content": p["prompt"]}], "chosen": p["chosen"],
      "rejected": [{"role": "assistant", "content": p["rejected"]}]} for p in TRAIN]])
def test_forms_of_a_pair_mean_the_same(form: list[dict[str, Any]], tmp_path: Path) -> None:
    tokenizer = Characters(alphabet="0123456789=").load()
    prompts = Rows(rows=tuple(form), shuffle=False).load(tokenizer, RowRules()).take(0, 8, 0)
    pairs = demonstrated(prompts, tokenizer, (CHOSEN, REJECTED))
    assert pairs.completions == tuple(p[name] for p in TRAIN[:8] for name in ("chosen", "rejected"))
    assert [p.messages[0]["content"] for p in prompts] == [p["prompt"] for p in TRAIN[:8]]
    assert pairs.group.tolist() == [g for g in range(8) for _ in "ab"]


@pytest.mark.parametrize(("given", "message"), [
    (rows({"prompt": "12=", "chosen": "2"}), r"column 'rejected' is missing; other rows have it"),
    (rows({"prompt": "12=", "chosen": "2", "rejected": ""}), r"column 'rejected' is empty"),
    (rows({"prompt": "12=", "chosen": "2", "rejected": "2"}),
     r"columns 'chosen' and 'rejected' hold the same answer"),
    (rows({"prompt": "12=", "chosen": "2", "rejected": "x"}), r"column 'rejected': character 'x'"),
    (rows({"prompt": "12=", "chosen": "2", "rejected": 1}), r"column 'rejected' should be text"),
    (rows({**CHAT[0], "rejected": CHAT[1]["rejected"]}, base=CHAT), r"the conversations .* differ"),
    (rows({**CHAT[0], "rejected": CHAT[1]["rejected"][:1]}, base=CHAT), r"column 'rejected': ends with"),
    (rows({**CHAT[0], "rejected": "3"}, base=CHAT), r"column 'rejected' should be a conversation"),
    (rows({"chosen": CHAT[0]["chosen"]}, base=CHAT),
     r"column 'rejected' is missing; the row has chosen, and a pair has two answers"),
    ([{"chosen": "2", "rejected": "1"}], r"(?s)column 'prompt' is missing; the row has chosen, rejected; name it by "
     r"task\.prompt_key, or let both answers be conversations that begin with it \("),
    ([{"chosen": [{"role": "assistant", "content": x}]} | {"rejected": "1"} for x in "23"],
     r"column 'prompt' is missing"),
    ([{"prompt": "12=", "chosen": 2, "rejected": 1}],
     r"(?s)1 of 1 have not both:\n  column 'chosen' should be text or one assistant message, found a number; "
     r"column 'rejected' should be text .*found a number \(.*write answers as text, or name .* task\.chosen_key"),
    ([{"prompt": "12=", "chosen": "2"}], r"(?s)1 of 1 have not both:\n  no 'rejected' to learn from \(.*add what is "
     r"missing, or name .* task\.rejected_key"),
    ([{"prompt": "12=", "chosen": None, "rejected": "1"}], r"column 'chosen' should be text .*, found null \("),
    ([{name: CHAT[0]["chosen"][:1] for name in ("chosen", "rejected")}],
     r"(?s)'chosen': ends with 'user', but each conversation of a pair ends with the assistant's answer; add the "
     r"answer \(.*'rejected': ends with 'user'"),
    ([{"chosen": CHAT[0]["chosen"]}], r"column 'rejected' is missing; the row has chosen, and a pair has two answers"),
    ([{"prompt": "12=", "completion": "2"}],
     r"(?s)needs a preferred and a rejected answer.*no 'chosen' and no 'rejected' to learn from.*task\.chosen_key"),
])
def test_wrong_rows_are_named(given: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    task = {"use": "rows", "path": str(tmp_path / "rows.jsonl")}
    with pytest.raises(DataError) as error:
        trained(tmp_path / "run", "dpo", task=task, evaluate={"every": 0})
    assert re.search(message, str(error.value)), str(error.value)
    assert f"rows.jsonl:{len(given)})" in str(error.value)
    assert ("hold the same answer" in str(error.value)) == ("hold the same answer" in message)
    assert not (tmp_path / "run").exists()


def test_equal_answers_can_be_left_out_and_columns_named(tmp_path: Path) -> None:
    renamed = [{"prompt": p["prompt"], "good": p["chosen"], "bad": p["rejected"]} for p in TRAIN]
    renamed[3]["bad"] = renamed[3]["good"]
    task = {"use": "rows", "rows": renamed, "chosen_key": "good", "rejected_key": "bad"}
    lines = trained(tmp_path / "run", "dpo", task=task, data={"on_bad_row": "skip"}, steps=2, evaluate={"every": 0})
    assert lines[0]["loss/dpo"] == pytest.approx(math.log(2), abs=1e-6)


def test_pairs_still_serve_supervised_training_on_one_column(tmp_path: Path) -> None:
    task = {"use": "rows", "rows": TRAIN, "held_out_rows": HELD_OUT, "completion_key": "chosen"}
    lines = trained(tmp_path / "run", "sft", task=task, steps=20, evaluate={"every": 20})
    assert lines[-1]["eval/loss"] == pytest.approx(lines[-1]["eval/sft/nll"])
    assert lines[-1]["eval/loss"] < lines[0]["eval/loss"]


# ---- configurations

@pytest.mark.parametrize(("recipe", "changes", "message"), [
    ("dpo", {"loop": "rl", "rewards": {"right": "exact_match"}}, "learns from given answers.*recipe: sft, dpo"),
    ("dpo", {"objective": "ppo"}, "loop: supervised cannot train objective 'ppo', which needs advantages"),
    ("reward_model", {"rewards": {"right": "exact_match"}}, "trains scores of given answers.*remove rewards"),
    ("dpo", {"objective": {"use": "dpo", "loss": "ipo", "label_smoothing": 0.1}}, "label_smoothing belongs to"),
    ("dpo", {"objective": {"use": "dpo", "loss": "sigmod"}}, "did you mean 'sigmoid'"),
    ("dpo", {"objective": {"use": "dpo", "beta": 0.0}}, "beta must be positive"),
    ("dpo", {"objective": {"use": "dpo", "beta": math.inf}}, "beta must be positive and finite"),
])
def test_what_does_not_fit_is_refused(recipe: str, changes: Mapping[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        trained(tmp_path / "run", recipe, **changes)
    assert re.search(message, str(error.value)), str(error.value)


def test_sizes_are_told_in_pairs(tmp_path: Path) -> None:
    sizes = dict(derived(load(config(tmp_path / "run", "dpo"), [], discover()).settings))
    assert sizes == {"episodes per optimiser step": "32 (16 pairs)", "optimiser steps in all": "60",
                     "episodes in all": "1,920"}


def correct(completions: list[str], chosen: list[str], **columns: Any) -> list[float]:
    return [float(c == a) + 0.1 * len(c) for c, a in zip(completions, chosen, strict=True)]


def rollouts(**changes: Any) -> dict[str, Any]:
    return {"loop": "rl", "objective": "decoupled_ppo", "estimator": "grpo", "rewards": {"right": correct}, "steps": 3,
            "rollout": {"prompts_per_step": 4, "group_size": 4, "max_new_tokens": 3, "staleness": 1},
            "evaluate": {"every": 0}, **changes}


def test_decoupled_ppo_recomputes_pi_old_and_weighs_by_the_sampler(tmp_path: Path) -> None:
    lines = trained(tmp_path / "run", "grpo", **rollouts(update={"steps_per_rollout": 2}))
    assert lines[-1]["policy/behavior_weight"] != 1.0 and 0.2 < lines[-1]["policy/behavior_weight"] < 2.0
    assert lines[0]["policy/behavior_weight"] == pytest.approx(1.0, abs=1e-4)  # the first rollout is not stale


@pytest.mark.parametrize(("changes", "message"), [
    ({"correction": {"use": "tis"}}, "weighs by the ratio to the sampler itself; correction 'tis' would do it twice"),
    ({"update": {"old_logprobs": "behavior"}}, "takes the sampler for pi_old"),
    ({"estimator": {"use": "vtrace"}, "critic": "policy"}, "both weigh by the ratio to the sampler"),
])
def test_decoupled_ppo_is_the_only_part_that_weighs(changes: Mapping[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        trained(tmp_path / "run", "grpo", **rollouts(**changes))
    assert message in str(error.value), str(error.value)


@pytest.mark.parametrize("objective", ["cispo", "sapo", "ppo_dual_clip"])
def test_presets_train(objective: str, tmp_path: Path) -> None:
    lines = trained(tmp_path / "run", "grpo", **rollouts(objective=objective, update={"epochs": 2}))
    assert all(math.isfinite(line["loss/policy"]) for line in lines)
    assert ("policy/capped" in lines[-1]) == (objective == "cispo")


# ---- the page

def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCS.read_text(), re.DOTALL)


SMALL: Mapping[str, Callable[[Any], Any]] = {
    "policy": lambda policy: {**policy, "hidden_size": 32, "layers": 2, "device": "cpu"}, "steps": lambda _: 4,
    "evaluate": lambda _: {"every": 2}, "batch_size": lambda _: 4}


@pytest.mark.parametrize("recipe", ["dpo", "reward_model"])
def test_the_example_of_the_page_runs(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    example = yaml.safe_load(blocks("yaml")[0])
    small = {key: SMALL[key](value) if key in SMALL else value for key, value in example.items()}
    if recipe == "reward_model":
        del small["objective"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    (tmp_path / "train.yaml").write_text(yaml.safe_dump({**small, "recipe": recipe, "threads": 1, "run": "run"}))
    posttrain.train(tmp_path / "train.yaml", output="quiet")
    assert "eval/preference/accuracy" in metrics(tmp_path / "run")[-1]


@pytest.mark.parametrize("text", blocks("json"))
def test_the_rows_of_the_page_are_pairs(text: str, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(text)
    lines = trained(tmp_path / "run", "dpo", steps=1, tokenizer="bytes", evaluate={"every": 0},
                    policy={**config(tmp_path, "dpo")["policy"], "max_positions": 256},
                    task={"use": "rows", "path": str(tmp_path / "pairs.jsonl")}, batch_size=2)
    assert lines[0]["loss/dpo"] == pytest.approx(math.log(2), abs=1e-6)


def test_every_policy_loss_is_in_the_page() -> None:
    page = DOCS.read_text()
    named = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    own = {c.name for c in discover().components("objective") if c.target.startswith("posttrain_objectives.")}
    assert named == own - {"value", "action_value", "entropy"}
