"""The commands on a tiny model: cache, training, evaluation, resuming, and the message for each wrong input."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_spo.cli import main
from tests.support.processes import TIMES, largest_difference, read_metrics
from tests.support.tiny import arithmetic_pairs, tiny_model, tiny_run, tiny_tokenizer, write_jsonl


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A model, data and a configuration `config.yaml`: DPO with the penalty schedule, 4 steps of 4 pairs."""
    tiny_run(tmp_path, pairs=10, held_out=5, training={"global_batch_size": 4, "eval_every": 2})
    return tmp_path


def command(job: Path, name: str, *overrides: str) -> int:
    return main([name, str(job / "config.yaml"), *overrides])


def error_of(capsys: pytest.CaptureFixture[str], code: int, expected: int = 2) -> str:
    """Returns the only message of a refused command."""
    assert code == expected
    before, *messages = ("\n" + capsys.readouterr().err).split("\nerror: ")
    assert "Traceback" not in before
    assert len(messages) == 1
    return messages[0]


def test_reference_then_train(job, capsys):
    assert command(job, "reference") == 0
    before = sorted((path, path.stat().st_mtime_ns) for path in (job / "cache").rglob("*"))
    assert command(job, "reference") == 0
    assert "already complete" in capsys.readouterr().out
    assert before == sorted((path, path.stat().st_mtime_ns) for path in (job / "cache").rglob("*"))
    assert command(job, "train", "logging.report=true") == 0
    metrics = read_metrics(job / "run")
    assert [key for key in metrics if key[0] == "eval"] == [("eval", "held-out", step) for step in (0, 2, 4)]
    assert metrics["eval", "held-out", 0]["loss/preference"] == pytest.approx(0.693147, abs=1e-6)
    first = metrics["train", "", 1]
    assert first["loss/preference"] == pytest.approx(0.693147, abs=1e-6)
    expected = {
        "loss", "grad_norm", "learning_rate", "rewards/chosen", "rewards/rejected", "rewards/accuracies",
        "rewards/margins", "logps/chosen", "logps/rejected", "loss/preference", "loss/sft", "spo/gap", "spo/lambda",
        "spo/chosen_shift", "spo/rejected_shift", "spo/both_down", "pairs", "tokens", "row_fill",
    } | TIMES - {"mfu"}  # fmt: skip
    assert expected <= first.keys()
    parts = sum(value for name, value in first.items() if name.startswith("seconds/"))
    assert parts == pytest.approx(first["seconds"])
    assert first["tokens_per_second"] == pytest.approx(first["tokens"] / first["seconds"])
    status = json.loads((job / "run/status.json").read_text())
    assert (status["state"], status["step"], status["checkpoint"]) == ("done", 4, "step_00000004")
    assert {"config.yaml", "metrics.jsonl", "report.html", "checkpoints"} <= {p.name for p in (job / "run").iterdir()}


def test_a_run_without_its_page(job):
    assert command(job, "train", "loss.name=simpo", "reference.cache=null", "logging.report=false") == 0
    assert not (job / "run/report.html").exists()


def test_what_is_imported_until_the_first_step(job):
    """A run imports nothing that only other features need, and wandb and TensorBoard can be imported afterwards."""
    code = """
import sys
from megatron_spo.cli import main
from megatron_spo.train.run_directory import RunDirectory

log, given = RunDirectory.log, set(sys.modules)

def note(*arguments):
    log(*arguments)
    heavy = ("wandb", "tensorboard", "torch._dynamo", "torch._inductor", "datasets", "pandas", "scipy", "sklearn",
             "matplotlib", "transformers.models.llama.modeling_llama", "transformers.generation.utils",
             "megatron.core.inference.engines")
    print("imported", [name for name in heavy if name in sys.modules])

RunDirectory.log = note
code = main(sys.argv[1:])
import torch, wandb
from megatron.core.jit import jit_fuser
from torch.utils.tensorboard import SummaryWriter
from megatron_spo.runtime import megatron_import
assert jit_fuser is megatron_import.compile_when_called and torch.compile is megatron_import._compile
calls = []
megatron_import._compile = lambda function, **options: calls.append(options) or torch.relu
double = jit_fuser(lambda x: 2 * x)
assert calls == [] and double(torch.tensor(-1.0)) == 0 and double(torch.tensor(3.0)) == 3 and calls == [{}]
sys.exit(code)
"""
    arguments = ["train", job / "config.yaml", "loss.name=simpo", "reference.cache=null", "training.steps=1"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("imported")][0] == "imported []"


