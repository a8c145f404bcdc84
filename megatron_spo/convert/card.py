"""The model card of an exported run."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_spo.checkpoint.folder import Checkpoint

_SECTIONS = ("loss", "spo", "optimizer", "lora", "precision")
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
    header = {
        "base_model": base,
        **licence_of(origin),
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
        "## Usage",
        "",
        "```python",
        (_ADAPTERS if adapters else _MODEL) + "\n" + _ANSWER,
        "```",
        "",
        "## Training",
        *_table("fact", "value", facts),
        "## Settings",
        *_table("key", "value", settings),
    ]
    for title, metrics in _last_metrics(checkpoint).items():
        lines += [f"## {title}", *_table("metric", "value", metrics)]
    return "\n".join(lines) + "\n"


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


def _table(left: str, right: str, entries: Mapping[str, Any]) -> list[str]:
    rows = [f"| {key} | `{json.dumps(value)}` |" for key, value in entries.items() if value is not None]
    return ["", f"| {left} | {right} |", "|---|---|", *rows, ""]


def _last_metrics(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """Returns the last metrics up to the checkpoint, by section title.

    Empty if the checkpoint was moved out of its run directory.
    """
    path = checkpoint.path.parent.parent / "metrics.jsonl"
    last: dict[str, dict[str, Any]] = {}
    for text in path.read_text().splitlines() if path.exists() else ():
        line = json.loads(text)
        if line["step"] <= checkpoint.step:
            title = " ".join(filter(None, ("Metrics:", line.pop("kind"), line.pop("name", ""))))
            last[title] = line
    return last
