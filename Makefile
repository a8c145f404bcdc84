# make quickstart   run the quickstart, from an untrained model to a table of results (about 5 minutes on 2 cores)
# make test         run the tests of every feature
# make test-all     run all tests: also large parameter grids, benchmarks and long jobs
# make lint         check style, types and import contracts
# make bench        run the benchmarks
# make docs         write build/docs/index.html, the documentation of the Python API
#
# Each target creates .venv if it does not exist. Variables:
#   PYTHON=python3.12        interpreter for .venv (default: the first of python3.12, python3.11, python3 that fits)
#   TORCH=torch==2.13.0      PyTorch to install (default: the installed one, else a CUDA or CPU build)
#   PIP_TORCH_ARGS="..."     further arguments of pip install for PyTorch, such as --index-url
#   JOBS=2                   number of test processes
#   MODEL=folder             make bench: also compare a real model in Hugging Face format with TRL

PYTHON ?=
TORCH ?=
PIP_TORCH_ARGS ?=
JOBS ?= 2
MODEL ?=
BIN := .venv/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadscope --no-loadscope-reorder

.PHONY: quickstart test test-all lint bench docs venv
.DEFAULT_GOAL := help

.PHONY: help
help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

venv: .venv/.installed

.venv/.installed: setup.py tools/make_venv.sh
	@PYTHON="$(PYTHON)" TORCH="$(TORCH)" PIP_TORCH_ARGS="$(PIP_TORCH_ARGS)" bash tools/make_venv.sh
	@touch $@

quickstart: venv
	@$(BIN)/python examples/quickstart/run.py

# Tests of a module share fixtures, so they run in one process; the longest modules start first (tests/conftest.py).
test: venv
	@$(PYTEST)

test-all: venv
	@$(PYTEST) -m ""

lint: venv
	@echo "== ruff, mypy, import contracts"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@if command -v shellcheck >/dev/null; then echo "== shellcheck"; shellcheck -x slurm/*.sh tools/*.sh tools/bench/*.sh .ci/run; fi

bench: venv
	@$(BIN)/python tools/bench/run.py $(if $(MODEL),--model $(MODEL))

# pdoc takes the public names for all there is of the package; the modules behind them have to be named.
MODULES := $(patsubst megatron_spo/%.py,megatron_spo.%,$(filter-out megatron_spo/__%,$(wildcard megatron_spo/*.py)))
MODULES += $(patsubst megatron_spo/%/__init__.py,megatron_spo.%,$(wildcard megatron_spo/*/__init__.py))

docs: venv
	@$(BIN)/pdoc -d google -o build/docs megatron_spo $(MODULES)
	@echo "build/docs/index.html"
