"""What ends a rollout's optimiser steps, and a run, before their time: a policy that has moved too far."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import posttrain
import pytest
from integration.small import config
from posttrain.comm import SingleProcess
from posttrain.data import Metric, Metrics
from posttrain.errors import ConfigError
from posttrain.update import moved

pytest.importorskip("torch")
pytest.importorskip("posttrain_objectives")

FAST = {"optimizer": {"lr": 0.05}, "kl": "none"}
"""Moves far in a few optimiser steps."""


def records(run: Any) -> list[Mapping[str, Any]]:
    return [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]


def weights(run: Any) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(run.directory / "policy" / "model.safetensors")


def test_the_rest_of_a_rollouts_steps_is_left_out(tmp_path: Path) -> None:
    """The step that would be the first beyond the limit is not made: the weights are those of the steps before."""
    update = {"steps_per_rollout": 4, "epochs": 2}
    runs = {name: posttrain.train(config(tmp_path / name, steps=1, update={**update, **more}, **FAST))
            for name, more in (("free", {}), ("held", {"max_kl": 1e-3}), ("loose", {"max_kl": 1e9}))}
    made = {name: records(run)[-1] for name, run in runs.items()}
    assert made["free"]["batch/parts"] == made["loose"]["batch/parts"] == 8
    assert made["held"]["update/stopped"] == 1 and made["loose"]["update/stopped"] == 0
    assert "update/stopped" not in made["free"]
    parts = int(made["held"]["batch/parts"])  # the first step has moved nothing yet; what was looked at counts, too
    assert 2 <= parts < 8
    loose, free, held = (weights(runs[name]) for name in ("loose", "free", "held"))
    assert all(np.array_equal(loose[name], free[name]) for name in free)
    assert not all(np.array_equal(held[name], free[name]) for name in free)


def test_a_run_ends_where_it_is_too_far_from_the_reference(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = config(tmp_path / "run", steps=40, optimizer={"lr": 0.05}, stop={"kl": 0.02},
                      kl={"use": "fixed", "coef": 0.0})
    run = posttrain.train(settings)
    found = records(run)
    assert run.state.step < 40
    assert found[-1]["kl/reference"] > 0.02 >= max(row["kl/reference"] for row in found[1:-1])
    assert f"ended after step {run.state.step} of 40: the KL to the reference is" in caplog.text
    assert "eval/reward/mean" in found[-1] and (run.directory / "policy" / "model.safetensors").exists()
    again = posttrain.resume(run.directory, [])
    assert again.state.step == run.state.step and "the run ended at a KL to the reference" in caplog.text
    steps = run.state.step + 2
    assert posttrain.resume(run.directory, ["stop.kl=0", f"steps={steps}"]).state.step == steps


@pytest.mark.parametrize(("changes", "says"), [
    ({"stop": {"kl": 0.1}, "kl": "none"}, "stop.kl ends the run by its KL to the reference, which kl: none"),
    ({"update": {"max_kl": 0.1, "epochs": 2}, "rollout": {"prompts_per_step": 4, "max_new_tokens": 4, "staleness": 1}},
     "update.max_kl measures from the policy before the update, and the ratio is to the sampler"),
    *(({"recipe": "sft", "kl": "none", "rewards": {}, **more}, f"{key}: loop: supervised has no rollouts")
      for key, more in (
        ("stop.kl", {"stop": {"kl": 0.1}}), ("update.max_kl", {"update": {"max_kl": 0.1}}),
        ("kl", {"kl": {"use": "fixed"}}), ("constraint", {"constraint": "crpo"}))),
    ({"update": {"max_kl": 0.1}}, "update.max_kl leaves out the rest of a rollout's optimiser steps, and there is one"),
    ({"update": {"max_kl": -0.1}}, "max_kl must not be negative, got -0.1"),
    ({"stop": {"kl": float("inf")}}, "kl must be finite, got inf"),
])
def test_what_cannot_stop_is_told(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        posttrain.train(config(tmp_path / "run", **changes))


def test_an_objective_that_does_not_measure_the_kl_is_told() -> None:
    assert moved(Metrics({"policy/approx_kl": Metric(0.6, 2.0)}), SingleProcess()) == 0.3
    assert moved(Metrics({"policy/approx_kl": Metric(0.0, 0.0)}), SingleProcess()) == 0.0
    with pytest.raises(ConfigError, match="update.max_kl: the objective does not measure policy/approx_kl"):
        moved(Metrics(), SingleProcess())


def test_a_run_ends_after_a_step_and_goes_on_as_if_it_had_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Schedules go by `steps`; asked again for the same step it does nothing, so a retry is safe."""
    whole = posttrain.train(config(tmp_path / "whole", evaluate={}), output="quiet")
    run = posttrain.train(config(tmp_path / "run", evaluate={}, stop={"after": 3}), output="quiet")
    assert run.state.step == 3 and (run.directory / "checkpoints" / "step-000003").is_dir()
    assert "ended after step 3 of 6, as stop.after asks" in caplog.text and "stop.after=0" in caplog.text
    assert posttrain.resume(run.directory, output="quiet").state.step == 3
    run = posttrain.resume(run.directory, ["stop.after=5"], output="quiet")
    assert run.state.step == 5
    run = posttrain.resume(run.directory, ["stop.after=0"], output="quiet")
    mine, theirs = weights(run), weights(whole)
    assert run.state.step == 6 and all(np.array_equal(mine[name], theirs[name]) for name in theirs)
    assert [{k: v for k, v in row.items() if k != "timing"} for row in records(run)] == [
        {k: v for k, v in row.items() if k != "timing"} for row in records(whole)]
