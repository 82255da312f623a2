"""The learner in JAX: equal to torch's from the same seed, few compilations, and what becomes of memory that is used
up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("flax")
pytest.importorskip("optax")

import jax
from posttrain.batching import cut
from posttrain.data import TokenOutputs, to_numpy
from posttrain.errors import ConfigError, MemoryExhausted
from posttrain.protocols import LoadRequest, Optimization, Output
from posttrain.testing.tiny_models import Probe, accumulate, disturbed, random_rollouts, step_data, weights_of
from posttrain_backends._jax import compiled
from posttrain_backends._jax.buckets import columns, power_of_two, rectangle
from posttrain_backends._jax.memory import translating_memory_errors
from posttrain_backends.flax import Flax
from posttrain_backends.torch_native import Torch

V = 8
SIZES = dict(hidden_size=8, layers=2, heads=2, kv_heads=1, intermediate_size=8, max_positions=32, device="cpu")
POLICY = frozenset({Output.LOGPROBS, Output.ENTROPY})
VALUES = POLICY | {Output.VALUES, Output.BOOTSTRAP_VALUES, Output.ACTION_VALUES, Output.EXPECTED_ACTION_VALUES}


def request(**fields) -> LoadRequest:
    return LoadRequest(V, seed=3, **{"optimization": Optimization(lr=0.01, weight_decay=0.1), **fields})


def both(request: LoadRequest, **fields):
    """The same model in JAX and in torch, from the same seed."""
    return Flax(**SIZES, **fields).load(request), Torch(**SIZES, **fields).load(request)


def largest_gap(a, b) -> float:
    a, b = weights_of(a), weights_of(b)
    assert a.keys() == b.keys()
    return max(float(np.abs(a[name] - b[name]).max()) for name in a)


# ---- equal to torch

@pytest.mark.oracle
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "smollm3"])
def test_first_weights_are_those_of_torch(family):
    ours, theirs = both(request(), family=family)
    assert largest_gap(ours, theirs) < 1e-7


@pytest.mark.oracle
def test_steps_are_those_of_torch():
    """Scores, losses and weights from the same weights and rollouts, with value heads."""
    ours, theirs = both(request(value_heads=1, action_value_heads=1), precision="float64")
    start = disturbed(weights_of(theirs), 1, 0.3)
    for learner in (ours, theirs):
        learner.load_params(start.items(), 0)
    probe = Probe(POLICY | {Output.VALUES})
    for step in range(3):
        data = step_data(random_rollouts(V), heads=1, seed=step)
        a, b = (learner.score(data.rollouts, VALUES, 0.8) for learner in (ours, theirs))
        for name in TokenOutputs.__dataclass_fields__:
            x, y = getattr(a, name), getattr(b, name)
            assert name == "aux" or (x is None) == (y is None)
            if isinstance(x, np.ndarray):
                np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12, err_msg=name)
        c, d = (accumulate(learner, data, probe, [range(8)]) for learner in (ours, theirs))
        assert c.keys() == d.keys()
        for name in c:
            np.testing.assert_allclose(c[name].value, d[name].value, rtol=1e-10, err_msg=name)
        e, f = (learner.apply() for learner in (ours, theirs))
        np.testing.assert_allclose(e["grad_norm"].value, f["grad_norm"].value, rtol=1e-10)
    assert largest_gap(ours, theirs) < 1e-9


@pytest.mark.oracle
def test_what_is_saved_is_read_by_torch(tmp_path: Path):
    ours = Flax(**SIZES).load(request(value_heads=2))
    accumulate(ours, step_data(random_rollouts(V), heads=2), Probe(POLICY | {Output.VALUES}))
    ours.apply()
    ours.save(tmp_path)
    theirs = Torch(weights=str(tmp_path), device="cpu").load(request(value_heads=2))
    asked = POLICY | {Output.VALUES}
    a, b = (learner.score(random_rollouts(V), asked, 1.0) for learner in (ours, theirs))
    np.testing.assert_allclose(a.logprobs, b.logprobs, atol=2e-6)
    np.testing.assert_allclose(a.values, b.values, atol=2e-6)
    assert np.abs(a.values).max() > 0


def test_bfloat16_multiplies_and_float32_remembers():
    half, whole = (Flax(**SIZES, precision=p).load(request()) for p in ("bf16", "float32"))
    weights = disturbed(weights_of(whole), 1, 0.3)
    for learner in (half, whole):
        learner.load_params(weights.items(), 0)
    data = step_data(random_rollouts(V))
    a, b = (learner.score(data.rollouts, POLICY, 1.0).logprobs for learner in (half, whole))
    assert 1e-4 < np.abs(a - b).max() < 0.1
    accumulate(half, data, Probe(POLICY))
    half.apply()
    assert {x.dtype for x in half.state().values()} == {np.dtype(np.float32), np.dtype(np.int64)}


def test_a_reference_that_it_cannot_be_compared_with_is_refused():
    ours, theirs = both(request(optimization=None))
    with pytest.raises(ConfigError, match="the reference is a TorchLearner, whose output matrix(?s:.*)kl.estimator=k2"):
        ours.compare_with(theirs)
    with pytest.raises(ConfigError, match="the reference is a JaxLearner, whose output matrix a torch learner"):
        theirs.compare_with(ours)
    other = Flax(**SIZES).load(LoadRequest(V + 1))
    with pytest.raises(ConfigError, match="the reference has a vocabulary of 9, the policy one of 8"):
        ours.compare_with(other)
    ours.compare_with(Flax(**SIZES).load(LoadRequest(V)))
    assert Output.REFERENCE_KL in ours.provides


# ---- buckets and compilations

def test_powers_of_two_hold_everything():
    for seed in range(5):
        data = step_data(random_rollouts(V, seed), heads=2)
        batch = cut(data, np.arange(8))
        made, numbers = rectangle(batch.tokens, data.rollouts.offsets, batch.source, batch.last,
                                  max_positions=None), columns(batch, np.float32)
        S, T = made.tokens.shape
        assert power_of_two(S) == S and power_of_two(T) == T and len(made.before) == len(numbers["weight"])
        assert not numbers["weight"][len(batch.weight):].any() and (numbers["count"] >= 1).all()
        assert (numbers["episode"][len(batch.episode):] == len(batch.count)).all()
        N = len(batch.source)
        assert (made.chosen[:N] == batch.tokens[batch.source]).all()
        assert (made.tokens.ravel()[made.before[:N]] == batch.tokens[batch.source - 1]).all()


def test_a_shape_is_compiled_once_and_counted():
    learner, probe = Flax(**SIZES, family="qwen2").load(request()), Probe()
    counts = []
    for seed in range(3):
        accumulate(learner, step_data(random_rollouts(V), seed=seed), probe)
        counts.append(learner.apply()["timing/compilations"].value)
    assert counts[0] >= 1 and counts[1:] == [0.0, 0.0]
    learner.accumulate(cut(step_data(random_rollouts(V, episodes=40)), np.arange(40)), probe, {})
    assert learner.apply()["timing/compilations"].value == 1


def test_another_coefficient_compiles_nothing():
    learner, probe, data = Flax(**SIZES).load(request()), Probe(POLICY), step_data(random_rollouts(V))
    for entropy in (0.1, 0.2, 0.3):
        learner.accumulate(cut(data, np.arange(8)), probe, {"entropy": entropy})
        last = learner.apply()["timing/compilations"].value
    assert last == 0


def test_a_sequence_beyond_the_positions_is_refused():
    learner = Flax(**{**SIZES, "max_positions": 4}).load(request())
    with pytest.raises(ConfigError, match="does not fit the model's 4 positions(?s:.*)policy.max_positions"):
        learner.score(random_rollouts(V), POLICY, 1.0)


# ---- memory

def test_memory_that_is_used_up_is_said_where_it_happens():
    def exhausted():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 12 bytes.\nmore")
    with pytest.raises(MemoryExhausted, match=r"^RESOURCE_EXHAUSTED: Out of memory allocating 12 bytes\.$"):
        translating_memory_errors(exhausted)
    def other():
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        translating_memory_errors(other)


def test_an_allocation_that_cannot_be_made_is_memory_exhausted():
    """XLA's own allocator, asked for more than any machine has."""
    def asked():
        return jax.jit(lambda: jax.numpy.zeros((2**44,), "float32") + 1)()
    with pytest.raises(MemoryExhausted):
        translating_memory_errors(asked)