def test_share_of_the_peak_where_the_gpu_is_known(job, monkeypatch):
    assert command(job, "train", "loss.name=simpo", "reference.cache=null", f"output={job}/cpu") == 0
    monkeypatch.setattr("megatron_spo.train.run.name_of", lambda device: "NVIDIA H100 80GB HBM3")
    assert command(job, "train", "loss.name=simpo", "reference.cache=null", f"output={job}/h100") == 0
    cpu, h100 = (read_metrics(job / name)["train", "", 1] for name in ("cpu", "h100"))
    assert "mfu" not in cpu
    assert 0 < h100["mfu"] < 1e-3


def test_train_makes_the_missing_cache_and_says_so(job, capsys):
    """The result is that of a cache made by `reference`, bit for bit."""
    assert command(job, "reference") == 0
    assert command(job, "train", f"output={job}/two-commands") == 0
    shutil.rmtree(job / "cache")
    capsys.readouterr()
    assert command(job, "train") == 0
    assert "has no log-probs of the reference for train, held-out; computing them first" in capsys.readouterr().err
    assert largest_difference(job / "run", job / "two-commands")[0] == 0
    assert command(job, "train", f"output={job}/again", "reference.make=false") == 0
    assert "computing" not in capsys.readouterr().err


def test_the_end_says_what_is_next_and_a_finished_run_that_it_is_finished(job, capsys):
    free = ["loss.name=simpo", "reference.cache=null", "logging.report=true", "checkpoint.best=loss/sft"]
    assert command(job, "train", *free) == 0
    said = capsys.readouterr().out
    assert f"report: {job}/run/report.html" in said
    assert f"best by loss/sft: megatron-spo convert {job}/run/checkpoints/best {job}/run-best --to hf" in said
    exports = [line.partition("export: megatron-spo ")[2] for line in said.splitlines() if "export: " in line]
    assert main(exports[0].split()) == 0
    before = read_metrics(job / "run")
    assert command(job, "train", *free) == 0
    said = capsys.readouterr().out
    assert "already finished, all 4 steps are done" in said and exports[0] in said
    assert read_metrics(job / "run") == before
    assert command(job, "train", *free, "training.steps=6") == 0
    assert "already finished" not in capsys.readouterr().out
    assert ("train", "", 6) in read_metrics(job / "run")


def test_a_finished_run_is_noticed_before_torch_is_imported(job):
    free = ["loss.name=simpo", "reference.cache=null"]
    assert command(job, "train", *free) == 0
    code = "import sys; from megatron_spo.cli import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    arguments = [sys.executable, "-c", code, "train", str(job / "config.yaml"), *free]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert "already finished" in done.stdout and done.stdout.endswith("False\n"), done.stderr
    (job / "held-out.jsonl").unlink()
    done = subprocess.run([*arguments, f"output={job}/new"], capture_output=True, text=True)
    assert "held-out.jsonl does not exist" in done.stderr and done.stdout == "False\n"


def test_step_lines_in_a_log(job, capsys, monkeypatch):
    """Every `logging.every` steps, the first, the last, and one a minute; the files are not changed by it."""
    free = ["loss.name=simpo", "reference.cache=null", "training.steps=6", "logging.every=3", "logging.progress=true"]
    assert command(job, "train", *free, f"output={job}/lines") == 0
    said = capsys.readouterr().err
    form = r"^step (\d)/6  loss \S+  acc \d\.\d\d  \S+ s/step  [\d,.]+ tok/s(  left \d+ s)?$"
    found = re.findall(form, said, re.MULTILINE)
    assert [step for step, _ in found] == ["1", "3", "6"] and [bool(left) for _, left in found] == [True, True, False]
    assert re.search(r"^evaluation after step 0 on held-out  loss \S+  acc \S+  \S+ s$", said, re.MULTILINE)
    assert re.search(r"^saving step 6: \S+ GB$", said, re.MULTILINE)
    assert re.search(r"^saved step_00000006 in \d+ s$", said, re.MULTILINE)
    monkeypatch.setattr("megatron_spo.train.step_lines.AT_LEAST", 0.0)
    assert command(job, "train", *free, f"output={job}/minutes") == 0
    assert len(re.findall(form, capsys.readouterr().err, re.MULTILINE)) == 6
    assert command(job, "train", *free, f"output={job}/silent", "logging.progress=false") == 0
    assert "s/step" not in capsys.readouterr().err
    assert largest_difference(job / "lines", job / "silent")[0] == 0


