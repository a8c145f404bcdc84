"""The job scripts under a real SLURM with a tiny model: undisturbed and disturbed jobs, arrays and refused input."""

import contextlib
import csv
import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.support.processes import largest_difference, steps_done
from tests.support.slurm import Cluster, missing
from tests.support.tiny import tiny_run, write_jsonl

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
STEPS = 240
TWO_NODES = ["--nodes=2", "--ntasks-per-node=1", "--nodelist=n[1-2]", "--cpus-per-task=1"]
ONE_NODE = ["--ntasks-per-node=2", "--cpus-per-task=1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slurm")
    write_jsonl(folder / "prompts.jsonl", [{"prompt": "1+1="}, {"prompt": "20+30="}])
    tiny_run(
        folder,
        shape={"num_hidden_layers": 2},
        pairs=64,
        held_out=6,
        output=None,
        reference=None,
        loss={"name": "alpha_dpo"},
        spo={"schedule": "dual"},
        training={"global_batch_size": 4, "steps": STEPS, "eval_every": 50},
        checkpoint={"every": 20},
        logging=None,
    )
    return folder


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[Cluster]:
    with Cluster(folder / "cluster") as cluster:
        yield cluster


def variables(folder: Path, out: str, **more: str) -> dict[str, str]:
    return {
        "SPO_CONFIG": str(folder / "config.yaml"),
        "SPO_OUT": str(folder / out),
        "SPO_LAYOUT": "parallel.tensor=2",
        "SPO_DEVICE": "cpu",
        "SPO_INTERFACE": "lo",
        "SPO_MIN_FREE_GB": "1",
        "SLURM_WAIT": "10",
        **more,
    }


def finish(cluster: Cluster, job: str, seconds: float = 600) -> int:
    """Waits for the end of a job; returns its exit code."""
    cluster.wait_for(lambda: cluster.state(job) == "", seconds)
    return cluster.exit_code(job)


@pytest.fixture(scope="module")
def whole(cluster: Cluster, folder: Path) -> Path:
    """Returns SPO_OUT of an undisturbed job on one node."""
    given = variables(folder, "whole", SPO_REHEARSE="1")
    job = cluster.submit("spo_8b_single_node.sh", folder / "whole.log", *ONE_NODE, **given)
    assert finish(cluster, job) == 0, (folder / "whole.log").read_text()
    assert "evaluate: skipped, because SPO_PROMPTS is not set" in (folder / "whole.log").read_text()
    return folder / "whole"


def model_of(out: Path) -> Path:
    return out / f"hf/step_{STEPS:08d}"


def assert_same_training(out: Path, whole: Path) -> None:
    """Asserts that all metrics and weights are equal bit for bit."""
    assert largest_difference(out / "run", whole / "run")[0] == 0.0
    got, expected = (load_file(model_of(one) / "model.safetensors") for one in (out, whole))
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def test_a_job_ends_with_a_model(whole: Path) -> None:
    status = json.loads((whole / "run/status.json").read_text())
    assert (status["state"], status["step"]) == ("done", STEPS)
    assert AutoModelForCausalLM.from_pretrained(model_of(whole)).config.num_hidden_layers == 2
    assert "peak of the tensors" in (whole / "logs/rehearse.log").read_text()


