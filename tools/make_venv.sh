#!/usr/bin/env bash
# Makes .venv and installs the package with its development tools, PyTorch first. Called by the Makefile.
# Reads PYTHON, TORCH and PIP_TORCH_ARGS; the Makefile explains them.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { echo "== $*"; }
fail() { echo "error: $*" >&2; exit 2; }
suits() { "$1" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; }

find_python() {
    local name
    for name in ${PYTHON:-python3.12 python3.11 python3}; do
        if command -v "$name" >/dev/null && suits "$name"; then
            command -v "$name"
            return
        fi
    done
    fail "needs Python 3.11 or 3.12 and found neither (looked for: ${PYTHON:-python3.12 python3.11 python3});" \
        "on Debian: apt-get install python3 python3-venv; else name one: make PYTHON=/path/to/python3.12 ..."
}

make_venv() {
    local python
    python=$(find_python)
    say "making .venv with $("$python" --version)"
    if "$python" -c 'import ensurepip' 2>/dev/null; then
        "$python" -m venv .venv
    elif "$python" -m pip --version >/dev/null 2>&1; then
        "$python" -m venv --without-pip .venv
        "$python" -m pip --python .venv/bin/python install --quiet pip
    else
        fail "$python can make no virtual environment; on Debian: apt-get install python3-venv"
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
        say "installing PyTorch with CUDA (an NVIDIA GPU is there)"
        "${install[@]}" torch==2.13.0
    else
        say "installing PyTorch for the CPU"
        # A plain name may bring gigabytes of CUDA libraries; the CPU build carries this label where it is offered.
        "${install[@]}" --quiet torch==2.13.0+cpu 2>/dev/null || {
            say "no build labelled +cpu is offered here (PIP_TORCH_ARGS can name a place that has one); taking the plain one"
            "${install[@]}" torch==2.13.0
        }
    fi
}

[ -x .venv/bin/python ] || make_venv
suits .venv/bin/python || fail ".venv holds another Python than 3.11 or 3.12; remove it and call make again"
if .venv/bin/python -c 'import importlib.metadata as m; m.version("torch")' 2>/dev/null && [ -z "${TORCH:-}" ]; then
    say "keeping the PyTorch that .venv has"
else
    install_torch
fi
say "installing megatron-spo, Megatron-Core and the development tools (a few minutes)"
.venv/bin/python -m pip install --quiet --progress-bar off -e '.[dev]'
say "ready: .venv/bin/megatron-spo doctor shows what is there"
