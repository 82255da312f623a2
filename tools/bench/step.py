"""A whole GRPO step beside TRL's GRPOTrainer: same weights, tokenizer file, prompts, reward, sizes and learning rate.

Each case is a process of its own, and the cases of one setting take turns, so that a busy machine hits all alike. A
process first trains a miniature of the task, so that nothing is imported or compiled later; then it trains `--steps`
steps, from the start of one to the start of the next. Shown are medians over the steps of all repeats: wall and CPU
seconds, the CPU seconds of each phase, and the peak of resident memory over what was resident before the model was
loaded. The logits of both sides are asserted equal before, the tokens of a step and the rewards after.

    python tools/bench/step.py [--setting small] [--threads 1 2] [--repeats 3] [--steps 12]

The peer needs `pip install trl==1.16.0 transformers==5.23.0`; without it only our side is measured.

Prediction, written before anything was made faster, for `small` on one thread: decoding is the overhead of small
operations, and theirs has some six times as many per token, so rollout 4x; forward and backward are the same matrices,
so update 1.2x; with rollout at 60 % of their step, the whole 2.2x. Memory is the activations of the update, which both
keep: 0.7 of theirs from the head and from padding alone, and a third only by recomputing or by smaller parts.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

from processes import resident

PHASES = ("rollout", "reward", "scoring", "forward", "backward", "optimiser", "other")
WARM = 2
"""Steps at the start that are not counted."""


@dataclass(frozen=True)
class Setting:
    """Sizes of the model and of a step, and the seconds one step may be expected to take."""

    vocab_size: int = 512
    hidden_size: int = 128
    intermediate_size: int = 352
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    prompts: int = 4
    terms: int = 2
    """Numbers in the sum that a prompt asks for."""
    answers: int = 8
    new_tokens: int = 64
    parts: int = 1
    """Micro-batches of an update."""
    lr: float = 1e-5
    """So low that no step teaches either side to end its answers: then the work stays equal."""

    @property
    def rows(self) -> list[dict[str, str]]:
        """As many as one step takes: every step has the same prompts."""
        sums = [[17 * i + 3] + [5 * i + 2 + n for n in range(self.terms - 1)] for i in range(self.prompts)]
        return [{"prompt": "+".join(map(str, numbers)) + "=", "answer": str(sum(numbers))} for numbers in sums]


SETTINGS: Mapping[str, Setting] = {
    "small": Setting(),
    "small, 4 parts": Setting(parts=4),
    "long prompts": Setting(terms=80),
    "vocabulary of 32768": Setting(vocab_size=32768, hidden_size=256, intermediate_size=704, new_tokens=32),
}
"""The second splits each update in four; the third has prompts of some 150 tokens, which we compute once for all their
answers and the peer once for each; the last shows the output matrix."""


def digits(completions: list[str], **columns: Any) -> list[float]:
    """Fraction of an answer's characters that are digits."""
    return [sum(x.isdigit() for x in c) / max(1, len(c)) for c in completions]


# ---- what a process measures


@dataclass
class Stopwatch:
    """CPU seconds by phase, each without the phases inside it, and a row per step."""

    steps: list[dict[str, float]] = field(default_factory=list)
    _running: list[str] = field(default_factory=list)
    _seconds: dict[str, float] = field(default_factory=dict)
    _since: float = 0.0
    _wall: float = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._charge()
        self._running.append(name)
        try:
            yield
        finally:
            self._charge()
            self._running.pop()

    def _charge(self) -> None:
        now, name = time.process_time(), self._running[-1] if self._running else "other"
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
        self._since = now

    def step(self) -> None:
        """A step begins; the one before it, if there is one, is complete."""
        self._charge()
        now = time.perf_counter()
        if self._wall:
            self.steps.append({"wall": now - self._wall, "cpu": sum(self._seconds.values()), **self._seconds})
        self._seconds, self._wall = {}, now

    def around(self, owner: Any, name: str, phase: str) -> AbstractContextManager[Any]:
        """For a while `owner.name` runs in `phase`."""
        inner = getattr(owner, name)

        def timed(*args: Any, **named: Any) -> Any:
            with self.phase(phase):
                return inner(*args, **named)

        return mock.patch.object(owner, name, timed)


