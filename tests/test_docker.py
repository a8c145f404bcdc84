"""The container recipes: one base image, one installation script, and what the job scripts make of an image."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"


def test_the_recipes_agree() -> None:
    image = re.search(r"^ARG BASE=(\S+)$", (DOCKER / "Dockerfile").read_text(), re.MULTILINE)
    assert image
    definition = (DOCKER / "apptainer.def").read_text()
    assert f"From: {image[1]}\n" in definition and f"`{image[1]}`" in (DOCKER / "README.md").read_text()
    for recipe in ("Dockerfile", "apptainer.def"):
        assert "bash /opt/megatron_spo/docker/install.sh /opt/megatron_spo\n" in (DOCKER / recipe).read_text()


@pytest.mark.parametrize("command", [["shellcheck", "docker/install.sh"], ["hadolint", "docker/Dockerfile"]])
def test_linters(command: list[str]) -> None:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


OPTIONS = """
home=/repo PWD=/work SPO_OUT=/out SPO_MOUNTS=/data:/data SPO_DEVICE={device} SPO_CONTAINER={image}
SLURM_JOB_NODELIST=n1 SLURM_JOB_ID=1
scontrol() {{ echo n1; }}
srun() {{ echo --container-image; }}
source {root}/slurm/lib.sh
set_start_options
printf '%s\\n' "${{container[@]}}" "${{srun_options[@]}}"
"""


@pytest.mark.parametrize(
    ("image", "device", "expected"),
    [
        ("/i/spo.sif", "gpu", ["apptainer", "exec", "--bind", "/repo,/work,/out,/data:/data", "--nv", "/i/spo.sif"]),
        ("/i/spo.sif", "cpu", ["apptainer", "/i/spo.sif"]),
        ("/i/spo.sqsh", "gpu", ["--container-image=/i/spo.sqsh", "--container-workdir=/work",
                                "--container-mounts=/repo:/repo,/work:/work,/out:/out,/data:/data"]),
        ("", "gpu", []),
    ],
)  # fmt: skip
def test_the_lines_that_start_a_process_in_an_image(image: str, device: str, expected: list[str]) -> None:
    script = OPTIONS.format(root=ROOT, image=image, device=device)
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    assert [word for word in words if word in expected] == expected
    assert ("--nv" in words) == ("--nv" in expected) and ("apptainer" in words) == image.endswith(".sif")
