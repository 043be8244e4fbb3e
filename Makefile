# `make demo` and `make test` work on a fresh machine with Python >= 3.10 and make: the first call of either creates
# `.venv` with the versions of constraints.txt. To use another interpreter: `make clean test PYTHON=python3.12`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=

# Two test workers with one thread each: the pool of a numerical library per worker would only fight over the cores.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
SOURCES := sb3_rfm examples tests docs/conf.py

.DEFAULT_GOAL := help
.PHONY: help demo test lint types unit conformance conformance-subset docs format constraints clean

help:
	@echo "make demo     train RFM on cartpole-swingup and film the result (make demo ARGS=--help lists the options)"
	@echo "make test     format, lint, types, tests and documentation"
	@echo "make conformance  Stable-Baselines3's own tests on every algorithm; make test runs a part of them"
	@echo "make format   reformat the code and apply safe lint fixes"
	@echo "make docs     build the documentation in docs/_build/html"
	@echo "make clean    remove the virtual environment and everything built; runs/ is kept"

demo: $(STAMP)
	@$(BIN)/python examples/demo.py $(ARGS)

test: lint types unit conformance-subset docs

lint: $(STAMP)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)

types: $(STAMP)
	$(BIN)/mypy

unit: $(STAMP)
	$(ONE_THREAD) $(BIN)/pytest -n 2 --dist worksteal $(ARGS)

# Stable-Baselines3's own tests, with its SAC and TD3 replaced by the algorithms of this package.
conformance: $(STAMP)
	$(ONE_THREAD) $(BIN)/python tests/conformance/run.py $(ARGS)

conformance-subset: $(STAMP)
	$(ONE_THREAD) $(BIN)/python tests/conformance/run.py --subset

docs: $(STAMP)
	$(BIN)/sphinx-build -W --keep-going --quiet docs docs/_build/html

format: $(STAMP)
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

# Pins for every supported Python and every extra; pins that still fit pyproject.toml are kept.
constraints: $(STAMP)
	$(BIN)/pip install --quiet uv
	$(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.10 --no-annotate --quiet \
		--custom-compile-command "make constraints" --output-file constraints.txt

clean:
	rm -rf $(VENV) build dist docs/_build .mypy_cache .pytest_cache .ruff_cache
	find sb3_rfm examples tests docs -name __pycache__ -type d -prune -exec rm -rf {} +

# dm-control goes in without its dependencies because one of them, labmaze, cannot be installed on Python >= 3.13 (see
# pyproject.toml); on older versions it is there already and the line does nothing.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "sb3_rfm needs Python >= 3.10; choose one with: make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m pip install --constraint constraints.txt --no-deps dm-control
	@touch $(STAMP)