@pytest.mark.slow
def test_a_job_goes_on_by_itself_whatever_happens(cluster: Cluster, folder: Path, whole: Path) -> None:
    out, log = folder / "disturbed", folder / "disturbed.log"
    given = variables(folder, "disturbed", SPO_PROMPTS=str(folder / "prompts.jsonl"), SPO_GENERATE="--max-new-tokens 4")
    job = cluster.submit("spo_70b.sh", log, *TWO_NODES, **given)

    def at_step(step: int) -> None:
        cluster.wait_for(lambda: steps_done(out / "run") >= step and cluster.state(job) == "RUNNING")

    def restarts() -> int:
        return log.read_text().count("starts on n[1-2]") - 1 if log.exists() else 0

    at_step(30)
    cluster.run("scancel", "--batch", "--signal=USR1", job)  # as SLURM does before the time limit
    cluster.wait_for(lambda: restarts() == 1)
    assert "train stopped and can be resumed; requeueing the job\n" in log.read_text()

    at_step(70)
    cluster.run("scontrol", "requeue", job)  # as a preemption does
    cluster.wait_for(lambda: restarts() == 2)

    at_step(120)
    for process in cluster.rank(job, 1):  # a lost node reports nothing, nor does its SLURM daemon
        os.kill(process, signal.SIGKILL)
    cluster.wait_for(lambda: restarts() == 3)
    assert "train lost a process: rank 1 (host" in log.read_text()

    at_step(170)
    cluster.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")  # SLURM then requeues the job itself
    cluster.run("scontrol", "update", "NodeName=n2", "State=RESUME")
    cluster.wait_for(lambda: restarts() == 4)

    assert finish(cluster, job) == 0, log.read_text()
    assert_same_training(out, whole)
    model = AutoModelForCausalLM.from_pretrained(model_of(out))
    assert model.config.num_hidden_layers == 2
    answers = [json.loads(line) for line in (out / f"answers-step_{STEPS:08d}.jsonl").read_text().splitlines()]
    assert [len(answer["responses"]) for answer in answers] == [1, 1]

    again = cluster.submit("spo_70b.sh", folder / "again.log", *TWO_NODES, **given)
    assert finish(cluster, again) == 0
    said = (folder / "again.log").read_text()
    assert all(said.count(f"{name}: already done") == 1 for name in ("reference", "train", "export", "evaluate"))
    assert "megatron-spo" not in said


@pytest.mark.slow
def test_a_study_is_an_array_with_a_table(cluster: Cluster, folder: Path, whole: Path) -> None:
    (folder / "study.txt").write_text(
        "# the first as in the configuration\nspo.schedule=dual\n\nloss.name=simpo 'training.steps=40'\n"
        "optimizer.lrr=1\noptimizer.lr=1e30\n"
    )
    given = variables(folder, "study", SPO_STUDY=str(folder / "study.txt"), SPO_AT_ONCE="2")
    options = ["--output", str(folder / "study-%x-%j.log"), *ONE_NODE]
    done = cluster.run("bash", "slurm/array_study.sh", *options, **given)
    assert done.returncode == 0, done.stderr
    first = folder / "study/1/run"
    cluster.wait_for(lambda: steps_done(first) >= 60)
    owner = (folder / "study/1/logs/owner").read_text().strip()
    cluster.run("scontrol", "requeue", owner)
    table = folder / "study/summary.txt"
    cluster.wait_for(table.exists)
    head, *rows = table.read_text().splitlines()
    assert head.split()[:4] == ["run", "state", "step", "loss"]
    assert [row.split()[:3] for row in rows] == [
        ["1", "done", str(STEPS)],
        ["2", "done", "40"],
        ["3", "failed", "0"],
        ["4", "failed", "1"],
    ]
    assert "train ended with code 2: command line: unknown key 'optimizer.lrr'" in rows[2].partition("<-")[2]
    assert "not a finite number" in rows[3].partition("<-")[2]
    assert "error: train ended with code 3: " in (folder / "study/4/logs/job.log").read_text()
    assert_same_training(folder / "study/1", whole)


@pytest.mark.slow
def test_a_study_file_is_submitted_and_its_table_made(cluster: Cluster, folder: Path) -> None:
    """`scaling study --slurm submit` with the script's own header, 8 processes per run."""
    out = folder / "submitted"
    given = variables(folder, "submitted")
    spec = {
        "base": given.pop("SPO_CONFIG"),
        "out": given.pop("SPO_OUT"),
        "set": {"training.steps": 3, "training.eval_every": 3, "reference.cache": "{out}/reference"},
        "vary": {"loss.name": ["dpo", "simpo"]},
    }
    study = folder / "study.yaml"
    study.write_text(json.dumps(spec))
    command = [sys.executable, "-m", "megatron_spo", "scaling", "study", str(study)]
    done = cluster.run(*command, "--slurm", "submit", SBATCH_OUTPUT=str(folder / "submitted-%x-%j.log"), **given)
    assert done.returncode == 0, done.stderr
    cluster.wait_for((out / "summary.txt").exists)
    done = cluster.run(*command)
    assert done.returncode == 0, done.stderr
    with (out / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["loss.name"], row["state"], row["training_steps"]) for row in rows] == [
        ("dpo", "done", "3"),
        ("simpo", "done", "3"),
    ]
    assert all(float(row["eval/loss"]) > 0 for row in rows)


