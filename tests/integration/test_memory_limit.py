"""Under a limit that the kernel keeps (`RLIMIT_DATA`), a run that cannot be finished in the parts it was given is
finished by `batching: adaptive`, and learns the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from posttrain.rundir import read_metrics

pytest.importorskip("torch")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux limits it")]

LIMITED = Path(__file__).with_name("limited.py")
MIB = 140


def run(directory: Path, planner: str, mib: int) -> subprocess.CompletedProcess[str]:
    """In malloc's plain form, which gives large blocks back, as a GPU's allocator can."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536",
                   "PYTHONPATH": os.pathsep.join([str(LIMITED.parents[1]), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run([sys.executable, str(LIMITED), str(directory), planner, str(mib)], env=environment,
                          capture_output=True, text=True, timeout=280, check=False)


def curve(directory: Path, name: str) -> list[float]:
    return [line[name] for line in read_metrics(directory) if line["step"]]


def test_adaptive_finishes_what_fails_without(tmp_path: Path) -> None:
    failed = run(tmp_path / "failed", "unretried", MIB)
    assert failed.returncode != 0 and "MemoryExhausted" in failed.stderr, failed.stderr
    for name, mib in (("adaptive", MIB), ("unretried", 0)):
        done = run(tmp_path / f"{name}-{mib}", name, mib)
        assert done.returncode == 0, done.stderr
    for name in ("grad_norm", "reward/mean", "kl/reference"):
        np.testing.assert_allclose(curve(tmp_path / f"adaptive-{MIB}", name), curve(tmp_path / "unretried-0", name),
                                   rtol=1e-3, atol=1e-6, err_msg=name)
    assert sum(curve(tmp_path / f"adaptive-{MIB}", "batch/memory_retries")) <= 1
