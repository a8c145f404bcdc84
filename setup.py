"""Package metadata.

NVIDIA's apex is not an extra, because the package index has an unrelated package of that name (`megatron-spo doctor`).
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "megatron_spo/__init__.py").read_text())[1]
README = HERE / "README.md"

setup(
    name="megatron-spo",
    version=VERSION,
    description="Stable Preference Optimization on Megatron-Core",
    long_description=README.read_text() if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=[*find_packages(include=["megatron_spo", "megatron_spo.*"]), "megatron_spo.slurm"],
    package_dir={"megatron_spo.slurm": "slurm"},  # the job scripts, for megatron-spo slurm submit
    package_data={
        "megatron_spo": ["py.typed"],
        "megatron_spo.planner.presets": ["*/config.json"],
        "megatron_spo.slurm": ["*.sh"],
    },
    entry_points={"console_scripts": ["megatron-spo = megatron_spo.cli:main"]},
    install_requires=[
        "torch>=2.8",
        "megatron-core>=0.16.1,<0.20",  # 0.17 and later require Python 3.12,
        "transformers>=5,<6",
        "tokenizers>=0.21",
        "datasets>=4,<6",
        "pyarrow>=17",
        "filelock>=3.13",
        "xxhash>=3.4",
        "safetensors>=0.4",
        "psutil>=5.9",
        "numpy>=1.26",
        "pydantic>=2.11,<3",
        "pyyaml>=6",
        "jinja2>=3.1",
        "math-verify>=0.8,<1",
        "matplotlib>=3.8",
        "scipy>=1.11",
        "tabulate>=0.9",
        "tqdm>=4.66",
    ],
    extras_require={
        # Its torch part is compiled by pip install --no-build-isolation. megatron-core 0.16.1, the only version for
        # Python 3.11, requires this range; later versions allow any.
        "gpu": [
            "torch>=2.10",  # has the attention kernel for variable lengths
            "transformer-engine[core_cu13,pytorch]>=2.9,<2.12; python_version < '3.12'",
            "transformer-engine[core_cu13,pytorch]>=2.9,<3; python_version >= '3.12'",
        ],
        # not needed to convert NeMo checkpoints; 3.0 has no LLM collection, whose requirements are not included here
        "nemo": ["nemo-toolkit>=2.7,<3"],
        "wandb": ["wandb>=0.18"],
        "tensorboard": ["tensorboard>=2.14"],
        "eval": ["lm-eval>=0.4.5"],
        "docs": ["pdoc>=15"],
        "dev": [
            "accelerate>=1",
            "hypothesis>=6",
            "import-linter>=2",
            "lm-eval>=0.4.5",
            "mypy>=1.13",
            "pdoc>=15",
            "peft>=0.18",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.8",
            "tensorboard>=2.14",
            "trl==1.16.0",
            "types-PyYAML",
            "types-psutil",
            "wandb>=0.18",
        ],
    },
)