def test_a_step_goes_on_after_memory_ran_out(monkeypatch):
    """Gradients are given to the call that fails; `discard` makes room for new ones."""
    learner, probe, data = Flax(**SIZES).load(request()), Probe(), step_data(random_rollouts(V))
    accumulate(learner, data, probe, [range(4)])
    def failing(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
    with monkeypatch.context() as broken:
        broken.setattr(compiled.Compiled, "__call__", failing)
        with pytest.raises(MemoryExhausted):
            accumulate(learner, data, probe, [range(4, 8)])
    learner.discard()
    again = Flax(**SIZES).load(request())
    for one in (learner, again):
        accumulate(one, data, probe)
        one.apply()
    assert largest_gap(learner, again) == 0


# ---- a module of the user's own

USER = '''
import jax
import jax.numpy as jnp
from flax import nnx


class Recurrent(nnx.Module):
    def __init__(self, vocab_size, rngs, causal=True, bias=False):
        self.embed, self.mix = nnx.Embed(vocab_size, 6, rngs=rngs), nnx.Linear(6, 6, rngs=rngs)
        self.lm_head = nnx.Linear(6, vocab_size, use_bias=bias, rngs=rngs)
        self.causal = causal

    def __call__(self, tokens, positions):
        x = self.embed(tokens)
        before = jnp.cumsum(x, axis=1) if self.causal else x.sum(axis=1, keepdims=True)
        return jnp.tanh(self.mix(before / (1.0 + positions[..., None])))


class Dropping(Recurrent):
    def __init__(self, vocab_size, rngs):
        super().__init__(vocab_size, rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)


def build(vocab_size, rngs):
    return Recurrent(vocab_size, rngs)


def looks_ahead(vocab_size, rngs):
    return Recurrent(vocab_size, rngs, causal=False)


def biased(vocab_size, rngs):
    return Recurrent(vocab_size, rngs, bias=True)


def dropping(vocab_size, rngs):
    return Dropping(vocab_size, rngs)


def none(vocab_size, rngs):
    return None


def fails(vocab_size, rngs):
    raise KeyError("oops")
'''


@pytest.fixture
def user_file(tmp_path: Path) -> Path:
    (tmp_path / "model.py").write_text(USER)
    return tmp_path / "model.py"


def test_a_user_module_is_trained_saved_and_loaded(user_file, tmp_path):
    component = Flax(file=f"{user_file}:build", device="cpu")
    learner, data = component.load(request()), step_data(random_rollouts(V))
    assert {"embed.embedding", "mix.kernel", "mix.bias", "lm_head.kernel"} == weights_of(learner).keys()
    before = weights_of(learner)
    accumulate(learner, data, Probe(POLICY))
    assert learner.apply()["grad_norm"].value > 0 and (before["mix.bias"] != weights_of(learner)["mix.bias"]).all()
    learner.save(tmp_path / "saved")
    again = replace(component, weights=str(tmp_path / "saved")).load(request())
    a, b = (x.score(data.rollouts, POLICY, 1.0).logprobs for x in (learner, again))
    assert np.array_equal(a, b)


@pytest.mark.parametrize("name, message", [
    ("looks_ahead", "is not causal"), ("biased", "or one with a bias"), ("dropping", "beside its parameters"),
    ("none", "returned NoneType"), ("fails", "raised KeyError"), ("absent", "has no function 'absent'")])
def test_a_user_module_that_does_not_fit_is_refused(user_file, name, message):
    with pytest.raises(ConfigError, match=message):
        Flax(file=f"{user_file}:{name}", device="cpu").load(request())


def test_params_are_live_and_outlast_a_step():
    learner = Flax(**SIZES).load(request())
    held = dict(learner.params())
    accumulate(learner, step_data(random_rollouts(V)), Probe())
    learner.apply()
    now = dict(learner.params())
    assert all(np.isfinite(to_numpy(x)).all() for x in held.values())
    assert any((to_numpy(held[name]) != to_numpy(now[name])).any() for name in held)
