"""Adapters in every layout, with and without a cache, compared with PEFT; saving, refusing and exporting them."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_spo.checkpoint.stored import StoredTensors
from megatron_spo.cli import main
from megatron_spo.model.optimizer import Trainable
from megatron_spo.train import run
from tests.oracles.reference_loop import TokenisedPair, reference_trajectory, response_logprob
from tests.support.grids import grid, layout_settings, selected
from tests.support.processes import NOT_COMPARED, Job, largest_difference, read_metrics, run_jobs
from tests.support.tiny import arithmetic_pairs, tiny_model, tiny_run, write_jsonl

STEPS, BATCH = 5, 6
LAYOUTS = {
    "tp2": ["parallel.tensor=2"],
    "tp2-sp": ["parallel.tensor=2", "parallel.sequence=true", "parallel.recompute=full"],
    "pp2": ["parallel.pipeline=2", "parallel.recompute=full"],
    "dp2": [],
    "cp2": ["parallel.context=2"],
    "pp2-vpp2": ["parallel.pipeline=2", "parallel.virtual_pipeline=2"],
}
SEPARATE = ["spo.sft_data={folder}/sft.jsonl", "spo.sft_batch_size=5"]
TIED = ["model.path={folder}/tied", "lora.targets=[q_proj,v_proj,up_proj,down_proj]", "lora.alpha=3"]
"""A Qwen3 with tied embeddings, and adapters on some of the projections of a fused layer."""
BIASED = ["model.path={folder}/biased"]
"""A Qwen2, whose query, key and value projections have biases."""
OBJECTIVES: dict[str, list[str]] = {
    "penalty": [],
    "penalty-pair-tied": ["spo.constraint=pair", *TIED],
    "dual": ["spo.schedule=dual", "spo.lambda_unit=token"],
    "simpo-separate": ["loss.name=simpo", *SEPARATE],
    "lookahead": ["spo.schedule=lookahead", "spo.lookahead_lr=0.5"],
    "barrier-separate": ["spo.schedule=barrier", "spo.barrier_rate=40", *SEPARATE],
}
ORACLES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "dpo": (["spo.schedule=none", "loss.beta=0.3", *BIASED], {"loss": "dpo", "beta": 0.3}),
    "simpo-token": (
        ["loss.name=simpo", "loss.gamma_beta_ratio=0.3", "spo.lambda_unit=token", "spo.lambda=5", *TIED],
        {"loss": "simpo", "beta": 2.5, "gamma_beta_ratio": 0.3, "schedule": "penalty", "lam": 5.0},
    ),
}
IN_LAYOUT = {  # each objective in three layouts
    "tp2": ["penalty", "penalty-pair-tied", "lookahead"],
    "tp2-sp": ["penalty", "simpo-separate", "barrier-separate"],
    "pp2": ["dual", "penalty-pair-tied", "barrier-separate"],
    "dp2": ["penalty", "dual", "lookahead"],
    "cp2": ["simpo-separate", "barrier-separate", "penalty-pair-tied"],
    "pp2-vpp2": ["dual", "simpo-separate", "lookahead"],
}
CELLS = {
    (layout, objective): [*layout_settings(2, LAYOUTS[layout]), *OBJECTIVES[objective], objective]
    for layout, wanted in IN_LAYOUT.items()
    for objective in wanted
}
EXPORTED = ["one/penalty", "tp2-sp/penalty", "tp2/penalty-pair-tied", "pp2/penalty-pair-tied"]
"""Runs whose exported models are compared."""


def prepare(folder: Path) -> Path:
    return tiny_run(
        folder,
        pairs=STEPS * BATCH,
        held_out=7,
        lora={"rank": 4},
        data={"row_length": 100, "shuffle": False},
        reference=None,
        optimizer={"lr": 1e-2},
        training={"global_batch_size": BATCH, "steps": STEPS, "eval_every": 3},
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    tiny_model(folder / "tied", "qwen3", tie_word_embeddings=True, vocab_size=301)
    tiny_model(folder / "biased", "qwen2")
    sft = [{"prompt": f"Add {r['prompt']}", "completion": f"the sum is {r['chosen']}"} for r in arithmetic_pairs(12)]
    write_jsonl(folder / "sft.jsonl", sft)
    config = prepare(folder)

    def job(command: str, output: str, *settings: str) -> Job:
        return command, str(config), [f"output={folder}/{output}", *(s.format(folder=folder) for s in settings)]

    def train(name: str, objective: str, *more: str) -> Job:
        return job("train", f"{name}/{objective}", *OBJECTIVES[objective], *more)

    cells = selected(request, "layout", "objective") | {tuple(source.split("/")) for source in EXPORTED} - {
        ("one", "penalty")
    }
    two = [train(name, objective, *LAYOUTS[name]) for name, objective in sorted(cells)]
    two.append(job("train", "resharded", "training.steps=2", *LAYOUTS["tp2-sp"]))
    two.append(job("train", "resharded", "training.steps=4", *LAYOUTS["pp2"]))
    one = [train("one", objective) for objective in OBJECTIVES]
    caches = [f"reference.cache={folder}/{name}" for name in ("cache", "tied-cache")]
    one += [job("reference", "unset", *more, cache) for more, cache in zip((SEPARATE, TIED), caches, strict=True)]
    one += [train("cached", objective, caches["tied" in objective]) for objective in OBJECTIVES]
    one.append(train("one-recomputed", "penalty", "parallel.recompute=full"))
    for name, (settings, _) in ORACLES.items():
        one.append(job("train", f"oracle/{name}", *settings))
        one.append(job("train", f"start/{name}", *settings, "optimizer.lr=1e-300", "training.steps=1"))
    one.append(job("train", "resharded"))
    run_jobs(two, 2)
    run_jobs(one, 1)
    return folder


@grid("layout,objective", CELLS)
def test_layout_equals_one_process(runs: Path, layout: str, objective: str) -> None:
    difference, where = largest_difference(runs / layout / objective, runs / "one" / objective)
    assert difference < 1e-4, where


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_model_without_adapters_is_the_cached_reference(runs: Path, objective: str) -> None:
    assert "spo/gap" in read_metrics(runs / "one" / objective)["train", "", 1]
    difference, where = largest_difference(runs / "one" / objective, runs / "cached" / objective)
    assert difference < 1e-5, where  # fp32 sums of about 50 nats, over differently packed rows


def test_recomputed_layers_have_gradients_behind_a_frozen_embedding(runs: Path) -> None:
    difference, where = largest_difference(runs / "one-recomputed/penalty", runs / "one/penalty")
    assert difference < 1e-5, where


def test_a_checkpoint_goes_on_in_other_layouts(runs: Path) -> None:
    """Two steps at TP2 with SP, two at PP2, the last one in one process."""
    whole = read_metrics(runs / "one/penalty")
    for step in range(1, STEPS + 1):
        for key in (("train", "", step), ("eval", "held-out", step)):
            for name, value in read_metrics(runs / "resharded").get(key, {}).items():
                if key in whole and name not in NOT_COMPARED:
                    assert value == pytest.approx(whole[key][name], rel=1e-4, abs=1e-4), f"{name} at {key}"


def pairs_of(model: Path, rows: list[dict[str, str]]) -> list[TokenisedPair]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = [[tokenizer(row[side]).input_ids for side in ("prompt", "chosen", "rejected")] for row in rows]
    return [(prompt, [*chosen, 1], [*rejected, 1]) for prompt, chosen, rejected in ids]


def export(source: Path, target: Path, form: str) -> Path:
    assert main(["convert", str(source), str(target), "--to", form]) == 0
    return target


@pytest.mark.parametrize("name", ORACLES)
def test_steps_equal_a_loop_with_peft(runs: Path, name: str, tmp_path: Path) -> None:
    """Starts from the same adapters and also compares the trained adapters."""
    settings, case = ORACLES[name]
    model = runs / ("tied" if TIED[0] in settings else "biased")
    start = export(runs / "start" / name, tmp_path / "start", "peft")
    pairs = pairs_of(model, arithmetic_pairs(STEPS * BATCH))
    batches = [pairs[i : i + BATCH] for i in range(0, len(pairs), BATCH)]
    final: dict[str, Tensor] = {}
    expected = reference_trajectory(model, batches, **case, lr=1e-2, adapter=start, final_weights=final)
    ours = read_metrics(runs / "oracle" / name)
    for step, line in enumerate(expected, 1):
        for metric, value in line.items():
            if metric == "spo/both_down" and step == 1:
                continue  # the loop's reference differs by rounding, whose sign these metrics count
            got = ours["train", "", step][metric]
            assert got == pytest.approx(value, rel=1e-4, abs=1e-4), f"{metric} at step {step}"
    trained = load_file(export(runs / "oracle" / name, tmp_path / "end", "peft") / "adapter_model.safetensors")
    theirs = {key.replace(".default.", "."): value for key, value in final.items() if "lora_" in key}
    assert trained.keys() == theirs.keys()
    for key, weight in trained.items():
        torch.testing.assert_close(weight, theirs[key], rtol=1e-3, atol=2e-4, msg=key)


@pytest.mark.parametrize("source", EXPORTED)
def test_exports_are_the_model_that_was_evaluated(runs: Path, source: str, tmp_path: Path) -> None:
    base = runs / ("tied" if "tied" in source else "model")
    adapters = export(runs / source, tmp_path / "peft", "peft")
    merged = AutoModelForCausalLM.from_pretrained(export(runs / source, tmp_path / "hf", "hf"))
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapters))
    assert AutoTokenizer.from_pretrained(adapters).eos_token == "<eos>"
    tokens = torch.arange(6, 60)[None]
    pairs = pairs_of(base, arithmetic_pairs(7, seed=1))
    line = read_metrics(runs / source)["eval", "held-out", STEPS]
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens).logits, adapted(tokens).logits, rtol=1e-5, atol=1e-5)
        plain = AutoModelForCausalLM.from_pretrained(base)(tokens).logits
        assert (adapted(tokens).logits - plain).abs().max() > 0.1
        for i, side in enumerate(("chosen", "rejected"), 1):
            mean = sum(response_logprob(adapted, pair[0], pair[i]).item() for pair in pairs) / len(pairs)
            assert line[f"logps/{side}"] == pytest.approx(mean, rel=1e-5)


@pytest.fixture
def job(tmp_path: Path) -> Path:
    prepare(tmp_path)
    return tmp_path


def train(job: Path, *overrides: str) -> int:
    return main(["train", str(job / "config.yaml"), "data.eval=[]", "training.eval_every=0", *overrides])


def test_bf16_starts_at_ln_2_and_leaves_the_base_alone(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Trainable] = []
    before: dict[str, Tensor] = {}
    make = run.make_trainable

    def watched(chunks: Any, *more: Any, **named: Any) -> Trainable:
        before.update({name: p.detach().bfloat16().clone() for name, p in chunks[0].named_parameters()})
        seen.append(make(chunks, *more, **named))
        return seen[0]

    monkeypatch.setattr(run, "make_trainable", watched)
    assert train(job, "precision.dtype=bf16") == 0
    first = read_metrics(job / "run")["train", "", 1]
    assert first["loss/preference"] == pytest.approx(math.log(2), abs=1e-7)
    assert first["spo/chosen_shift"] == first["spo/rejected_shift"] == first["spo/gap"] == 0
    (chunk,), (wrapped,) = seen[0].chunks, seen[0].wrapped
    moved = {name for name, p in chunk.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "_lora." in name}
    adapters = sum(p.numel() for name, p in chunk.named_parameters() if "_lora." in name)
    assert sum(p.numel() for p in seen[0].optimizer.get_parameters()) == adapters
    assert sum(buffer.grad_data.numel() for buffer in wrapped.buffers) < adapters + 1000  # padding


def test_what_is_stored_and_how_it_starts(job: Path) -> None:
    assert train(job, "training.steps=1", "optimizer.lr=1e-300", "lora.targets=[q_proj, down_proj]") == 0
    checkpoint = job / "run/checkpoints/step_00000001"
    keys = set(dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata)
    layers = "decoder.layers."
    query, down = f"{layers}self_attention.linear_qkv_lora.q_proj_", f"{layers}mlp.linear_fc2_lora.down_proj_"
    assert {key for key in keys if key.startswith("decoder") and "_extra_state" not in key} == {
        query + "A",
        query + "B",
        down + "A",
        down + "B",
    }
    assert not [key for key in keys if "word_embeddings" in key or "output_layer.weight" in key]
    stored = StoredTensors(checkpoint)
    a = stored.read(down + "A", None)
    assert a.shape == (4, 4, 64)
    assert 0.95 / 8 < a.abs().max() <= 1 / 8
    assert not torch.equal(a[0], a[1])
    assert not stored.read(query + "B", None).any()


def test_resuming_needs_the_same_base(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(job, "training.steps=1") == 0
    path = job / "model/model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"][3] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    recorded = json.loads((job / "run/provenance.json").read_text())["weights"]
    for command in (
        ["train", str(job / "config.yaml")],
        ["convert", str(job / "run"), str(job / "hf"), "--to", "hf"],
    ):
        capsys.readouterr()
        assert main(command) == 2
        assert f"belong to weights with the fingerprint {recorded}" in capsys.readouterr().err
    assert not (job / "hf").exists()
    assert main(["convert", str(job / "run"), str(job / "peft"), "--to", "peft"]) == 0


def test_other_adapters_on_resume_are_refused_by_name(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(job, "training.steps=1") == 0
    for change in ("lora.rank=8", "lora.alpha=8", "lora.targets=[q_proj]", "lora.rank=0"):
        assert train(job, change, "loss.name=simpo" if change == "lora.rank=0" else "loss.name=dpo") == 2
        assert change.partition("=")[0] in capsys.readouterr().err


def test_a_run_without_adapters_has_none_to_export(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(job, "training.steps=1", "lora.rank=0", "loss.name=simpo") == 0
    assert main(["convert", str(job / "run"), str(job / "peft"), "--to", "peft"]) == 2
    assert "has no adapters, because all weights were trained (lora.rank: 0); use --to hf" in capsys.readouterr().err


def test_sft_measures_no_reference_without_a_cache(job: Path) -> None:
    assert train(job, "spo.schedule=sft") == 0
    assert "spo/gap" not in read_metrics(job / "run")["train", "", 1]
