"""AdamW with moments in 8 bits: the steps of bitsandbytes, a state by name that goes on bit for bit, and what is
refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from posttrain.errors import ConfigError, PluginError
from posttrain.protocols import LoadRequest, Optimization
from posttrain_backends._torch.optimizer import NamedAdamW
from posttrain_backends.torch_native import Torch

bitsandbytes = pytest.importorskip("bitsandbytes")

SHAPES = {"large": (64, 80), "odd": (3, 1500), "small": (8, 8), "bias": (5000,)}
SETTINGS = Optimization(lr=1e-2, betas=(0.8, 0.95), weight_decay=0.1, moments="int8")


def parameters() -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def step(optimizer: NamedAdamW, k: int) -> None:
    """The k-th one of a sequence."""
    generator = torch.Generator().manual_seed(100 + k)
    for p in optimizer.parameters.values():
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()


def moved(settings: Optimization, steps: int) -> dict[str, torch.Tensor]:
    optimizer = NamedAdamW(parameters(), settings)
    for k in range(steps):
        step(optimizer, k)
    return {name: p.detach() for name, p in optimizer.parameters.items()}


def float64_steps(steps: int) -> dict[str, np.ndarray]:
    """The rule itself, equation by equation (1711.05101, algorithm 2), with exact moments."""
    (b1, b2), found = SETTINGS.betas, {}
    for name, p in parameters().items():
        x, m, v = p.detach().double().numpy(), 0.0, 0.0
        for k in range(steps):
            generator = torch.Generator().manual_seed(100 + k)
            g = {n: torch.randn(shape, generator=generator).double().numpy() for n, shape in SHAPES.items()}[name]
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            decay = SETTINGS.weight_decay if p.ndim >= 2 else 0.0
            x = x - SETTINGS.lr * (m / (1 - b1**(k + 1)) / (np.sqrt(v / (1 - b2**(k + 1))) + SETTINGS.eps) + decay * x)
        found[name] = x
    return found


@pytest.mark.oracle
def test_the_first_step_is_exact_and_later_ones_are_within_the_rounding_of_moments() -> None:
    for steps, bound in ((1, 2e-4), (20, 0.15)):
        start, exact, found = parameters(), float64_steps(steps), moved(SETTINGS, steps)
        for name, p in found.items():
            path = np.abs(exact[name] - start[name].detach().numpy()).max()
            assert np.abs(p.numpy() - exact[name]).max() < (bound if p.numel() >= 4096 else 2e-4) * path


@pytest.mark.oracle
def test_steps_are_those_of_the_library() -> None:
    ours, theirs = moved(SETTINGS, 5), parameters()
    library = bitsandbytes.optim.AdamW8bit(
        [{"params": [p], "weight_decay": 0.1 * (p.ndim > 1)} for p in theirs.values()], lr=1e-2, betas=(0.8, 0.95))
    for k in range(5):
        generator = torch.Generator().manual_seed(100 + k)
        for p in theirs.values():
            p.grad = torch.randn(p.shape, generator=generator)
        library.step()
    assert all(torch.equal(ours[name], p) for name, p in theirs.items())


def test_a_state_goes_on_bit_for_bit() -> None:
    whole, cut = (NamedAdamW(parameters(), SETTINGS) for _ in range(2))
    for k in range(3):
        step(whole, k)
    state = {name: x.clone() for name, x in whole.arrays()}
    assert {name for name, x in state.items() if x.dtype == torch.uint8} == {
        f"state{i}.{name}" for i in (1, 2) for name in ("large", "odd", "bias")}
    with torch.no_grad():
        for name, p in cut.parameters.items():
            p.copy_(whole.parameters[name])
    for name, x in cut.arrays():
        x.copy_(state[name])
    cut.resume(3)
    for k in range(3, 6):
        step(whole, k)
        step(cut, k)
    assert all(torch.equal(p, cut.parameters[name]) for name, p in whole.parameters.items())


def test_the_moments_take_a_quarter_and_are_there_before_the_first_step() -> None:
    def held(moments: str) -> int:
        settings = Optimization(moments=moments)  # type: ignore[arg-type]  # one of its two
        return sum(x.nbytes for name, x in NamedAdamW(parameters(), settings).arrays() if not name.endswith("small"))
    assert held("int8") < 0.26 * held("float32")


def test_a_learner_s_state_holds_them() -> None:
    request = LoadRequest(8, optimization=Optimization(lr=1e-2, moments="int8"))
    model = Torch(hidden_size=64, layers=1, heads=2, kv_heads=1, intermediate_size=64, device="cpu")
    first, other = model.load(request), model.load(LoadRequest(8, seed=1, optimization=request.optimization))
    state = first.state()
    assert state["state1.model.layers.0.mlp.up_proj.weight"].dtype == np.uint8
    other.load_state(state)
    assert all(np.array_equal(x, other.state()[name]) for name, x in state.items())
    plain = model.load(LoadRequest(8, optimization=Optimization()))
    with pytest.raises(ConfigError, match="saved state does not fit the model"):
        plain.load_state(state)


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    request = LoadRequest(8, optimization=Optimization(moments="int8"))
    with pytest.raises(ConfigError, match="int8 is for parameters in float32"):
        Torch(hidden_size=8, layers=1, heads=2, kv_heads=1, precision="float64", device="cpu").load(request)
    monkeypatch.setattr("posttrain_backends.installed.find_spec", lambda name: None)
    with pytest.raises(PluginError, match=r"optimizer.moments: int8 needs bitsandbytes.*backends\[quantized\]"):
        NamedAdamW(parameters(), SETTINGS)
