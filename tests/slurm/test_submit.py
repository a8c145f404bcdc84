"""Before the queue: `slurm submit` from any folder, --check of the scripts, the webhook, links between the nodes."""

import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_spo.errors import UserError
from megatron_spo.runtime.links import Link, summary
from tests.support.slurm import Cluster, missing
from tests.support.tiny import tiny_run

ROOT = Path(__file__).parents[2]
needs_slurm = pytest.mark.skipif(missing() is not None, reason=str(missing()))
SPO = [sys.executable, "-m", "megatron_spo"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("submit")
    tiny_run(
        folder,
        pairs=16,
        shape={"num_hidden_layers": 2},
        output="out",
        loss={"name": "simpo"},
        reference=None,
        spo={"schedule": "none"},
        training={"steps": 2},
    )
    return folder


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[Cluster]:
    with Cluster(folder / "cluster") as cluster:
        yield cluster


@pytest.fixture
def webhook() -> Iterator[tuple[str, list[str]]]:
    """A URL, and the texts that were posted to it."""
    texts: list[str] = []

    class Hook(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            texts.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hook) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/", texts
        server.shutdown()


GIVEN = {
    "SPO_DEVICE": "cpu",
    "SPO_INTERFACE": "lo",
    "PYTHONPATH": str(ROOT),
    "SPO_STEPS": "train export",
    "SPO_MIN_LINK_GB_S": "0",
}


def queued(cluster: Cluster) -> str:
    return cluster.run("squeue", "-h", "--states=all", "-o", "%i").stdout.strip()


@needs_slurm
def test_check_queues_nothing(cluster: Cluster, folder: Path) -> None:
    before = queued(cluster)
    options = ["--nodes", "2", "--gpus-per-node", "1", "--check"]
    done = cluster.run(*SPO, "slurm", "submit", "config.yaml", *options, cwd=folder, **GIVEN)
    assert done.returncode == 0, done.stderr
    assert "ok     layout         2 GPUs" in done.stdout and "ok     SLURM  " in done.stdout
    given = {**GIVEN, "SPO_CONFIG": str(folder / "config.yaml"), "SPO_OUT": str(folder / "x"), "SPO_MIN_FREE_GB": "1"}
    script = ["bash", "slurm/spo_8b_single_node.sh", "--check"]
    done = cluster.run(*script, "--ntasks-per-node=2", **{**given, "SPO_LAYOUT": "parallel.tensor=2"})
    assert done.returncode == 0, done.stderr
    for name in ("variables", "SLURM", "free space", "configuration", "layout", "data", "disk", "memory"):
        assert f"ok     {name}" in done.stdout, done.stdout
    lines = folder / "lines.txt"
    study = ["bash", "slurm/array_study.sh", "--check", "--ntasks-per-node=2"]
    of_study = {**given, "SPO_STUDY": str(lines), "SPO_LAYOUT": "parallel.tensor=2"}
    lines.write_text("loss.name=simpo\n# a comment\nloss.name=cpo\n")
    done = cluster.run(*study, **of_study)
    assert done.returncode == 0, done.stderr
    assert "== loss.name=simpo" in done.stdout and "config.yaml: cpo, " in done.stdout
    lines.write_text("loss.name=simpo\nloss.name=sigmoid\n")
    done = cluster.run(*study, **of_study)
    assert done.returncode == 2 and "it is dpo here" in done.stderr
    lines.write_text("# a comment\n")
    done = cluster.run(*study, **of_study)
    assert done.returncode == 2 and "has no line of overrides" in done.stderr
    assert queued(cluster) == before and not (folder / "x").exists() and not (folder / "out").exists()

    wrong = {
        "3 processes are not a multiple of": ([*script, "--ntasks-per-node=3"], {"SPO_LAYOUT": "parallel.tensor=2"}),
        "SPO_PROMPT is not a variable": (script, {"SPO_PROMPT": "x"}),
        "cannot read SPO_PROMPTS=/no/prompts": (script, {"SPO_PROMPTS": "/no/prompts"}),
        "but SPO_MIN_FREE_GB requires 1000000000": (script, {"SPO_MIN_FREE_GB": "1000000000"}),
        "SLURM would not accept the job: ": ([*script, "--partition=none"], {}),
        "it is dpo here": (script, {"SPO_OVERRIDES": "loss.name=sigmoid"}),
    }
    for part, (command, more) in wrong.items():
        done = cluster.run(*command, **{**given, **more})
        assert done.returncode == 2 and part in done.stderr, done.stdout + done.stderr
    assert queued(cluster) == before


@needs_slurm
def test_submit_from_any_folder(cluster: Cluster, folder: Path, webhook: tuple[str, list[str]]) -> None:
    url, texts = webhook
    given = {**GIVEN, "SPO_MIN_LINK_GB_S": "0.001", "SPO_WEBHOOK": url, "SLURM_WAIT": "10"}
    command = [*SPO, "slurm", "submit", "config.yaml", "training.seed=3", "--nodes", "2", "--gpus-per-node", "1",
               "--sbatch=--nodelist=n[1-2] --cpus-per-task=1"]  # fmt: skip
    done = cluster.run(*command, cwd=folder, **given)
    assert done.returncode == 0, done.stderr
    assert f"logs in {folder}/out/logs" in done.stdout
    job = done.stdout.split("Submitted batch job ")[1].split(";")[0]
    cluster.wait_for(lambda: cluster.state(job) == "")
    log = (folder / "out/logs/job.log").read_text()
    assert cluster.exit_code(job) == 0, log
    assert "links: median " in log and " GB/s between n1 and n2" in log
    assert (folder / "out/hf/step_00000002/model.safetensors").exists()
    assert "seed: 3" in (folder / "out/run/config.yaml").read_text()
    assert texts == [f"spo {job}: all steps are done; results in {folder}/out"]

    done = cluster.run(*command, "optimizer.lr=-1", cwd=folder, **given)
    assert done.returncode == 2 and "optimizer.lr = -1" in done.stderr
    broken = {**given, "SPO_MIN_LINK_GB_S": "1000000"}
    done = cluster.run(*command, "--out", "slow", cwd=folder, **broken)
    job = done.stdout.split("Submitted batch job ")[1].split(";")[0]
    cluster.wait_for(lambda: cluster.state(job) == "")
    assert cluster.exit_code(job) == 2
    assert len(texts) == 2 and texts[1].startswith(f"spo {job}: failed with code 2: the check of the links")
    assert "but at least 1e+06 GB/s are required" in texts[1]


def test_print_shows_the_command(folder: Path) -> None:
    command = [
        *SPO,
        "slurm",
        "submit",
        "config.yaml",
        "--nodes",
        "4",
        "--time",
        "8:00:00",
        "--mail",
        "me@x.org",
        "--print",
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    for part in (
        f"SPO_HOME={ROOT} SPO_CONFIG={folder}/config.yaml SPO_OUT={folder}/out sbatch --nodes=4 --ntasks-per-node=8",
        "--gpus-per-node=8 --time=8:00:00 --mail-type=END,FAIL --mail-user=me@x.org",
        f"{ROOT}/slurm/job.sh",
        "'SPO_STEPS=train export evaluate'",
    ):
        assert part in done.stdout, done.stdout


def test_the_scripts_are_part_of_the_package(tmp_path: Path) -> None:
    build = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path / "lib")]
    done = subprocess.run([*build[:2], "egg_info", "--egg-base", str(tmp_path), *build[2:]], cwd=ROOT,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    code = "from megatron_spo.scaling.slurm import scripts_home; print(scripts_home())"
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                           env={"PYTHONPATH": str(tmp_path / "lib")})  # fmt: skip
    home = Path(found.stdout.strip())
    assert home == tmp_path / "lib/megatron_spo", found.stderr
    names = {path.name for path in (home / "slurm").iterdir()}
    assert {path.name for path in (ROOT / "slurm").iterdir() if path.suffix in (".sh", ".py")} <= names


def test_slow_links_are_named() -> None:
    links = [Link("n1", "n2", 40.0), Link("n2", "n3", 12.0), Link("n3", "n4", 44.0)]
    text = "links: median 40 GB/s, slowest 12 GB/s between n2 and n3; slow: n2-n3 12"
    assert summary(links, 1.0) == text
    with pytest.raises(UserError, match="12 GB/s between n2 and n3, but at least 20 GB/s are required"):
        summary(links, 20.0)
