"""The decoder in flax gives the hidden states and the names of the native one in torch."""

import numpy as np
import pytest

pytest.importorskip("flax")

import jax
import jax.numpy as jnp
import torch
from posttrain.errors import ConfigError
from posttrain_backends._jax.decoder import Decoder
from posttrain_backends._jax.model import Structure
from posttrain_backends._torch.layout import Layout
from posttrain_backends._torch.models.decoder import Decoder as TorchDecoder
from posttrain_backends.families.rope import Llama3
from posttrain_backends.families.shape import Shape

TINY = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, max_position_embeddings=64)
SHAPES = {
    "llama": Shape(**TINY, rope_scaling=Llama3(4.0, 1.0, 4.0, 16), attention_bias=True, mlp_bias=True),
    "qwen2": Shape(**TINY, model_type="qwen2", tie_word_embeddings=True),
    "qwen3": Shape(**TINY, model_type="qwen3"),
    "smollm3": Shape(**TINY, model_type="smollm3", no_rope_layers=(1, 0)),
}


def pair(shape: Shape, **options) -> tuple[TorchDecoder, Structure, dict]:
    """The decoder in both frameworks, with equal weights that are not small."""
    twin, generator = TorchDecoder(shape), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in twin.parameters():
            p.normal_(0, 0.3, generator=generator)
    params = {name: jnp.asarray(x.numpy()) for name, x in twin.state_dict().items()}
    return twin, Structure.of(lambda: Decoder(shape, **options)), params


@pytest.mark.oracle
@pytest.mark.parametrize("family", SHAPES)
def test_equals_torch(family):
    twin, structure, params = pair(SHAPES[family])
    assert structure.paths.keys() == params.keys()
    assert {name: x.shape for name, x in structure.shapes.items()} == {name: x.shape for name, x in params.items()}
    tokens = np.random.default_rng(0).integers(0, 50, (3, 16))
    positions = np.tile(np.arange(16), (3, 1))
    hidden = jax.jit(lambda p: structure.bound(p).hidden(tokens, positions))(params)
    expected = twin.hidden(torch.from_numpy(tokens.ravel()), Layout.from_offsets(np.arange(4) * 16))
    np.testing.assert_allclose(np.asarray(hidden).reshape(-1, 32), expected.detach(), rtol=1e-5, atol=1e-5)


def test_gradients_do_not_depend_on_checkpointing():
    _, plain, params = pair(SHAPES["qwen3"])
    _, again, _ = pair(SHAPES["qwen3"], gradient_checkpointing=True)
    tokens, positions = np.arange(8)[None], np.arange(8)[None]

    def gradient(structure):
        return jax.jit(jax.grad(lambda p: (structure.bound(p).hidden(tokens, positions)[..., :3] ** 2).sum()))(params)
    for (name, a), b in zip(gradient(plain).items(), gradient(again).values(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(a).max(), err_msg=name)


def test_checkpointing_keeps_the_inputs_of_layers_alone():
    """What the backward pass is given, beside the weights themselves. (Whether a compiler then keeps less is its own
    affair: XLA's for CPUs does not.)"""
    shape = Shape(**{**TINY, "num_hidden_layers": 6})
    tokens, positions = np.zeros((8, 64), np.int32), np.broadcast_to(np.arange(64), (8, 64))

    def kept(structure: Structure) -> int:
        pullback = jax.eval_shape(lambda p: jax.vjp(lambda q: structure.bound(q).hidden(tokens, positions), p)[1],
                                  dict(structure.shapes))
        return sum(x.size for x in jax.tree.leaves(pullback)) - sum(x.size for x in structure.shapes.values())
    plain, again = (kept(Structure.of(lambda x=x: Decoder(shape, gradient_checkpointing=x))) for x in (False, True))
    hidden = 8 * 64 * 32
    assert 6 * hidden <= again < 12 * hidden < 100 * hidden < plain


def test_what_is_behind_the_end_of_a_row_changes_nothing():
    _, structure, params = pair(SHAPES["llama"])
    short = np.arange(6)[None]
    longer = np.concatenate([short, np.full((1, 2), 49)], axis=1)
    a, b = (structure.bound(params).hidden(x, np.arange(x.shape[1])[None]) for x in (short, longer))
    np.testing.assert_allclose(a, b[:, :6], rtol=1e-6, atol=1e-6)


def test_experts_are_refused():
    with pytest.raises(ConfigError, match="policy.use=torch"):
        Decoder(Shape(**TINY, model_type="mixtral", num_experts=4, num_experts_per_tok=2))
