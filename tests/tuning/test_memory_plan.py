"""What is predicted of memory without taking it, against what real runs take, and the settings that make a run fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commandline import called
from integration import small
from posttrain.config import Loaded, load
from posttrain.errors import ConfigError
from posttrain.memory import HOST, RESIDENT
from posttrain.protocols import LoadRequest, Optimization
from posttrain.registry import discover
from posttrain_tuning.memory import plan as planning
from posttrain_tuning.memory.predict import Prediction, predict

torch = pytest.importorskip("torch")
from posttrain_backends.torch_native import Torch

MIDDLE = {"use": "torch", "hidden_size": 128, "layers": 3, "heads": 4, "kv_heads": 2, "max_positions": 256,
          "device": "cpu"}
WORK: dict[str, Any] = {
    "policy": MIDDLE, "tokenizer": "bytes", "kl": "none", "evaluate": {"every": 0},
    "optimizer": {"lr": 1e-4}, "rollout": {"prompts_per_step": 8, "group_size": 8, "max_new_tokens": 64}}


def loaded(tmp_path: Path, **changes: Any) -> Loaded:
    return load(small.config(tmp_path / "run", **{**WORK, **changes}), [], discover())


def test_an_imagined_model_holds_what_the_real_one_holds() -> None:
    backend = Torch(hidden_size=64, layers=2, heads=4, kv_heads=2, device="cpu")
    request = LoadRequest(300, value_heads=1, optimization=Optimization())
    real = backend.load(request)
    with backend.imagined(0) as mark:
        imagined = backend.load(request)
        assert imagined.held() == real.held()
        kept = mark.level()[HOST]
    table = sum(x.nbytes for x in (real.model._cos, real.model._sin))  # type: ignore[attr-defined]  # rotary angles
    assert kept == sum(real.held().values()) + table + 4 * len(real._parameters)  # each parameter's count of steps
    assert mark.level()[HOST] == kept
    del imagined
    assert mark.level()[HOST] == 0, "what nobody holds is free"


def test_weights_of_a_folder_are_not_read(tmp_path: Path) -> None:
    backend = Torch(hidden_size=64, layers=2, heads=4, kv_heads=2, device="cpu")
    backend.load(LoadRequest(300)).save(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with Torch(weights=str(tmp_path), device="cpu").imagined(0) as mark:
        model = Torch(weights=str(tmp_path), device="cpu").load(LoadRequest(300))
        with mark.span() as span:
            pass
    assert span.start[HOST] >= sum(model.held().values()) > 0


def test_a_model_larger_than_the_machine_is_predicted_without_it(tmp_path: Path) -> None:
    """7 B parameters: weights, gradients and two moments in float32 are 108 GiB."""
    seven = {"hidden_size": 4096, "layers": 32, "heads": 32, "kv_heads": 32, "intermediate_size": 11008,
             "max_positions": 256, "use": "torch", "device": "cpu"}
    with RESIDENT.span() as span:
        found = predict(loaded(tmp_path, policy=seven))
    parameters = found.categories["parameters"]
    assert 6.4e9 * 4 < parameters < 7e9 * 4 and found.categories["optimiser"] == 2 * parameters
    assert found.phases["backward"] > 4 * parameters and found.phases["checkpoint"] > 6 * parameters
    assert span.peak[HOST] - span.start[HOST] < 2**30


def test_smaller_parts_and_checkpointing_take_less(tmp_path: Path) -> None:
    whole = predict(loaded(tmp_path))
    parts = predict(loaded(tmp_path, batching={"use": "first_fit", "tokens": 512}))
    layers = predict(loaded(tmp_path, policy={**MIDDLE, "gradient_checkpointing": True}))
    eight = predict(loaded(tmp_path, optimizer={"lr": 1e-4, "moments": "int8"}))
    assert parts.phases["backward"] < whole.phases["backward"] > layers.phases["backward"]
    assert parts.phases["rollout"] == whole.phases["rollout"]
    assert eight.categories["optimiser"] == pytest.approx(2.03 / 8 * whole.categories["optimiser"])


@pytest.mark.parametrize("changes", [
    {"recipe": "sft", "kl": "none", "batch_size": 16},
    {"critic": "policy", "estimator": "gae", "objective": "ppo", "kl": "fixed"},
    {"critic": {"use": "torch", "hidden_size": 32, "layers": 1, "heads": 2, "kv_heads": 1, "device": "cpu"},
     "estimator": "gae", "objective": "ppo", "update": {"epochs": 2, "steps_per_rollout": 2}},
    {"rollout": {"prompts_per_step": 2, "group_size": 4, "max_new_tokens": 8, "staleness": 1}},
    {"rewards": {"a": small.correct, "b": small.correct}, "gradient_combiner": "mgda"}],
    ids=["supervised", "shared critic", "critic", "stale", "gradients of each reward"])
def test_every_loop_is_predicted(changes: dict[str, Any], tmp_path: Path) -> None:
    found = predict(loaded(tmp_path, **changes))
    assert {"load", "backward", "optimiser", "checkpoint"} <= set(found.phases)
    assert found.binding in found.phases and found.peak == found.phases[found.binding]


def test_prediction_leaves_torch_as_it_was(tmp_path: Path) -> None:
    predict(loaded(tmp_path))
    x = torch.ones(3)
    assert type(x) is torch.Tensor and x.sum().item() == 3


def test_what_cannot_be_imagined_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="policy: backend 'hf'"):
        predict(loaded(tmp_path, policy={"use": "hf", "weights": str(tmp_path)}))
    with pytest.raises(ConfigError, match=r"reference.quantize: layers"):
        predict(loaded(tmp_path, kl="fixed", reference={**MIDDLE, "quantize": "int8"}))


def written(tmp_path: Path) -> Path:
    """A configuration as a file."""
    import yaml

    tree = small.config(tmp_path / "run", **WORK)
    tree["rewards"] = {"correct": {"use": "exact_match"}}
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_the_plan_is_written_as_settings_that_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path)
    base = json.loads(called(capsys, "memory", "plan", str(file), "--limit", "100GiB", "--json")[1])
    assert base["fits"] and base["settings"] == []
    limit = base["process"] + (base["phases"]["backward"] + base["phases"]["rollout"]) // 2
    code, out, _ = called(capsys, "memory", "plan", str(file), "--limit", str(limit))
    assert code == 0 and "binds" in out, out
    found = predict(load(tmp_path / "train.memory.yaml", [], discover()))
    assert found.peak <= limit - base["process"]
    assert not (tmp_path / "run").exists()


def test_what_does_not_fit_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = called(capsys, "memory", "plan", str(written(tmp_path)), "--limit", "1MiB")
    assert code == 1 and "does not fit" in out and "not tried: LoRA" in out


def test_the_fastest_set_that_fits_is_chosen(tmp_path: Path) -> None:
    """With a stand-in for predictions: whole layers are kept or not, and parts halved or not."""
    asked: list[tuple[str, ...]] = []

    def predicted(settings: Any) -> Prediction:
        asked.append(tuple(settings))
        backward = 1000
        for text in settings:
            key, _, value = text.partition("=")
            if key == "policy.gradient_checkpointing":
                backward //= 2
            if key == "batching.tokens":
                backward = backward * int(value) // 4096
        return Prediction({"backward": backward, "load": 10}, {"gradients": 4_000_000}, 4096)

    settings = loaded(tmp_path, batching={"use": "first_fit", "tokens": 8192})
    chosen = planning.plan(settings, 600, predicted)
    assert chosen.fits and chosen.change.settings == ("batching.tokens=2048",)
    assert planning.plan(settings, 1000, predicted).change.settings == ()
    assert not planning.plan(settings, 5, predicted).fits


@pytest.mark.parametrize("text", ["", "24", "lots", "1.2.3GB", "-1GiB", "5 GiBs"])
def test_sizes(text: str) -> None:
    if text == "24":
        assert planning.size_of(text) == 24
        return
    with pytest.raises(ConfigError, match="24GiB"):
        planning.size_of(text)


def test_profile_runs_and_says_the_phases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, error = called(capsys, "memory", "profile", str(written(tmp_path)), "--steps", "3")
    assert code == 0 and "backward" in out and "kv_cache" in out, error
    page = (tmp_path / "run" / "report.html").read_text()
    assert "backward, predicted" in page and "<th scope=\"col\">predicted</th>" in page
