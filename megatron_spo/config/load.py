"""Loads a `Config` from a YAML file and command-line overrides."""

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from megatron_spo.config import foreign
from megatron_spo.config.data_source import DataSource
from megatron_spo.config.model_shape import ModelShape, read_model_shape
from megatron_spo.config.rules import Facts, broken_rules, unused_keys
from megatron_spo.config.schema import Config, keys_of, section_class
from megatron_spo.config.section import FORMATS, message_of
from megatron_spo.config.yaml_text import format_yaml, parse_yaml
from megatron_spo.errors import UserError


def load_config(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    world_size: int | None = None,
    elsewhere: bool = False,
    in_slurm: bool = False,
) -> Config:
    """Loads, checks and resolves a configuration.

    Resolved means that the loss's parameters, `training.epochs` and `data.max_length` have their effective values.

    Args:
        path: YAML file; examples/reference.yaml has all keys with units, defaults and ranges.
        overrides: such as "loss.beta=0.2"; the value is YAML.
        world_size: number of processes, for which the layout is checked as well; None checks it when they start.
        elsewhere: the run takes place on another machine, so that nothing is asked of this one.
        in_slurm: messages are for a SLURM job.

    Raises:
        UserError: with one line per mistake.
    """
    values = _read(Path(path))
    return load_values(values, str(path), overrides, world_size=world_size, elsewhere=elsewhere, in_slurm=in_slurm)


def load_values(
    values: dict[str, Any],
    path: str,
    overrides: Sequence[str] = (),
    *,
    world_size: int | None = None,
    elsewhere: bool = False,
    in_slurm: bool = False,
) -> Config:
    """Checks and resolves the content of a configuration file, as `load_config`; `path` is its name in messages.

    The overrides are written into `values`.

    Raises:
        UserError: with one line per mistake.
    """
    overridden = [_apply_override(values, override) for override in overrides]
    given = frozenset(_flat_keys(values))
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        lines = [_explain(details, path, overridden) for details in error.errors(include_url=False)]
        raise UserError("\n".join(lines)) from None
    shape = _shape_of(config)
    config = _resolve(config, given, shape)
    broken = broken_rules(Facts(config, given, shape, world_size, elsewhere, in_slurm))
    if broken:
        raise UserError("\n".join(f"{path}: {message}" for message in broken))
    return config


def dump_config(config: Config) -> str:
    """Returns YAML that `load_config` reads back to an equal configuration, without keys that have no effect."""
    return format_yaml(plain(config))


def plain(config: Config) -> dict[str, Any]:
    """Returns the configuration as nested dicts with YAML names, without keys that have no effect."""
    unused = unused_keys(config)
    result: dict[str, Any] = {}
    for name, value in config.model_dump(mode="json", by_alias=True).items():
        if isinstance(value, dict):
            value = {key: entry for key, entry in value.items() if f"{name}.{key}" not in unused}
        result[name] = value
    return result


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: configuration file does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the configuration ({error})") from None
    try:
        values = parse_yaml(text)
    except ValueError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        found = "empty" if values is None else repr(values)
        raise UserError(f"{path}: must be a YAML mapping with sections such as `model:` and `data:`, but is {found}")
    for name, value in values.items():
        if value is None and _is_section(name):  # all its keys are commented out
            values[name] = {}
    return values


def _is_section(name: Any) -> bool:
    return name in Config.model_fields and section_class(name) is not None


def _apply_override(values: dict[str, Any], override: str) -> str:
    """Applies one override `section.key=value` (or `output=value`) to `values` and returns its key."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UserError(f"override {override!r}: must have the form section.key=value")
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise UserError(f"override {override!r}: not valid YAML: {error}") from None
    section, dot, name = key.partition(".")
    if not dot:
        if _is_section(section):
            raise UserError(f"override {override!r}: {section} is a section; use {section}.key=value")
        values[key] = value
        return key
    if not _is_section(section):
        near = _nearest(section)
        if "did you mean" not in near and (known := foreign.hint(key)):
            near = f"; {known}"
        raise UserError(f"override {override!r}: unknown section {section!r}{near}")
    if not isinstance(values.setdefault(section, {}), dict):
        raise UserError(f"override {override!r}: {section} must be a section in the file, but is {values[section]!r}")
    values[section][name] = value
    return key


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (section.key, value) of nested values."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def covers(names: Iterable[str], key: str) -> bool:
    """Returns whether a key or one of its sections is among the names."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _flat_keys(values: Mapping[str, Any]) -> list[str]:
    keys = []
    for name, value in values.items():
        keys += [f"{name}.{key}" for key in value] if isinstance(value, dict) else [str(name)]
    return keys


