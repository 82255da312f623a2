"""Quantised weights of native models and of the user's own: what they compute as a reference, what is drawn from a
rounded copy of a policy, and what is refused."""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from ragged import answers_to_one_prompt

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")

from posttrain.batching import StepData, cut  # after the check that the libraries are there
from posttrain.data import Counts, Loss, Prompt, Sampling, Term, Weights
from posttrain.errors import ConfigError, PluginError
from posttrain.protocols import LoadRequest, Optimization, Output
from posttrain.tokenizers import Characters
from posttrain_backends._torch.models.projections import has_plain_layers, is_plain
from posttrain_backends._torch.quantised import dequantised, quantised
from posttrain_backends.engines import Batched
from posttrain_backends.quantization import QUANTIZERS
from posttrain_backends.ssm import SSM
from posttrain_backends.torch_native import Torch

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # the libraries' own

TOKENIZER = Characters(string.ascii_letters + "0123456").load()
V = TOKENIZER.vocab_size
HERE = tuple(name for name, q in QUANTIZERS.items() if not q.cuda_only)
AGREE = {name: 0.1 if QUANTIZERS[name].rounds_inputs else 2e-5 for name in HERE}
"""Nats between log-probs of the same numbers that were come by in another way."""
HALF = 0.15
"""The same where matrices are multiplied in bfloat16."""
LOGPROBS = frozenset({Output.LOGPROBS})
GIVEN = answers_to_one_prompt(12, (3, 9, 1, 14), low=0, high=V, seed=0)
USER = """
import torch
import torch.nn.functional as F
from torch import nn

class Small(nn.Module):
    def __init__(self, vocab_size, called):
        super().__init__()
        self.embed, self.place = nn.Embedding(vocab_size, 64), nn.Embedding(64, 64)
        self.rnn, self.mix, self.called = nn.GRU(64, 64, batch_first=True), nn.Linear(64, 64), called
        self.turn = nn.Parameter(torch.eye(64))
        self.lm_head = nn.Linear(64, vocab_size, bias=False)

    def forward(self, tokens, positions):
        h = self.rnn(self.embed(tokens) + self.place(positions))[0] @ self.turn  # in bfloat16 where matrices are
        return h + F.silu(self.mix(h) if self.called else F.linear(h, self.mix.weight, self.mix.bias))

def build(vocab_size): return Small(vocab_size, True)
def reads(vocab_size): return Small(vocab_size, False)
"""
SIZES = {"hidden_size": 64, "layers": 2, "heads": 4, "kv_heads": 2, "max_positions": 64, "device": "cpu"}
MODELS: dict[str, Callable[[str, str], Torch | SSM]] = {
    "llama": lambda path, user: Torch(**SIZES, weights=path),
    "tied": lambda path, user: Torch(**SIZES, tied_embeddings=True, weights=path),
    "qwen2": lambda path, user: Torch(**SIZES, family="qwen2", weights=path),
    "qwen3": lambda path, user: Torch(**SIZES, family="qwen3", weights=path),
    "mamba2": lambda path, user: SSM(hidden_size=64, layers=2, state_size=8, head_dim=16, chunk_size=8, device="cpu",
                                     weights=path),
    "user": lambda path, user: Torch(file=f"{user}:build", device="cpu", weights=path),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Torch | SSM]:
    """Each model with weights far from their first ones, as it is loaded from its folder."""
    root = tmp_path_factory.mktemp("native")
    (root / "model.py").write_text(USER)
    made = {}
    for name, spec in MODELS.items():
        learner = spec("", str(root / "model.py")).load(LoadRequest(V, seed=3))
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for p in learner.model.module.parameters():
                p.add_(0.08 * torch.randn(p.shape, generator=generator))
        learner.save(root / name)
        made[name] = spec(str(root / name), str(root / "model.py"))
    return made


def loaded(spec, *, train: bool = False, **fields):
    return replace(spec, **fields).load(LoadRequest(V, optimization=Optimization(lr=0.05) if train else None))


def exact(spec, rounded: torch.nn.Module, params=None):
    """A model of float64 with the numbers that the quantised layers stand for, and for the rest those of `params`."""
    oracle = loaded(spec, precision="float64")
    items = dict(oracle.params() if params is None else params)
    items |= {f"{name}.weight": dequantised(layer).double() for name, layer in quantised(rounded).items()}
    oracle.load_params(items.items(), 0)
    return oracle


def scored(learner, rollouts=GIVEN) -> np.ndarray:
    return learner.score(rollouts, LOGPROBS, 1.0).logprobs


