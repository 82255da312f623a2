"""First weights in NumPy are those that torch draws."""

import numpy as np
import pytest
import torch
from posttrain_backends.families.initial import initial, normal


@pytest.mark.oracle
@pytest.mark.parametrize("n", [1, 2, 14, 15, 16, 17, 31, 32, 33, 1000])
@pytest.mark.parametrize("seed", [0, 7, 2**32 + 5])
def test_numbers_are_those_of_torchs_generator(n, seed):
    expected = torch.empty(n).normal_(generator=torch.Generator().manual_seed(seed)).numpy()
    np.testing.assert_allclose(normal(np.random.RandomState(seed % 2**32), n), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.oracle
def test_one_stream_serves_one_matrix_after_the_other():
    generator, stream = torch.Generator().manual_seed(1), np.random.RandomState(1)
    for n in (40, 6, 16, 2, 100, 8):
        expected = torch.empty(n).normal_(generator=generator).numpy()
        np.testing.assert_allclose(normal(stream, n), expected, rtol=1e-5, atol=1e-6)


def test_names_may_come_in_any_order():
    sizes = {"model.embed_tokens.weight": (3, 8), "model.layers.0.self_attn.q_proj.weight": (8, 8),
             "model.layers.10.mlp.up_proj.weight": (4, 8), "model.layers.9.mlp.down_proj.weight": (8, 4),
             "model.norm.weight": (8,), "lm_head.weight": (3, 8)}
    first, second = dict(initial(sizes, 2)), dict(initial(dict(reversed(sizes.items())), 2))
    assert all(np.array_equal(first[name], second[name]) for name in sizes)
    assert first.keys() == sizes.keys() and all(x.shape == sizes[name] for name, x in first.items())
