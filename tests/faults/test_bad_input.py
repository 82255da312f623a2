"""Bad input as a new user gives it: every problem is named with its remedy, no traceback, and nothing stands in the way
of the next try.
"""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import yaml
from integration import small
from posttrain import checkpoint, cli
from posttrain.rundir import RunDirectory, read_metrics

torch = pytest.importorskip("torch")

RUN = Path("runs/try")
REWARDS = '''\
import itertools

def correct(completions, answer, **columns):
    return [float(c == a) + 0.1 * sum(x.isdigit() for x in c) for c, a in zip(completions, answer)]

def raises(completions, answer, **columns):
    return [1 / (int(a) - 3) for a in answer]

def nan(completions, **columns):
    return [float("nan")] * len(completions)

def short(completions, **columns):
    return [1.0] * (len(completions) - 1)

def text(completions, **columns):
    return ["good"] * len(completions)

def one_text(completions, **columns):
    return "good"

def huge(completions, **columns):
    return [1e38 * len(c) for c in completions]

calls = itertools.count()

def soon_raises(completions, **columns):
    if next(calls) == 1:
        raise KeyError("answer")
    return [float(len(c)) for c in completions]
'''

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a configuration that runs, its rows and its rewards."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards.py").write_text(REWARDS)
    (tmp_path / "data.jsonl").write_text((small.DATA / "rows.jsonl").read_text())
    changes = {"steps": 2, "evaluate": {"every": 0}, "checkpoint": {"every": 1, "keep": 0},
               "optimizer": {"lr": 1e-2}, "task": {"use": "rows", "path": "data.jsonl"},
               "rewards": {"correct": {"file": "rewards.py:correct"}}}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(small.config(RUN, **changes), sort_keys=False))
    return tmp_path


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """The command line in this process: exit code, output, errors. Never a traceback."""
    def called(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(arguments)
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err
    return called


def assert_next_try_works(call: Call) -> None:
    """Nothing is left of the failed run, and the mended configuration trains in the same directory."""
    assert not RUN.exists()
    code, _, err = call("train", "train.yaml")
    assert code == 0, err
    assert [line["step"] for line in read_metrics(RUN)] == [1, 2]


def edited(folder: Path, old: str, new: str) -> None:
    text = (folder / "train.yaml").read_text()
    assert text.count(old) == 1
    (folder / "bad.yaml").write_text(text.replace(old, new))


def test_one_long_row_is_named_before_training_begins(folder: Path, call: Call) -> None:
    rows = (folder / "data.jsonl").read_text()
    long = {"prompt": "1+" * 15 + "1=", "completion": "16", "answer": "16"}
    (folder / "data.jsonl").write_text(rows + json.dumps(long) + "\n")
    code, _, err = call("train", "train.yaml")
    assert code == 2 and f"1 of {len(small.ROWS) + 1} prompts cannot be answered by the policy" in err
    assert "32 prompt tokens and up to 4 new ones do not fit the model's 32 positions" in err
    assert f"data.jsonl:{len(small.ROWS) + 1})" in err
    (folder / "data.jsonl").write_text(rows)
    assert_next_try_works(call)


# The configuration ------------------------------------------------------------------------------------------------


CONFIGS = {
    "unknown key": ("group_size: 4", "group_sise: 4",
                    ["rollout.group_sise is not a key; did you mean 'group_size'? (bad.yaml:"]),
    "wrong type": ("steps: 2", "steps: many", ["steps must be a whole number, got 'many' (bad.yaml:2)"]),
    "out of range": ("prompts_per_step: 4", "prompts_per_step: 0", ["prompts_per_step must be at least 1, got 0"]),
    "unknown recipe": ("recipe: grpo", "recipe: grppo", ["recipe 'grppo' not found; did you mean 'grpo'?"]),
    "unknown component": ("recipe: grpo", "recipe: grpo\nestimator: gea",
                          ["estimator 'gea' not found; did you mean 'gae' (posttrain-estimators ",
                           "installed: clipped_is, dr_grpo, gae, ", "all: posttrain plugins estimator (bad.yaml:2)"]),
    "unknown field": ("recipe: grpo", "recipe: grpo\nestimator: {use: rloo, baselin: mean}",
                      ["estimator.baselin is not a field of rloo; did you mean 'baseline'? (bad.yaml:2)"]),
    "field of a model": ("heads: 2", "heads: 5", ["hidden_size 32 is not a multiple of heads 5: take one of"]),
    "no such rows": ("path: data.jsonl", "path: dta.jsonl", ["task.path: no such file: ", "dta.jsonl (bad.yaml:"]),
    "no such weights": ("use: torch", "use: torch\n  weights: runs/other/policy",
                        ["policy.weights: no such file: ", "runs/other/policy"]),
    "reward with a typo": ("rewards.py:correct", "rewards.py:corect",
                           ["rewards.correct.file: rewards.py has no 'corect'; did you mean 'correct'? (bad.yaml:"]),
    "no such rewards": ("rewards.py:correct", "rewrds.py:correct", ["no such file: ", "rewrds.py (bad.yaml:"]),
    "no such plugin": ("recipe: grpo", "recipe: grpo\nplugins: [mine.py]", ["plugins: no such file: ", "mine.py"]),
    "no YAML": ("recipe: grpo", "recipe: [grpo", ["not valid YAML: ", "(bad.yaml:2)"]),
    "no rewards": ("correct:\n    file: rewards.py:correct", "correct: null",
                   ["rewards is empty; name at least one, for example rewards: {correct: exact_match}"]),
    "values without a critic": ("recipe: grpo", "recipe: grpo\nestimator: gae",
                                ["estimator 'gae' needs 'values'; add a critic (critic: policy) or use one of: ",
                                 "grpo", "rloo", "reinforce"]),
    "given answers in the loop of rewards": ("recipe: grpo", "recipe: grpo\nobjective: sft",
                                             ["objective 'sft' learns from given answers", "loop: supervised"]),
    "rewards in the loop of given answers": ("recipe: grpo", "recipe: grpo\nloop: supervised",
                                             ["loop: supervised cannot train objective 'grpo'", "objective: sft"]),
    "more reused than kept": ("recipe: grpo", "recipe: grpo\nreplay: {reuse: 9, capacity: 8}",
                              ["replay.reuse is larger than replay.capacity"]),
    "no room for the answer": ("max_positions: 32", "max_positions: 6",
                               ["4 prompt tokens and up to 4 new ones do not fit the model's 6 positions (",
                                "data.jsonl:", "lower rollout.max_new_tokens"]),
    "schedule shorter than its warm-up": ("lr: 0.01", "lr: 0.01\n  schedule: cosine\n  warmup_steps: 5",
                                          ["'cosine' needs total_steps above warmup_steps (5), got 2"]),
    "user module": ("use: torch", "use: torch\n  file: rewards.py:biuld", ["rewards.py has no function 'biuld'"]),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_wrong_configuration(case: str, folder: Path, call: Call) -> None:
    old, new, texts = CONFIGS[case]
    edited(folder, old, new)
    code, out, err = call("train", "bad.yaml")
    assert code == 2 and out == ""
    for text in texts:
        assert text in err
    assert not RUN.exists()


SETTINGS = {
    "estimator=gae": "estimator 'gae' needs 'values'; add a critic (critic: policy) or use one of: ",
    "critic=policy": "estimator 'grpo' gives nothing to train a critic on; set critic: none or use one of: gae",
    "recipe=ppo value_objective=ppo kl=none": "value_objective 'ppo' trains no critic of states; use value",
    "update.steps_per_rollout=9": "update.steps_per_rollout is 9, but a rollout has only 4 groups",
    "rewards.reward=length": "rewards.reward: the sum of all rewards has that name; choose another",
    "rewards.correct.weight=.nan": "rewards.correct.weight must be finite, got nan (command line)",
    "evaluate.every=1": "evaluate.every asks for held-out rows, but the task holds none out; give task.held_out or",
    "seed=-1": "seed must not be negative, got -1", "threads=-1": "threads must not be negative, got -1",
    "batch_size=0": "batch_size must be at least 1, got 0", "checkpoint.keep=-1": "keep must not be negative, got -1",
    "replay.capacity=-1": "capacity must not be negative", "rollout.max_refills=-1": "max_refills must not be negative",
    "rollout.temperature=.nan": "temperature must be positive in training",
    "update.entropy_coef=.nan": "entropy_coef must be finite, got nan",
    "optimizer.betas=[0.9,2]": "betas must lie in [0, 1), got (0.9, 2.0) (command line)",
    "optimizer.eps=0": "eps must be positive, got 0.0 (command line)",
    "optimizer.weight_decay=-1": "weight_decay must not be negative, got -1.0 (command line)",
    "optimizer.max_bad_steps=0": "max_bad_steps must be at least 1, got 0 (command line)",
}


@pytest.mark.parametrize("settings", SETTINGS)
def test_settings_that_cannot_be_meant(settings: str, folder: Path, call: Call) -> None:
    """Found without loading anything: `check` says the same as `train`."""
    for command in ("check", "train"):
        code, _, err = call(command, "train.yaml", *settings.split())
        assert code == 2 and SETTINGS[settings] in err and len(err.splitlines()) == 1
        assert not RUN.exists()


def test_paths_of_the_command_line_are_relative_to_where_one_stands(folder: Path, call: Call) -> None:
    (folder / "deep").mkdir()
    (folder / "train.yaml").rename(folder / "deep" / "train.yaml")
    code, _, err = call("check", "deep/train.yaml", "task.path=data.jsonl")
    assert code == 2 and f"no such file: {folder / 'deep' / 'rewards.py'} (deep/train.yaml:" in err.replace(
        f"({folder}/", "(") and "data.jsonl" not in err
    assert call("check", "deep/train.yaml", "task.path=data.jsonl", "rewards.correct.file=rewards.py:correct")[0] == 0


def test_the_estimator_that_needs_a_critic_is_told_as_designed(folder: Path, call: Call) -> None:
    _, _, err = call("check", "train.yaml", "estimator=gae")
    said = err.strip()
    start = "estimator 'gae' needs 'values'; add a critic (critic: policy) or use one of: "
    assert said.startswith(start)
    assert {"grpo", "rloo", "reinforce"} <= set(said.removeprefix(start).split(", "))
    assert "gae" not in said.removeprefix(start).split(", ")


def test_all_problems_of_a_file_are_told_at_once(folder: Path, call: Call) -> None:
    settings = yaml.safe_load((folder / "train.yaml").read_text())
    settings |= {"steps": 0, "estimatr": "gae", "kl": {"use": "fixed", "koef": 1}, "rollout": {"group_size": "four"}}
    (folder / "bad.yaml").write_text(yaml.safe_dump(settings))
    code, _, err = call("check", "bad.yaml")
    title, *problems = err.splitlines()
    assert code == 2 and title == "bad.yaml cannot be run:"
    assert sorted(line.rpartition(" (bad.yaml:")[0].strip() for line in problems) == [
        "estimatr is not a key; did you mean 'estimator'?", "kl.koef is not a field of fixed; did you mean 'coef'?",
        "rollout.group_size must be a whole number, got 'four'", "steps must be at least 1, got 0"]


def test_a_missing_configuration(folder: Path, call: Call) -> None:
    code, _, err = call("train", "trian.yaml")
    assert code == 2 and "cannot read trian.yaml: No such file or directory" in err


def test_a_setting_that_is_none(folder: Path, call: Call) -> None:
    code, _, err = call("train", "train.yaml", "steps:3")
    assert code == 2 and "'steps:3' is not a setting; write key=value" in err
    assert_next_try_works(call)


# The rows ---------------------------------------------------------------------------------------------------------


GOOD = '{"prompt": "1+2=", "answer": "3"}'
ROWS: Mapping[str, tuple[list[str], list[str], list[str]]] = {
    "broken lines": ([GOOD, '{"prompt": "1+', GOOD, "[1, 2]", '{"answer": "3"}', '{"prompt": 5}'], [],
                     ["data.jsonl: 4 of 6 rows cannot be used", "data.jsonl:2)", "not JSON", "data.jsonl:4)",
                      "data.jsonl:5)", "column 'prompt' is missing", "data.jsonl:6)", "data.on_bad_row=skip"]),
    "no rows": ([], [], ["there is no row; write one JSON object per line", "data.jsonl)"]),
    "another column": (['{"question": "1+2="}'], [], ["no row has a column 'prompt' or 'messages'",
                                                      "the columns are question", "task.prompt_key"]),
    "too long a prompt": ([GOOD, '{"prompt": "1+2+3+4+5=", "answer": "15"}'], ["data.max_prompt_tokens=6"],
                          ["10 tokens", "data.max_prompt_tokens", "data.jsonl:2)"]),
    "outside the alphabet": ([GOOD, '{"prompt": "1*2=", "answer": "2"}'], [],
                             ["character '*' at position 1 of '1*2=' is not in the tokenizer's alphabet",
                              "tokenizer.alphabet", "data.jsonl:2)"]),
    "no answers to learn from": ([GOOD] * 30, ["recipe=sft", "kl=none"], [
        "30 of 30 have none:", "no 'completion' to learn from (", "data.jsonl:1)", "data.jsonl:20)",
        "task.completion_key"]),
}


@pytest.mark.parametrize("case", ROWS)
def test_rows_that_cannot_be_used(case: str, folder: Path, call: Call) -> None:
    rows, settings, texts = ROWS[case]
    before = (folder / "data.jsonl").read_text()
    (folder / "data.jsonl").write_text("".join(row + "\n" for row in rows))
    for command in ("check", "train"):
        code, _, err = call(command, "train.yaml", *settings)
        assert code == 2 and len(err.splitlines()) < 25
        for text in texts:
            assert text in err
        assert not RUN.exists()
    (folder / "data.jsonl").write_text(before)
    if case == "broken lines":
        assert_next_try_works(call)


def test_bad_rows_may_be_left_out(folder: Path, call: Call) -> None:
    with (folder / "data.jsonl").open("a") as file:
        file.write('{"prompt": \n')
    assert call("train", "train.yaml", "data.on_bad_row=skip")[0] == 0


# The rewards ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "texts"), [
    ("raises", ["reward 'correct' raised ZeroDivisionError: ", "on row ", "data.jsonl:", "rewards.py:7"]),
    ("nan", ["reward 'correct' returned nan, which is not finite", "(row "]),
    ("short", ["reward 'correct' returned 15 numbers for 16 completions"]),
    ("text", ["reward 'correct' returned 'good' (str), which is no number", "(row "]),
    ("one_text", ["reward 'correct' returned 'good' (str), expected a list of 16 numbers"]),
])
def test_a_reward_that_fails(name: str, texts: list[str], folder: Path, call: Call) -> None:
    setting = f"rewards.correct.file=rewards.py:{name}"
    code, _, err = call("train", "train.yaml", setting)
    assert code == 2
    for text in texts:
        assert text in err
    assert_next_try_works(call)


