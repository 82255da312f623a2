"""Settings of every test: few threads, no accelerator, examples of Hypothesis drawn the same way each time."""

from __future__ import annotations

import os

from hypothesis import settings

# Before torch or JAX is imported anywhere: they read these once.
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "2")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

pytest_plugins = ["pytester"]  # the contract kit's own behaviour in pytest is tested with it

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")
