# Two commands do everything: `make demo` and `make test`. Both set up .venv first, once.
# All paths are relative, so a checkout whose path has a space works.

PYTHON ?= python3
BIN := .venv/bin
# one BLAS thread per process: tests run side by side, and benchmarks compare like with like
ONE_THREAD := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1
DEMO ?=
TESTS ?= tests
BENCH ?=

.PHONY: help demo test bench lint build clean
.DEFAULT_GOAL := help

help:            ## show these commands
	@grep -E '^[a-z]+: .*##|^[a-z]+:  +##' Makefile | sed -E 's/:[^#]*## /\t/' | awk -F'\t' '{printf "  make %-8s %s\n", $$1, $$2}'

demo: .venv/student  ## see the whole idea: a lesson completed, a GPT, its text with and without the KV cache
	$(BIN)/python -m tito demo $(DEMO)

test: .venv/developer  ## run all tests (those against PyTorch run where it is installed, and say so where not)
	$(ONE_THREAD) $(BIN)/python -m pytest -n auto -rs $(TESTS)

bench: .venv/developer  ## measure beside the peers that are installed (QUICK=1: two minutes; BENCH=training: a part; BENCH=grading)
	$(BIN)/python tests/bench $(BENCH) $(if $(QUICK),--quick) $(BENCH_OPTIONS)

lint: .venv/developer  ## check style with ruff
	$(BIN)/ruff check src tinytorch tito tests

build: .venv/developer  ## build notebooks, package and index from src/
	$(BIN)/python -m tito dev build

clean:           ## remove the environment and everything that was made
	rm -rf .venv .tito out build *.egg-info .pytest_cache .ruff_cache .hypothesis

# An environment that a failed or interrupted run left half made is no environment, and its python is the system's.
WHOLE := $(shell $(BIN)/python -c 'import pip, sys; print(sys.prefix != sys.base_prefix)' 2>/dev/null)

.venv/bin/python: $(if $(filter True,$(WHOLE)),,anew)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "TinyTorch needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.12 demo")'
	$(PYTHON) -m venv --clear .venv

.PHONY: anew
anew:

.venv/student: pyproject.toml .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[plot]'
	@touch $@

.venv/developer: pyproject.toml .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,cluster,explore,grade,plot,serve]'
	@touch .venv/student $@