def test_a_reward_that_fails_later_leaves_the_run_to_go_on_with(folder: Path, call: Call) -> None:
    """What was trained is kept: with the function mended the run is resumed."""
    code, _, err = call("train", "train.yaml", "rewards.correct.file=rewards.py:soon_raises")
    assert code == 2 and "reward 'correct' raised KeyError: 'answer'" in err
    assert [line["step"] for line in read_metrics(RUN)] == [1]
    code, _, err = call("train", "train.yaml")
    assert code == 2 and f"posttrain resume '{RUN}'" in err
    (folder / "rewards.py").write_text(REWARDS.replace("== 1", "== -1"))
    code, _, err = call("resume", str(RUN))
    assert code == 0, err
    assert [line["step"] for line in read_metrics(RUN)] == [1, 2]


# Run directories --------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(folder: Path, call: Call) -> Path:
    """A run of two steps with a checkpoint of each."""
    assert call("train", "train.yaml")[0] == 0
    return RUN


def content(directory: Path) -> dict[str, bytes]:
    """Every file of a run but the lock."""
    return {str(p): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file() and p.name != ".lock"}


def test_a_run_directory_that_exists(finished: Path, call: Call) -> None:
    before = content(finished)
    code, _, err = call("train", "train.yaml")
    assert code == 2 and f"this directory already holds a run ({finished})" in err
    assert f"posttrain resume '{finished}'" in err and "run=PATH" in err
    assert content(finished) == before


