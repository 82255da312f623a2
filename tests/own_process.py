"""Python in a process of its own, for what must be chosen before an import: Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys


def in_a_process(*arguments: str, **environ: str) -> None:
    """Runs Python, whose Triton is not this process's, and fails with what it printed."""
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False,
                          env={**clean, **environ})
    assert done.returncode == 0, done.stdout + done.stderr
