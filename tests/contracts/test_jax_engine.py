"""The engine `batched` keeps the contract of its kind on a policy in JAX, a model of a few hundred numbers."""

from __future__ import annotations

import pytest
from posttrain.testing import EngineContract

pytest.importorskip("flax")
pytest.importorskip("optax")

from posttrain_backends.engines import Batched
from posttrain_backends.flax import Flax


class TestBatchedOnFlax(EngineContract):
    components = (Batched(), Batched(slots=3, prefill_tokens=5))
    backend = Flax(hidden_size=8, layers=1, heads=2, kv_heads=1, intermediate_size=8, max_positions=32, device="cpu")
    max_positions = 32
