"""Checks the oracle itself, against whole trajectories of TRL's trainer and against cases by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_spo.config.losses import LOSS_SPECS
from megatron_spo.objective.losses import PairLogprobs
from megatron_spo.objective.step_plan import Pass
from megatron_spo.objective.terms import GlobalCounts, objective
from tests.objective.samples import STATISTICS, only, spo_config
from tests.oracles.reference_loop import TokenisedPair, reference_trajectory, response_logprob
from tests.support.tiny import tiny_model

STEPS = 3
ROWS = [
    {"prompt": "12+3=", "chosen": "15", "rejected": "about 17"},
    {"prompt": "100+23=", "chosen": "123", "rejected": "133"},
    {"prompt": "7+8=", "chosen": "15", "rejected": "it is 1"},
    {"prompt": "45+46=", "chosen": "it makes 91", "rejected": "81"},
]
SHARED_WITH_TRL = [
    "loss",
    "grad_norm",
    "logps/chosen",
    "logps/rejected",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("oracle")
    tiny_model(folder)
    return folder


def tokenised(model_dir: Path) -> list[TokenisedPair]:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    end = [tokenizer.eos_token_id]

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    return [(ids(row["prompt"]), ids(row["chosen"]) + end, ids(row["rejected"]) + end) for row in ROWS]


def trl_trajectory(model_dir: Path, out: Path, **settings: Any) -> list[dict[str, float]]:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    config = trl.DPOConfig(
        output_dir=str(out),
        per_device_train_batch_size=len(ROWS),
        max_steps=STEPS,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        disable_tqdm=True,
        **settings,
    )
    trainer = trl.DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32),
        args=config,
        train_dataset=datasets.Dataset.from_list(ROWS),
        processing_class=AutoTokenizer.from_pretrained(model_dir),
    )
    trainer.train()
    return trainer.state.log_history[:STEPS]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"loss": "dpo"}, {"loss_type": ["sigmoid"]}),
        ({"loss": "ipo", "beta": 0.5}, {"loss_type": ["ipo"], "beta": 0.5}),
        (
            {"loss": "dpo", "schedule": "penalty", "lam": 2.0, "lambda_unit": "token"},
            {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 2.0]},
        ),
        ({"loss": "dpo", "schedule": "sft"}, {"loss_type": ["sft"]}),
    ],
)
def test_trl_goes_the_same_way(model_dir: Path, tmp_path: Path, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    steps = reference_trajectory(model_dir, [tokenised(model_dir)] * STEPS, lr=1e-3, **ours)
    for step, expected in zip(steps, trl_trajectory(model_dir, tmp_path, **theirs), strict=True):
        for name in SHARED_WITH_TRL:
            assert step[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-5), name


@pytest.mark.parametrize(
    ("loss", "unit"),
    [("dpo", "token"), ("dpo", "relative"), ("simpo", "token"), ("simpo", "relative"), ("ipo", "token")],
)
def test_its_objective_is_ours(model_dir: Path, loss: str, unit: str) -> None:
    """Compares two independent implementations of the formulas on a model that differs from its reference."""
    batch = tokenised(model_dir)
    settings: dict[str, Any] = {"loss": loss, "beta": 0.7, "gamma_beta_ratio": 0.4}
    settings.update(schedule="penalty", lam=1.5, lambda_unit=unit, lr=1e-2)
    weights: dict[str, torch.Tensor] = {}
    reference_trajectory(model_dir, [batch], final_weights=weights, **settings)
    second = reference_trajectory(model_dir, [batch] * 2, **settings)[1]

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    with torch.no_grad():
        reference = [[response_logprob(model, prompt, side) for prompt, *both in batch for side in both]]
        model.load_state_dict(weights)
        policy = [[response_logprob(model, prompt, side) for prompt, *both in batch for side in both]]
    sums = torch.tensor(policy + reference).view(2, len(batch), 2)
    counts = torch.tensor([[float(len(chosen)), float(len(rejected))] for _, chosen, rejected in batch])
    pairs = PairLogprobs(*sums[0].T, *counts.T, *sums[1].T)
    parameters: dict[str, float | bool] = {**LOSS_SPECS[loss].parameters, "beta": 0.7}
    if loss == "simpo":
        parameters["gamma_beta_ratio"] = 0.4
    value, per_pair = objective(
        pairs,
        Pass(1.0, 1.5),
        losses=only(loss, parameters),
        spo=spo_config(lambda_unit=unit),
        counts=GlobalCounts(len(batch), int(counts[:, 0].sum())),
        statistics=STATISTICS,
    )
    assert second["loss"] == pytest.approx(value.item(), rel=1e-5)
    assert second["loss/preference"] == pytest.approx(per_pair["preference"].mean().item(), rel=1e-5)
    assert second["loss"] != second["loss/preference"]


def test_first_step_at_the_reference(model_dir: Path) -> None:
    (step,) = reference_trajectory(model_dir, [tokenised(model_dir)], loss="dpo")
    assert step["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert step["spo/gap"] == step["spo/chosen_shift"] == step["spo/rejected_shift"] == 0.0
    assert step["rewards/accuracies"] == 0.5


def test_clipping_changes_the_step_and_not_the_reported_norm(model_dir: Path) -> None:
    batches = [tokenised(model_dir)] * 2
    clipped = reference_trajectory(model_dir, batches, clip=1e-9, eps=1e-8)  # Adam's step shrinks below eps
    free = reference_trajectory(model_dir, batches, clip=0.0)
    assert clipped[0]["grad_norm"] == free[0]["grad_norm"] > 0.1
    assert abs(clipped[1]["loss"] - 0.6931472) < 0.1 * abs(free[1]["loss"] - 0.6931472)
