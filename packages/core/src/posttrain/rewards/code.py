"""Answers that are Python code: run with the row's tests in a process of its own, under limits.

Limits of a process are no sandbox. They stop accidents (endless loops, memory, large files, many processes), not an
attacker: the code can read what this user can read, and use the network. Train on code from a model you do not trust
inside a container or a virtual machine. Knows texts and columns alone.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from math import ceil, inf
from pathlib import Path
from typing import Any, final

from posttrain.rewards.rules import column

FENCED = re.compile(r"```[ \t]*(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)

RUNNER = r"""
import json, os, sys
task = json.load(sys.stdin)
sys.stdin.close()
if sys.platform == "linux":
    import ctypes, signal
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != task["parent"]:
        os._exit(1)
import resource
for name, most in task["limits"].items():
    limit = getattr(resource, name, None)
    if limit is not None:
        allowed = resource.getrlimit(limit)[1]
        most = most if allowed == resource.RLIM_INFINITY else min(most, allowed)
        resource.setrlimit(limit, (most, most))
channel = os.dup(1)
os.write(channel, b"+")
quiet = os.open(os.devnull, os.O_RDWR)
os.dup2(quiet, 1); os.dup2(quiet, 2)
names = {"__name__": "answer"}
exec(compile(task["code"], "answer.py", "exec"), names)
exec(compile(task["test"], "test.py", "exec"), names)
os.write(channel, task["passed"].encode())
os._exit(0)
"""
"""What the process runs: limits first, of which `+` tells, then the answer, then the test. That the test was reached
and passed is said by a word the answer has not been told, so that ending early with status 0 earns nothing."""


@final
@dataclass(frozen=True, slots=True)
class Code:
    """The share of the row's tests that an answer's code passes.

    The code is the answer's last block in triple backticks, or the whole answer where it has none. A test is Python
    that runs after the code, with its names, and raises where the code is wrong (`assert add(1, 2) == 3`); the column
    holds one test or a list of them, each run in a fresh process. None where the row has none.

    Raises `RuntimeError` where a process could not be started under its limits: that is no answer's fault.

    Each process has an empty environment, an empty folder, a session of its own that is killed as a whole after
    `seconds`, and limits on processor time, memory, files and processes. These are no sandbox: see the module.
    """

    tests_key: str = "tests"
    """Column of the tests."""
    seconds: float = 5.0
    """For one test. The reward's `timeout` must leave time for all tests of an answer."""
    memory_mb: int = 512
    """Address space of a process."""
    file_mb: int = 1
    """Largest file it may write."""
    processes: int = 0
    """Processes and threads of this user that may exist when it starts another; 0: it starts none. The system does not
    hold the superuser to it."""
    all_or_nothing: bool = False
    """1 where all tests pass, else 0."""

    def __post_init__(self) -> None:
        if not 0 < self.seconds < inf:
            raise ValueError(f"seconds must be positive and finite, got {self.seconds}")
        if self.memory_mb < 1 or self.file_mb < 0 or self.processes < 0:
            raise ValueError("memory_mb must be at least 1, file_mb and processes must not be negative")

    def __call__(self, *, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        tests = column(columns, self.tests_key)
        return [self._share(code_of(text), [given] if isinstance(given, str) else given)
                for text, given in zip(completions, tests, strict=True)]

    def _share(self, code: str, tests: list[str] | None) -> float | None:
        if not tests:
            return None
        passed = [self._passes(code, test) for test in tests]
        return float(all(passed)) if self.all_or_nothing else sum(passed) / len(passed)

    def _passes(self, code: str, test: str) -> bool:
        """Run one test in a process of its own."""
        word = secrets.token_hex()
        task = json.dumps({"code": code, "test": test, "passed": word, "parent": os.getpid(), "limits": {
            "RLIMIT_CPU": ceil(self.seconds), "RLIMIT_AS": self.memory_mb << 20, "RLIMIT_FSIZE": self.file_mb << 20,
            "RLIMIT_NPROC": self.processes, "RLIMIT_CORE": 0}})
        with tempfile.TemporaryDirectory() as folder:
            process = subprocess.Popen(
                [sys.executable, "-I", "-c", RUNNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, cwd=Path(folder), env={}, start_new_session=True)
            try:
                said, in_time = process.communicate(task.encode(), timeout=self.seconds)[0], True
            except subprocess.TimeoutExpired:
                said, in_time = b"", False
            finally:
                with suppress(ProcessLookupError, PermissionError):  # nobody is left in its session
                    os.killpg(process.pid, signal.SIGKILL)
            said = said if in_time else process.communicate()[0]
        if not said.startswith(b"+"):
            raise RuntimeError(f"the process for the answer's code did not start within {self.seconds:g} s "
                               f"(exit status {process.returncode})")
        return in_time and said == f"+{word}".encode()


def code_of(text: str) -> str:
    """The last fenced block of an answer, or all of it.

    >>> code_of("First:\\n```python\\nx = 1\\n```\\nBetter:\\n```\\nx = 2\\n```")
    'x = 2\\n'
    """
    blocks: list[str] = FENCED.findall(text)
    return blocks[-1] if blocks else text
