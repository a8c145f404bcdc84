"""Checks which settings may change when a run resumes from a checkpoint."""

from collections.abc import Mapping
from typing import Any

from megatron_spo.checkpoint.folder import Checkpoint
from megatron_spo.config.load import covers, flat
from megatron_spo.errors import UserError

FREE = ("output", "parallel", "checkpoint", "logging", "reference.cache", "data.eval", "data.num_proc",
        "training.steps", "training.eval_every", "training.threads", "training.time_limit", "training.hang_timeout",
        "training.on_anomaly", "training.spike_factor", "precision.layers", "monitor")  # fmt: skip
"""Sections and keys that may change on resume. They do not alter the trajectory (training.steps: if the learning rate
is constant; monitor, data.eval and training.eval_every: unless an alarm raises lambda), or alter it only where it would
have ended (training.on_anomaly, training.spike_factor) or only by rounding (precision.layers)."""

REMOVED = {"data.last_batch": "keep", "data.drop_ches": 0.0, "model.freeze_router": True, "spo.gap_ema": 0.9}
"""Keys of earlier versions, with the value that is now the only one."""


def changes(found: Checkpoint, config: Mapping[str, Any], data: Mapping[str, str]) -> list[str]:
    """Returns one line for each allowed difference from the checkpoint's run.

    Args:
        found: the checkpoint.
        config: the resolved configuration, as plain data.
        data: fingerprints of the training sets, by name.

    Raises:
        UserError: a difference alters the training and is not listed in checkpoint.allow_changed.
    """
    old, new = _without_removed(dict(flat(found.record["config"]))), dict(flat(config))
    bound = set() if new["optimizer.decay"] == "constant" else {"training.steps"}
    if "raise_lambda" in (old.get("monitor.on_alarm"), new["monitor.on_alarm"]):
        bound |= {"monitor", "data.eval", "training.eval_every"}
    free = [key for key in FREE if key not in bound]
    differ = {key: f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in sorted(old | new)
              if old.get(key) != new.get(key)}  # fmt: skip
    for name, fingerprint in data.items():
        if found.record["data"].get(name) != fingerprint:
            key = "spo.sft_data" if name == "sft" else "data.train"
            differ.setdefault(key, f"{key}: the rows differ from those of the checkpoint")
    allowed = [*free, *config["checkpoint"]["allow_changed"]]
    refused = [text for key, text in differ.items() if not covers(allowed, key)]
    if refused:
        raise UserError(
            f"{found.path} was trained with a different configuration: {'; '.join(refused)}. Restore these keys, "
            "choose another output folder, or list them in checkpoint.allow_changed"
        )
    return [text for key, text in differ.items() if not covers(("checkpoint.allow_changed", "output"), key)]


def _without_removed(old: dict[str, Any]) -> dict[str, Any]:
    """Returns the keys of a checkpoint's configuration in terms of today's keys, as far as they mean the same."""
    if old.get("model.freeze_router") is True:
        old["model.router_aux_loss"] = None
    return {key: value for key, value in old.items() if key not in REMOVED or value != REMOVED[key]}


def check_base(checkpoint: Checkpoint, weights: str | None) -> None:
    """Checks that adapters are used with the weights they were trained on.

    Args:
        checkpoint: the checkpoint of the adapters; its record has the fingerprint of their weights.
        weights: fingerprint of the weights in model.path now.

    Raises:
        UserError: the fingerprints differ.
    """
    recorded = checkpoint.record.get("weights")
    if recorded != weights:
        raise UserError(f"the adapters in {checkpoint.path} belong to weights with the fingerprint {recorded}, but "
                        f"those in model.path have {weights}; restore that model, or start again in another output "
                        "folder")  # fmt: skip
