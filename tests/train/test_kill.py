"""kill -9 at random moments, then the same command again: the final weights equal those of an uninterrupted run."""

import random
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_spo.cli import main
from tests.support.processes import Ranks, cli, largest_difference, steps_done
from tests.support.tiny import tiny_run

LAYOUTS = {"tp2": ["parallel.tensor=2"], "dp2": []}
STEPS, TRAIN_KILLS, REFERENCE_KILLS = 100, 11, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kill")
    tiny_run(
        folder,
        shape={"num_hidden_layers": 2},
        pairs=6000,
        held_out=6,
        data={"row_length": 128},
        loss={"name": "alpha_dpo"},
        spo={"schedule": "dual"},
        precision={"dtype": "bf16"},
        training={"steps": STEPS, "eval_every": 10},
        checkpoint={"every": 2},
    )
    return folder


class Disturbed:
    """Starts a command repeatedly; each time a rank is killed after a little more work, or during start-up."""

    def __init__(self, folder: Path, layout: str, command: str, given: list[str]) -> None:
        self._folder, self._layout, self._command, self._given = folder, layout, command, given
        self._random, self.kills = random.Random(f"{layout} {command}"), 0

    def run(self, kills: int, done: Path) -> None:
        """Kills a rank `kills` times, then lets the command finish. `done`: the run directory or the cache."""
        while True:
            name = self._folder / f"{self._layout}-{self._command}-{self.kills}"
            name.mkdir()
            with Ranks(name, self._command, self._folder / "config.yaml", *self._given) as job:
                if self.kills == kills:
                    codes = job.codes()
                    assert codes == [0, 0], f"{codes}\n{job.said(0)}\n{job.said(1)}"
                    return
                if self._random.random() < 0.2:
                    time.sleep(self._random.uniform(0.5, 3.0))
                else:
                    enough = self._progress(done) + self._random.randint(1, 3)
                    job.wait_for(lambda: self._progress(done) >= enough)  # noqa: B023 (called at once)
                    time.sleep(self._random.uniform(0.0, 0.2))  # within a step, a save, a write
                victim = self._random.randrange(2)
                assert job.processes[victim].poll() is None, f"it ended before kill {self.kills}\n{job.said(victim)}"
                job.processes[victim].kill()
                self.kills += 1

    def _progress(self, done: Path) -> int:
        if self._command == "train":
            return steps_done(done)
        return len(list(done.glob("train-*/parts/*.part")))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_random_kills_change_nothing(folder: Path, layout: str, record_property) -> None:
    cache = {name: folder / f"cache-{layout}-{name}" for name in ("whole", "killed")}
    output = {name: folder / f"{layout}-{name}" for name in cache}
    given = {
        name: [f"reference.cache={cache[name]}", f"output={output[name]}", *LAYOUTS[layout]] for name in cache
    }  # fmt: skip
    for command in ("reference", "train"):
        assert cli(command, str(folder / "config.yaml"), *given["whole"], processes=2).returncode == 0
    kills = 0
    for command, wanted, done in (
        ("reference", REFERENCE_KILLS, cache["killed"]),
        ("train", TRAIN_KILLS, output["killed"]),
    ):
        disturbed = Disturbed(folder, layout, command, given["killed"])
        disturbed.run(wanted, done)
        kills += disturbed.kills
    record_property("kills", kills)
    assert largest_difference(output["killed"], output["whole"])[0] == 0.0
    weights = []
    for name in output:
        target = folder / f"hf-{layout}-{name}"
        assert main(["convert", str(output[name]), str(target), "--to", "hf"]) == 0
        weights.append(load_file(target / "model.safetensors"))
    assert all(torch.equal(weights[1][key], tensor) for key, tensor in weights[0].items())
