"""Settings of every test: few threads, no accelerator, examples of Hypothesis drawn the same way each time.

Needs pytest and Hypothesis alone: the tests of a package run where only core and that package are installed, and a
test that needs more says so with `@pytest.mark.needs("torch", ...)`.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
from hypothesis import settings

# Before torch or JAX is imported anywhere: they read these once.
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "2")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

pytest_plugins = ["pytester"]  # the contract kit's own behaviour in pytest is tested with it

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs(*modules): skipped where one of these modules is not installed")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Nothing is imported here: a test about what an import costs stays one."""
    for mark in item.iter_markers("needs"):
        for module in mark.args:
            if find_spec(module) is None:
                pytest.skip(f"{module} is not installed")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch on one thread: sums are then rounded the same way each time."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def signals_are_given_back() -> Iterator[None]:
    """Whoever called `train` or a command can be stopped by Ctrl-C after it, too."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    left = {number: signal.getsignal(number) for number in before}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert left == before
