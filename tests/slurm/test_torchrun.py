"""The torchrun command of slurm/README.md, started twice as on two machines."""

import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import ROOT, cli, largest_difference
from tests.support.tiny import tiny_run


def documented() -> list[str]:
    """Returns the words of the torchrun command in slurm/README.md."""
    (block,) = re.findall(r"```bash\n(torchrun .*?)```", (ROOT / "slurm/README.md").read_text(), re.DOTALL)
    return shlex.split(block.replace("\\\n", " "))


@pytest.mark.slow
def test_the_documented_torchrun_command(tmp_path: Path) -> None:
    config = tiny_run(
        tmp_path, pairs=12, reference=None, loss={"name": "simpo"}, training={"global_batch_size": 4, "steps": 2}
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ours = {"4": "2", "8": "1", "HOST:29500": f"127.0.0.1:{port}", "my.yaml": str(config)}
    words = documented()
    assert all(words.count(word) == 1 for word in ours)
    command = [sys.executable, "-m", "torch.distributed.run", *(ours.get(word, word) for word in words[1:])]
    machines = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    said = [machine.communicate(timeout=240)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert cli("train", str(config), f"output={tmp_path}/alone").returncode == 0
    assert largest_difference(tmp_path / "run", tmp_path / "alone")[0] < 1e-4
