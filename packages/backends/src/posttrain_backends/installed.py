"""Whether the libraries of a component are installed, and what to do where they are not. Imports none of them."""

from __future__ import annotations

from importlib.util import find_spec

from posttrain.errors import PluginError

_EXTRAS = {"peft": "lora", "gguf": "gguf", **dict.fromkeys(("accelerate", "bitsandbytes", "torchao"), "quantized")}
"""Modules of an extra of their own."""


def require(what: str, *modules: str, extra: str = "hf") -> None:
    """Raise `PluginError` with what to install where a module is missing; `extra` holds those without one of their
    own."""
    if missing := [name for name in modules if find_spec(name) is None]:
        raise PluginError([f"{what} needs {' and '.join(missing)}, which is not installed: "
                           f"pip install 'posttrain-backends[{_EXTRAS.get(missing[0], extra)}]'"])