def test_a_run_directory_in_use(finished: Path, call: Call) -> None:
    with RunDirectory.open(finished):
        before = content(finished)
        code, _, err = call("resume", str(finished), "steps=3")
        assert code == 2 and f"run directory {finished} is in use by process {os.getpid()}" in err
        assert content(finished) == before
    assert call("resume", str(finished), "steps=3")[0] == 0


def test_files_of_others_in_a_run_directory_stay(folder: Path, call: Call) -> None:
    (folder / RUN).mkdir(parents=True)
    (folder / RUN / "notes.txt").write_text("mine")
    assert call("train", "train.yaml", "rewards.correct.file=rewards.py:nan")[0] == 2
    assert [path.name for path in RUN.iterdir()] == ["notes.txt"]
    assert call("train", "train.yaml")[0] == 0
    assert (RUN / "notes.txt").read_text() == "mine"


def test_a_run_directory_that_cannot_be_made(folder: Path, call: Call) -> None:
    (folder / "runs").write_text("a file")
    code, _, err = call("train", "train.yaml")
    assert code == 2 and "cannot write: " in err and "run=PATH" in err
    (folder / "runs").unlink()
    assert_next_try_works(call)


@pytest.mark.parametrize("arguments", [("resume",), ("eval",), ("sample", "1+2=")])
def test_a_directory_that_is_no_run(arguments: tuple[str, ...], folder: Path, call: Call) -> None:
    command, *more = arguments
    (folder / "runs").mkdir()
    code, _, err = call(command, "runs", *more)
    assert code == 2 and "runs is not a run directory: it has no config.yaml" in err and "posttrain train CONFIG" in err
    assert list((folder / "runs").iterdir()) == []
    assert call(command, "gone", *more)[0] == 2 and not Path("gone").exists()