PROMPTS = [Prompt(text=t, group=g) for g, t in enumerate(["abc", "abc", "hello", "b", "abc"])]
HELD = [Prompt(text="ab" * 20, group=0)] * 6
"""Answers to a prompt that is long enough to be held once."""


class Likelihood:
    """The loss -sum(weight * logprob)."""

    needs, outputs, unit, slots = frozenset(), LOGPROBS, "episode", ("main",)

    def weights(self, counts: Counts) -> Weights:
        return Weights(weight=np.ones(counts.actions))

    def __call__(self, ops, out, batch, coef):
        return Loss({"policy": Term(-ops.xp.sum(batch.weight * out.logprobs))})


def step(learner) -> None:
    n = int(GIVEN.is_action.sum())
    learner.accumulate(cut(StepData(GIVEN, np.ones(n, bool), Weights(weight=np.linspace(-1, 1, n))), np.arange(4)),
                       Likelihood(), {})
    learner.apply()


@pytest.mark.oracle
@pytest.mark.parametrize("quantize", HERE)
@pytest.mark.parametrize("name", MODELS)
def test_log_probs_are_those_of_the_numbers_that_the_weights_stand_for(name, quantize, folders):
    learner = loaded(folders[name], quantize=quantize)
    layers = {id(m) for m in learner.model.module.modules() if isinstance(m, torch.nn.Linear)}
    kept = [m for m in learner.model.module.modules() if isinstance(m, torch.nn.Linear) and is_plain(m)]
    assert len(layers) > len(kept) and all(m.weight is learner.model.output_weight for m in kept)
    found = scored(learner)
    np.testing.assert_allclose(found, scored(exact(folders[name], learner.model.module)), rtol=0, atol=AGREE[quantize])
    moved = np.abs(found - scored(loaded(folders[name]))).max()
    assert (5e-3 if quantize == "nf4" else 1e-4) < moved < 1  # it is quantised, and still the same model


@pytest.mark.parametrize("quantize", HERE)
@pytest.mark.parametrize("name", MODELS)
def test_a_quantised_model_is_drawn_from_as_it_is(name, quantize, folders, monkeypatch):
    monkeypatch.setattr("posttrain_backends._torch.rows.SPARED", 8)  # prompts of that many tokens are held once
    learner = loaded(folders[name], quantize=quantize)
    for shared, prompts in ((True, PROMPTS), (False, PROMPTS), (True, HELD)):
        drawn = Batched(slots=0 if prompts is HELD else 3).start(learner, TOKENIZER, shared=shared).rollout(
            prompts, Sampling(max_new_tokens=9), (0, 1))
        np.testing.assert_allclose(drawn.behavior_logprobs, scored(learner, drawn), rtol=0, atol=AGREE[quantize])


@pytest.mark.parametrize("quantize", HERE)
@pytest.mark.parametrize("name", MODELS)
def test_a_policy_is_drawn_from_in_quantised_form_and_keeps_its_own(name, quantize, folders):
    """What a sampler records is what the quantised model of the same weights says, also after an update; and the policy
    that is evaluated decodes, and learns, in between."""
    learner = loaded(folders[name], train=True)
    before = {n: t.clone() for n, t in learner.params()}
    engine = Batched(slots=3, quantize=quantize)
    evaluator, sampler = (engine.start(learner, TOKENIZER, shared=shared) for shared in (True, False))
    assert all(torch.equal(before[n], t) for n, t in learner.params()) and has_plain_layers(learner.model.module)
    for version in (0, 1):
        drawn = sampler.rollout(PROMPTS, Sampling(max_new_tokens=9), (0, version))
        assert (drawn.policy_version == version).all()
        copy = exact(folders[name], sampler._drawn.model.module, learner.params())
        np.testing.assert_allclose(drawn.behavior_logprobs, scored(copy, drawn), rtol=0, atol=AGREE[quantize])
        assert np.abs(drawn.behavior_logprobs - scored(learner, drawn)).max() > 1e-4
        own = evaluator.rollout(PROMPTS, Sampling(max_new_tokens=9), (0, version))
        np.testing.assert_allclose(own.behavior_logprobs, scored(learner, own), rtol=0, atol=2e-5)
        step(learner)
        sampler.sync(learner.params(), 1)