@pytest.mark.slow
def test_rounds_resume_by_themselves(cluster: Cluster, folder: Path) -> None:
    """Two parts are sampled on two nodes, and both nodes train; a warning in the middle of the training."""
    (folder / "likes.py").write_text(
        "def it(prompts, completions, **others):\n    return [sum(map(ord, text)) % 7 for text in completions]\n"
    )
    write_jsonl(folder / "many.jsonl", [{"prompt": f"{i}+{i}="} for i in range(8)])
    spec = {
        "base": str(folder / "config.yaml"),
        "out": "replaced",
        "rounds": 1,
        "prompts": str(folder / "many.jsonl"),
        "sampling": {"samples": 4, "max_new_tokens": 6, "parts": 2},
        "pairs": {"scorer": "function=likes:it", "unfinished": "reject"},
    }
    (folder / "rounds.yaml").write_text(json.dumps(spec))
    given = variables(folder, "rounds", SPO_CONFIG=str(folder / "rounds.yaml"), PYTHONPATH=str(folder))
    out, log = folder / "rounds", folder / "rounds.log"
    at = out / "rounds/round-1"
    job = cluster.submit("spo_rounds.sh", log, *TWO_NODES, **given)
    cluster.wait_for(lambda: steps_done(at / "run") >= 30)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    assert finish(cluster, job) == 0, log.read_text()
    said = log.read_text()
    assert "rounds stopped and can be resumed; requeueing the job" in said
    assert "all rounds are done" in said
    assert "resuming from step_" in (at / "stages/train.log").read_text()
    assert "parallel" in (at / "run/config.yaml").read_text()
    assert AutoModelForCausalLM.from_pretrained(at / "model").config.num_hidden_layers == 2
    assert "stages" in (out / "logs/rounds.log").read_text()


REFUSED = {
    "no config": ({"SPO_CONFIG": ""}, "SPO_CONFIG is not set"),
    "no folder": ({"SPO_OUT": ""}, "SPO_OUT is not set"),
    "unknown": ({"SPO_PROMPT": "x"}, "SPO_PROMPT is not a variable of these scripts"),
    "step": ({"SPO_STEPS": "train exprot"}, "unknown step exprot"),
    "number": ({"SPO_MIN_FREE_GB": "1TB"}, "SPO_MIN_FREE_GB must be a whole number, not 1TB"),
    "gpu": ({"SPO_DEVICE": "gpu"}, "no GPU found (nvidia-smi: command not found)"),
    "disk": ({"SPO_MIN_FREE_GB": "1000000000"}, "SPO_MIN_FREE_GB requires 1000000000"),
    "file": ({"SPO_PROMPTS": "/nowhere/prompts"}, "cannot read /nowhere/prompts"),
    "python": ({"SPO_PYTHON": "/nowhere/python"}, "/nowhere/python -m megatron_spo does not start"),
    "container": ({"SPO_CONTAINER": "image.sqsh"}, "has no --container-image; it requires pyxis"),
    "key": ({"SPO_OVERRIDES": "optimizer.lrr=1"}, "reference ended with code 2: "),
    "word": ({"SPO_OVERRIDES": "'a"}, "cannot be split into words: 'a"),
}


def test_what_is_wrong_is_said_before_anything_starts(cluster: Cluster, folder: Path) -> None:
    jobs = {}
    for name, (changed, _) in REFUSED.items():
        given = {**variables(folder, f"refused {name}"), **changed}
        jobs[name] = cluster.submit("spo_8b_single_node.sh", folder / f"{name}.log", *ONE_NODE, **given)
    for name, job in jobs.items():
        assert finish(cluster, job) == 2, name
        said = (folder / f"{name}.log").read_text()
        assert REFUSED[name][1] in said.partition("error: ")[2], said


