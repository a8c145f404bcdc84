"""kill -9 at random moments, the same command again: the weights end as those of a run that nobody disturbed."""

import random
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_spo.cli import main
from tests.support.processes import Ranks, cli, largest_difference
from tests.support.tiny import arithmetic_pairs, tiny_model, write_jsonl

LAYOUTS = {"tp2": ["parallel.tensor=2"], "dp2": []}
KILLS = {"tp2": 15, "dp2": 15}
STEPS = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kill")
    tiny_model(folder / "model", num_hidden_layers=2)
    write_jsonl(folder / "pairs.jsonl", arithmetic_pairs(300))
    write_jsonl(folder / "held-out.jsonl", arithmetic_pairs(6, seed=1))
    (folder / "config.yaml").write_text(
        f"""
output: {folder}/unset
model: {{path: {folder}/model}}
data: {{train: {folder}/pairs.jsonl, eval: {folder}/held-out.jsonl, max_length: 64, row_length: 128}}
reference: {{cache: {folder}/cache}}
loss: {{name: alpha_dpo}}
spo: {{schedule: dual}}
optimizer: {{lr: 1e-3}}
precision: {{dtype: bf16}}
training: {{global_batch_size: 8, steps: {STEPS}, threads: 1, eval_every: 20}}
checkpoint: {{every: 2}}
logging: {{progress: false}}
"""
    )
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_random_kills_change_nothing(folder: Path, layout: str, record_property) -> None:  # type: ignore[no-untyped-def]
    """A third of the kills meets the reference pass, the others the training, from its start-up to its last save."""
    rng = random.Random(layout)
    caches = {name: f"reference.cache={folder}/cache-{layout}-{name}" for name in ("whole", "killed")}
    given = {name: [cache, f"output={folder}/{layout}-{name}", *LAYOUTS[layout]] for name, cache in caches.items()}
    seconds = {}
    for command in ("reference", "train"):
        begin = time.monotonic()
        assert cli(command, str(folder / "config.yaml"), *given["whole"], processes=2).returncode == 0
        seconds[command] = time.monotonic() - begin
    killed = 0
    for command in ("reference", "train"):
        wanted = KILLS[layout] // 3 if command == "reference" else KILLS[layout] - KILLS[layout] // 3
        for attempt in range(10 * wanted):
            name = f"{layout}-{command}-{attempt}"
            (folder / name).mkdir()
            with Ranks(folder / name, command, folder / "config.yaml", *given["killed"]) as job:
                if wanted:
                    time.sleep(rng.uniform(0.3, 0.9) * seconds[command])
                    victim = rng.randrange(2)
                    if job.processes[victim].poll() is None:
                        job.processes[victim].kill()
                        killed, wanted = killed + 1, wanted - 1
                        continue
                codes = job.codes()
                assert codes == [0, 0], f"{codes}\n{job.said(0)}\n{job.said(1)}"
            if not wanted:
                break
        assert wanted == 0
    record_property("kills", killed)
    assert killed == KILLS[layout]
    assert largest_difference(folder / f"{layout}-killed", folder / f"{layout}-whole")[0] == 0.0
    weights = []
    for name in ("whole", "killed"):
        target = folder / f"hf-{layout}-{name}"
        assert main(["convert", str(folder / f"{layout}-{name}"), str(target), "--to", "hf"]) == 0
        weights.append(load_file(target / "model.safetensors"))
    assert all(torch.equal(weights[1][key], tensor) for key, tensor in weights[0].items())
