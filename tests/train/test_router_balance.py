"""The load-balancing loss of the routers, compared with its definition in plain transformers, and what it must not
change."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_spo.convert.export import to_hf
from tests.support.processes import Job, read_metrics, run_jobs
from tests.support.tiny import arithmetic_pairs, tiny_run

STEPS, BATCH, LR, BETA, WEIGHT, EXPERTS, TOP = 3, 4, 1e-3, 0.1, 0.5, 4, 2


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("balance")
    config = tiny_run(
        folder,
        family="mixtral",
        shape={"num_local_experts": EXPERTS, "num_experts_per_tok": TOP},
        pairs=STEPS * BATCH,
        model={"router_aux_loss": 0.0},
        data={"eval": f"{folder}/pairs.jsonl", "row_length": 64, "shuffle": False},
        loss={"beta": BETA},
        spo={"schedule": "none"},
        optimizer={"lr": LR, "clip_grad": 0},
        training={"global_batch_size": BATCH, "steps": STEPS},
    )
    balanced = f"model.router_aux_loss={WEIGHT}"
    jobs: list[Job] = [("reference", str(config), [])]
    jobs += [
        ("train", str(config), [f"output={folder}/{name}", *more])
        for name, more in {
            "balanced": [balanced],
            "free": [],
            "first": [balanced, "training.steps=1"],
            "first-free": ["training.steps=1"],
            "sft": [balanced, "spo.schedule=sft", "reference.cache=null"],
        }.items()
    ]
    run_jobs(jobs, 1)
    return folder


def response(logits: Tensor, tokens: list[int], prompt: int) -> Tensor:
    """Returns the log-prob of the tokens after the prompt."""
    logprobs = logits[:-1].log_softmax(-1)
    return logprobs.gather(1, torch.tensor(tokens[1:])[:, None])[prompt - 1 :].sum()


def plain_loop(folder: Path) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Runs DPO with the balancing loss by its definition: f of the previous batch, P over all tokens, counting the
    tokens that a pair shares once."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    rows, lines, shares = arithmetic_pairs(STEPS * BATCH), [], None
    for step in range(STEPS):
        losses, routed = [], []
        for row in rows[step * BATCH : (step + 1) * BATCH]:
            prompt, chosen, rejected = (tokenizer(row[side]).input_ids for side in ("prompt", "chosen", "rejected"))
            both = [prompt + chosen + [1], prompt + rejected + [1]]
            shared = next(i for i, (a, b) in enumerate(zip(*both, strict=False)) if a != b)
            sums = []
            for tokens, first in zip(both, (0, shared), strict=True):
                out = model(torch.tensor([tokens]), output_router_logits=True)
                with torch.no_grad():
                    theirs = response(reference(torch.tensor([tokens])).logits[0], tokens, len(prompt))
                sums.append(response(out.logits[0], tokens, len(prompt)) - theirs)
                routed.append(torch.stack(out.router_logits)[:, first:])
            losses.append(torch.nn.functional.softplus(-BETA * (sums[0] - sums[1])))
        probabilities = torch.cat(routed, dim=1).softmax(-1)  # [layers, tokens, experts]
        picked = torch.nn.functional.one_hot(probabilities.topk(TOP).indices, EXPERTS).sum(2).float().mean(1) / TOP
        mean = probabilities.mean(1)
        objective = torch.stack(losses).mean()
        loss = objective
        if shares is not None:
            loss = objective + WEIGHT * EXPERTS * (shares * mean).sum()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
        optimizer.step()
        aux = EXPERTS * (picked * mean).sum(-1).mean()
        lines.append({"loss": objective.item(), "loss/router_aux": aux.item(), "grad_norm": norm.item()})
        shares = picked
    return lines, model.state_dict()


def test_steps_equal_the_definition(runs: Path, tmp_path: Path) -> None:
    lines, weights = plain_loop(runs)
    ours = read_metrics(runs / "balanced")
    for step, line in enumerate(lines, 1):
        for name, value in line.items():
            assert ours["train", "", step][name] == pytest.approx(value, rel=1e-4, abs=1e-4), f"{name} at {step}"
    to_hf(runs / "balanced", tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, weights[name], rtol=1e-3, atol=2e-4, msg=name)


def test_it_changes_the_gradient_from_the_second_batch_on(runs: Path) -> None:
    balanced, free = read_metrics(runs / "balanced"), read_metrics(runs / "free")
    assert balanced["train", "", 1]["grad_norm"] == free["train", "", 1]["grad_norm"]
    assert abs(balanced["train", "", 2]["grad_norm"] - free["train", "", 2]["grad_norm"]) > 1e-3
    assert not any("loss/router_aux" in line for line in free.values())


def test_evaluation_has_none_of_it(runs: Path) -> None:
    """After one step, which the loss does not affect yet, the evaluation is the same with and without it."""
    balanced, free = (read_metrics(runs / name)["eval", "pairs", 1] for name in ("first", "first-free"))
    assert {**balanced, "seconds": 0} == {**free, "seconds": 0}


def test_an_sft_step_has_it_too(runs: Path) -> None:
    lines = [line for (kind, _, _), line in read_metrics(runs / "sft").items() if kind == "train"]
    assert len(lines) == STEPS
    assert all(1 <= line["loss/router_aux"] <= EXPERTS / TOP for line in lines)