@pytest.mark.slow
def test_a_node_that_does_not_share_the_folder_is_named(cluster: Cluster, folder: Path) -> None:
    if "n3" not in cluster.nodes_up():
        pytest.skip("the kernel does not permit mount namespaces here (unshare --mount)")
    options = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--nodelist=n1,n3"]
    given = variables(folder, "cluster/hidden/out")
    job = cluster.submit("spo_70b.sh", folder / "hidden.log", *options, **given)
    assert finish(cluster, job) == 2
    said = (folder / "hidden.log").read_text()
    assert "node n3: does not see the SPO_OUT of the first node" in said
    assert "node n1:" not in said


def ready_for_warnings(out: Path, command: str) -> int:
    """Returns the number of processes of a command that write to `out` and handle SIGUSR1."""
    count, bit = 0, 1 << (signal.SIGUSR1 - 1)
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            if b"megatron_spo" in words and command.encode() in words and any(str(out).encode() in w for w in words):
                caught = re.search(r"SigCgt:\s*(\w+)", (process / "status").read_text())
                count += bool(caught and int(caught[1], 16) & bit)
    return count


@pytest.mark.slow
def test_a_warning_that_brings_nothing_new_is_not_repeated_for_ever(cluster: Cluster, folder: Path) -> None:
    log = folder / "attempts.log"
    job = cluster.submit("spo_8b_single_node.sh", log, *ONE_NODE, **variables(folder, "attempts", SPO_ATTEMPTS="0"))
    cluster.wait_for(lambda: ready_for_warnings(folder / "attempts", "reference") == 2)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    assert finish(cluster, job) == 4
    assert "no progress in 0 attempts in a row (SPO_ATTEMPTS)" in log.read_text()


@pytest.mark.slow
def test_a_job_ended_by_its_user_stays_ended(cluster: Cluster, folder: Path) -> None:
    log = folder / "cancelled.log"
    job = cluster.submit("spo_8b_single_node.sh", log, *ONE_NODE, **variables(folder, "cancelled"))
    cluster.wait_for(lambda: log.exists() and "reference: 1 x 2 processes" in log.read_text())
    cluster.run("scancel", job)
    cluster.wait_for(lambda: cluster.state(job) == "")
    assert "JobState=CANCELLED" in cluster.run("scontrol", "-o", "show", "job", job).stdout


@pytest.mark.slow
def test_two_jobs_do_not_share_a_folder(cluster: Cluster, folder: Path) -> None:
    (folder / "taken/logs").mkdir(parents=True)
    holder = cluster.run(
        "sbatch", "--parsable", "--output=/dev/null", "--wrap=sleep 30", "--nodelist=n4"
    ).stdout.strip()
    (folder / "taken/logs/owner").write_text(holder)
    job = cluster.submit("spo_8b_single_node.sh", folder / "taken.log", *ONE_NODE, **variables(folder, "taken"))
    assert finish(cluster, job) == 2
    assert f"SPO_OUT={folder}/taken is in use by job {holder}" in (folder / "taken.log").read_text()
    cluster.run("scancel", holder)


@pytest.mark.parametrize("script", ["spo_70b.sh", "spo_8b_single_node.sh", "spo_rounds.sh", "array_study.sh"])
def test_slurm_accepts_the_header(cluster: Cluster, script: str) -> None:
    cluster.wait_for(lambda: cluster.nodes_up() >= {"n1", "n2", "n4"})
    fewer = [] if "n3" in cluster.nodes_up() or script not in ("spo_70b.sh", "spo_rounds.sh") else ["--nodes=3"]
    done = cluster.run("sbatch", "--test-only", *fewer, f"slurm/{script}")
    assert done.returncode == 0, done.stderr


def test_outside_of_slurm_the_scripts_say_what_to_do(cluster: Cluster) -> None:
    done = cluster.run("bash", "slurm/spo_70b.sh")
    assert done.returncode == 2
    assert "this is a job script; submit it with: sbatch slurm/spo_70b.sh" in done.stderr
    done = cluster.run("bash", "slurm/array_study.sh")
    assert done.returncode == 2
    assert "SPO_STUDY" in done.stderr
