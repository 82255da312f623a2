"""Runs with the KL over the whole vocabulary: what it measures and holds, resumed bit for bit, with a reference that
moves or that is the policy without its adapter; and what is told before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import posttrain
import pytest
from integration.small import config
from posttrain.config import load
from posttrain.errors import ConfigError
from posttrain.fitting import check
from posttrain.protocols import LoadRequest, Output

pytest.importorskip("torch")
pytest.importorskip("posttrain_objectives")

EXACT = {"use": "adaptive", "placement": "loss", "estimator": "exact", "target": 1e-3, "coef": 0.1, "horizon": 50}
SCHEDULE = {"lr": 1e-2, "schedule": "cosine", "total_steps": 20}
TINY = {"rollout": {"prompts_per_step": 2, "group_size": 4, "max_new_tokens": 3}, "evaluate": {"every": 0},
        "checkpoint": {"every": 3}, "optimizer": SCHEDULE}


def column(run: Any, name: str) -> list[float]:
    rows = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]


def weights(run: Any) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(run.directory / "policy" / "model.safetensors")


def furthest(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> float:
    return max(float(np.abs(a[name] - b[name]).max()) for name in a)


def run(directory: Path, steps: int = 5, **changes: Any) -> Any:
    return posttrain.train(config(directory, steps=steps, **{**TINY, "kl": EXACT, **changes}), output="quiet")


CASES: Mapping[str, Mapping[str, Any]] = {
    "one step": {}, "several steps": {"update": {"epochs": 2}}, "reset": {"reference_update": {"every": 2}},
    "average": {"reference_update": {"every": 1, "rate": 0.3}, "update": {"epochs": 2}},
    "replay": {"replay": {"capacity": 4, "reuse": 1}, "correction": "tis"},
    "old answers": {"rollout": {**TINY["rollout"], "staleness": 1}}}


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_goes_on_as_the_whole_one(tmp_path: Path, case: str) -> None:
    whole, half = run(tmp_path / "whole", **CASES[case]), run(tmp_path / "half", 3, **CASES[case])
    again = posttrain.resume(half.directory, ["steps=5"], output="quiet")
    for name in ("kl/reference", "kl/coef", "loss/kl"):
        assert column(again, name) == column(whole, name) and len(column(whole, name)) == 5
    assert furthest(weights(whole), weights(again)) == 0.0
    assert max(column(whole, "kl/reference")) > 1e-6 and not column(whole, "kl/clamped")


def test_it_measures_what_k3_estimates_and_costs_what_it_measures(tmp_path: Path) -> None:
    """With a coefficient of 0 both runs are one run, and each says how far the policy is."""
    exact, k3 = (run(tmp_path / name, 8, kl={"use": "fixed", "placement": "loss", "estimator": name, "coef": 0.0},
                     rollout={"prompts_per_step": 8, "group_size": 8, "max_new_tokens": 4})
                 for name in ("exact", "k3"))
    assert furthest(weights(exact), weights(k3)) == 0.0
    found, estimated = (np.array(column(x, "kl/reference")) for x in (exact, k3))
    assert found[0] == 0 and found[1:].min() > 1e-4
    np.testing.assert_allclose(found[1:], estimated[1:], rtol=0.3)


def test_micro_batches_and_chunks_of_logits_change_nothing(tmp_path: Path) -> None:
    kl = {"use": "fixed", "placement": "loss", "estimator": "exact", "coef": 5.0}
    policy = config(tmp_path)["policy"]
    one, several = (run(tmp_path / str(tokens), 3, kl=kl, batching={"tokens": tokens},
                        policy={**policy, "head_chunk": chunk}) for tokens, chunk in ((10_000, 0), (12, 3)))
    assert column(several, "batch/parts")[-1] > column(one, "batch/parts")[-1] == 1
    assert furthest(weights(one), weights(several)) < 1e-5
    for name in ("loss/kl", "kl/reference"):
        assert column(several, name)[1:] == pytest.approx(column(one, name)[1:], rel=1e-4)


def test_it_holds_the_policy_over_several_optimiser_steps(tmp_path: Path) -> None:
    free, held = (run(tmp_path / str(coef), update={"epochs": 2}, kl={
        "use": "fixed", "placement": "loss", "estimator": "exact", "coef": coef}) for coef in (0.0, 20.0))
    assert column(held, "kl/reference")[-1] < 0.5 * column(free, "kl/reference")[-1]


def test_the_reference_is_not_scored_on_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass over it in each optimiser step, and none before them."""
    from posttrain_backends._torch.learner import TorchLearner

    scored, read, score, readout = [], [], TorchLearner.score, TorchLearner.readout
    monkeypatch.setattr(TorchLearner, "score", lambda self, *a: scored.append(self) or score(self, *a))
    monkeypatch.setattr(TorchLearner, "readout", lambda self, *a: read.append(self) or readout(self, *a))
    run(tmp_path / "run", 2)
    assert not scored and len(read) == 2


def test_a_moving_reference_is_the_policy_after_a_reset(tmp_path: Path) -> None:
    found = run(tmp_path / "run", 5, reference_update={"every": 2})
    kl, initial = column(found, "kl/reference"), column(found, "kl/initial")
    assert kl[0] == kl[2] == kl[4] == 0 and kl[1] > 0 and kl[3] > 0 and initial[4] > 0


# ---- what is told


@dataclass(frozen=True)
class Other:
    """A backend of another framework."""

    provides: frozenset[Output] = frozenset({Output.LOGPROBS, Output.ENTROPY})
    framework: str = "other"

    def load(self, request: LoadRequest) -> Any:
        raise AssertionError("nothing is loaded")


@pytest.mark.parametrize(("changes", "says"), [
    ({"policy": Other()}, "which backend 'policy' does not compare with a reference; use estimator: k2"),
    ({"reference": Other()}, "the reference is of other where the policy is of torch; use estimator: k2"),
])
def test_what_cannot_be_compared_is_told_before_anything_is_loaded(tmp_path: Path, changes: dict[str, Any],
                                                                   says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check(load(config(tmp_path / "run", kl=EXACT, **changes), (), posttrain.discover()))


def test_another_vocabulary_is_told_when_it_is_loaded(tmp_path: Path) -> None:
    first = posttrain.train(config(tmp_path / "first", steps=1, kl="none", optimizer={}, evaluate={"every": 0},
                                   tokenizer={"use": "characters", "alphabet": "0123456789+=-"}), output="quiet")
    hf = {"use": "hf", "weights": str(first.directory / "policy"), "device": "cpu"}
    with pytest.raises(ConfigError, match=r"(?s)the reference has a vocabulary of \d+, the policy one of \d+.*k2"):
        run(tmp_path / "run", reference=hf)
