"""What goes with a model's weights: tokenizer, chat templates, processor, generation config, licence, model card."""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from megatron_spo.checkpoint.folder import SEAL
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
_MEGATRON = ("common.pt", "metadata.json", SEAL, "*.distcp")


@dataclass(frozen=True)
class Sides:
    """The side files of a model, and what its training adds to them.

    Attributes:
        folders: where they are; a file of a later folder counts more.
        tokenizer: folder of another tokenizer, which takes the place of the model's.
        chat_template: text of the template that the model was trained with, where it is not the tokenizer's.
        ends: token ids that the model was trained to end its answers with.
        card: text of README.md, in place of the one of the folders.
    """

    folders: tuple[Path, ...]
    tokenizer: Path | None = None
    chat_template: str | None = None
    ends: tuple[int, ...] = ()
    card: str | None = None

    def write(self, target: Path) -> list[str]:
        """Write all of them into the folder `target`; returns what the user should know.

        Raises:
            UserError: one cannot be read.
        """
        notes = []
        try:
            for folder in filter(Path.is_dir, self.folders):
                notes += _copy_all(folder, target, but=() if self.tokenizer is None else _TOKENIZER)
            if self.tokenizer is not None:
                _copy([path for path in self.tokenizer.iterdir() if _matches(path, _TOKENIZER)], target)
        except (OSError, shutil.Error) as error:
            raise UserError(f"a file beside the weights cannot be copied: {error}") from error
        if self.chat_template is not None:
            write_chat_template(target, self.chat_template)
        if self.card is not None:
            (target / CARD).write_text(self.card, encoding="utf-8")
        return notes + self._add_ends(target)

    def _add_ends(self, target: Path) -> list[str]:
        """Make sure that what stops at eos_token_id stops where the model was trained to."""
        if not self.ends:
            return []
        generation = read_generation_config(target)
        if generation is None:  # then transformers takes them from config.json
            raw = read_config(self.folders[0]) if (self.folders[0] / CONFIG).exists() else {}
            keys = ("bos_token_id", "eos_token_id", "pad_token_id")
            generation = {key: raw[key] for key in keys if raw.get(key) is not None}
        known = token_ids(generation.get("eos_token_id"), f"{target / CONFIG}: eos_token_id")
        if not (added := [token for token in self.ends if token not in known]):
            return []
        ids = [*known, *added]
        generation["eos_token_id"] = ids if len(ids) > 1 else ids[0]
        (target / GENERATION_CONFIG).write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
        return [f"added {', '.join(map(str, added))} to eos_token_id in {GENERATION_CONFIG}: the model was trained to "
                "end its answers with it"]  # fmt: skip


def write_chat_template(folder: Path, text: str) -> None:
    """Make `text` the default chat template of the tokenizer in a folder; templates with other names stay.

    transformers (5.24) takes chat_template.jinja and additional_chat_templates/ before those in tokenizer_config.json.
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
    """Whether the tokenizer in a folder has a default template."""
    path = folder / TOKENIZER_CONFIG
    return (folder / TEMPLATE).exists() or (path.exists() and bool(read_json_object(path).get("chat_template")))


def _named(templates: Any) -> Iterator[tuple[str, str]]:
    """The names and texts of the templates in a tokenizer_config.json, which are one text or a list."""
    for one in templates if isinstance(templates, list) else ():
        if not isinstance(one, dict) or not all(isinstance(one.get(key), str) for key in ("name", "template")):
            raise UserError(f"{TOKENIZER_CONFIG}: chat_template has an entry without name and template")
        if Path(one["name"]).name != one["name"]:
            raise UserError(f"{TOKENIZER_CONFIG}: chat template {one['name']!r} cannot be the name of a file")
        yield one["name"], one["template"]


def _copy_all(folder: Path, target: Path, *, but: Sequence[str]) -> list[str]:
    """Copy the side files of a model folder; returns a note about what is left out: other weights, and folders."""
    kept: list[Path] = []
    left_out: list[Path] = []
    converted = _converted(folder)
    for path in sorted(folder.iterdir()):
        if path.name in converted or _matches(path, (CONFIG, INDEX, ".*", *but)):
            continue
        other = path.is_dir() and path.name != TEMPLATES
        (left_out if other or _matches(path, (*_WEIGHTS, *_MEGATRON)) else kept).append(path)
    _copy(kept, target)
    return [f"left out of {folder}: {', '.join(path.name for path in left_out)}"] if left_out else []


def _converted(folder: Path) -> set[str]:
    """Names of the files that hold the weights of a model folder, which are no side files."""
    if (folder / ".metadata").exists():
        return {path.name for path in folder.iterdir() if _matches(path, _MEGATRON)}
    try:
        return {path.name for path in shard_files(folder)} if has_weights(folder) else set()
    except UserError:  # a run may have begun with random weights
        return set()


def _copy(paths: Sequence[Path], target: Path) -> None:
    for path in paths:
        if path.is_dir():
            shutil.copytree(path, target / path.name, dirs_exist_ok=True)
        else:
            shutil.copyfile(path, target / path.name)


def _matches(path: Path, patterns: Sequence[str]) -> bool:
    return any(fnmatch(path.name, pattern) for pattern in patterns)
