"""The ONNX graphs of the native decoder against transformers: decoding in shared buffers, exported models, and what
goes wrong in silence where graphs are traced: inputs that vanish, parameters that are renamed or stay behind, threads.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
transformers = pytest.importorskip("transformers")
ort = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")

from exchange import SIZES, V, randomise  # after the check that the libraries are there
from posttrain.rewards.pool import usable_cores
from posttrain_backends._onnx import decoder
from posttrain_backends._onnx.session import Bound, Weights, options, packed, with_constants
from posttrain_backends._onnx.tape import Tape
from posttrain_backends.families.config import read_shape
from posttrain_backends.families.shape import Shape

torch.set_num_threads(1)
pytestmark = [pytest.mark.oracle,
              pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]  # the libraries' own

KINDS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {"num_attention_heads": 2, "num_key_value_heads": 1}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "smollm3": ("smollm3", {"num_hidden_layers": 4}),
}
ROWS = np.array([5, 9, 3])
"""Tokens of each."""
COLUMNS = 16


@dataclass(frozen=True)
class Model:
    """A model of transformers, its shape and its numbers."""

    library: Any
    shape: Shape

    @property
    def weights(self) -> dict[str, np.ndarray]:
        tied = {"lm_head.weight"} if self.shape.tie_word_embeddings else set()
        return {n: x.numpy() for n, x in self.library.state_dict().items() if n not in tied}

    def logits(self, tokens: np.ndarray, length: int) -> np.ndarray:
        with torch.no_grad():
            found: np.ndarray = self.library(input_ids=torch.from_numpy(tokens[None, :length])).logits[0].numpy()
        return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):
    @cache
    def made(name: str) -> Model:
        kind, traits = KINDS[name]
        library = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(kind, **{**SIZES, **traits})).eval()
        randomise(library)
        folder: Path = tmp_path_factory.mktemp("model")
        library.save_pretrained(folder)
        return Model(library, read_shape(folder))
    return made


def tokens() -> np.ndarray:
    """[3, 9] ids; those behind a row's length are padding."""
    return np.random.default_rng(0).integers(1, V, (len(ROWS), ROWS.max()))


def bound_to(graph: Any, model: Model) -> Bound:
    return Bound(graph, Weights(model.weights.items(), decoder.weights_of([graph], model.shape), "the test"), 1)


GRAPHS = {
    "scoring": (decoder.scoring, {"tokens", "asked", "seqlens_k", "total_sequence_length"}),
    "head": (lambda shape: decoder.head(shape, entropy=True), {"hidden", "chosen", "temperature"}),
    "decoding": (decoder.decoding, {"tokens", "asked", "seqlens_k", "total_sequence_length"}),
    "exported": (decoder.exported, {"input_ids", "attention_mask", "position_ids"}),
}
"""Graph -> what a call brings beside weights and the past."""


# ---- decoding


@pytest.mark.parametrize("form", ["bound", "packed"])
@pytest.mark.parametrize("name", KINDS)
def test_rows_of_uneven_length_decode_as_transformers_does(name, form, model):
    """A prompt of each row in one call, padded; then two tokens, one a call. Past and present are one buffer."""
    m, ids = model(name), tokens()
    shape, graph = m.shape, decoder.decoding(m.shape)
    weights = Weights(m.weights.items(), decoder.weights_of([graph], shape), "the test")
    session = packed(graph, weights, 1) if form == "packed" else \
        ort.InferenceSession(graph.SerializeToString(), options(1), providers=["CPUExecutionProvider"])
    io = session.io_binding()
    size = (len(ROWS), shape.num_key_value_heads, COLUMNS, shape.head_dim)
    for past, present in zip(decoder.past_names(shape.num_hidden_layers),
                             decoder.present_names(shape.num_hidden_layers)):
        for before, after in zip(past, present):
            buffer = ort.OrtValue.ortvalue_from_numpy(np.zeros(size, np.float32))
            io.bind_ortvalue_input(before, buffer)
            io.bind_ortvalue_output(after, buffer)
    for n, value in weights.values.items() if form == "bound" else ():
        io.bind_ortvalue_input(n, value)
    def step(read: np.ndarray, lengths: np.ndarray, asked: np.ndarray) -> np.ndarray:
        given = {"tokens": read, "seqlens_k": (lengths - 1).astype(np.int32), "asked": asked,
                 "total_sequence_length": np.array(lengths.max(), np.int32)}
        for n, x in given.items():
            io.bind_cpu_input(n, np.ascontiguousarray(x))
        io.bind_output("logits")
        session.run_with_iobinding(io)
        found: np.ndarray = io.get_outputs()[-1].numpy()
        return found
    prompt, rows = ROWS - 2, np.arange(len(ROWS))
    steps = [step(ids[:, :prompt.max()], prompt, rows * prompt.max() + prompt - 1)]
    steps += [step(ids[rows, prompt + i][:, None], prompt + i + 1, rows) for i in range(2)]
    for row, length in enumerate(ROWS):
        expected = m.logits(ids[row], length)[-3:]
        np.testing.assert_allclose(np.stack([logits[row] for logits in steps]), expected, rtol=0, atol=1e-5)


# ---- exported models