@pytest.mark.parametrize("arguments", [("eval",), ("sample", "1+2=")])
def test_a_run_without_a_checkpoint(arguments: tuple[str, ...], finished: Path, call: Call) -> None:
    for path in (finished / "checkpoints").iterdir():
        path.rename(finished.parent / path.name)
    command, *more = arguments
    code, _, err = call(command, str(finished), *more)
    assert code == 2 and f"{finished} has no checkpoint yet" in err and f"posttrain resume {finished}" in err


def test_eval_without_held_out_rows(finished: Path, call: Call) -> None:
    code, _, err = call("eval", str(finished))
    assert code == 2 and "no held-out rows" in err and "task.held_out" in err


@pytest.mark.parametrize(("prompt", "text"), [
    ("1*2=", "character '*' at position 1 of '1*2=' is not in the tokenizer's alphabet"),
    ("", "the prompt is empty"), ("1" * 40, "do not fit the model's 32 positions"),
])
def test_a_prompt_that_cannot_be_answered(prompt: str, text: str, finished: Path, call: Call) -> None:
    code, out, err = call("sample", str(finished), prompt)
    assert code == 2 and out == "" and text in err


def test_a_lost_manifest_costs_the_comparison_alone(finished: Path, call: Call,
                                                    caplog: pytest.LogCaptureFixture) -> None:
    for damage in (lambda p: p.write_text("{"), Path.unlink):
        damage(finished / "manifest.json")
        steps = len(read_metrics(finished)) + 1
        assert call("resume", str(finished), f"steps={steps}")[0] == 0
        assert f"{finished / 'manifest.json'} cannot be read" in caplog.text
        caplog.clear()


