"""Whether the libraries of a component are installed, and what to do where they are not. Imports none of them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from posttrain.errors import PluginError

_EXTRAS = {"peft": "lora", "gguf": "gguf", **dict.fromkeys(("accelerate", "bitsandbytes", "torchao"), "quantized")}
"""Modules of an extra of their own."""
_RUNTIMES = ("onnxruntime", "onnxruntime-gpu")


def require(what: str, *modules: str, extra: str = "hf") -> None:
    """Raise `PluginError` with what to install where a module is missing; `extra` holds those without one of their
    own."""
    if missing := [name for name in modules if find_spec(name) is None]:
        raise PluginError([f"{what} needs {' and '.join(missing)}, which is not installed: "
                           f"pip install 'posttrain-backends[{_EXTRAS.get(missing[0], extra)}]'"])


def require_onnx(what: str, device: str = "cpu") -> None:
    """Raise `PluginError` where ONNX or ONNX Runtime is missing, where both builds of ONNX Runtime are installed, or
    where the installed one cannot use `device`."""
    extra = "onnx" if device == "cpu" else "onnx-gpu"
    require(what, "onnx", "onnxruntime", extra=extra)
    require_one_runtime(what, installed_runtimes())
    if device != "cpu":
        import onnxruntime

        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise PluginError([f"{what} on {device} needs onnxruntime-gpu, and the installed onnxruntime computes on "
                               "CPUs: pip uninstall -y onnxruntime && pip install 'posttrain-backends[onnx-gpu]'"])


def installed_runtimes() -> frozenset[str]:
    """The distributions that bring the module `onnxruntime`."""
    return frozenset(filter(_is_installed, _RUNTIMES))


def _is_installed(distribution: str) -> bool:
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True


def require_one_runtime(what: str, runtimes: frozenset[str]) -> None:
    """Raise `PluginError` where several distributions wrote the files of one module, so that it is neither of them.

    >>> require_one_runtime("backend 'onnx'", frozenset({"onnxruntime"}))
    """
    if len(runtimes) > 1:
        raise PluginError([f"{what}: {' and '.join(sorted(runtimes))} are installed, and each overwrites the module "
                           "onnxruntime of the other"],
                          next_step=f"pip uninstall -y {' '.join(sorted(runtimes))}, then one of them: "
                                    "pip install 'posttrain-backends[onnx]' for CPUs, or "
                                    "'posttrain-backends[onnx-gpu]'.")
