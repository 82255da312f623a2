"""The backends and engines of posttrain-backends keep the contracts of their kinds, on models of a few hundred numbers.

Those of core are in `tests/core/test_toy.py`, which needs no framework.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from posttrain.testing import BackendContract, EngineContract, failures

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from posttrain_backends._torch import learner  # after the check that the libraries are there
from posttrain_backends._torch.head import Readout, compared_logprobs, walk
from posttrain_backends.engines import Batched
from posttrain_backends.hf import HF, Lora
from posttrain_backends.ssm import SSM
from posttrain_backends.torch_native import Torch

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # the libraries' own

V = 8
NATIVE = Torch(hidden_size=8, layers=1, heads=2, kv_heads=1, intermediate_size=8, max_positions=32, device="cpu")
STATES = SSM(hidden_size=8, layers=1, state_size=4, head_dim=8, chunk_size=4, device="cpu")
SIZES = {"vocab_size": V, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "max_position_embeddings": 32}
"""Of the models in the folders `tiny` and `hybrid`."""
FOLDERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "tiny": ("llama", SIZES),
    "states": ("mamba2", {"vocab_size": V, "hidden_size": 8, "num_hidden_layers": 1, "num_heads": 4, "head_dim": 4,
                          "state_size": 4, "n_groups": 1, "chunk_size": 4, "bos_token_id": None, "eos_token_id": 1,
                          "pad_token_id": 0}),
    "hybrid": ("bamba", {**SIZES, "attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 4, "mamba_d_state": 4,
                         "mamba_n_groups": 1, "mamba_chunk_size": 4, "bos_token_id": None, "eos_token_id": 1,
                         "pad_token_id": None})}  # the library trains no embedding of a pad token
"""Folder -> the model of transformers in it."""


@pytest.fixture(scope="module", autouse=True)
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Work beside folders that hold models of transformers, so that components name them alike in every run."""
    with contextlib.chdir(tmp_path_factory.mktemp("models")), torch.random.fork_rng():
        for folder, (kind, sizes) in FOLDERS.items():
            torch.manual_seed(0)
            config = transformers.AutoConfig.for_model(kind, **sizes)
            transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        yield


class TestTorch(BackendContract):
    components = (NATIVE, replace(NATIVE, layers=2, kv_heads=2, precision="float64"),
                  replace(NATIVE, tied_embeddings=True, gradient_checkpointing=True, head_chunk=3),
                  replace(NATIVE, family="qwen3", attention="eager"))

    def reloaded(self, component: Torch, folder: Path) -> Torch:
        return Torch(weights=str(folder), device="cpu", precision=component.precision)


WRONG_COMPARISONS: Mapping[str, Callable[..., Any]] = {
    "the reference at another temperature": lambda h, w, c, reference, *, temperature, **how: compared_logprobs(
        h, w, c, replace(reference, hidden=temperature * reference.hidden), temperature=temperature, **how),
    "the KL to the policy": lambda h, w, c, reference, *, compute, **how: (
        *compared_logprobs(h, w, c, reference, compute=compute, **how)[:2],
        compared_logprobs(reference.hidden, reference.weight, c, Readout(h, w, compute), **how)[2]),
    "no gradient": lambda *given, **how: tuple(
        x.detach() if i == 2 else x for i, x in enumerate(compared_logprobs(*given, **how)))}


@pytest.mark.parametrize("bug", WRONG_COMPARISONS)
def test_a_wrong_comparison_is_found(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    test = "test_the_kl_to_a_reference_is_that_of_the_vocabulary"
    monkeypatch.setattr(learner, "compared_logprobs", WRONG_COMPARISONS[bug])
    monkeypatch.setattr(learner, "takes_one_pass", lambda objective: False)
    assert [name for name, _ in failures(TestTorch, NATIVE, only=test)] == [test]


WRONG_WALKS: Mapping[str, Callable[..., Any]] = {
    "the reference at another temperature": lambda *given, temperature, reference, **how: walk(
        *given, temperature=temperature, reference=reference and replace(
            reference, hidden=temperature * reference.hidden), **how),
    "no gradient": lambda *given, d_weight, **how: (walk(*given, **how)[0], None)}


@pytest.mark.parametrize("bug", WRONG_WALKS)
def test_a_wrong_comparison_in_one_pass_is_found(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    test = "test_the_kl_to_a_reference_is_that_of_the_vocabulary"
    monkeypatch.setattr(learner, "walk", WRONG_WALKS[bug])
    assert [name for name, _ in failures(TestTorch, NATIVE, only=test)] == [test]


class TestTorchWithoutPositions(TestTorch):
    """Every fourth layer has none, so there are four, and less noise: a step is to be small where all four bend."""

    components = (replace(NATIVE, family="smollm3", layers=4, precision="float64"),)
    spread = 0.1


class TestSSM(BackendContract):
    components = (STATES, replace(STATES, layers=2, groups=2, precision="float64"),
                  replace(STATES, tied_embeddings=True, gradient_checkpointing=True, head_chunk=3))

    def reloaded(self, component: SSM, folder: Path) -> SSM:
        return SSM(weights=str(folder), device="cpu", precision=component.precision)


class TestHF(BackendContract):
    components = (HF(weights="tiny", device="cpu"),
                  HF(weights="tiny", device="cpu", attention="eager", packing="always"))
    seeded = False

    def reloaded(self, component: HF, folder: Path) -> HF:
        return HF(weights=str(folder), device="cpu")


class TestHFWithAdapter(BackendContract):
    components = (HF(weights="tiny", device="cpu", adapter=Lora(rank=2, alpha=4.0)),)

    def reloaded(self, component: HF, folder: Path) -> HF:
        return HF(weights=str(folder), device="cpu")


class TestHFWithStates(BackendContract):
    components = (HF(weights="states", device="cpu"), HF(weights="hybrid", device="cpu"))
    seeded = False

    def reloaded(self, component: HF, folder: Path) -> HF:
        return HF(weights=str(folder), device="cpu")


@pytest.mark.needs("bitsandbytes", "torchao")
class TestHFQuantised(BackendContract):
    """Those whose layers do not round what they read; what is saved is read to score."""

    components = tuple(HF(weights="tiny", device="cpu", quantize=quantize, adapter=Lora(rank=2, alpha=4.0))
                       for quantize in ("nf4", "int8_weight_only"))

    def reloaded(self, component: HF, folder: Path) -> HF:
        return HF(weights=str(folder), device="cpu")


class TestBatched(EngineContract):
    components = (Batched(), Batched(slots=3, prefill_tokens=5), Batched(cache_tokens=40))
    backend = NATIVE
    max_positions = 32


class TestBatchedOnSSM(EngineContract):
    components = (Batched(), Batched(slots=3, prefill_tokens=5))
    backend = STATES


class TestBatchedOnHF(EngineContract):
    components = (Batched(slots=5),)
    backend = HF(weights="tiny", device="cpu", adapter=Lora(rank=2, alpha=4.0))
    max_positions = 32


class TestBatchedOnHFWithStates(EngineContract):
    components = (Batched(), Batched(slots=3, prefill_tokens=5))
    backend = HF(weights="states", device="cpu")


class TestBatchedOnHFWithBoth(EngineContract):
    components = (Batched(), Batched(slots=3, prefill_tokens=5))
    backend = HF(weights="hybrid", device="cpu")
    max_positions = 32