def test_a_resumed_model_of_another_size(finished: Path, call: Call) -> None:
    before = content(finished)
    code, _, err = call("resume", str(finished), "policy.hidden_size=64", "steps=3")
    assert code == 2 and "embed_tokens.weight has shape (14, 32), the model has (14, 64)" in err
    assert content(finished) == before and call("resume", str(finished), "steps=3")[0] == 0


def test_init_where_a_file_stands(folder: Path, call: Call) -> None:
    code, _, err = call("init", "train.yaml")
    assert code == 2 and "cannot write: " in err and "posttrain init DIR" in err


def test_a_damaged_checkpoint(finished: Path, call: Call) -> None:
    file = finished / "checkpoints" / "step-000002" / "policy.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    before = content(finished)
    for arguments in (("resume", str(finished)), ("sample", str(finished), "1+2=")):
        code, _, err = call(*arguments)
        assert code == 3
        assert f"checkpoint {file.parent} is damaged: policy.safetensors has sha256 " in err
        assert "resume.fallback=true" in err
    assert content(finished) == before
    assert call("resume", str(finished), "resume.fallback=true")[0] == 0
    assert checkpoint.load(file.parent).step == 2, "step 2 was trained again from step 1 and saved anew"


# The machine ------------------------------------------------------------------------------------------------------


