"""Reads and writes YAML 1.2 scalars: 1e-4 is a number, `off` is a string, and a duplicate key is an error."""

import re
from collections.abc import Hashable
from typing import Any

import yaml

# YAML 1.2 scalars. PyYAML follows 1.1, where 1e-4 is a string, off is false and 2024-01-01 is a date.
_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?(?:0|[1-9][0-9_]*)", list("-+0123456789")),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    table: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for tag, (pattern, starts) in _SCALARS.items():
        for start in starts:
            table.setdefault(start, []).append((f"tag:yaml.org,2002:{tag}", re.compile(f"(?:{pattern})$")))
    return table


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _resolvers()

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a plain word", key.start_mark)
            if key.value in seen:
                problem = f"duplicate key {key.value!r}"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
            key.tag = "tag:yaml.org,2002:str"  # keys are strings, even `off` and `3`
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes strings that YAML 1.1 or 1.2 would read as another type."""

    yaml_implicit_resolvers = {
        start: yaml.SafeDumper.yaml_implicit_resolvers.get(start, []) + _resolvers().get(start, [])
        for start in {**yaml.SafeDumper.yaml_implicit_resolvers, **_resolvers()}
    }


def parse_yaml(text: str) -> Any:
    """Returns the value of one YAML document. Raises ValueError with a one-line message (`line 3, column 1: ...`)."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{place}{error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def format_yaml(value: Any, *, flow: bool = False) -> str:
    """Returns `value` as YAML for `parse_yaml`, with keys in their order; on one line with `flow`."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6, default_flow_style=flow)


def inline(value: Any) -> str:
    """Returns `value` as YAML on one line."""
    plain = list(value) if isinstance(value, tuple) else value
    return format_yaml([plain], flow=True).strip()[1:-1]
