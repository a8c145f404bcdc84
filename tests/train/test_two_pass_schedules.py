"""Compares lookahead and barrier with the same steps in plain transformers."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.oracles.reference_loop import response_logprob
from tests.support.processes import largest_difference, read_metrics, run_jobs
from tests.support.tiny import arithmetic_pairs, tiny_run

STEPS, BATCH, LR, ALPHA, LAMBDA, RATE = 3, 4, 1e-3, 0.05, 0.5, 40.0
SETTINGS = {
    "lookahead": ["spo.schedule=lookahead", f"spo.lookahead_lr={ALPHA}", f"spo.lambda={LAMBDA}"],
    "barrier": ["spo.schedule=barrier", f"spo.barrier_rate={RATE}"],
}
LAYOUTS = {
    "tp2-sp": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "dp2": (2, []),
    "dp2-pp2": (4, ["parallel.pipeline=2"]),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two-pass")
    made = tiny_run(
        folder,
        shape={"tie_word_embeddings": True},
        pairs=STEPS * BATCH,
        data={"row_length": 64, "shuffle": False},
        optimizer={"lr": LR},
        training={"global_batch_size": BATCH, "steps": STEPS},
    )
    config = str(made)

    def jobs(name: str, layout: list[str]) -> list[tuple[str, str, list[str]]]:
        return [("train", config, [f"output={folder}/{name}/{s}", *SETTINGS[s], *layout]) for s in SETTINGS]

    run_jobs([("reference", config, []), *jobs("one", [])], 1)
    for processes in (2, 4):
        wanted = [(name, layout) for name, (count, layout) in LAYOUTS.items() if count == processes]
        run_jobs([job for name, layout in wanted for job in jobs(name, layout)], processes)
    return folder


def plain_loop(folder: Path, schedule: str) -> list[dict[str, float]]:
    """Runs the steps by their definition, on whole gradients."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, attn_implementation="eager")
    reference = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0)
    rows, gap, lines = arithmetic_pairs(STEPS * BATCH), 0.0, []
    for step in range(STEPS):
        batch = [
            [tokenizer(row[side]).input_ids + [1] * (side != "prompt") for side in ("prompt", "chosen", "rejected")]
            for row in rows[step * BATCH : (step + 1) * BATCH]
        ]
        tokens = sum(len(chosen) for _, chosen, _ in batch)

        def both() -> tuple[Tensor, Tensor]:
            sums = [[response_logprob(m, p, x) for m in (model, reference) for x in (c, r)] for p, c, r in batch]  # noqa: B023
            margins = torch.stack([(w - rw) - (lo - rl) for w, lo, rw, rl in sums])
            chosen = torch.stack([w for w, *_ in sums])
            return torch.nn.functional.softplus(-0.1 * margins).mean(), -chosen.sum() / tokens  # noqa: B023

        f, g = both()
        v = -sum(response_logprob(reference, p, c).item() for p, c, _ in batch) / tokens
        g_gradient = torch.autograd.grad(g, parameters, retain_graph=True)
        if schedule == "lookahead":
            before = [p.detach().clone() for p in parameters]
            with torch.no_grad():
                for p, direction in zip(parameters, g_gradient, strict=True):
                    p.sub_(ALPHA * direction)
            f_gradient = torch.autograd.grad(both()[0], parameters)
            with torch.no_grad():
                for p, value in zip(parameters, before, strict=True):
                    p.copy_(value)
            weight = LAMBDA
        else:
            f_gradient = torch.autograd.grad(f, parameters)
            inner = sum((a * b).sum().item() for a, b in zip(f_gradient, g_gradient, strict=True))
            norm = sum((b * b).sum().item() for b in g_gradient)
            weight = max(0.0, (RATE * max(gap, 0.0) - inner) / norm)
        for p, a, b in zip(parameters, f_gradient, g_gradient, strict=True):
            p.grad = a + weight * b
        total = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        gap = g.item() - v
        lines.append(
            {"loss": f.item() + weight * g.item(), "spo/gap": gap, "grad_norm": total.item(), "spo/lambda": weight}
        )
    return lines


@pytest.mark.parametrize("schedule", SETTINGS)
def test_steps_equal_the_definition(runs: Path, schedule: str) -> None:
    ours = read_metrics(runs / "one" / schedule)
    for step, line in enumerate(plain_loop(runs, schedule), 1):
        for name, value in line.items():
            assert ours["train", "", step][name] == pytest.approx(value, rel=2e-4, abs=2e-4), f"{name} at {step}"


@pytest.mark.parametrize("schedule", SETTINGS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_agree(runs: Path, layout: str, schedule: str) -> None:
    difference, where = largest_difference(runs / layout / schedule, runs / "one" / schedule)
    assert difference < 1e-4, where