def process(*arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, after the statements `before`."""
    code = f"import sys\n{before}\nfrom posttrain.cli import main\nsys.exit(main({list(arguments)!r}))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_a_full_disk_while_saving(finished: Path, call: Call) -> None:
    """A limit on the size of files stands for it: the system refuses to write beyond."""
    sizes = [p.stat().st_size for p in (finished / "checkpoints" / "step-000002").iterdir()]
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({max(sizes) // 2}, {resource.RLIM_INFINITY}))"
    done = process("resume", str(finished), "steps=3", before=limit)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"checkpoint of step 3 was not saved in {finished / 'checkpoints'}: File too large" in done.stderr
    needed, free = (int(word) for word in done.stderr.replace(";", " ").split() if word.isdigit() and int(word) > 3)
    assert needed >= max(sizes) * 0.9 and free > 0
    assert "earlier checkpoints are intact" in done.stderr
    assert sorted(p.name for p in (finished / "checkpoints").iterdir()) == ["step-000001", "step-000002"]
    assert checkpoint.load(finished / "checkpoints" / "step-000002").step == 2
    assert call("resume", str(finished), "steps=3")[0] == 0
    assert [line["step"] for line in read_metrics(finished)] == [1, 2, 3]


BLOCKED = {
    "absent": "sys.modules['torch'] = None",
    "not found": """
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] == 'torch':
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)
sys.meta_path.insert(0, Absent())""",
}


@pytest.mark.parametrize("how", BLOCKED)
def test_without_torch(how: str, folder: Path, call: Call) -> None:
    done = process("train", "train.yaml", before=BLOCKED[how])
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.strip() == ("backend 'torch' needs torch, which is not installed: "
                                   "pip install 'posttrain-backends[torch]'")
    assert process("check", "train.yaml", before=BLOCKED[how]).returncode == 0
    assert_next_try_works(call)


# Numbers ----------------------------------------------------------------------------------------------------------


def test_gradients_that_are_not_finite_are_skipped_and_then_end_the_run(folder: Path, call: Call) -> None:
    code, _, err = call("train", "train.yaml", "rewards.correct.file=rewards.py:huge", "recipe=reinforce", "kl=none",
                        "steps=9", "optimizer.max_bad_steps=2")
    assert code == 4 and "rows of that step: " in err and "data.jsonl:" in err
    assert "the gradient was not finite in 3 consecutive steps" in err and "first in " in err
    assert "model.layers." in err or "lm_head" in err or "model.embed_tokens" in err
    lines = read_metrics(RUN)
    assert [line["skipped"] for line in lines] == [1, 1], "skipped steps are counted before the run ends"
    initial, after = (checkpoint.load(RUN / "checkpoints" / f"step-{n:06d}").arrays["policy"] for n in (1, 2))
    weights = [name for name in initial if name.endswith("embed_tokens.weight")]
    assert weights and all(np.array_equal(initial[name], after[name]) for name in weights), "no step was taken"
    assert all(math.isfinite(line["reward/mean"]) for line in lines)


def test_a_learning_rate_that_destroys_the_weights(folder: Path, call: Call) -> None:
    code, _, err = call("train", "train.yaml", "optimizer.lr=1e30", "steps=9")
    assert code == 4 and "not finite" in err and "lower optimizer.lr" in err.lower()
    assert [line["step"] for line in read_metrics(RUN)] == list(range(1, len(read_metrics(RUN)) + 1))
    json.loads((RUN / "manifest.json").read_text())


def test_a_configuration_that_is_no_file(folder: Path, call: Call) -> None:
    code, _, err = call("train", str(folder))
    assert code == 2 and f"cannot read {folder}: Is a directory" in err
