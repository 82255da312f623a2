"""Whether Triton kernels can run here, and the sizes that they are started with. Imports no Triton."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

from posttrain.errors import PluginError


@cache
def is_installed() -> bool:
    return find_spec("triton") is not None


def runs_on(device: str) -> bool:
    """Whether Triton is there and, for the host, interpreted."""
    return is_installed() and (device != "cpu" or os.environ.get("TRITON_INTERPRET") == "1")


def require_triton(kernel: str) -> None:
    """Raise `PluginError` with what to install where Triton is missing."""
    if not is_installed():
        raise PluginError([f"kernel '{kernel}' needs Triton, which is not installed: "
                           "pip install 'posttrain-backends[triton]' (Linux)"])


def require_sizes(block: int, warps: int) -> None:
    """Raise `ValueError` where Triton knows no program of `block` numbers and `warps` warps."""
    if not _is_power_of_2(block) or not _is_power_of_2(warps) or warps > 32:
        raise ValueError(f"block and warps must be powers of 2, and warps at most 32, got {block} and {warps}")


def _is_power_of_2(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0
