"""A mesh of simulated devices computes what one device does; sizes that it cannot share are refused by numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from posttrain.errors import ConfigError

jax = pytest.importorskip("jax")
pytest.importorskip("flax")

from posttrain_backends._jax.mesh import mesh_of, require_divisible, spec_of
from posttrain_backends.families.shape import Shape
from posttrain_backends.flax import Flax

LLAMA = Shape(vocab_size=8, hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
              num_key_value_heads=2, head_dim=4, max_position_embeddings=64)


def test_sizes_that_do_not_divide_are_all_named() -> None:
    require_divisible(LLAMA, 2)
    with pytest.raises(ConfigError, match="tensor_parallel 4 does not divide 2 key and value heads, 9 tokens") as found:
        require_divisible(replace(LLAMA, vocab_size=9), 4)
    assert "policy.tensor_parallel of 1." in str(found.value)


def test_more_devices_than_there_are_are_refused() -> None:
    n = len(jax.devices("cpu"))
    with pytest.raises(ConfigError, match=f"{n + 1} x policy.tensor_parallel 2 needs {2 * (n + 1)} devices, JAX finds "
                       f"{n} of kind cpu"):
        mesh_of(jax.devices("cpu"), n + 1, 2)


def test_a_module_of_the_users_own_has_no_tensor_axis() -> None:
    with pytest.raises(ValueError, match="module from `file` can have data_parallel"):
        Flax(file="m.py:build", tensor_parallel=2)


def test_every_matrix_is_cut_and_every_vector_of_hidden_size_is_whole() -> None:
    from posttrain_backends._jax.decoder import Decoder
    from posttrain_backends._jax.model import Structure

    biased = replace(LLAMA, attention_bias=True, mlp_bias=True, model_type="llama")
    for name, x in Structure.of(lambda: Decoder(biased)).shapes.items():
        cut = any(spec_of(name))
        assert cut == (x.ndim == 2 or x.shape != (LLAMA.hidden_size,)), name


@pytest.mark.slow
def test_four_devices_equal_one() -> None:
    """In a process of its own: how many devices a CPU shows is decided when JAX begins."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, __file__], env={**os.environ, **flags}, capture_output=True, text=True,
                          timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["drawn", "trained"], done.stdout


def drawn_on_a_mesh() -> None:
    """Answers from cut weights are those from whole ones."""
    from posttrain.data import Prompt, Sampling
    from posttrain.tokenizers import Characters
    from posttrain_backends._jax.decoder import Decoder
    from posttrain_backends._jax.generate import JaxSampler
    from posttrain_backends._jax.mesh import OnMesh
    from posttrain_backends._jax.model import Structure
    from posttrain_backends.engines import Batched

    structure, rng = Structure.of(lambda: Decoder(LLAMA)), np.random.default_rng(0)
    weights = {name: (rng.normal(0, 0.5, x.shape) + (x.ndim == 1)).astype(np.float32)
               for name, x in structure.shapes.items()}
    place = OnMesh(mesh_of(jax.devices(), 2, 2))
    cut = {name: place.weight(name, x) for name, x in weights.items()}
    assert cut["lm_head.weight"].addressable_shards[0].data.shape == (4, 12)
    prompts = [Prompt(text=text) for text in ("ab", "ab", "fed", "fed")]
    found = [JaxSampler(structure, lambda given=given: given, 0, Characters("abcdef").load(), Batched(), shared=True)
             .rollout(prompts, Sampling(max_new_tokens=6), (1,)) for given in (weights, cut)]
    np.testing.assert_array_equal(found[0].tokens, found[1].tokens)
    np.testing.assert_allclose(found[0].behavior_logprobs, found[1].behavior_logprobs, rtol=0, atol=1e-5)
    print("drawn")


def trained_on_a_mesh() -> None:
    """What a learner says, the gradients that it sums and two steps of it, in float32 and float64; what it keeps
    stays where it was put."""
    from posttrain.protocols import LoadRequest
    from posttrain.testing.tiny_models import PLAIN, Probe, accumulate, random_rollouts, step_data, weights_of

    tiny = Flax(hidden_size=16, layers=1, heads=4, kv_heads=2, intermediate_size=24, max_positions=32, device="cpu")
    rollouts = random_rollouts(8)
    request = LoadRequest(8, value_heads=1, optimization=replace(PLAIN, lr=0.5, eps=1.0))  # so that no step is a sign
    for precision, tolerance, meshes in (("float32", 1e-5, [(2, 2)]), ("float64", 1e-11, [(4, 1), (1, 2)])):
        found = []
        for data, tensor in ((1, 1), *meshes):
            learner = replace(tiny, precision=precision, data_parallel=data, tensor_parallel=tensor).load(request)
            for step in range(2):
                probe = Probe(learner.provides & Probe().outputs)
                accumulate(learner, step_data(rollouts, heads=1, seed=step), probe, [range(3), range(3, 8)])
                gramian = learner.gramian(("main",))
                learner.apply()
            cut = dict(learner.params())["model.layers.0.mlp.down_proj.weight"]
            assert cut.addressable_shards[0].data.shape == (16, 24 // tensor), (data, tensor)
            said = learner.score(rollouts, learner.provides, 0.9)
            found.append([said.logprobs, said.entropy, said.values, gramian, *weights_of(learner).values()])
        for other in found[1:]:
            for a, b in zip(found[0], other, strict=True):
                np.testing.assert_allclose(b, a, rtol=tolerance, atol=tolerance)
        moved = weights_of(replace(tiny, precision=precision).load(request)).values()
        assert max(np.abs(a - b).max() for a, b in zip(moved, found[0][4:], strict=True)) > 1e-3
    print("trained")


if __name__ == "__main__":
    drawn_on_a_mesh()
    trained_on_a_mesh()
