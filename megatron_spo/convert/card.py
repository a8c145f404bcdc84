"""The model card of an exported run."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_spo.checkpoint.folder import Checkpoint

_SECTIONS = ("loss", "spo", "optimizer", "lora", "precision")
_METRICS = ("loss", "loss/preference", "loss/sft", "spo/gap", "spo/both_down", "rewards/accuracies", "rewards/margins",
            "logps/chosen", "logps/rejected", "policy/entropy")  # fmt: skip
"""The metrics that a card shows, at most ten."""
_PAPER = "https://arxiv.org/abs/2507.07723"
_LICENCE = ("license", "license_name", "license_link")
_MODEL = """from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or its hub id
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")"""
_ADAPTERS = """from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

folder = "."  # this folder, or its hub id; the base model is the one that adapter_config.json names
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype="auto")"""
_ANSWER = """
prompt = "What is the capital of Spain?"
if tokenizer.chat_template:
    messages = [{"role": "user", "content": prompt}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
inputs = tokenizer(prompt, add_special_tokens=not tokenizer.chat_template, return_tensors="pt")
output = model.generate(**inputs.to(model.device), max_new_tokens=64)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""


def model_card(checkpoint: Checkpoint, origin: Path, *, adapters: bool = False) -> str:
    """Returns the text of an export's README.md: usage, base model, licence, settings, data and last metrics.

    Args:
        checkpoint: The exported checkpoint.
        origin: Folder of the model that the run started from.
        adapters: Whether only the adapters are exported.
    """
    config = checkpoint.record["config"]
    base = base_name(config["model"]["path"])
    sections = [name for name in _SECTIONS if name != "lora" or config["lora"]["rank"]]
    settings = {f"{name}.{key}": value for name in sections for key, value in config[name].items()}
    facts = {"base model": base, "optimizer steps": checkpoint.step}
    facts |= {f"data, {name}": fingerprint for name, fingerprint in checkpoint.record["data"].items()}
    hub_id = hub_id_of(config["model"]["path"], origin)
    data = [source["path"] for source in config["data"]["train"] if _is_hub_id(source["path"])]
    header: dict[str, Any] = {
        **({} if hub_id is None else {"base_model": hub_id}),
        **({} if hub_id is None else {"base_model_relation": "adapter" if adapters else "finetune"}),
        **licence_of(origin),
        **({"datasets": data} if data else {}),
        "library_name": "peft" if adapters else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["preference-optimization", "spo", "megatron_spo"],
    }
    what = "Adapters" if adapters else "A model"
    lines = [
        "---",
        *(f"{key}: {json.dumps(value)}" for key, value in header.items()),
        "---",
        f"# {what} trained by Stable Preference Optimization",
        "",
        f"Trained with megatron_spo by [SPO]({_PAPER}): {', '.join(_names(config))}.",
        "",
        "## Usage",
        "",
        "```python",
        (_ADAPTERS if adapters else _MODEL) + "\n" + _ANSWER,
        "```",
        "",
        "## Training",
        *_table(["fact", "value"], [[key, json.dumps(value)] for key, value in facts.items()]),
        "## Settings",
        *_table(["key", "value"], [[key, json.dumps(value)] for key, value in settings.items() if value is not None]),
        *_metrics(checkpoint),
    ]
    return "\n".join(lines) + "\n"


def _names(config: Mapping[str, Any]) -> list[str]:
    losses = config["loss"]["name"]
    return [*(losses if isinstance(losses, list) else [losses]), f"spo.schedule: {config['spo']['schedule']}"]


def hub_id_of(path: str, origin: Path) -> str | None:
    """Returns the hub id of the model at `path`, or None: the hub rejects a card with another `base_model`.

    For a folder, it is the name in the path of the hub's cache, or the one that config.json of `origin` records.
    """
    if _is_hub_id(name := base_name(path)):
        return name
    try:
        recorded = json.loads((origin / "config.json").read_text(encoding="utf-8")).get("_name_or_path")
    except (OSError, ValueError, AttributeError):
        return None
    return recorded if isinstance(recorded, str) and _is_hub_id(recorded) else None


def _is_hub_id(text: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", text) is not None and not Path(text).exists() and text[0] not in "./"


def base_name(path: str) -> str:
    """Returns the hub id of the model at `path`, or the name of its folder; never a path."""
    folder = Path(path)
    if not folder.is_dir() and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        return path
    if found := re.search(r"models--([\w.-]+?)--([\w.-]+)/snapshots/", f"{folder.absolute()}/"):
        return f"{found[1]}/{found[2]}"  # a folder in the hub's cache
    return folder.resolve().name


def licence_of(origin: Path) -> dict[str, str]:
    """Returns the licence entries in the header of a model's README.md; empty if there are none."""
    try:
        header = re.match(r"---\s*\n(.*?)\n---", (origin / "README.md").read_text(encoding="utf-8"), re.DOTALL)
        values = yaml.safe_load(header[1]) if header else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    known = values if isinstance(values, dict) else {}
    return {key: known[key] for key in _LICENCE if isinstance(known.get(key), str)}


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return [
        *lines,
        *(f"| {row[0]} | {' | '.join(f'`{cell}`' if cell else '' for cell in row[1:])} |" for row in rows),
        "",
    ]


def _metrics(checkpoint: Checkpoint) -> list[str]:
    """Returns the last metrics up to the checkpoint, of training and of each held-out set, as a section.

    Empty if the checkpoint was moved out of its run directory.
    """
    path = checkpoint.path.parent.parent / "metrics.jsonl"
    last: dict[str, dict[str, Any]] = {}
    for text in path.read_text().splitlines() if path.exists() else ():
        line = json.loads(text)
        if line["step"] <= checkpoint.step and line["kind"] in ("train", "eval"):
            last[line.get("name", "training")] = line
    names = [name for name in _METRICS if any(name in line for line in last.values())]
    if not names:
        return []
    rows = [[name, *(_digits(line.get(name)) for line in last.values())] for name in names]
    return ["## Metrics", *_table(["metric", *last], rows)]


def _digits(value: Any) -> str:
    """Returns a number with four significant digits."""
    return f"{value:.4g}" if isinstance(value, int | float) else ""
