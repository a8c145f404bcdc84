"""Compares values and gradients of the losses with TRL's own trainers for given log-probs.

The expected numbers come from TRL's methods, called on trainer objects without a model. Only the model (a function
that returns log-probs) and the gathering of metrics over processes are replaced. The tests' comments say where TRL
and this package differ on purpose.
"""

from collections import defaultdict
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_spo.objective.losses import PairLogprobs, preference_losses
from tests.objective.samples import STATISTICS, defaults, make_pairs, only, random_pairs

trl = pytest.importorskip("trl")

TRL_NAMES = {"dpo": "sigmoid"}  # losses with another name as TRL's `loss_type`
DPO_CASES = [
    ("dpo", {}),
    ("robust", {"label_smoothing": 0.2}),
    ("ipo", {}),
    ("hinge", {}),
    ("exo_pair", {"label_smoothing": 0.01}),
    ("nca_pair", {}),
    ("apo_zero", {}),
    ("apo_down", {}),
    ("sppo_hard", {"beta": 0.05}),
    ("discopop", {"discopop_tau": 0.3}),
    ("bco_pair", {"beta": 0.3}),  # like TRL 1.16, without a running reward shift
]


@pytest.fixture(autouse=True)
def double_by_default() -> Iterator[None]:
    """Makes fp64 the default dtype, in which TRL creates some constants."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def _accelerator() -> SimpleNamespace:
    return SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)


def trl_dpo(loss_type: str, pairs: PairLogprobs, **settings: Any) -> Tensor:
    """Returns TRL's `DPOTrainer._compute_loss` (mean over pairs) with a model that returns the given log-probs."""
    lengths = torch.cat([pairs.chosen_tokens, pairs.rejected_tokens]).long()
    width = int(lengths.max()) + 1  # one prompt token, which predicts the first response token
    positions = torch.arange(width)
    completion = (positions >= 1) & (positions <= lengths[:, None])
    per_token = torch.cat([pairs.chosen, pairs.rejected])[:, None] / lengths[:, None]
    log_probs = per_token * completion[:, 1:]
    blank = torch.zeros_like(log_probs)
    outputs = SimpleNamespace(log_probs=log_probs, entropy=blank, mean_logits=blank, is_top1=blank.bool())
    trainer = object.__new__(trl.DPOTrainer)
    state: dict[str, Any] = {
        "model": SimpleNamespace(training=True),
        "accelerator": _accelerator(),
        "_metrics": {"train": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
        "args": SimpleNamespace(discopop_tau=settings.get("discopop_tau")),
        "aux_loss_enabled": False,
        "ld_alpha": None,
        "precompute_ref_logps": True,
        "f_divergence_type": "reverse_kl",
        "use_weighting": False,
        "loss_types": [loss_type],
        "loss_weights": [1.0],
        "beta": settings["beta"],
        "label_smoothing": settings.get("label_smoothing", 0.0),
    }
    trainer.__dict__.update(state)
    inputs = {
        "input_ids": torch.zeros(completion.shape, dtype=torch.long),
        "attention_mask": torch.ones(completion.shape, dtype=torch.long),
        "completion_mask": completion.long(),
        "ref_chosen_logps": pairs.reference_chosen,
        "ref_rejected_logps": pairs.reference_rejected,
    }
    return trainer._compute_loss(lambda **_: outputs, inputs, return_outputs=False)


def trl_cpo(chosen: Tensor, rejected: Tensor, loss_type: str, **settings: Any) -> Tensor:
    """Returns TRL's `CPOTrainer.cpo_loss` per pair."""
    from trl.experimental.cpo import CPOTrainer

    trainer: Any = object.__new__(CPOTrainer)
    state = {"alpha": 0.0, "loss_type": loss_type, "label_smoothing": 0.0, "accelerator": _accelerator()}
    trainer.__dict__.update(state, **settings)
    return trainer.cpo_loss(chosen, rejected)[0]


def assert_same(ours: Tensor, theirs: Tensor, pairs: PairLogprobs, *, rtol: float = 1e-9, atol: float = 1e-12) -> None:
    """Checks that values and gradients in both log-probs are equal."""
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)
    leaves = (pairs.chosen, pairs.rejected)
    gradients = torch.autograd.grad(ours.sum(), leaves)
    expected = torch.autograd.grad(theirs.sum(), leaves)
    torch.testing.assert_close(gradients, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize(("name", "settings"), DPO_CASES)
def test_dpo_trainer(name: str, settings: dict[str, float]) -> None:
    pairs = random_pairs(9)
    parameters = defaults(name, **settings)
    ours = preference_losses(only(name, parameters), pairs, STATISTICS).mean()
    assert_same(ours, trl_dpo(TRL_NAMES.get(name, name), pairs, **parameters), pairs)


def test_label_smoothing_of_dpo_is_the_one_trl_keeps_in_aot() -> None:
    # TRL's sigmoid has no label smoothing any more; its aot sorts a batch, which for a single pair changes
    # nothing.
    for seed in range(5):
        pairs = random_pairs(1, seed=seed)
        ours = preference_losses(only("dpo", defaults("dpo", label_smoothing=0.3)), pairs, STATISTICS).mean()
        assert_same(ours, trl_dpo("aot", pairs, beta=0.1, label_smoothing=0.3), pairs)


def test_ipo_of_sums() -> None:
    # TRL's DPO trainer averages only; its CPO trainer has the same square on whatever log-probs it is given.
    pairs = random_pairs(9)
    ours = preference_losses(only("ipo", defaults("ipo", average=False)), pairs, STATISTICS)
    assert_same(ours, trl_cpo(pairs.chosen_ratio, pairs.rejected_ratio, "ipo", beta=0.1), pairs)


def test_simpo() -> None:
    pairs = random_pairs(9)
    parameters = {"beta": 2.5, "gamma_beta_ratio": 0.3, "label_smoothing": 0.1}
    ours = preference_losses(only("simpo", parameters), pairs, STATISTICS)
    theirs = trl_cpo(pairs.chosen_mean, pairs.rejected_mean, "simpo", beta=2.5, simpo_gamma=0.75, label_smoothing=0.1)
    assert_same(ours, theirs, pairs)


def test_alpha_dpo_is_simpo_with_a_margin_per_pair() -> None:
    # TRL has no AlphaDPO; its SimPO takes the margin, computed here from the formula.
    pairs = random_pairs(9)
    parameters = defaults("alpha_dpo", label_smoothing=0.1)
    gap = (pairs.mean_gap.detach() - STATISTICS.mean) / STATISTICS.std
    gamma = 2.5 * (0.2 * gap + 0.6)
    ours = preference_losses(only("alpha_dpo", parameters), pairs, STATISTICS)
    theirs = trl_cpo(pairs.chosen_mean, pairs.rejected_mean, "simpo", beta=2.5, simpo_gamma=gamma, label_smoothing=0.1)
    assert_same(ours, theirs, pairs)


def test_cpo() -> None:
    pairs = random_pairs(9)
    ours = preference_losses(only("cpo", defaults("cpo", label_smoothing=0.1)), pairs, STATISTICS)
    theirs = trl_cpo(pairs.chosen, pairs.rejected, "sigmoid", beta=0.1, label_smoothing=0.1)
    assert_same(ours, theirs, pairs)


def test_odds_ratio_term_of_orpo() -> None:
    from trl.experimental.orpo import ORPOTrainer

    trainer: Any = object.__new__(ORPOTrainer)
    trainer.__dict__.update(beta=0.2, accelerator=_accelerator())
    pairs = random_pairs(9)
    odds = preference_losses(only("orpo", {"beta": 0.2}), pairs, STATISTICS) + pairs.chosen_mean
    theirs = -trainer.odds_ratio_loss(pairs.chosen_mean, pairs.rejected_mean)[0].double()
    assert_same(odds, theirs, pairs, rtol=2e-5, atol=1e-6)  # TRL computes it in fp32


def _logits_trainer(trainer_class: Any, **settings: Any) -> Any:
    trainer: Any = object.__new__(trainer_class)
    state = {"is_encoder_decoder": False, "pad_token_id": 0, "padding_value": 0, "aux_loss_enabled": False}
    trainer.__dict__.update(state, accelerator=_accelerator(), **settings)
    return trainer


def _batch(lengths: tuple[list[int], list[int]]) -> dict[str, Tensor]:
    """Returns sequences of one prompt token and a response, in the format of TRL's CPO and ORPO collators."""
    generator = torch.Generator().manual_seed(3)
    batch = {}
    for side, sizes in zip(("chosen", "rejected"), lengths, strict=True):
        mask = torch.arange(max(sizes) + 1) <= torch.tensor(sizes)[:, None]
        tokens = torch.randint(1, 11, mask.shape, generator=generator).masked_fill(~mask, 0)
        batch[f"{side}_input_ids"] = tokens
        batch[f"{side}_attention_mask"] = mask.long()
        labels = tokens.masked_fill(~mask, -100)
        labels[:, 0] = -100
        batch[f"{side}_labels"] = labels
    return batch


def _summed(trainer_class: Any, logits: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Returns TRL's own summed log-probs of the batch for `logits`."""
    labels = trainer_class.concatenated_inputs(batch, padding_value=0)["concatenated_labels"]
    sums = trainer_class.get_batch_logps(logits, labels, average_log_prob=False)
    return sums.chunk(2)


@pytest.mark.parametrize("chosen_lengths", [[4, 4, 4], [6, 2, 4]])
@pytest.mark.parametrize("name", ["cpo", "orpo"])
def test_nll_of_cpo_and_orpo(name: str, chosen_lengths: list[int]) -> None:
    # TRL's NLL is a token mean over the micro-batch (ORPO: with the prompt; a prompt of one token predicts
    # nothing of itself). Ours is a mean over pairs of token means: the same for equal lengths, and related as
    # computed here.
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    trainer_class: Any = CPOTrainer if name == "cpo" else ORPOTrainer
    trainer = _logits_trainer(
        trainer_class, alpha=0.0, beta=0.1, loss_type="sigmoid", label_smoothing=0.0, cpo_alpha=0.7
    )
    batch = _batch((chosen_lengths, [3, 5, 2]))
    width = max(*chosen_lengths, 5) + 1
    logits = torch.randn(6, width, 11, generator=torch.Generator().manual_seed(4)).requires_grad_()

    def model(*_: Any, **__: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=logits)

    theirs = trainer.get_batch_loss_metrics(model, batch)[0]

    chosen, rejected = _summed(trainer_class, logits, batch)
    counts = torch.tensor(chosen_lengths).double(), torch.tensor([3.0, 5.0, 2.0])
    pairs = PairLogprobs(chosen, rejected, *counts)
    weight = 0.7 if name == "cpo" else 1.0
    parameters = {"beta": 0.1, "label_smoothing": 0.0, "nll_weight": 0.7} if name == "cpo" else {"beta": 0.1}
    ours = preference_losses(only(name, parameters), pairs, STATISTICS).mean()
    token_mean, pair_mean = -chosen.sum() / counts[0].sum(), -pairs.chosen_mean.mean()
    if len(set(chosen_lengths)) == 1:
        assert token_mean.item() == pytest.approx(pair_mean.item())
    torch.testing.assert_close(ours + weight * (token_mean - pair_mean), theirs, rtol=1e-5, atol=1e-6)


def test_dpop_is_dpo_where_the_chosen_rose_and_moves_the_margin_where_it_fell() -> None:
    # TRL has no DPO-Positive: its DPO computes the same where the penalised chosen log-prob is given to it.
    pairs = random_pairs(9)
    assert pairs.reference_chosen is not None
    assert pairs.reference_rejected is not None
    fallen = (pairs.reference_chosen - pairs.chosen).detach().clamp(min=0)
    shifted = make_pairs(
        pairs.chosen.detach() - 50 * fallen,
        pairs.rejected.detach(),
        (pairs.chosen_tokens.int().tolist(), pairs.rejected_tokens.int().tolist()),
        (pairs.reference_chosen.tolist(), pairs.reference_rejected.tolist()),
    )
    ours = preference_losses(only("dpop"), pairs, STATISTICS).mean()
    torch.testing.assert_close(ours, trl_dpo("sigmoid", shifted, beta=0.3), rtol=1e-9, atol=1e-12)