def _shape_of(config: Config) -> ModelShape | None:
    """Returns the model's shape if `model.path` is a folder. A hub id is checked after the download."""
    return read_model_shape(config.model.path) if Path(config.model.path).is_dir() else None


def _resolve(config: Config, given: frozenset[str], shape: ModelShape | None) -> Config:
    updates: dict[str, Any] = {"loss": config.loss.model_copy(update=config.loss.parameters())}
    if config.training.steps is None and config.training.epochs is None:
        updates["training"] = config.training.model_copy(update={"epochs": 1.0})
    if shape is not None and "data.max_length" not in given:
        updates["data"] = config.data.model_copy(
            update={"max_length": min(config.data.max_length, shape.max_positions)}
        )
    return config.model_copy(update=updates)


def _explain(details: ErrorDetails, path: str, overridden: Sequence[str]) -> str:
    """Formats one validation error: file or command line, key, value, and the allowed values."""
    location = tuple(part for part in details["loc"] if part not in FORMATS)
    key = _key_text(location)
    origin = "command line" if any(key == name or key.startswith(f"{name}[") for name in overridden) else path
    described = _description(location)
    allowed = f" ({described})" if described else ""
    if details["type"] == "missing":
        return f"{origin}: {key} is missing{allowed}"
    if details["type"] == "extra_forbidden":
        return f"{origin}: unknown key {key!r}{_nearest(key)}"
    if details["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return f"{origin}: {key} = {details['input']!r}: must be a section with `key: value` lines"
    named = location[:2] == ("loss", "name") and isinstance(details["input"], str)
    if named and (known := foreign.loss_hint(details["input"])):
        return f"{origin}: {key} = {details['input']!r}: {known}"
    return f"{origin}: {key} = {details['input']!r}: {message_of(details)}{allowed}"


def _key_text(location: Sequence[int | str]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _description(location: Sequence[int | str]) -> str | None:
    """Returns the docstring of the field at `location`, or None."""
    names = [part for part in location if isinstance(part, str)]
    section = section_class(names[0]) if names[0] in Config.model_fields else None
    if len(names) == 3:
        section = DataSource
    elif len(names) == 1:
        section = Config
    if section is None or names[-1] not in keys_of(section):
        return None
    return section.model_fields[keys_of(section)[names[-1]]].description


def _nearest(key: str) -> str:
    """Returns the end of the message for an unknown key: what a key of another trainer is called here; or `did you mean
    ...?`, preferring keys of the same section; or the allowed keys."""
    section, _, last = key.rpartition(".")
    if "[" in section:
        near = difflib.get_close_matches(last, keys_of(DataSource), 1)
        return f"; did you mean {near[0]!r}?" if near else f"; allowed keys: {', '.join(keys_of(DataSource))}"
    sections = {name: section_class(name) for name in Config.model_fields}
    every = [(name, entry) for name, members in sections.items() if members for entry in keys_of(members)]
    own = [entry for name, entry in every if name == section] if section else list(sections)
    same = [f"{name}.{entry}" for name, entry in every if entry == last]
    if not same and (known := foreign.hint(key)):
        return f"; {known}"
    near = same or [f"{section}.{entry}".lstrip(".") for entry in difflib.get_close_matches(last, own, 1)]
    near = near or [f"{name}.{entry}" for name, entry in every if difflib.get_close_matches(last, [entry], 1, 0.8)]
    return f"; did you mean {near[0]!r}?" if near else f"; allowed keys: {', '.join(own)}"
