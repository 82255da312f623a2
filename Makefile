# Every target makes what it needs: `make test` and `make demo` work on a fresh clone with Python 3.11 or later.
# torch comes from wherever pip is configured to look: the ordinary wheel on macOS, the CUDA build on Linux, or the CPU
# build where pip finds a `+cpu` wheel of the pinned version (see constraints.txt).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PACKAGES := core estimators objectives backends tuning
PROJECTS := pyproject.toml $(PACKAGES:%=packages/%/pyproject.toml)

# Explicit thread counts: timings and results should not depend on what else the machine does.
export OMP_NUM_THREADS ?= 2
export OPENBLAS_NUM_THREADS ?= $(OMP_NUM_THREADS)
export MKL_NUM_THREADS ?= $(OMP_NUM_THREADS)
export JAX_PLATFORMS ?= cpu

.PHONY: install check test test-all demo bench clean

install: $(STAMP)

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "posttrain needs Python 3.11 or later: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

# The build backends are installed first and builds are not isolated: an isolated build would ignore the constraints.
# setuptools builds the two dependencies of reasoning_gym that come as source alone, and has to know wheels by itself.
$(STAMP): $(PROJECTS) constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --upgrade --constraint constraints.txt pip setuptools hatchling editables
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --group dev \
		$(PACKAGES:%=--editable ./packages/%) --editable '.[all]'
	touch $@

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# One test process per core, each with one thread: threads of several processes on the same cores wait for one another.
WORKERS ?= auto
PYTEST := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest

test: check
	$(PYTEST) -n $(WORKERS) --dist worksteal -m "not slow and not clean"

test-all: check
	$(PYTEST) -n $(WORKERS) --dist worksteal -m "not clean"
	$(PYTEST) -m clean

demo: $(STAMP)
	$(BIN)/python examples/addition/demo.py

bench: $(STAMP)
	set -e; for script in tools/bench/*.py; do echo "== $$script"; $(BIN)/python "$$script"; done

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find packages tests tools examples -name __pycache__ -type d -prune -exec rm -rf {} +
