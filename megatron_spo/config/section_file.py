"""Reads a YAML file with one section, such as a study or rounds."""

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from megatron_spo.config.section import Section, message_of
from megatron_spo.config.yaml_text import parse_yaml
from megatron_spo.errors import UserError

S = TypeVar("S", bound=Section)


def read_section(path: Path, kind: type[S], prepare: Callable[[Any], Any] = lambda raw: raw) -> S:
    """Returns the checked content of a file; `prepare` changes it before the check.

    Raises:
        UserError: with one line per mistake.
    """
    try:
        raw = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    try:
        return kind.model_validate(prepare(raw))
    except ValidationError as error:
        known = _names(kind.model_json_schema())
        raise UserError("\n".join(f"{path}: {_explain(one, known)}" for one in error.errors())) from None


def _names(schema: dict[str, Any]) -> list[str]:
    """Returns the keys of a section and of the sections within it."""
    return [name for one in (schema, *schema.get("$defs", {}).values()) for name in one.get("properties", {})]


def _explain(details: ErrorDetails, known: list[str]) -> str:
    key = ".".join(map(str, details["loc"])) or "the file"
    if details["type"] == "missing":
        return f"{key}: is missing"
    if details["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(details["loc"][-1]), known, 1)
        return f"{key}: unknown key" + (f"; did you mean {near[0]!r}?" if near else "")
    return f"{key}: {details['input']!r}: {message_of(details)}"