def test_a_reference_free_loss_needs_no_cache(job):
    assert command(job, "train", "loss.name=simpo", "reference.cache=null") == 0
    assert "spo/gap" not in read_metrics(job / "run")["train", "", 1]
    assert command(job, "train", "loss.name=simpo", "reference.cache=null", "spo.v=1.5", f"output={job}/v") == 0
    line = read_metrics(job / "v")["train", "", 1]
    assert line["spo/gap"] == pytest.approx(line["loss/sft"] - 1.5)


def test_training_goes_on_from_a_checkpoint(job):
    command(job, "reference")
    assert command(job, "train", f"output={job}/whole") == 0
    assert command(job, "train", "training.steps=2") == 0
    assert command(job, "train", "parallel.tensor=1") == 0
    assert largest_difference(job / "run", job / "whole")[0] < 1e-6
    assert json.loads((job / "run/status.json").read_text())["step"] == 4


def test_micro_batches_change_nothing(job):
    command(job, "reference")
    for name, length in (("one-row", 512), ("many-rows", 32)):
        assert command(job, "train", f"output={job}/{name}", f"data.row_length={length}") == 0
    assert largest_difference(job / "many-rows", job / "one-row")[0] < 1e-4


def test_bf16_starts_at_ln_2(job):
    precision = "precision.dtype=bf16"
    assert command(job, "reference", precision) == 0
    assert command(job, "train", precision) == 0
    assert read_metrics(job / "run")["train", "", 1]["loss/preference"] == pytest.approx(0.693147, abs=1e-6)


def test_sft_on_prompt_and_completion(job):
    write_jsonl(job / "pairs.jsonl", [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(8)])
    free = ["spo.schedule=sft", "reference.cache=null", "data.eval=[]", "training.eval_every=0"]
    assert command(job, "train", *free) == 0
    line = read_metrics(job / "run")["train", "", 1]
    assert line["loss"] == pytest.approx(line["loss/sft"])
    assert "rewards/accuracies" not in line


def test_dropped_rows_are_listed(job, capsys):
    rows = [*arithmetic_pairs(6), {"prompt": "1+1=", "chosen": "2", "rejected": "2"}, {"prompt": "1", "chosen": None}]
    write_jsonl(job / "pairs.jsonl", rows)
    assert command(job, "train", "loss.name=simpo", "reference.cache=null", "data.bad_rows=drop") == 0
    assert "2 rows dropped" in capsys.readouterr().err
    listed = [json.loads(line) for line in (job / "run/dropped_rows.jsonl").read_text().splitlines()]
    assert [row["line"] for row in listed] == [7, 8]


def _no_cache(job: Path) -> list[str]:
    shutil.rmtree(job / "cache")
    return ["reference.make=false"]


def _other_weights(job: Path) -> list[str]:
    tiny_model(job / "model", seed=7)
    return []


def _other_rows(job: Path) -> list[str]:
    write_jsonl(job / "pairs.jsonl", arithmetic_pairs(10, seed=3))
    return ["reference.make=false"]


def _other_template(job: Path) -> list[str]:
    tiny_tokenizer(job / "model", chat=True)
    return ["reference.make=false"]


def _torn_cache(job: Path) -> list[str]:
    records = next((job / "cache").glob("train-*/records.npy"))
    records.write_bytes(records.read_bytes()[:-9])
    return []


def _flipped_cache(job: Path) -> list[str]:
    records = next((job / "cache").glob("train-*/records.npy"))
    content = bytearray(records.read_bytes())
    content[-30] ^= 1
    records.write_bytes(content)
    return []


def _change_weights(job: Path, change) -> list[str]:
    path = job / "model/model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return ["loss.name=simpo", "reference.cache=null"]


def _no_tensor(job: Path) -> list[str]:
    return _change_weights(job, lambda tensors: tensors.pop("model.norm.weight"))


def _stray_tensor(job: Path) -> list[str]:
    return _change_weights(job, lambda tensors: tensors.update({"model.extra.weight": torch.zeros(2)}))


