#!/usr/bin/env bash
# Installs the package in FOLDER into the Python of an image, for Dockerfile and apptainer.def: install.sh FOLDER
# The PyTorch and Transformer Engine of the image are kept. An image without PyTorch gets the CPU build.
set -euo pipefail

folder=$1 kept=$(mktemp)
python=${PYTHON:-python3}
# NVIDIA's image pins hundreds of packages for pip (/etc/pip/constraint.txt), some of them below what transformers requires.
export PIP_CONSTRAINT='' PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
"$python" - >"$kept" <<'END'
from importlib import metadata

for name in ("torch", "transformer-engine", "apex", "flash-attn"):
    try:
        print(f"{name}=={metadata.version(name)}")
    except metadata.PackageNotFoundError:
        pass
END
if ! grep -q ^torch== "$kept"; then
    "$python" -m pip install --index-url "${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}" torch
fi
echo "kept: $(tr '\n' ' ' <"$kept")"
"$python" -m pip install --constraint "$kept" "${folder}[wandb,tensorboard,eval]"
rm "$kept"
"$python" -m megatron_spo doctor
