"""The toy policy keeps the contracts, learns in a second with core alone, has the derivatives of torch, and resumes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import posttrain
import posttrain.toy
import pytest
from posttrain.batching import StepData, cut
from posttrain.data import Array, Counts, Loss, MicroBatch, Prompt, Sampling, Term, TokenOutputs, Weights
from posttrain.errors import ConfigError, DataError
from posttrain.ops import Ops, ops_of
from posttrain.protocols import LoadRequest, Need, Optimization, Output
from posttrain.rundir import read_metrics
from posttrain.testing import BackendContract, EngineContract
from posttrain.testing.tiny_models import Probe, random_rollouts, step_data
from posttrain.tokenizers import Characters
from posttrain.toy.engine import ToyEngine
from posttrain.toy.policy import TABLE, VALUES, Toy, ToyLearner

V = 8
COEF = {"entropy": 0.1}


class TestToy(BackendContract):
    components = (Toy(),)
    plugins = (posttrain.toy,)
    seeded = False
    spread = 1.0
    tolerance = 1e-9  # its derivatives are differences

    def reloaded(self, component: Toy, folder: Path) -> Toy:
        return Toy(weights=str(folder))


class TestToyEngine(EngineContract):
    components = (ToyEngine(),)
    plugins = (posttrain.toy,)
    backend = Toy()
    spread = 1.0
    tolerance = 1e-6


# ---- a run


def config(tmp_path: Path, name: str = "run", **changes: Any) -> dict[str, Any]:
    """Four prompts, each with one right letter."""
    rows = tmp_path / "data.jsonl"
    rows.write_text("".join(json.dumps({"prompt": str(i), "answer": "abcd"[i]}) + "\n" for i in range(4)))
    return {"plugins": ["posttrain.toy"], "steps": 30, "seed": 0, "run": str(tmp_path / name), "policy": "toy",
            "tokenizer": {"use": "characters", "alphabet": "0123abcd"}, "task": {"use": "rows", "path": str(rows)},
            "rewards": {"correct": "exact_match"}, "estimator": "toy", "objective": "toy", "kl": "none",
            "rollout": {"engine": "toy", "prompts_per_step": 4, "group_size": 16, "max_new_tokens": 1},
            "optimizer": {"lr": 0.5}, "checkpoint": {"every": 0}, "trackers": {"console": None, "jsonl": None},
            **changes}


def rewards(run: Any) -> list[float]:
    return [line["reward/mean"] for line in read_metrics(run.directory) if "reward/mean" in line]


def test_learns_the_right_letters_in_thirty_steps(tmp_path: Path) -> None:
    found = rewards(posttrain.train(config(tmp_path), output="quiet"))
    assert len(found) == 30 and found[0] < 0.4 and np.mean(found[-3:]) > 0.99


def test_a_run_leaves_its_report_and_outlives_a_page_that_cannot_be_made(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    finished = posttrain.train(config(tmp_path, "whole", steps=2), output="quiet")
    assert (finished.directory / "report.html").read_text().startswith("<!doctype html>")

    def broken(*_: object) -> None:
        raise ZeroDivisionError("no curve")
    monkeypatch.setattr("posttrain.run.write_page", broken)
    finished = posttrain.train(config(tmp_path, "without", steps=2), output="quiet")
    assert finished.state.step == 2 and not (finished.directory / "report.html").exists()
    assert "no report was written: no curve; try again: posttrain report" in caplog.text


def test_learns_from_its_first_step(tmp_path: Path) -> None:
    """Without a warm-up the first step has the full rate."""
    run = posttrain.train(config(tmp_path, steps=1), output="quiet")
    table = np.array(json.loads((run.directory / "policy" / "table.json").read_text())[TABLE])
    assert math.isclose(np.abs(table).max(), 0.5, rel_tol=1e-4)


def test_resumes_bit_for_bit(tmp_path: Path) -> None:
    changes = {"checkpoint": {"every": 2}, "steps": 6, "evaluate": {"every": 0}}
    whole = posttrain.train(config(tmp_path, "whole", **changes), output="quiet")
    cut_short = posttrain.train(config(tmp_path, "cut", **{**changes, "steps": 4}), output="quiet")
    again = posttrain.resume(cut_short.directory, ["steps=6"], output="quiet")
    tables = [(run.directory / "policy" / "table.json").read_bytes() for run in (whole, again)]
    assert tables[0] == tables[1] and rewards(whole) == rewards(again)


# ---- derivatives


@dataclass(frozen=True)
class Held:
    """A clipped ratio to a detached log-prob, and a log-sigmoid of differences between episodes."""

    needs: frozenset[Need] = frozenset()
    outputs: frozenset[Output] = frozenset({Output.LOGPROBS, Output.ENTROPY})
    unit: str = "action"
    slots: tuple[str, ...] = ("main",)

    def weights(self, counts: Counts) -> Weights:
        return Weights()

    def __call__(self, ops: Ops, out: TokenOutputs, batch: MicroBatch, coef: Mapping[str, Array]) -> Loss:
        xp = ops.xp
        ratio = xp.exp(out.logprobs - ops.stop_gradient(out.logprobs) * 0.9)
        clipped = xp.minimum(ratio * batch.advantages, xp.clip(ratio, 0.5, 0.9) * batch.advantages)
        E = batch.count.shape[0]
        sums = ops.segment_sum(out.logprobs, batch.episode, E)
        margin = xp.sum(ops.log_sigmoid(sums[: E // 2] - sums[E // 2: 2 * (E // 2)]))
        soft = xp.sum(batch.kl_weight * ops.sigmoid(out.entropy) * ops.stop_gradient(out.entropy))
        return Loss({"policy": Term(-xp.sum(batch.weight * clipped)), "margin": Term(margin, -0.2),
                     "entropy": Term(soft, coef["entropy"])})


EVERYTHING = frozenset({Output.LOGPROBS, Output.ENTROPY, Output.VALUES})


@pytest.mark.oracle
@pytest.mark.parametrize(("objective", "slots", "heads"), [
    (Probe(), 1, 0), (Probe(EVERYTHING), 1, 2), (Probe(EVERYTHING, ("a", "b")), 2, 1), (Held(), 1, 0)],
    ids=["policy", "policy, entropy, values", "two slots", "held and compared"])
def test_gradients_are_those_of_autograd(objective: Any, slots: int, heads: int) -> None:
    """torch differentiates the same table."""
    torch = pytest.importorskip("torch")
    learner, data = random_learner(heads), step_data(random_rollouts(V, seed=4), slots, heads)
    batch = cut(data, np.arange(8))
    learner.accumulate(batch, objective, COEF)
    parameters = {name: torch.tensor(p, requires_grad=True) for name, p in learner.parameters.items()}
    before, actions = batch.tokens[batch.source - 1], batch.tokens[batch.source]
    logp = torch.log_softmax(parameters[TABLE][before] / batch.temperature, -1)
    out = TokenOutputs(logprobs=logp[np.arange(len(actions)), actions], entropy=-(logp.exp() * logp).sum(-1),
                       values=parameters[VALUES][:, before])
    terms = objective(ops_of(out.logprobs), out, in_torch(torch, batch), COEF).terms.values()
    for slot, found in learner._gradients.items():
        total = sum(term.coef * term.total for term in terms if term.slot == slot)
        wanted = torch.autograd.grad(total, list(parameters.values()), retain_graph=True, allow_unused=True)
        for name, expected in zip(parameters, wanted, strict=True):
            expected = np.zeros_like(found[name]) if expected is None else expected.numpy()
            np.testing.assert_allclose(found[name], expected, rtol=0, atol=1e-9, err_msg=f"{slot} {name}")
    assert max(float(np.abs(g[TABLE]).max()) for g in learner._gradients.values()) > 1e-3


def random_learner(heads: int = 0, **settings: Any) -> ToyLearner:
    learner = Toy().load(LoadRequest(V, heads, optimization=Optimization(**settings)))
    rng = np.random.default_rng(0)
    for p in learner.parameters.values():
        p[:] = rng.normal(size=p.shape)
    return learner


def in_torch(torch: Any, batch: MicroBatch) -> MicroBatch:
    names = [n for n in ("weight", "kl_weight", "value_weight", "advantages", "targets", "old_logprobs", "episode")
             if getattr(batch, n) is not None]
    return replace(batch, **{name: torch.from_numpy(getattr(batch, name)) for name in names})


def test_a_step_is_one_of_adam() -> None:
    """Its first step moves by the rate in the direction of the sign."""
    learner, data = random_learner(lr=0.1, clip_norm=0.0), step_data(random_rollouts(V))
    before = learner.parameters[TABLE].copy()
    learner.accumulate(cut(data, np.arange(8)), Probe(), COEF)
    g = learner._gradients["main"][TABLE].copy()
    learner.apply()
    moved = before - learner.parameters[TABLE]
    np.testing.assert_allclose(moved, 0.1 * g / (np.abs(g) + 1e-8), rtol=0, atol=1e-12)


# ---- what is refused


@pytest.mark.parametrize(("settings", "name"), [
    ({"schedule": "cosine", "total_steps": 5}, "schedule"), ({"weight_decay": 0.1}, "weight_decay")])
def test_what_the_optimiser_lacks_is_refused(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        random_learner(**settings)


def test_weights_of_another_size_are_refused(tmp_path: Path) -> None:
    random_learner().save(tmp_path)
    with pytest.raises(ConfigError, match=r"logits has shape \(8, 8\), the toy policy has \(9, 9\)"):
        Toy(weights=str(tmp_path)).load(LoadRequest(9))
    with pytest.raises(ConfigError, match="holds no table.json"):
        Toy(weights=str(tmp_path / "nothing")).load(LoadRequest(V))


def test_a_model_for_scoring_has_no_optimiser() -> None:
    data: StepData = step_data(random_rollouts(V))
    learner = Toy().load(LoadRequest(V))
    with pytest.raises(RuntimeError, match="LoadRequest.optimization is None"):
        learner.accumulate(cut(data, np.arange(8)), Probe(), COEF)
    assert not [name for name in learner.state() if name.startswith(("m.", "v."))]


def test_the_engine_refuses_what_it_does_not_do() -> None:
    tokenizer = Characters("abcdef").load()
    sampler = ToyEngine().start(random_learner(), tokenizer, shared=True)
    for sampling in (Sampling(top_k=2), Sampling(top_p=0.5), Sampling(min_p=0.1), Sampling(stop=("b",))):
        with pytest.raises(ConfigError, match="top_p, top_k, min_p and stop strings"):
            sampler.rollout([Prompt(text="a")], sampling, (0,))
    with pytest.raises(DataError) as error:
        sampler.check([Prompt(text="", where="rows:1"), Prompt(text="a"), Prompt(tokens=(V,)), Prompt(text="?")],
                      Sampling())
    for named in ("empty, so nothing predicts its first token (rows:1)", "8 to 8 do not fit the table of 8 (prompt 2)",
                  "character '?'"):
        assert named in str(error.value)
    with pytest.raises(ConfigError, match="draws from the toy policy alone"):
        ToyEngine().start(object(), tokenizer, shared=True)


def test_a_run_with_another_policy_says_so(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("posttrain_backends")
    policy = {"use": "torch", "hidden_size": 8, "layers": 1, "heads": 2, "kv_heads": 1, "device": "cpu"}
    with pytest.raises(ConfigError, match="draws from the toy policy alone"):
        posttrain.train(config(tmp_path, policy=policy, steps=1), output="quiet")


def test_declares_what_it_has() -> None:
    assert {(c.kind, c.name) for c in posttrain.toy.components()} == {
        ("backend", "toy"), ("engine", "toy"), ("estimator", "toy"), ("objective", "toy")}
