"""The backend `onnx` keeps the contract of models that score alone, on models of a few hundred numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from posttrain.testing import failures
from posttrain.testing.scorers import ScorerContract

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")
torch = pytest.importorskip("torch")

from posttrain.protocols import LoadRequest  # after the check that the libraries are there
from posttrain_backends._onnx import scorer
from posttrain_backends._onnx.session import Bound, Weights
from posttrain_backends.onnx import Onnx
from posttrain_backends.torch_native import Torch

torch.set_num_threads(1)

V = 8
SMALL = Torch(hidden_size=16, layers=1, heads=2, kv_heads=1, intermediate_size=8, max_positions=32, device="cpu")
FOLDERS: Mapping[str, Torch] = {
    "llama": SMALL,
    "wide": Torch(hidden_size=32, layers=2, heads=2, kv_heads=2, intermediate_size=8, max_positions=32,
                  tied_embeddings=True, device="cpu"),
    "qwen2": Torch(hidden_size=16, layers=1, heads=2, kv_heads=1, max_positions=32, family="qwen2", device="cpu"),
    "qwen3": Torch(hidden_size=16, layers=2, heads=2, kv_heads=1, max_positions=32, family="qwen3", device="cpu"),
    "smollm3": Torch(hidden_size=16, layers=4, heads=2, kv_heads=1, max_positions=32, family="smollm3", device="cpu"),
}
"""Folder -> the model in it."""


@pytest.fixture(scope="module", autouse=True)
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Work beside the folders, so that components name them alike in every run."""
    with contextlib.chdir(tmp_path_factory.mktemp("models")), torch.random.fork_rng():
        for folder, component in FOLDERS.items():
            component.load(LoadRequest(V)).trunk.save(Path(folder))
        yield


class TestOnnx(ScorerContract):
    components = (Onnx(weights="llama"), Onnx(weights="wide", head_chunk=3), Onnx(weights="qwen2"),
                  Onnx(weights="qwen3"))
    seeded = False


class TestOnnxWithoutPositions(ScorerContract):
    """Every fourth layer has none."""

    components = (Onnx(weights="smollm3"),)
    seeded = False
    spread = 0.1


class Unchecked(Weights):  # type: ignore[misc]  # final for everyone but this mistake
    """Takes of a set of weights what fits."""

    def take(self, items: Iterable[tuple[str, Any]], what: str = "") -> None:
        for name, x in items:
            if name in self.arrays and self.arrays[name].shape == np.shape(x):
                self.arrays[name][...] = x


class Late(Bound):  # type: ignore[misc]  # as above
    """Reads the state behind a token in place of the one before it."""

    def __call__(self, **inputs: np.ndarray) -> list[np.ndarray]:
        if "asked" in inputs:
            inputs["asked"] = np.minimum(inputs["asked"] + 1, inputs["tokens"].size - 1)
        return super().__call__(**inputs)


@pytest.mark.parametrize("name, wrong, test", [
    ("Weights", Unchecked, "test_refuses_weights_that_do_not_fit"),
    ("Bound", Late, "test_scores_are_logarithms_of_probabilities")])
def test_a_mistake_is_found(name: str, wrong: Any, test: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorer, name, wrong)
    assert [found for found, _ in failures(TestOnnx, Onnx(weights="qwen3"), only=test)] == [test]
