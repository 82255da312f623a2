"""The steps of optax are torch's, over a whole schedule."""

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("optax")
torch = pytest.importorskip("torch")

import jax.numpy as jnp
from posttrain.errors import ConfigError
from posttrain.protocols import Optimization
from posttrain_backends._jax.optimizer import NamedAdamW, norm_of
from posttrain_backends._torch.optimizer import NamedAdamW as TorchAdamW

STEPS = 50
SETTINGS = [
    Optimization(lr=1e-3, schedule="constant", warmup_steps=5, clip_norm=0.0),
    Optimization(lr=1e-3, schedule="linear", total_steps=STEPS, weight_decay=0.1, betas=(0.9, 0.95)),
    Optimization(lr=1e-3, schedule="cosine", total_steps=40, warmup_steps=10, min_lr_ratio=0.1, clip_norm=0.5)]


def trajectories(settings: Optimization, dtype: type) -> tuple[dict, dict]:
    """The weights after `STEPS` steps in JAX and in torch, by the same gradients."""
    rng = np.random.default_rng(0)
    start = {"a.weight": rng.normal(size=(7, 5)), "norm.weight": rng.normal(size=5)}
    start = {name: (0.1 * x).astype(dtype) for name, x in start.items()}
    with jax.enable_x64(dtype is np.float64):
        ours = {name: jnp.asarray(x) for name, x in start.items()}
        theirs = {name: torch.nn.Parameter(torch.from_numpy(x.copy())) for name, x in start.items()}
        jax_adamw, torch_adamw = NamedAdamW(ours, settings), TorchAdamW(theirs, settings)
        for _ in range(STEPS):
            gradients = {name: (0.1 * rng.normal(size=x.shape)).astype(dtype) for name, x in start.items()}
            for name, p in theirs.items():
                p.grad = torch.from_numpy(gradients[name].copy())
            if settings.clip_norm:
                torch.nn.utils.clip_grad_norm_(theirs.values(), settings.clip_norm)
            assert jax_adamw.lr == torch_adamw.lr
            torch_adamw.step()
            given = {name: jnp.asarray(g) for name, g in gradients.items()}
            ours = jax_adamw.step(ours, given, float(norm_of(given)))
        return ({name: np.asarray(x) for name, x in ours.items()},
                {name: x.detach().numpy() for name, x in theirs.items()})


@pytest.mark.oracle
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: s.schedule)
@pytest.mark.parametrize("dtype, allowed", [(np.float32, 1e-6), (np.float64, 1e-9)])
def test_fifty_steps_are_those_of_torch(settings, dtype, allowed):
    ours, theirs = trajectories(settings, dtype)
    for name, x in ours.items():
        assert np.abs(x - theirs[name]).max() < allowed, name


def test_a_step_goes_on_from_what_was_kept():
    settings = Optimization(lr=0.1)
    params = {"w": jnp.ones((2, 2))}
    first = NamedAdamW(params, settings)
    once = first.step(params, {"w": jnp.full((2, 2), 0.5)}, 1.0)
    kept = {name: np.array(x) for name, x in first.arrays()}
    other = NamedAdamW(params, settings)
    other.resume(first.steps, {name: jnp.asarray(x) for name, x in kept.items()})
    a, b = (adamw.step(once, {"w": jnp.eye(2)}, 1.4)["w"] for adamw in (first, other))
    assert np.array_equal(a, b) and other.steps == 2


def test_moments_in_8_bits_are_refused():
    with pytest.raises(ConfigError, match=r"moments: int8 is for learners of torch(?s:.*)policy\.use=torch"):
        NamedAdamW({"w": jnp.ones((2, 2))}, Optimization(moments="int8"))