def forget_peak() -> float:
    """Give freed memory back, begin the peak anew -> MiB that are resident now."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


Train = Callable[[Setting, Path, int, Stopwatch], tuple[list[float], list[float]]]
"""Train that many steps -> answer tokens per step, and mean reward of each step."""


def measure(train: Train, setting: Setting, folder: Path, steps: int) -> dict[str, Any]:
    """One case in this process."""
    train(replace(setting, prompts=1, answers=2, new_tokens=4, parts=1), folder, 1, Stopwatch())
    base, watch = forget_peak(), Stopwatch()
    tokens, rewards = train(setting, folder, steps + WARM + 1, watch)  # the end of the last step is never seen
    return {"steps": watch.steps[WARM:], "extra_mib": resident("VmHWM") - base,
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "tokens": tokens[WARM:-1], "rewards": rewards}


# ---- the two sides


def ours(setting: Setting, folder: Path, steps: int, watch: Stopwatch) -> tuple[list[float], list[float]]:
    """`posttrain.train` on the folder."""
    import posttrain
    from posttrain import run, trainer
    from posttrain_backends._torch.generate import TorchSampler
    from posttrain_backends._torch.learner import TorchLearner

    iterate, assess = run.LOOPS["rl"]

    def begun(*args: Any) -> Any:
        watch.step()
        return iterate(*args)

    directory = Path(tempfile.mkdtemp(dir=folder)) / "run"
    with ExitStack() as timed:
        timed.enter_context(mock.patch.object(run, "LOOPS", {**run.LOOPS, "rl": (begun, assess)}))
        for owner, name, phase in ((trainer, "score_rewards", "reward"), (TorchSampler, "rollout", "rollout"),
                                   (TorchLearner, "score", "scoring"), (TorchLearner, "accumulate", "forward"),
                                   (TorchLearner, "_backward", "backward"), (TorchLearner, "apply", "optimiser")):
            timed.enter_context(watch.around(owner, name, phase))
        posttrain.train(config(setting, folder, steps, directory), output="quiet")
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return ([setting.prompts * setting.answers * row["episode/length"] for row in rows],
            [row["reward/mean"] for row in rows])


def config(setting: Setting, folder: Path, steps: int, directory: Path) -> dict[str, Any]:
    """What TRL's defaults are: one optimiser step per rollout, mean over answers of means over tokens, no KL."""
    answers = setting.prompts * setting.answers
    longest = max(len(row["prompt"]) for row in setting.rows) + setting.new_tokens
    return {
        "recipe": "grpo", "kl": "none", "steps": steps, "run": str(directory), "threads": threads(),
        "policy": {"use": "torch", "weights": str(folder), "device": "cpu"},
        "tokenizer": {"use": "json", "path": str(folder), "eos": EOS, "pad": PAD},
        "task": {"use": "rows", "rows": setting.rows}, "rewards": {"digits": digits},
        "rollout": {"prompts_per_step": setting.prompts, "group_size": setting.answers,
                    "max_new_tokens": setting.new_tokens},
        "batching": {"use": "first_fit", "tokens": answers * longest // setting.parts},
        "optimizer": {"lr": setting.lr}, "checkpoint": {"every": 0}, "trackers": {"console": None, "jsonl": None},
    }


def peer(setting: Setting, folder: Path, steps: int, watch: Stopwatch) -> tuple[list[float], list[float]]:
    """TRL's GRPOTrainer on the folder."""
    from datasets import Dataset  # type: ignore[import-not-found]  # the peer is no dependency; so for all three
    from transformers import (  # type: ignore[import-not-found]
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
        PrinterCallback,
        TrainerCallback,
    )
    from trl import GRPOConfig, GRPOTrainer  # type: ignore[import-not-found]

    class Steps(TrainerCallback):  # type: ignore[misc]  # untyped where it is not installed
        def on_step_begin(self, *args: Any, **named: Any) -> None:
            watch.step()

    answers = setting.prompts * setting.answers
    trainer = GRPOTrainer(
        model=LlamaForCausalLM.from_pretrained(folder), reward_funcs=digits, callbacks=[Steps()],
        train_dataset=Dataset.from_list(setting.rows),
        processing_class=PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer.json"), eos_token=EOS, pad_token=PAD, padding_side="left"),
        args=GRPOConfig(
            output_dir=tempfile.mkdtemp(dir=folder), per_device_train_batch_size=answers // setting.parts,
            gradient_accumulation_steps=setting.parts, num_generations=setting.answers,
            max_completion_length=setting.new_tokens, max_steps=steps, learning_rate=setting.lr,
            lr_scheduler_type="constant", loss_type="grpo", logging_steps=1, report_to=[], save_strategy="no",
            use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True))
    trainer.remove_callback(PrinterCallback)
    with ExitStack() as timed:
        for owner, name, phase in ((trainer, "_generate_single_turn", "rollout"),
                                   (trainer, "_calculate_rewards", "reward"), (trainer, "compute_loss", "forward"),
                                   (trainer.accelerator, "backward", "backward"),
                                   (trainer.accelerator, "clip_grad_norm_", "optimiser")):
            timed.enter_context(watch.around(owner, name, phase))
        create = trainer.create_optimizer

        def created(*args: Any) -> Any:
            optimizer = create(*args)
            timed.enter_context(watch.around(optimizer, "step", "optimiser"))
            return optimizer

        timed.enter_context(mock.patch.object(trainer, "create_optimizer", created))
        trainer.train()
    logs = [row for row in trainer.state.log_history if "reward" in row]
    return [answers * row["completions/mean_length"] for row in logs], [row["reward"] for row in logs]


SIDES: Mapping[str, Train] = {"posttrain": ours, "TRL": peer}
NEEDS: Mapping[str, Sequence[str]] = {"posttrain": ("torch", "tokenizers"), "TRL": ("trl", "transformers")}
PAD, EOS = "<pad>", "<eos>"


# ---- what both are given


def prepare(setting: Setting, folder: Path) -> None:
    """Write model and tokenizer; where the peer is installed, assert that it computes the same logits."""
    import torch
    from posttrain.protocols import LoadRequest
    from posttrain_backends._torch.layout import Layout
    from posttrain_backends.torch_native import Torch

    tokenizer = tokenizer_of(setting.vocab_size)
    tokenizer.save(str(folder / "tokenizer.json"))
    learner = Torch(
        hidden_size=setting.hidden_size, layers=setting.layers, heads=setting.heads, kv_heads=setting.kv_heads,
        intermediate_size=setting.intermediate_size, max_positions=512, device="cpu",
    ).load(LoadRequest(tokenizer.get_vocab_size(), seed=0))
    never_end(learner.model, tokenizer.token_to_id(EOS))
    learner.save(folder)
    if absent("TRL"):
        return
    from transformers import LlamaForCausalLM

    ids = torch.tensor(tokenizer.encode(setting.rows[0]["prompt"]).ids)
    with torch.no_grad():
        hidden = learner.model.hidden(ids, Layout.from_offsets([0, len(ids)]))
        theirs = LlamaForCausalLM.from_pretrained(folder)(ids[None]).logits[0]
    torch.testing.assert_close(theirs, hidden @ learner.model.output_weight.t(), rtol=0, atol=1e-5)


def never_end(model: Any, eos: int) -> None:
    """Let the hidden states agree in one coordinate, and the row of `eos` point against it: answers are of one length,
    so that both sides do equal work."""
    with_gradient = model.output_weight.requires_grad
    model.requires_grad_(False)
    model.model.embed_tokens.weight[:, 0] = 0.2
    model.output_weight[eos] = 0
    model.output_weight[eos, 0] = -2
    model.requires_grad_(with_gradient)


def tokenizer_of(vocab_size: int) -> Any:
    """Byte pairs learned from sums, `vocab_size` tokens in all."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator(
        (f"{a}+{17 * a}={18 * a}" for a in range(10 * vocab_size)), trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[PAD, EOS], show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    assert tokenizer.get_vocab_size() == vocab_size, tokenizer.get_vocab_size()
    return tokenizer


# ---- the cases


def threads() -> int:
    return int(os.environ["OMP_NUM_THREADS"])


def absent(side: str) -> bool:
    return any(importlib.util.find_spec(name) is None for name in NEEDS[side])


def in_process(*arguments: str, threads: int = 1) -> Any:
    """What this script prints as its last line when it is run with `arguments`."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads),
                   "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compared(name: str, count: int, repeats: int, steps: int, sides: Sequence[str]) -> dict[str, dict[str, float]]:
    """Medians by side, of processes that took turns."""
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        in_process("--prepare", name, folder)
        for _ in range(repeats):
            for side in sides:
                found[side].append(in_process("--case", side, name, folder, str(steps), threads=count))
    medians = {side: summary(cases) for side, cases in found.items()}
    tokens = [m["tokens"] for m in medians.values()]
    assert max(tokens) < 1.01 * min(tokens), f"unequal work: {medians}"
    return medians


def summary(cases: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Medians over the steps of all cases (memory: over cases)."""
    steps = [step for case in cases for step in case["steps"]]
    by_step = {key: statistics.median(step.get(key, 0.0) for step in steps) for key in ("wall", "cpu", *PHASES)}
    by_case = {key: statistics.median(case[key] for case in cases) for key in ("extra_mib", "peak_mib")}
    tokens = statistics.mean(n for case in cases for n in case["tokens"])
    return {**by_step, **by_case, "tokens": tokens, "reached": statistics.mean(case["rewards"][-1] for case in cases)}


ROWS: Sequence[tuple[str, str, float]] = (
    ("wall ms", "wall", 1e3), ("CPU ms", "cpu", 1e3), *((f"CPU ms, {phase}", phase, 1e3) for phase in PHASES),
    ("extra peak MiB", "extra_mib", 1), ("peak MiB of the process", "peak_mib", 1), ("answer tokens", "tokens", 1),
    ("reward of the last step", "reached", 1))


def table(name: str, count: int, medians: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown: a row per quantity of a step, a column per side, and how many times more the peer takes."""
    lines = [f"### {name}, {count} thread{'s' * (count > 1)}", "", f"| one step | {' | '.join(SIDES)} | ratio |",
             "|---|" + "---:|" * (len(SIDES) + 1)]
    for title, key, scale in ROWS:
        mine, other = (medians[side][key] * scale if side in medians else None for side in SIDES)
        ratio = f"{other / mine:.2f}" if other is not None and mine else ""
        cells = ["not measured" if x is None else f"{x:.3g}" if x < 1 else f"{x:.1f}" for x in (mine, other)]
        lines.append(f"| {title} | {' | '.join(cells)} | {ratio} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", nargs="+", choices=list(SETTINGS), default=["small"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3, help="processes of each case")
    parser.add_argument("--steps", type=int, default=12, help="steps of each that count")
    parser.add_argument("--side", nargs="+", choices=list(SIDES), default=list(SIDES))
    parser.add_argument("--prepare", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--case", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.prepare:
        name, folder = options.prepare
        prepare(SETTINGS[name], Path(folder))
        print("null")
    elif options.case:
        side, name, folder, steps = options.case
        import torch

        torch.set_num_threads(threads())
        print(json.dumps(measure(SIDES[side], SETTINGS[name], Path(folder), int(steps))))
    else:
        sides = [side for side in options.side if not absent(side)]
        for name in options.setting:
            for count in options.threads:
                print(table(name, count, compared(name, count, options.repeats, options.steps, sides)), flush=True)


if __name__ == "__main__":
    main()
