"""Mixed weights of policies: each parent back bit for bit, float32 arithmetic, and what cannot be mixed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from posttrain.errors import InputError
from posttrain_objectives.pareto.soups import soup
from safetensors.numpy import load_file, save_file

TOKENIZER = '{"alphabet": "ab"}'


def policy(folder: Path, seed: int, dtype: type = np.float32, **more: np.ndarray) -> Path:
    rng = np.random.default_rng(seed)
    folder.mkdir()
    save_file({"w": rng.normal(size=(3, 5)).astype(dtype), "b": rng.normal(size=5).astype(dtype), **more},
              folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text(TOKENIZER)
    return folder


@pytest.fixture
def parents(tmp_path: Path) -> list[Path]:
    return [policy(tmp_path / f"p{seed}", seed) for seed in range(3)]


@pytest.mark.parametrize("i", range(3))
def test_all_weight_on_one_policy_gives_that_policy(i: int, parents: list[Path], tmp_path: Path) -> None:
    mixed = soup(parents, [float(j == i) for j in range(3)], tmp_path / "soup")
    assert {p.name: p.read_bytes() for p in mixed.iterdir()} == {p.name: p.read_bytes() for p in parents[i].iterdir()}


def test_a_weight_of_zero_keeps_even_a_broken_policy_out(parents: list[Path], tmp_path: Path) -> None:
    w, b = np.full((3, 5), np.nan, np.float32), np.full(5, np.inf, np.float32)
    save_file({"w": w, "b": b}, parents[1] / "model.safetensors")
    mixed = load_file(soup(parents, [0.5, 0.0, 0.5], tmp_path / "soup") / "model.safetensors")
    assert np.isfinite(mixed["w"]).all() and np.isfinite(mixed["b"]).all()


def test_between_policies_every_tensor_is_the_mean_in_float32(parents: list[Path], tmp_path: Path) -> None:
    w = [0.25, 0.25, 0.5]
    mixed = load_file(soup(parents, w, tmp_path / "soup") / "model.safetensors")
    for name, x in mixed.items():
        expected = sum(np.float32(a) * load_file(p / "model.safetensors")[name] for a, p in zip(w, parents))
        assert x.dtype == np.float32 and np.array_equal(x, expected)


def test_half_precision_is_mixed_in_float32_and_rounded_once(tmp_path: Path) -> None:
    parents = [policy(tmp_path / f"h{seed}", seed, np.float16) for seed in range(2)]
    mixed = load_file(soup(parents, [0.3, 0.7], tmp_path / "soup") / "model.safetensors")
    a, b = (load_file(p / "model.safetensors")["w"].astype(np.float32) for p in parents)
    assert np.array_equal(mixed["w"], (0.3 * a + 0.7 * b).astype(np.float16))


@pytest.mark.needs("torch")
def test_bfloat16_is_rounded_as_torch_does(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    given = [torch.randn(40, 7, generator=torch.Generator().manual_seed(seed)).bfloat16() for seed in range(2)]
    for i, x in enumerate(given):
        (tmp_path / f"{i}").mkdir()
        save_torch({"w": x}, tmp_path / f"{i}" / "model.safetensors")
    mixed = load_torch(soup([tmp_path / "0", tmp_path / "1"], [0.5, 0.5], tmp_path / "soup") / "model.safetensors")
    assert torch.equal(mixed["w"], (0.5 * given[0].float() + 0.5 * given[1].float()).bfloat16())


def test_a_model_may_be_split_in_other_files(parents: list[Path], tmp_path: Path) -> None:
    whole = load_file(parents[1] / "model.safetensors")
    (parents[1] / "model.safetensors").unlink()
    for i, name in enumerate(whole):
        save_file({name: whole[name]}, parents[1] / f"model-{i}.safetensors")
    mixed = load_file(soup(parents[:2], [0.0, 1.0], tmp_path / "soup") / "model.safetensors")
    assert all(np.array_equal(mixed[name], whole[name]) for name in whole)


def test_lora_products_are_mixed_not_their_factors(tmp_path: Path) -> None:
    """What a run saves holds W_0 + B_i A_i; the soup of it is W_0 + sum_i w_i B_i A_i."""
    rng = np.random.default_rng(5)
    start, folders, products = rng.normal(size=(6, 4)), [], []
    for i in range(2):
        A, B = rng.normal(size=(2, 4)), rng.normal(size=(6, 2))
        products.append(B @ A)
        folders.append(tmp_path / f"lora{i}")
        folders[-1].mkdir()
        save_file({"w": start + products[-1]}, folders[-1] / "model.safetensors")
    mixed = load_file(soup(folders, [0.25, 0.75], tmp_path / "soup") / "model.safetensors")["w"]
    np.testing.assert_allclose(mixed, start + 0.25 * products[0] + 0.75 * products[1], rtol=1e-13)


def test_policies_that_do_not_fit_are_refused_with_all_that_differs(parents: list[Path], tmp_path: Path) -> None:
    save_file({"w": np.zeros((3, 4), np.float32), "c": np.zeros(5, np.float32)}, parents[1] / "model.safetensors")
    (parents[1] / "tokenizer.json").write_text("{}")
    (parents[2] / "config.json").unlink()
    with pytest.raises(InputError) as caught:
        soup(parents, [0.5, 0.25, 0.25], tmp_path / "soup")
    said = str(caught.value)
    assert f"these policies cannot be mixed with {parents[0]}:" in said
    assert f"tokenizer.json differs; only policies of one start and one tokenizer mix ({parents[1]})" in said
    assert "only one of them has b, c" in said and "w is F32 (3, 4), in the first F32 (3, 5)" in said
    assert f"config.json is missing in one of them; only policies of one start and one tokenizer mix ({parents[2]})" \
        in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p0", "p1", "p2"]


def test_counts_must_be_equal(tmp_path: Path) -> None:
    a, b, c = (policy(tmp_path / f"n{i}", i, n=np.array([n])) for i, n in enumerate((3, 3, 4)))
    assert load_file(soup([a, b], [0.5, 0.5], tmp_path / "soup") / "model.safetensors")["n"].tolist() == [3]
    with pytest.raises(InputError, match="n holds other numbers, and I64 cannot be mixed"):
        soup([a, c], [0.5, 0.5], tmp_path / "other")


def test_weights_folders_and_files_that_do_not_fit(parents: list[Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="one weight for each policy, got 2 for 3"):
        soup(parents, [0.5, 0.5], tmp_path / "soup")
    with pytest.raises(InputError, match="must sum to 1"):
        soup(parents, [0.5, 0.5, 0.5], tmp_path / "soup")
    with pytest.raises(InputError, match="it exists already"):
        soup(parents, [1.0, 0.0, 0.0], parents[1])
    with pytest.raises(InputError, match=r"holds no \*\.safetensors"):
        soup([tmp_path], [1.0], tmp_path / "soup")
    (parents[2] / "model.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(InputError, match="not a file of safetensors"):
        soup(parents, [0.5, 0.5, 0.0], tmp_path / "soup")


def test_an_empty_tensor_and_one_number(tmp_path: Path) -> None:
    for i in range(2):
        (tmp_path / f"{i}").mkdir()
        save_file({"none": np.zeros((0, 3), np.float32), "one": np.array(1.0 + i)},
                  tmp_path / f"{i}" / "model.safetensors")
    mixed = load_file(soup([tmp_path / "0", tmp_path / "1"], [0.5, 0.5], tmp_path / "soup") / "model.safetensors")
    assert mixed["none"].shape == (0, 3) and mixed["one"] == 1.5
