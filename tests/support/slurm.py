"""Runs a SLURM cluster of four "nodes" on this machine with the installed daemons; its state is in one folder."""

import contextlib
import getpass
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
DAEMONS = ("slurmctld", "slurmd", "munged", "sbatch")
PATH = f"{os.environ['PATH']}:/usr/sbin"
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
GresTypes=gpu
KillWait=5
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=96 RealMemory=1000 Gres=gpu:8
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=96 RealMemory=1000 Gres=gpu:8
NodeName=n3 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[3]} CPUs=96 RealMemory=1000 Gres=gpu:8
NodeName=n4 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[4]} CPUs=96 RealMemory=1000 Gres=gpu:8
PartitionName=main Nodes=n[1-4] Default=YES MaxTime=INFINITE State=UP
"""
"""`cred_expire`: seconds that a requeued job waits. The short times here are minutes by default."""


def free_ports(count: int) -> list[int]:
    """Returns free ports below the kernel's range of ephemeral ports."""
    with contextlib.ExitStack() as stack:
        ports: list[int] = []
        while len(ports) < count:
            one = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                one.bind(("", random.SystemRandom().randrange(12000, 20000)))
                ports.append(one.getsockname()[1])
    return ports


def missing() -> str | None:
    """Returns why a cluster cannot run here, or None."""
    absent = [name for name in DAEMONS if shutil.which(name, path=PATH) is None]
    return f"not installed: {', '.join(absent)} (Debian: slurmctld slurmd slurm-client munge)" if absent else None


class Cluster:
    """Nodes n1 to n4. On n3 an empty folder is mounted over `hidden`; if the kernel does not permit that, there is no
    n3."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.hidden = folder, folder / "hidden"
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "SPO_"))},
            "PATH": PATH,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
            "SPO_PYTHON": sys.executable,
        }

    def __enter__(self) -> "Cluster":
        self.hidden.mkdir(parents=True)
        (self.folder / "state").mkdir()
        ports = free_ports(5)
        values = {"folder": self.folder, "host": socket.gethostname().partition(".")[0], "user": getpass.getuser()}
        (self.folder / "slurm.conf").write_text(CONFIGURATION.format(ports=ports, **values))
        (self.folder / "gres.conf").write_text(f"NodeName=n[1-4] Name=gpu File={self.folder}/gpu[0-7]\n")
        for number in range(8):  # SLURM only counts the device files
            (self.folder / f"gpu{number}").touch()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        munge = [f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        try:
            self._start("munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", *munge)
            self.wait_for((self.folder / "munge.socket").exists)
            self._start("slurmctld", "-D", "-c")
            for node in ("n1", "n2", "n4"):
                self._start("slurmd", "-D", "-N", node)
            hide = 'mount -t tmpfs none "$0" && exec slurmd -D -N n3'
            self._start("unshare", "--mount", "sh", "-c", hide, str(self.hidden))
            self.wait_for(lambda: self.nodes_up() >= {"n1", "n2", "n4"})
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        """Kills the daemons and everything they started: all processes with the configuration file in their
        environment."""
        for daemon in reversed(self._daemons):
            daemon.terminate()
        mark = f"SLURM_CONF={self.folder}/slurm.conf".encode()
        for _ in range(50):
            found = [process for process in Path("/proc").iterdir() if process.name.isdigit() and _has(process, mark)]
            for process in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(process.name), signal.SIGKILL)
            if not found:
                break
            time.sleep(0.1)
        for daemon in self._daemons:
            daemon.wait(10)

    def _start(self, *command: str) -> None:
        with (self.folder / "daemons.log").open("ab") as log:
            command = ("setpriv", "--pdeathsig=KILL", *command)  # even if the tests are killed
            self._daemons.append(subprocess.Popen(command, env=self._environment, stdout=log, stderr=log))

    def run(self, *command: str, cwd: Path | str = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
        """Runs a command of the cluster, by default in the repository's root, with more variables set."""
        environment = {**self._environment, **variables}
        return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, check=False)

    def submit(self, script: str, log: Path, *options: str, **variables: str) -> str:
        """Submits slurm/SCRIPT with `log` as its output; returns the job's number."""
        done = self.run("sbatch", "--parsable", f"--output={log}", *options, f"slurm/{script}", **variables)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def nodes_up(self) -> set[str]:
        """Returns the names of the nodes that can run a job."""
        return set(self.run("sinfo", "-h", "-N", "--states=idle,mixed,allocated", "-o", "%N").stdout.split())

    def state(self, job: str) -> str:
        """Returns PENDING, RUNNING, ..., or "" once the job is over."""
        return self.run("squeue", "-h", "-j", job, "-o", "%T", "--states=PENDING,RUNNING,COMPLETING").stdout.strip()

    def exit_code(self, job: str) -> int:
        """Returns the exit code of a job that is over."""
        shown = dict(
            part.split("=", 1) for part in self.run("scontrol", "-o", "show", "job", job).stdout.split() if "=" in part
        )
        return int(shown["ExitCode"].partition(":")[0])

    def wait_for(self, condition: Callable[[], bool], seconds: float = 600) -> None:
        """Wait until something has happened."""
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until, "\n".join(
                f"== {path}\n{path.read_text(errors='replace')[-1000:]}" for path in self.folder.parent.rglob("*.log")
            )
            time.sleep(0.05)

    def rank(self, job: str, number: int) -> list[int]:
        """Returns the process ids of a rank of the running step and of its slurmstepd."""
        for process in Path("/proc").iterdir():
            if process.name.isdigit() and _has(
                process, f"\0SLURM_JOB_ID={job}\0".encode(), f"\0RANK={number}\0".encode()
            ):
                parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
                if (Path("/proc") / parent / "cmdline").read_bytes().startswith(b"slurmstepd"):
                    return [int(process.name), int(parent)]
        raise AssertionError(f"job {job} has no rank {number}")


def _has(process: Path, *marks: bytes) -> bool:
    """Returns whether a process was started with all of these in its environment."""
    try:
        environment = (process / "environ").read_bytes()
    except OSError:
        return False
    return all(mark in environment for mark in marks)
