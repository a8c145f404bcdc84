#!/usr/bin/env bash
# Runs every test that needs a GPU and prints a table of results: [PYTHON=python3] gpu_check.sh [pytest arguments]
# Exit code: 0 if all tests ran and passed; 1 if some failed or were skipped; 2 without an NVIDIA GPU.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit

python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || python=python3
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "error: this PyTorch finds no NVIDIA GPU, so nothing was checked. The environment:" >&2
    "$python" -m megatron_spo doctor >&2
    exit 2
fi

results=$(mktemp -d)
trap 'rm -rf "$results"' EXIT
"$python" -m megatron_spo doctor
"$python" -m pytest -q -m gpu tests/gpu -o junit_family=xunit1 --junitxml="$results/gpu.xml" "$@"
"$python" tools/bench/gpu_table.py "$results/gpu.xml"
