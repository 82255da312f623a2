"""Runs across frameworks, each one key of the same file away from another: a policy in torch or Flax, a reference in
torch or ONNX, answers drawn by torch, by JAX or by ONNX Runtime. Weights cross by Hugging Face's names."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import posttrain
import pytest
from integration.small import config
from posttrain.data import Rollouts
from posttrain.errors import ConfigError
from posttrain.testing.replayed import Recording, Replaying

for module in ("torch", "posttrain_objectives", "posttrain_estimators"):
    pytest.importorskip(module)

from posttrain_backends.engines import Batched  # after the check that its package is there

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # the libraries' own

TOLERANCE = 1e-4
"""Of losses from the same weights and rollouts."""
NEEDS_FLAX, NEEDS_ONNX = pytest.mark.needs("flax", "optax"), pytest.mark.needs("onnx", "onnxruntime")
FLAX, ONNX_REFERENCE, ONNX_ROLLOUTS = ("policy.use=flax",), ("reference.use=onnx",), ("rollout.engine=onnx",)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights in torch to begin with."""
    run = posttrain.train(config(tmp_path_factory.mktemp("start") / "run", steps=3, checkpoint={"every": 0}))
    return Path(run.directory) / "policy"


@dataclass(frozen=True)
class Setting:
    """One file for all runs of a folder."""

    folder: Path
    start: Path

    def file(self, **rollout: Any) -> dict[str, Any]:
        """The configuration; every model is loaded from the same weights."""
        plain = config(self.folder, steps=5, checkpoint={"every": 0}, evaluate={"every": 0}, reference=self.model(),
                       policy=self.model(), kl={"use": "fixed", "placement": "loss", "coef": 0.1, "estimator": "k3"},
                       update={"steps_per_rollout": 2})
        return {**plain, "rollout": {**plain["rollout"], **rollout}}

    def model(self) -> dict[str, str]:
        return {"use": "torch", "weights": str(self.start)}

    def run(self, name: str, overrides: Sequence[str] = (), **rollout: Any) -> list[Mapping[str, float]]:
        """Metrics of the steps."""
        found = posttrain.train(self.file(**rollout), [f"run={self.folder / name}", *overrides], output="quiet")
        lines = (found.directory / "metrics.jsonl").read_text().splitlines()
        return [line for line in map(json.loads, lines) if line["step"]]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory, start: Path) -> Setting:
    return Setting(tmp_path_factory.mktemp("cross"), start)


@dataclass(frozen=True)
class Recorded:
    """A run of torch alone."""

    metrics: list[Mapping[str, float]]
    rollouts: list[Rollouts]


@pytest.fixture(scope="module")
def torch_alone(setting: Setting) -> Recorded:
    engine = Recording(Batched())
    metrics = setting.run("torch", engine=engine)
    return Recorded(metrics, engine.kept)


def require_same_training(found: Sequence[Mapping[str, float]], expected: Sequence[Mapping[str, float]]) -> None:
    """Losses, and what else says what was learnt in which direction."""
    compared = {name for name in expected[0] if name.startswith("loss/")} | {
        "policy/entropy", "kl/reference", "policy/ratio", "policy/approx_kl", "grad_norm", "lr"}
    assert {"loss/policy", "loss/kl"} < compared
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        for name in compared:
            assert ours[name] == pytest.approx(theirs[name], rel=TOLERANCE, abs=TOLERANCE), (step, name)
    moved = [max(abs(step[name]) for step in expected) for name in ("loss/policy", "loss/kl", "policy/approx_kl")]
    assert min(moved) > 10 * TOLERANCE, f"there is little to see: {moved}"


@pytest.mark.parametrize("overrides", [
    pytest.param(FLAX, id="flax, torch", marks=NEEDS_FLAX),
    pytest.param(ONNX_REFERENCE, id="torch, onnx", marks=NEEDS_ONNX),
    pytest.param(FLAX + ONNX_REFERENCE, id="flax, onnx", marks=[NEEDS_FLAX, NEEDS_ONNX])])
def test_losses_are_those_of_torch(setting: Setting, torch_alone: Recorded, overrides: Sequence[str]) -> None:
    """Policy, reference: from the same weights and rollouts, over several updates."""
    found = setting.run("-".join(overrides), overrides, engine=Replaying(torch_alone.rollouts))
    require_same_training(found, torch_alone.metrics)


def test_what_is_replayed_is_seen(setting: Setting, torch_alone: Recorded) -> None:
    """The comparison can fail: rollouts in another order train otherwise."""
    other = [replace(r, behavior_logprobs=r.behavior_logprobs, tokens=np.roll(r.tokens, 1)) for r in
             torch_alone.rollouts]
    with pytest.raises(AssertionError):
        require_same_training(setting.run("other", engine=Replaying(other)), torch_alone.metrics)


# --- what ONNX is not -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("key", ["policy", "critic"])
def test_onnx_is_trained_by_nobody(setting: Setting, key: str) -> None:
    """Refused before anything is loaded, with the reason and with what ONNX can do."""
    with pytest.raises(ConfigError) as error:
        setting.run("refused", [f"{key}={{use: onnx, weights: {setting.start}}}", "estimator=gae"])
    text = str(error.value)
    assert f"{key}.use: onnx has nothing to train with: ONNX Runtime gave training up" in text
    for instead in ("reference: {use: onnx", "rollout.engine: onnx", "use: onnx_reward", "--format onnx"):
        assert instead in text
    assert not (setting.folder / "refused").exists()
