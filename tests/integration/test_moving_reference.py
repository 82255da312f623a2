"""Runs whose reference moves after the policy: when, how far, and that a resumed run goes on as the whole one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import posttrain
import pytest
from integration.small import config
from posttrain.errors import ConfigError

pytest.importorskip("torch")
pytest.importorskip("posttrain_objectives")

KL = {"use": "fixed", "placement": "loss", "coef": 0.05}


def records(run: Any) -> list[Mapping[str, Any]]:
    """One per step; the first is the evaluation before them."""
    return [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()][1:]


def column(run: Any, name: str) -> list[float]:
    return [row[name] for row in records(run)]


def weights(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


def checkpoint_of(run: Any, step: int) -> dict[str, np.ndarray]:
    from posttrain import checkpoint

    found = [path for path in (run.directory / "checkpoints").iterdir() if path.name.endswith(f"{step}")]
    return dict(checkpoint.load(found[0]).arrays["reference"])


def test_a_hard_reset_takes_the_kl_to_nothing(tmp_path: Path) -> None:
    """The step after a reset begins at the reference; the KL to the policy before training goes on growing."""
    run = posttrain.train(config(tmp_path / "run", kl=KL, reference_update={"every": 3}))
    assert column(run, "kl/reference_moved") == [0, 0, 1, 0, 0, 1]
    kl, initial = column(run, "kl/reference"), column(run, "kl/initial")
    assert kl[:3] == initial[:3] and kl[2] > 0
    assert abs(kl[3]) < 1e-9 < initial[3]
    assert 1e-6 < kl[4] != initial[4]
    last = weights(run.directory / "policy")
    held = checkpoint_of(run, 6)
    assert held.keys() == last.keys() and all(np.array_equal(held[name], last[name]) for name in last)


def test_rate_one_is_a_reset_and_a_small_one_stays_behind(tmp_path: Path) -> None:
    def kl(**how: Any) -> list[float]:
        name = "-".join(f"{key}{value}" for key, value in how.items()) or "fixed"
        return column(posttrain.train(config(tmp_path / name, kl={**KL, "coef": 0.0}, reference_update=how)),
                      "kl/reference")
    fixed, slow, soft, hard = kl(), kl(every=1, rate=1e-6), kl(every=1, rate=0.5), kl(every=1)
    assert slow == pytest.approx(fixed, rel=1e-3, abs=1e-8)
    for step in (2, 3, 4, 5):
        assert hard[step] < soft[step] < slow[step]


def test_a_reference_moves_where_the_kl_is_above_a_limit(tmp_path: Path) -> None:
    run = posttrain.train(config(tmp_path / "run", kl=KL, steps=8, reference_update={"kl_above": 2e-4}))
    kl, moved = column(run, "kl/reference"), column(run, "kl/reference_moved")
    assert moved == [float(x > 2e-4) for x in kl] and 0 < sum(moved) < 8


@pytest.mark.parametrize("how", [{"every": 2}, {"every": 1, "rate": 0.3}], ids=["reset", "soft"])
@pytest.mark.parametrize("kl", [KL, {"use": "adaptive", "placement": "reward", "target": 1e-3, "coef": 0.1}],
                         ids=["loss", "reward"])
def test_a_resumed_run_goes_on_as_the_whole_one(tmp_path: Path, how: dict[str, Any], kl: dict[str, Any]) -> None:
    whole = posttrain.train(config(tmp_path / "whole", kl=kl, reference_update=how))
    half = posttrain.train(config(tmp_path / "half", kl=kl, reference_update=how, steps=3,
                                  optimizer={"lr": 1e-2, "warmup_steps": 2, "schedule": "cosine", "total_steps": 6}))
    posttrain.resume(half.directory, ["steps=6"])
    a, b = weights(whole.directory / "policy"), weights(half.directory / "policy")
    assert all(np.array_equal(a[name], b[name]) for name in a)
    for name in ("kl/reference", "kl/initial", "kl/coef"):
        assert column(whole, name)[3:] == column(half, name)[-3:]


@pytest.mark.parametrize(("changes", "says"), [
    ({"kl": "none", "reference_update": {"every": 2}}, "reference_update moves the copy of the policy .* set kl"),
    ({"kl": KL, "reference": "torch", "reference_update": {"every": 2}}, "leave reference out"),
    ({"kl": KL, "reference_update": {"rate": 0.0, "every": 1}}, r"rate lies in \(0, 1\], got 0"),
    ({"kl": KL, "reference_update": {"every": -1}}, "every must not be negative, got -1"),
])
def test_what_cannot_move_is_told(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        posttrain.train(config(tmp_path / "run", **changes))


def nothing(completions: list[str], **columns: Any) -> list[None]:
    return [None for _ in completions]


def test_a_reference_moves_in_its_turn_where_there_was_no_update(tmp_path: Path) -> None:
    run = posttrain.train(config(tmp_path / "run", kl=KL, rewards={"n": nothing}, steps=3, optimizer={"lr": 1e-2},
                                 reference_update={"every": 2}))
    assert column(run, "kl/reference_moved") == [0, 1, 0]