@pytest.mark.parametrize("quantize", ["nf4", "int8", "int8_weight_only"])
@pytest.mark.parametrize("name", ["qwen2", "mamba2", "user"])
def test_bf16_and_biases_that_stay_in_float32(name, quantize, folders):
    """The libraries would give a bias the type of what they read, and a copy would no longer be given new ones."""
    learner = loaded(folders[name], train=True, precision="bf16")
    sampler = Batched(slots=3, quantize=quantize).start(learner, TOKENIZER, shared=False)
    for version in (0, 1):
        drawn = sampler.rollout(PROMPTS, Sampling(max_new_tokens=9), (0, version))
        copy = exact(folders[name], sampler._drawn.model.module, learner.params())
        assert np.abs(drawn.behavior_logprobs - scored(copy, drawn)).max() < HALF
        biases = {n: p for n, p in sampler._drawn.model.named_parameters() if n.endswith("bias")}
        assert all(torch.equal(p, dict(learner.params())[n]) for n, p in biases.items())
        step(learner)
        sampler.sync(learner.params(), 1)


def test_a_quantised_reference_of_a_policy(folders):
    """With the KL over the whole vocabulary, which reads its hidden states while the policy learns."""
    policy, reference = loaded(folders["llama"], train=True), loaded(folders["llama"], quantize="nf4")
    policy.compare_with(reference)
    kl = policy.score(GIVEN, frozenset({Output.REFERENCE_KL}), 1.0).reference_kl
    assert (kl > 0).all() and kl.mean() > 1e-4
    assert not any(p.requires_grad for _, p in reference.model.named_parameters())


def test_what_is_refused_by_name(folders, tmp_path, monkeypatch):
    llama = folders["llama"]
    with pytest.raises(ConfigError, match=r"weights in nf4 stay as they are, so nothing would be trained; adapters.* "
                                          r"of backend hf.*the same folder: \{use: quantized, weights"):
        loaded(llama, train=True, quantize="nf4")
    with pytest.raises(ValueError, match=r"compute in float32 at most, and precision is float64"):
        Torch(quantize="int8", precision="float64")
    with pytest.raises(ValueError, match=r"kernels of int4 are for CUDA alone.*take one of int8, nf4"):
        SSM(quantize="int4", device="cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"kernels of int4 are for CUDA alone, and the device is cpu"):
        loaded(llama, quantize="int4", device="auto")
    with pytest.raises(ConfigError, match="a native model with quantised weights is not saved"):
        loaded(llama, quantize="nf4").save(tmp_path)
    with pytest.raises(ConfigError, match=r"does not compute with linear layers in nf4(?s:.*)call its linear layers"):
        loaded(folders["user"], quantize="nf4", file=folders["user"].file.replace(":build", ":reads"))
    with pytest.raises(ConfigError, match="adapters on a module of yours are for its own code to have"):
        loaded(folders["user"], train=True, quantize="nf4")
    with pytest.raises(ConfigError, match=r"adapter: \{use: lora, targets: \[in_proj\]\}"):
        loaded(folders["mamba2"], train=True, quantize="nf4")
    mixture = Torch(hidden_size=64, heads=4, max_positions=64, device="cpu", family="qwen3_moe", experts=4)
    mixture.load(LoadRequest(V)).save(tmp_path)
    with pytest.raises(ConfigError, match=r"experts\S* holds several matrices in one .*, which nf4 would leave"):
        Torch(weights=str(tmp_path), device="cpu", quantize="nf4").load(LoadRequest(V))
    with pytest.raises(ValueError, match="quantize: experts hold several matrices in one"):
        replace(mixture, quantize="nf4")
    monkeypatch.setattr("posttrain_backends.installed.find_spec", lambda name: name != "bitsandbytes" or None)
    with pytest.raises(PluginError, match=r"needs bitsandbytes.*pip install 'posttrain-backends\[quantized\]'"):
        loaded(llama, quantize="nf4")


def test_what_cannot_be_drawn_from_in_quantised_form_says_why(folders):
    for policy, why in ((loaded(folders["llama"], quantize="nf4"), "quantised already, and drawn from as they are"),
                        (loaded(folders["llama"], precision="float64"), r"rollout\.engine\.quantize: .* float64"),
                        (Torch(family="qwen3_moe", experts=4, device="cpu").load(LoadRequest(V)), "several matrices")):
        with pytest.raises(ConfigError, match=why):
            Batched(quantize="int8").start(policy, TOKENIZER, shared=False)
    sampler = Batched(quantize="nf4").start(loaded(folders["llama"]), TOKENIZER, shared=False)
    with pytest.raises(ConfigError, match="weights given to the sampler"):
        sampler.sync({"a": np.zeros(1)}.items(), 1)
