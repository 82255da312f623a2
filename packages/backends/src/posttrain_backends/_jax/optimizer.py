"""AdamW of optax over parameters by name, as torch's takes it. Knows no model and no loss.

The rate and the scale of clipping are arguments of one compiled step, so a schedule compiles nothing anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

import jax
import jax.numpy as jnp
import optax
from posttrain.errors import ConfigError
from posttrain.protocols import Optimization

from posttrain_backends._jax.model import Params
from posttrain_backends.schedule import lr_at, require_room_for_schedule

_MOMENTS: Mapping[str, str] = {"exp_avg": "mu", "exp_avg_sq": "nu"}
"""What torch calls a moment, and so a checkpoint -> what optax does."""
_CLIP_EPS = 1e-6
"""As in `torch.nn.utils.clip_grads_with_norm_`."""


@final
@dataclass(frozen=True, slots=True)
class Rule:
    """What is constant of a step, and so of what is compiled."""

    betas: tuple[float, float]
    eps: float
    decay: float

    @property
    def adam(self) -> optax.GradientTransformation:
        return optax.scale_by_adam(*self.betas, eps=self.eps)


def _stepped(rule: Rule, params: dict[str, jax.Array], gradients: dict[str, jax.Array], moments: Any, lr: jax.Array,
             scale: jax.Array) -> tuple[dict[str, jax.Array], Any]:
    updates, moments = rule.adam.update({name: g * scale for name, g in gradients.items()}, moments)
    def moved(p: jax.Array, update: jax.Array) -> jax.Array:
        return (p * (1 - lr * rule.decay) if rule.decay and p.ndim >= 2 else p) - lr * update
    return {name: moved(p, updates[name]) for name, p in params.items()}, moments


_STEPPED = jax.jit(_stepped, static_argnums=(0,), donate_argnums=(2, 3))


@final
class NamedAdamW:
    """AdamW (1711.05101) with decay on matrices only. Moments exist from the start, so that a step cannot run out of
    memory for them; they lie as the parameters do."""

    def __init__(self, params: Params, settings: Optimization) -> None:
        require_room_for_schedule(settings)
        if settings.moments != "float32":
            raise ConfigError([f"optimizer.moments: {settings.moments} is for learners of torch, by bitsandbytes"],
                              next_step="Use optimizer.moments=float32 with policy.use=flax, or policy.use=torch.")
        self.settings, self.steps = settings, 0
        self._rule = Rule(settings.betas, settings.eps, settings.weight_decay)
        self._moments: Any = self._rule.adam.init(dict(params))

    @property
    def lr(self) -> float:
        """The rate of the next step."""
        return lr_at(self.steps, self.settings)

    def step(self, params: Params, gradients: Params, norm: float) -> dict[str, jax.Array]:
        """The parameters one step on, with gradients, which are used up, clipped by their `norm`."""
        clip = self.settings.clip_norm
        scale = min(1.0, clip / (norm + _CLIP_EPS)) if clip > 0 else 1.0
        moved, self._moments = _STEPPED(
            self._rule, dict(params), dict(gradients), self._moments, self.lr, scale)
        self.steps += 1
        return moved

    def arrays(self) -> Iterator[tuple[str, jax.Array]]:
        """`exp_avg.NAME` and `exp_avg_sq.NAME` of every parameter, live."""
        for kept, field in _MOMENTS.items():
            for name, x in getattr(self._moments, field).items():
                yield f"{kept}.{name}", x

    def resume(self, steps: int, arrays: Params) -> None:
        """Go on as after `steps` steps, with the moments that stand in `arrays` under the names above."""
        kept = {field: {name: arrays[f"{moment}.{name}"] for name in getattr(self._moments, field)}
                for moment, field in _MOMENTS.items()}
        self._moments = self._moments._replace(count=jnp.asarray(steps, jnp.int32), **kept)
        self.steps = steps


@jax.jit
def norm_of(gradients: Params) -> jax.Array:
    """The norm of all numbers, as the norm of the parameters' norms."""
    return jnp.linalg.norm(jnp.stack([jnp.linalg.norm(g.ravel()) for g in gradients.values()]))
