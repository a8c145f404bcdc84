"""Documentation of all configuration keys, generated from the schema: `--help` and examples/reference.yaml.

`python -m megatron_spo.config.document > examples/reference.yaml` writes the file.
"""

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from megatron_spo.config.losses import LOSS_SPECS
from megatron_spo.config.rules import unused_keys
from megatron_spo.config.schema import Config, keys_of, section_class
from megatron_spo.config.section import Section
from megatron_spo.config.spo import SCHEDULE_SPECS
from megatron_spo.config.yaml_text import inline

# values in examples/reference.yaml for keys without a usable default
PLACEHOLDERS: dict[str, Any] = {
    "output": "runs/example",
    "model.path": "path/to/model",
    "data.train": ["pairs.jsonl"],
    "reference.cache": "runs/reference",
}


@dataclass(frozen=True)
class KeyDoc:
    """Documentation of one key: `default` is YAML text or "required"; `text` includes unit and range."""

    name: str
    default: str
    text: str


def key_docs() -> Iterator[tuple[str, str, list[KeyDoc]]]:
    """Yields (name, text, keys) of each section; `output` comes first, in a section with an empty name."""
    plain = [name for name in Config.model_fields if section_class(name) is None]
    yield "", "", [_key_doc(name, Config.model_fields[name]) for name in plain]
    for name in Config.model_fields:
        section = section_class(name)
        if section is not None:
            yield name, section.__doc__ or "", [_key_doc(*entry) for entry in _fields(section)]


def help_text() -> str:
    """Returns the end of the help for the terminal: the sections, and how to show their keys."""
    lines = ["sections of CONFIG.yaml (section.key=value on the command line, nested in YAML):"]
    for section, text, docs in key_docs():
        lines.append(f"  {section or docs[0].name:<11} {text or docs[0].text}")
    return "\n".join([*lines, "", "--help SECTION shows the keys of a section, --help all those of all sections"])


def help_about(topic: str, width: int = 100) -> str | None:
    """Returns the documentation of a section, of one key such as `optimizer.lr`, or of `all`; None if unknown."""
    lines: list[str] = []
    for section, text, docs in key_docs():
        chosen = [doc for doc in docs if topic in ("all", section, f"{section}.{doc.name}".lstrip("."))]
        if not chosen:
            continue
        lines += ["", f"{section}: {text}"] if section and chosen == docs else []
        for doc in chosen:
            head = f"  {section + '.' if section else ''}{doc.name}  [{doc.default}]"
            lines += [head, textwrap.fill(doc.text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)]
        if {"name", "schedule"} & {doc.name for doc in chosen}:
            lines += _names(section, width)
    return "\n".join(lines).lstrip("\n") or None


def _names(section: str, width: int) -> list[str]:
    """Returns the lines on the losses or schedules that belong to a section."""
    if section == "loss":
        lines = ["", "losses (loss.name) and their parameters:"]
        for spec in LOSS_SPECS.values():
            parameters = ", ".join(f"{key}={inline(value)}" for key, value in spec.parameters.items())
            text = f"  {spec.name:<10} {spec.summary} [{parameters}]"
            lines.append(textwrap.fill(text, width, subsequent_indent=" " * 13))
        return lines
    if section == "spo":
        return ["", "schedules (spo.schedule):", *(f"  {s.name:<12}{s.summary}" for s in SCHEDULE_SPECS.values())]
    return []


def reference_yaml() -> str:
    """Returns a loadable configuration with all keys; keys that have no effect in it are commented out."""
    example = Config.model_validate(_nested(PLACEHOLDERS))
    unused = unused_keys(example)
    lines = [
        "# All keys with default, unit and range. Keys that are commented out have no effect with these values.",
        "# Generated: python -m megatron_spo.config.document > examples/reference.yaml",
    ]
    for section, text, docs in key_docs():
        indent = "  " if section else ""
        lines += ["", f"{section}:  # {text}"] if section else [""]
        for doc in docs:
            key = f"{section}.{doc.name}" if section else doc.name
            value = inline(PLACEHOLDERS[key]) if key in PLACEHOLDERS else doc.default
            mark = "# " if key in unused else ""
            lines.append(f"{indent}{mark}{doc.name}: {value}  # {doc.text}")
    return "\n".join(lines) + "\n"


def _fields(section: type[Section]) -> list[tuple[str, FieldInfo]]:
    return [(key, section.model_fields[name]) for key, name in keys_of(section).items()]


def _key_doc(name: str, field: FieldInfo) -> KeyDoc:
    choices = _choices(field.annotation)
    text = field.description or ""
    default = "required" if field.default is PydanticUndefined else inline(field.default)
    return KeyDoc(name, default, f"{text}; one of {', '.join(choices)}" if choices else text)


def _choices(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    parts = [part for inner in get_args(annotation) for part in (inner, *get_args(inner))]
    if float in parts:  # a number or a word; the description names the words
        return []
    return list(dict.fromkeys(choice for inner in get_args(annotation) for choice in _choices(inner)))


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    return nested


if __name__ == "__main__":
    print(reference_yaml(), end="")
