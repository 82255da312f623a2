"""Where a learner's arrays lie. Knows no model."""

from __future__ import annotations

from typing import Any, Literal, Protocol, final

import jax
from posttrain.errors import ConfigError

Device = Literal["auto", "cpu", "gpu", "tpu"]


class Placement(Protocol):
    """Puts arrays on devices; what is computed of them follows."""

    @property
    def rows(self) -> int:
        """What the rows of a batch must be a multiple of."""
        ...

    def weight(self, name: str, x: Any) -> jax.Array:
        """A parameter, or what is kept of one: a gradient, a moment."""
        ...

    def sequences(self, x: Any) -> jax.Array:
        """[S, T], row by row."""
        ...

    def column(self, x: Any) -> jax.Array:
        """Anything else of a batch."""
        ...


@final
class OneDevice:
    """All on one device."""

    rows = 1

    def __init__(self, device: jax.Device) -> None:
        self.device = device

    def weight(self, name: str, x: Any) -> jax.Array:
        return jax.device_put(x, self.device)

    def sequences(self, x: Any) -> jax.Array:
        return jax.device_put(x, self.device)

    def column(self, x: Any) -> jax.Array:
        return jax.device_put(x, self.device)


def device_of(kind: Device) -> jax.Device:
    """The first device of a kind; `auto` is what JAX finds best. Raises `ConfigError` where there is none."""
    try:
        return jax.devices(None if kind == "auto" else kind)[0]
    except RuntimeError as error:
        raise ConfigError([f"policy.device is {kind}, and JAX finds none: {str(error).partition(chr(10))[0]}"],
                          next_step="Take policy.device=auto, or install JAX for it: pip install 'jax[cuda]' or "
                                    "'jax[tpu]'.") from error
