#!/usr/bin/env bash
# Runs the tests that depend on Megatron-Core with another version of it than the installed one:
#
#     tools/test_megatron.sh 0.19.2 [arguments of pytest]
#
# The version is installed in build/megatron-VERSION, for the Python and torch of .venv. If that is not possible, for
# example without network access, the tests are skipped with a message.
set -euo pipefail
cd "$(dirname "$0")/.."

version=$1
shift
folder=$PWD/build/megatron-$version
python=${SPO_PYTHON:-.venv/bin/python}

if [ ! -e "$folder/megatron/core/__init__.py" ]; then
    rm -rf "$folder"
    # Versions from 0.17 on require Python 3.12, but their code runs with 3.11 too.
    "$python" -m pip install --quiet --no-deps --ignore-requires-python --only-binary :all: --python-version 3.12 \
        --target "$folder" "megatron-core==$version" || {
        echo "skipped: megatron-core $version cannot be installed"
        exit 0
    }
fi

tests=(
    tests/oracles
    tests/parallel/test_layouts.py
    tests/checkpoint/test_versions.py
    tests/train/test_damage.py
    tests/train/test_saving.py
    tests/convert/test_convert.py
    tests/convert/test_stored.py
    tests/examples/test_examples.py::test_quickstart_in_miniature
    tests/model
)
if [ "$("$python" -c 'import importlib.metadata as m; print(m.version("megatron-core"))')" = "$version" ]; then
    echo "skipped: megatron-core $version is the installed version, which make test runs"
    exit 0
fi
export SPO_TESTS_OTHER_MEGATRON=$folder PYTHONPATH=$folder${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=1
exec "$python" -m pytest -q "${tests[@]}" "$@"
