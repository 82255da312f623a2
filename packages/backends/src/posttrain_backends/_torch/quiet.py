"""What libraries of models are kept from saying: lines that nobody can act on, and bars beside our own progress.

How bitsandbytes and torchao are imported, too, without code from the Hub: transformers and peft import both where they
are installed, so this comes first. Knows no model.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec

_DROPPED: Mapping[str, str] = {
    "torchao": "Failed to load",  # its kernels for other devices
    "torch.utils._pytree": "is an Enum subclass",  # of torchao, and for torchao to change
    "bitsandbytes.backends.cpu.ops": "from kernels-community",  # see `_without_hub_kernels`
    "bitsandbytes.autograd._functions": "inputs will be cast from",  # in each layer of each pass
}
"""Logger -> what the lines hold that are dropped."""


def import_quietly(*names: str) -> None:
    """Import those of these packages that are installed."""
    for logger in map(logging.getLogger, _DROPPED):
        if _stays not in logger.filters:
            logger.addFilter(_stays)
    for name in names:
        if name not in sys.modules and find_spec(name) is not None:
            with _without_hub_kernels():
                import_module(name)


def _stays(record: logging.LogRecord) -> bool:
    """Whether a line stays."""
    return _DROPPED[record.name] not in record.getMessage()


@contextmanager
def errors_alone() -> Iterator[None]:
    """Inside, only errors of transformers are told."""
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


@contextmanager
def without_bars(*, local: bool = True) -> Iterator[None]:
    """Inside, transformers draws no bars over what is `local`: who reads or writes it says so. What is fetched from the
    hub may take minutes."""
    from transformers.utils import logging as transformers_logging

    hidden = local and transformers_logging.is_progress_bar_enabled()
    if hidden:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if hidden:
            transformers_logging.enable_progress_bar()


@contextmanager
def _without_hub_kernels() -> Iterator[None]:
    """Inside, `import kernels` fails: bitsandbytes would fetch and run code of the Hub with it, unasked."""
    held = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # type: ignore[assignment]  # how the import system marks what must not be found
    try:
        yield
    finally:
        del sys.modules["kernels"]
        if held is not None:
            sys.modules["kernels"] = held
