#!/usr/bin/env bash
# Creates .venv and installs PyTorch, and then the package with its development tools. Called by the Makefile.
# Reads PYTHON, TORCH and PIP_TORCH_ARGS, which the Makefile explains.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { echo "== $*"; }
fail() { echo "error: $*" >&2; exit 2; }
suits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

find_python() {
    local name
    for name in ${PYTHON:-python3.12 python3.11 python3.13 python3}; do
        if command -v "$name" >/dev/null && suits "$name"; then
            command -v "$name"
            return
        fi
    done
    fail "Python 3.11, 3.12 or 3.13 not found (tried: ${PYTHON:-python3.12 python3.11 python3.13 python3});" \
        "install it (on Debian: apt-get install python3 python3-venv), or set it: make PYTHON=/path/to/python3.12 ..."
}

make_venv() {
    local python
    python=$(find_python)
    say "creating .venv with $("$python" --version)"
    if "$python" -c 'import ensurepip' 2>/dev/null; then
        "$python" -m venv .venv
    elif "$python" -m pip --version >/dev/null 2>&1; then
        "$python" -m venv --without-pip .venv
        "$python" -m pip --python .venv/bin/python install --quiet pip
    else
        fail "$python cannot create virtual environments; on Debian: apt-get install python3-venv"
    fi
}

install_torch() {
    # shellcheck disable=SC2206  # several arguments in one variable
    local arguments=(${PIP_TORCH_ARGS:-})
    local install=(.venv/bin/python -m pip install --progress-bar off "${arguments[@]}")
    if [ -n "${TORCH:-}" ]; then
        say "installing $TORCH"
        "${install[@]}" "$TORCH"
    elif command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
        say "installing PyTorch with CUDA (an NVIDIA GPU was found)"
        "${install[@]}" torch==2.13.0
    else
        say "installing PyTorch for the CPU"
        # The plain version may install gigabytes of CUDA libraries; CPU builds have the label +cpu on some indexes.
        "${install[@]}" --quiet torch==2.13.0+cpu 2>/dev/null || {
            say "the package index has no +cpu build; installing the default build (set PIP_TORCH_ARGS to use another index)"
            "${install[@]}" torch==2.13.0
        }
    fi
}

[ -x .venv/bin/python ] || make_venv
suits .venv/bin/python || fail ".venv has a Python other than 3.11, 3.12 or 3.13; remove it and run make again"
if .venv/bin/python -c 'import importlib.metadata as m; m.version("torch")' 2>/dev/null && [ -z "${TORCH:-}" ]; then
    say "keeping the installed PyTorch"
else
    install_torch
fi
say "installing megatron-spo, Megatron-Core and the development tools (a few minutes)"
.venv/bin/python -m pip install --quiet --progress-bar off -e '.[dev]'
say "ready: .venv/bin/megatron-spo doctor shows what is installed"
