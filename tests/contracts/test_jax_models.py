"""The backend `flax` keeps the contract of its kind, on models of a few hundred numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from posttrain.testing import BackendContract

pytest.importorskip("flax")
pytest.importorskip("optax")

from posttrain_backends.flax import Flax

NATIVE = Flax(hidden_size=8, layers=1, heads=2, kv_heads=1, intermediate_size=8, max_positions=32, device="cpu")


class TestFlax(BackendContract):
    components = (NATIVE, replace(NATIVE, layers=2, kv_heads=2, precision="float64"),
                  replace(NATIVE, tied_embeddings=True, gradient_checkpointing=True, head_chunk=3),
                  replace(NATIVE, family="qwen3"))

    def reloaded(self, component: Flax, folder: Path) -> Flax:
        return Flax(weights=str(folder), device="cpu", precision=component.precision)