@pytest.mark.parametrize("name", KINDS)
def test_an_exported_graph_continues_padded_rows(name, model):
    m, ids = model(name), tokens()
    T, layers = ROWS.max(), m.shape.num_hidden_layers
    mask = (np.arange(T) >= T - ROWS[:, None]).astype(np.int64)
    left = np.stack([np.r_[np.zeros(T - n, np.int64), row[:n]] for row, n in zip(ids, ROWS)])
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    session = ort.InferenceSession(decoder.exported(m.shape).SerializeToString(), options(1),
                                   providers=["CPUExecutionProvider"])
    past = {n: np.zeros((len(ROWS), m.shape.num_key_value_heads, 0, m.shape.head_dim), np.float32)
            for pair in decoder.past_names(layers) for n in pair}
    logits = []
    for begin, end in ((0, 4), (4, 8), (8, T)):
        found = dict(zip([o.name for o in session.get_outputs()], session.run(None, {
            "input_ids": left[:, begin:end], "attention_mask": mask[:, :end], "position_ids": positions[:, begin:end],
            **past, **m.weights})))
        past = {before: found[after] for pair in zip(decoder.past_names(layers), decoder.present_names(layers))
                for before, after in zip(*pair)}
        logits.append(found["logits"])
    for row, length in enumerate(ROWS):
        ours = np.concatenate(logits, axis=1)[row, T - length:]
        np.testing.assert_allclose(ours, m.logits(ids[row], length), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_an_exported_graph_is_valid_onnx_of_no_other_domain(name, model):
    graph = decoder.exported(model(name).shape)
    onnx.checker.check_model(graph, full_check=True)
    assert {node.domain for node in graph.graph.node} == {""}


# ---- what goes wrong in silence


@pytest.mark.parametrize("name", GRAPHS)
def test_every_input_is_there_and_ends_in_the_result(name, model):
    """Trap 1: a tracer drops an input that its sample did not need, as the mask of a batch without padding."""
    m = model("qwen3")
    write, brought = GRAPHS[name]
    graph = write(m.shape)
    session = ort.InferenceSession(graph.SerializeToString(), options(1), providers=["CPUExecutionProvider"])
    past = {n for pair in decoder.past_names(2) for n in pair} if name in ("decoding", "exported") else set()
    assert {i.name for i in session.get_inputs()} == brought | past | decoder.weights_of([graph], m.shape).keys()
    read = {n for node in graph.graph.node for n in node.input}
    assert {i.name for i in graph.graph.input} <= read


@pytest.mark.parametrize("name", KINDS)
def test_every_parameter_keeps_its_name_and_each_is_refreshed(name, model):
    """Traps 2 and 3: an optimiser renames parameters, and leaves small ones inline, so that some are never replaced."""
    m = model(name)
    graph = decoder.decoding(m.shape)
    expected = {n: x.shape for n, x in m.weights.items()}
    assert decoder.weights_of([graph], m.shape) == expected
    assert not [t.name for t in graph.graph.initializer if t.name in expected]
    trunk = decoder.scoring(m.shape)
    weights = Weights(m.weights.items(), expected, "the test")
    both, head = Bound(trunk, weights, 1), Bound(decoder.head(m.shape, entropy=False), weights, 1)
    def said() -> np.ndarray:
        ids = tokens()[:1]
        (hidden,) = both(tokens=ids, asked=np.arange(9), seqlens_k=np.array([8], np.int32),
                         total_sequence_length=np.array(9, np.int32))
        (logprobs,) = head(hidden=hidden, chosen=ids[0], temperature=np.array(1, np.float32))
        return logprobs
    before = said()
    rng = np.random.default_rng(0)
    for n, old in m.weights.items():
        weights.take({**m.weights, n: old + 0.5 * rng.normal(size=old.shape).astype(np.float32)}.items())
        assert np.abs(said() - before).max() > 1e-3, f"{n} is not read"
    weights.take(m.weights.items())
    assert np.array_equal(said(), before)


def test_all_weights_of_a_packed_session_are_given_to_it(model):
    """Trap 3: what stands inline in the model is no longer the policy's after an update."""
    m = model("qwen3")
    graph, given = with_constants(decoder.decoding(m.shape), m.weights)
    held = {t.name: t for t in graph.graph.initializer}
    assert sorted(given) == sorted(m.weights) and all(
        held[n].data_location == onnx.TensorProto.EXTERNAL and not held[n].raw_data for n in given)
    assert not m.weights.keys() & {i.name for i in graph.graph.input}


@pytest.mark.parametrize("asked, of_the_process, found", [(3, "5", 3), (0, "5", 5), (0, "", usable_cores())])
def test_threads_are_always_said(asked, of_the_process, found, monkeypatch):
    """Trap 4: ONNX Runtime takes as many threads as the machine has cores."""
    monkeypatch.setenv("OMP_NUM_THREADS", of_the_process)
    assert options(asked).intra_op_num_threads == found


def test_sessions_have_the_threads_that_were_asked_for(model):
    m = model("qwen2")
    graph = decoder.decoding(m.shape)
    weights = Weights(m.weights.items(), decoder.weights_of([graph], m.shape), "the test")
    chosen = packed(graph, weights, 2).get_session_options()
    assert (chosen.intra_op_num_threads, chosen.inter_op_num_threads) == (2, 1)


def test_equal_constants_of_a_tape_are_one():
    tape = Tape()
    assert tape.ints(1, 2) == tape.ints(1, 2) != tape.ints(1)
    assert len(tape.model().graph.initializer) == 2
