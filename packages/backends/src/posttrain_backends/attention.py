"""Ways to compute attention by name: where each runs, what it needs, and what `auto` takes.

This is the light part, common to the backends on torch: it imports no framework.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from typing import Literal, final

from posttrain.errors import ConfigError, PluginError

log = logging.getLogger(__name__)

LibraryAttention = Literal["auto", "sdpa", "eager", "flex", "flash_attention_2", "flash_attention_3",
                           "flash_attention_4"]
"""What transformers has by itself."""
Attention = Literal[LibraryAttention, "xformers"]
FLASH = frozenset({"flash_attention_2", "flash_attention_3", "flash_attention_4"})
"""Made for sequences packed in one row."""


@final
@dataclass(frozen=True, slots=True)
class Kind:
    """Where one way to compute attention runs."""

    precisions: frozenset[str]
    everywhere: bool = True
    """Whether on CPUs, too, and not on CUDA alone."""
    trains_on_cpu: bool = True
    package: str = ""
    """The distribution that computes it, where that is not torch."""
    remedy: str = ""
    """How to install it."""


_ALL, _SINGLE, _HALF = frozenset({"float32", "bf16", "float64"}), frozenset({"float32", "bf16"}), frozenset({"bf16"})
KINDS: Mapping[str, Kind] = {
    "eager": Kind(_ALL),
    "sdpa": Kind(_ALL),
    "flex": Kind(_SINGLE, trains_on_cpu=False),
    "flash_attention_2": Kind(_HALF, False, False, "flash-attn", "pip install flash-attn --no-build-isolation"),
    "flash_attention_3": Kind(_HALF, False, False, "flash-attn-3", "build it from the folder hopper of "
                              "flash-attention's sources"),
    "flash_attention_4": Kind(_HALF, False, False, "flash-attn-4", "pip install --pre flash-attn-4"),
    "xformers": Kind(_SINGLE, False, False, "xformers", "pip install xformers, built for the installed torch"),
}


def installed(name: str) -> bool:
    """Whether the package that computes it is there. Not asked by module: versions 2 and 4 of flash share one."""
    if not KINDS[name].package:
        return True
    try:
        distribution(KINDS[name].package)
    except PackageNotFoundError:
        return False
    return True


def require_attention(name: Attention, device: str, precision: str) -> None:
    """Raise `PluginError` where its package is missing, `ValueError` where device or precision is not for it."""
    if name == "auto":
        return
    kind = KINDS[name]
    if not installed(name):
        raise PluginError([f"attention {name!r} needs {kind.package}, which is not installed: {kind.remedy}; sdpa and "
                           "flex come with torch"])
    if device == "cpu" and not kind.everywhere:
        raise ValueError(f"attention {name} runs on CUDA alone, and device is cpu; take sdpa")
    if precision not in kind.precisions:
        raise ValueError(f"attention {name} does not compute in {precision}, but in "
                         f"{' and '.join(sorted(kind.precisions))}; take sdpa, or another precision")


def require_device(name: Attention, device: str, *, trained: bool) -> None:
    """Raise `ConfigError` where the device that the model is put on, `cpu` or `cuda`, is not for it."""
    if name == "auto" or device != "cpu":
        return
    if not KINDS[name].everywhere:
        raise ConfigError([f"attention {name} runs on CUDA alone, and the model is on a CPU; take sdpa"])
    if trained and not KINDS[name].trains_on_cpu:
        raise ConfigError([f"attention {name} has no backward pass on a CPU, so it can score there and not train; take "
                           "sdpa"])


def candidates(device: str, precision: str) -> tuple[str, ...]:
    """What `auto` tries, the best first: on CUDA what takes packed sequences and shared prompts without padding."""
    if device == "cpu":
        return ("sdpa",)
    flash = ("flash_attention_3", "flash_attention_2") if precision == "bf16" else ()
    return (*filter(installed, flash), "flex", "sdpa")


def choose(name: Attention, tried: Sequence[str], fault: Callable[[str], str]) -> str:
    """The attention that is named, or of `auto` the first of `tried`, in which `fault` finds nothing wrong.

    Raises `ConfigError` where the named one is wrong. `auto` says what it leaves out, and ends with eager.
    """
    if name != "auto":
        if found := fault(name):
            raise ConfigError([f"attention {name} cannot be used here: {found}"],
                              next_step=f"Take attention: {'eager' if name == 'sdpa' else 'sdpa'}.")
        return name
    for other in tried:
        if not (found := fault(other)):
            return other
        log.warning("attention %s is left out: %s", other, found)
    return "eager"


def differs(error: float, what: str, bound: float) -> str:
    """What `fault` says of the largest difference to eager, relative to the largest value; nothing below the bound."""
    return "" if error <= bound else (f"its {what} differ from those of eager by {error:.1e} of the largest, above "
                                      f"{bound:.1e}")


def raised(error: Exception) -> str:
    """What `fault` says of an error."""
    lines = str(error).strip().splitlines()
    return f"it raises {type(error).__name__}{f': {lines[0]}' if lines else ''}"
