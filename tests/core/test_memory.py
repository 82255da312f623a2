"""The host's memory as passes see it: what is in use, the peak of a pass, and the nearest limit."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
from own_process import in_a_process
from posttrain.memory import HostMemory, memory_of
from posttrain.protocols import Usage

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells of it")
MiB = 2**20
LIMITED = """
import resource
from posttrain.memory import HostMemory
before = HostMemory().start()
resource.setrlimit(resource.RLIMIT_DATA, (before.held + 50 * 2**20, resource.RLIM_INFINITY))
now = HostMemory().start()
assert now.limit == before.held + 50 * 2**20, (before, now)
"""


TOUCHED = """
import numpy as np
from posttrain.memory import HostMemory
MiB = 2**20
memory = HostMemory()
start = memory.start()
x = np.ones(64 * MiB // 8)
del x
assert 60 * MiB < memory.peak(start) - start.used < 100 * MiB, (start, memory.peak(start))
assert abs(memory.start().used - start.used) < 20 * MiB, "what was given back is not in use"
"""


def test_a_peak_is_what_was_touched_in_between() -> None:
    """In a process of its own: where much was freed before, malloc need not ask for more."""
    in_a_process("-c", TOUCHED)


def test_without_new_memory_nobody_knows_the_peak() -> None:
    """As much as malloc kept may have been used, or nothing of it."""
    memory, start = HostMemory(), HostMemory().start()
    assert memory.peak(Usage(start.used - 100 * MiB, start.limit, start.held, start.resident)) == 0


def test_the_process_s_own_limit_is_seen() -> None:
    in_a_process("-c", LIMITED)


def test_there_is_a_limit_without_one_of_its_own() -> None:
    assert HostMemory().start().limit > HostMemory().start().held > 0


def test_a_model_with_a_device_says_what_memory_it_has() -> None:
    device = HostMemory()
    assert memory_of(SimpleNamespace(memory=lambda: device)) is device
    assert isinstance(memory_of(object()), HostMemory)
