"""Side files of a model: tokenizer, chat templates, processor, generation config, licence and model card."""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from megatron_spo.checkpoint.folder import COMMON, SEAL
from megatron_spo.config.model_folder import (
    CONFIG,
    GENERATION_CONFIG,
    INDEX,
    has_weights,
    read_config,
    read_generation_config,
    read_json_object,
    shard_files,
    token_ids,
)
from megatron_spo.errors import UserError

CARD = "README.md"
TEMPLATE, TEMPLATES = "chat_template.jinja", "additional_chat_templates"
TOKENIZER_CONFIG = "tokenizer_config.json"
_TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*",
              TEMPLATES, "*.tiktoken", "tekken.json", "spiece.model", "sentencepiece*", "*.spm")  # fmt: skip
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.onnx", "*.npz",
            "*.index.json")  # fmt: skip
_MEGATRON = (COMMON, "metadata.json", SEAL, "*.distcp")


@dataclass(frozen=True)
class Sides:
    """The side files of a model, and what training adds to them.

    Attributes:
        folders: Folders of the files; a file in a later folder overrides one in an earlier folder.
        tokenizer: Folder of another tokenizer, which replaces the model's.
        chat_template: Text of the template used in training, if it is not the tokenizer's.
        ends: Token ids with which the model was trained to end its answers.
        card: Text of README.md, which replaces the one in the folders.
    """

    folders: tuple[Path, ...]
    tokenizer: Path | None = None
    chat_template: str | None = None
    ends: tuple[int, ...] = ()
    card: str | None = None

    def write(self, target: Path) -> list[str]:
        """Writes all of them into the folder `target`; returns messages for the user.

        Raises:
            UserError: If a file cannot be copied.
        """
        notes = []
        try:
            for folder in filter(Path.is_dir, self.folders):
                notes += _copy_all(folder, target, but=() if self.tokenizer is None else _TOKENIZER)
            if self.tokenizer is not None:
                _copy([path for path in self.tokenizer.iterdir() if _matches(path, _TOKENIZER)], target)
        except (OSError, shutil.Error) as error:
            raise UserError(f"a file next to the weights cannot be copied: {error}") from error
        if self.chat_template is not None:
            write_chat_template(target, self.chat_template)
        if self.card is not None:
            (target / CARD).write_text(self.card, encoding="utf-8")
        return notes + self._add_ends(target)

    def _add_ends(self, target: Path) -> list[str]:
        """Adds the tokens of `ends` to eos_token_id, so that generation stops where the model was trained to stop."""
        if not self.ends:
            return []
        generation = read_generation_config(target)
        if generation is None:  # transformers then reads these keys from config.json
            raw = read_config(self.folders[0]) if (self.folders[0] / CONFIG).exists() else {}
            keys = ("bos_token_id", "eos_token_id", "pad_token_id")
            generation = {key: raw[key] for key in keys if raw.get(key) is not None}
        known = token_ids(generation.get("eos_token_id"), f"{target / CONFIG}: eos_token_id")
        if not (added := [token for token in self.ends if token not in known]):
            return []
        ids = [*known, *added]
        generation["eos_token_id"] = ids if len(ids) > 1 else ids[0]
        (target / GENERATION_CONFIG).write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
        return [f"added {', '.join(map(str, added))} to eos_token_id in {GENERATION_CONFIG}, because the model was "
                "trained to end its answers with it"]  # fmt: skip


def write_chat_template(folder: Path, text: str) -> None:
    """Makes `text` the default chat template of the tokenizer in a folder; templates with other names are kept.

    In transformers (5.24), chat_template.jinja and additional_chat_templates/ override tokenizer_config.json.
    """
    (folder / TEMPLATE).write_text(text, encoding="utf-8")
    path = folder / TOKENIZER_CONFIG
    if not path.exists():
        return
    content = read_json_object(path)
    if (old := content.pop("chat_template", None)) is None:
        return
    for name, template in _named(old):
        if name != "default" and not (folder / TEMPLATES / f"{name}.jinja").exists():
            (folder / TEMPLATES).mkdir(exist_ok=True)
            (folder / TEMPLATES / f"{name}.jinja").write_text(template, encoding="utf-8")
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def has_chat_template(folder: Path) -> bool:
    """Returns whether the tokenizer in a folder has a default chat template."""
    path = folder / TOKENIZER_CONFIG
    return (folder / TEMPLATE).exists() or (path.exists() and bool(read_json_object(path).get("chat_template")))


def _named(templates: Any) -> Iterator[tuple[str, str]]:
    """Yields the names and texts of the templates in a tokenizer_config.json; none if it holds one unnamed template."""
    for one in templates if isinstance(templates, list) else ():
        if not isinstance(one, dict) or not all(isinstance(one.get(key), str) for key in ("name", "template")):
            raise UserError(f"{TOKENIZER_CONFIG}: every entry of chat_template must have a name and a template")
        if Path(one["name"]).name != one["name"]:
            raise UserError(f"{TOKENIZER_CONFIG}: the chat template name {one['name']!r} cannot be a file name")
        yield one["name"], one["template"]


def _copy_all(folder: Path, target: Path, *, but: Sequence[str]) -> list[str]:
    """Copies the side files of a model folder; returns a note that names skipped files (other weights) and folders."""
    kept: list[Path] = []
    left_out: list[Path] = []
    converted = _converted(folder)
    for path in sorted(folder.iterdir()):
        if path.name in converted or _matches(path, (CONFIG, INDEX, ".*", *but)):
            continue
        other = path.is_dir() and path.name != TEMPLATES
        (left_out if other or _matches(path, (*_WEIGHTS, *_MEGATRON)) else kept).append(path)
    _copy(kept, target)
    return [f"{folder}: not copied: {', '.join(path.name for path in left_out)}"] if left_out else []


def _converted(folder: Path) -> set[str]:
    """Returns the names of the files in a model folder that hold its weights."""
    if (folder / ".metadata").exists():
        return {path.name for path in folder.iterdir() if _matches(path, _MEGATRON)}
    try:
        return {path.name for path in shard_files(folder)} if has_weights(folder) else set()
    except UserError:  # a run may have started from random weights
        return set()


def _copy(paths: Sequence[Path], target: Path) -> None:
    for path in paths:
        if path.is_dir():
            shutil.copytree(path, target / path.name, dirs_exist_ok=True)
        else:
            shutil.copyfile(path, target / path.name)


def _matches(path: Path, patterns: Sequence[str]) -> bool:
    return any(fnmatch(path.name, pattern) for pattern in patterns)
