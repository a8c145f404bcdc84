"""The model card of what a run has trained."""

import json
from collections.abc import Mapping
from typing import Any

from megatron_spo.model.checkpoint_files import Checkpoint

_SECTIONS = ("loss", "spo", "optimizer", "lora", "precision")


def model_card(checkpoint: Checkpoint) -> str:
    """README.md of an exported model: base model, loss, schedule, data, and what the run measured last."""
    config = checkpoint.record["config"]
    base = config["model"]["path"]
    sections = [name for name in _SECTIONS if name != "lora" or config["lora"]["rank"]]
    settings = {f"{name}.{key}": value for name in sections for key, value in config[name].items()}
    facts = {"base model": base, "optimizer steps": checkpoint.step}
    facts |= {f"data, {name}": fingerprint for name, fingerprint in checkpoint.record["data"].items()}
    lines = [
        "---",
        f"base_model: {json.dumps(base)}",
        "library_name: transformers",
        "tags: [preference-optimization, spo, megatron_spo]",
        "---",
        "# A model trained by Stable Preference Optimization",
        *_table("fact", "value", facts),
        "## Settings",
        *_table("key", "value", settings),
    ]
    for title, metrics in _last_metrics(checkpoint).items():
        lines += [f"## {title}", *_table("metric", "value", metrics)]
    return "\n".join(lines) + "\n"


def _table(left: str, right: str, entries: Mapping[str, Any]) -> list[str]:
    rows = [f"| {key} | `{json.dumps(value)}` |" for key, value in entries.items() if value is not None]
    return ["", f"| {left} | {right} |", "|---|---|", *rows, ""]


def _last_metrics(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """The last lines of metrics.jsonl up to the checkpoint, by a title; none where it has left its run directory."""
    path = checkpoint.path.parent.parent / "metrics.jsonl"
    last: dict[str, dict[str, Any]] = {}
    for text in path.read_text().splitlines() if path.exists() else ():
        line = json.loads(text)
        if line["step"] <= checkpoint.step:
            title = " ".join(filter(None, ("Metrics:", line.pop("kind"), line.pop("name", ""))))
            last[title] = line
    return last