def _small_tensor(job: Path) -> list[str]:
    return _change_weights(job, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(9, 32)}))


def _nan_tensor(job: Path) -> list[str]:
    return _change_weights(job, lambda tensors: tensors["lm_head.weight"][40].fill_(float("nan")))


def _torn_weights(job: Path) -> list[str]:
    path = job / "model/model.safetensors"
    path.write_bytes(path.read_bytes()[:200])
    return ["loss.name=simpo", "reference.cache=null"]


def _no_weights(job: Path) -> list[str]:
    (job / "model/model.safetensors").unlink()
    return ["loss.name=simpo", "reference.cache=null"]


def _tokens_beyond(job: Path) -> list[str]:
    config = json.loads((job / "model/config.json").read_text())
    (job / "model/config.json").write_text(json.dumps({**config, "vocab_size": 30}))
    return ["loss.name=simpo", "reference.cache=null", "model.init=random"]


def _no_tokenizer(job: Path) -> list[str]:
    (job / "model/tokenizer.json").unlink()
    return ["loss.name=simpo", "reference.cache=null"]


def _no_model(job: Path) -> list[str]:
    return [f"model.path={job}/absent"]


BROKEN = {
    _no_cache: ["megatron-spo reference"],
    _other_weights: ["weights", "megatron-spo reference"],
    _other_rows: ["megatron-spo reference"],
    _other_template: ["tokenizer", "megatron-spo reference"],
    _torn_cache: ["records.npy", "megatron-spo reference"],
    _flipped_cache: ["records.npy", "megatron-spo reference"],
    _no_tensor: ["model.norm.weight"],
    _stray_tensor: ["model.extra.weight"],
    _small_tensor: ["lm_head.weight", "(9, 32)"],
    _nan_tensor: ["step 0", "not a finite number", "held-out.jsonl line"],
    _torn_weights: ["model.safetensors", "damaged"],
    _no_weights: ["no safetensors", "model.init=random"],
    _tokens_beyond: ["pairs.jsonl line 1", "vocabulary of 30"],
    _no_tokenizer: ["contains no tokenizer", "model.tokenizer"],
    _no_model: ["absent"],
}


@pytest.mark.parametrize("damage", BROKEN, ids=lambda damage: damage.__name__.strip("_"))
def test_wrong_input_is_refused_with_one_message(job, damage, capsys):
    command(job, "reference")
    overrides = damage(job)
    capsys.readouterr()
    message = error_of(capsys, command(job, "train", *overrides), expected=3 if damage is _nan_tensor else 2)
    for part in BROKEN[damage]:
        assert part in message
    assert not (job / "run/checkpoints").exists()


def test_precision_is_part_of_the_cache(job, capsys):
    command(job, "reference")
    assert "precision" in error_of(capsys, command(job, "train", "precision.dtype=bf16"))


def test_other_settings_on_resume_are_refused_by_name(job, capsys):
    command(job, "reference")
    command(job, "train", "training.steps=1")
    message = error_of(capsys, command(job, "train", "optimizer.lr=2e-3", "loss.beta=0.2"))
    assert "optimizer.lr: 0.001 -> 0.002" in message
    assert "loss.beta" in message


def test_failed_runs_say_why(job, capsys):
    overrides = _nan_tensor(job)
    error_of(capsys, command(job, "train", *overrides), expected=3)
    status = json.loads((job / "run/status.json").read_text())
    assert status["state"] == "failed"
    assert "not a finite number" in status["reason"]


def test_damaged_checkpoints_are_named(job, capsys):
    command(job, "reference")
    command(job, "train", "training.steps=1")
    for shard in (job / "run/checkpoints/step_00000001").glob("*.distcp"):
        shard.write_bytes(shard.read_bytes()[:50])
    assert "step_00000001" in error_of(capsys, command(job, "train"))


def test_export_refuses_what_is_not_a_run(job, capsys):
    assert "neither a run directory" in error_of(capsys, main(["convert", str(job), str(job / "x"), "--to", "hf"]))
    assert "already in the format 'hf'" in error_of(
        capsys, main(["convert", str(job / "model"), str(job / "x"), "--to", "hf"])
    )
    command(job, "train", "loss.name=simpo", "reference.cache=null")
    message = error_of(capsys, main(["convert", str(job / "run"), str(job / "model"), "--to", "hf"]))
    assert "not an empty folder" in message
