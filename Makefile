# make quickstart   the main job on a laptop, from nothing to a table (about 5 minutes on 2 cores)
# make test         the tests of every feature      make lint   style, types, import arrows
# make test-all     all tests: whole grids of settings, benchmarks, long jobs too    make bench   benchmarks
# make docs         build/docs/index.html: the public API, and the modules behind it, from their docstrings
#
# Each makes .venv when there is none. Variables:
#   PYTHON=python3.12        interpreter for .venv (default: the first of 3.12, 3.11 found)
#   TORCH=torch==2.13.0      PyTorch to install (default: the CPU build, one with CUDA beside a GPU; kept if there)
#   PIP_TORCH_ARGS="..."     further arguments of that pip install, such as --index-url
#   JOBS=2                   test processes

PYTHON ?=
TORCH ?=
PIP_TORCH_ARGS ?=
JOBS ?= 2
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

# A module's tests share its fixtures, so that they stay in one process; the longest modules start first (tests/conftest.py).
test: venv
	@$(PYTEST)

test-all: venv
	@$(PYTEST) -m ""

lint: venv
	@echo "== ruff, mypy, import arrows"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@if command -v shellcheck >/dev/null; then echo "== shellcheck"; shellcheck -x slurm/*.sh tools/*.sh tools/bench/*.sh .ci/run; fi

bench: venv
	@$(BIN)/python tools/bench/run.py

# pdoc takes the public names for all there is of the package; the modules behind them have to be named.
MODULES := $(patsubst megatron_spo/%.py,megatron_spo.%,$(filter-out megatron_spo/__%,$(wildcard megatron_spo/*.py)))
MODULES += $(patsubst megatron_spo/%/__init__.py,megatron_spo.%,$(wildcard megatron_spo/*/__init__.py))

docs: venv
	@$(BIN)/pdoc -d google -o build/docs megatron_spo $(MODULES)
	@echo "build/docs/index.html"
