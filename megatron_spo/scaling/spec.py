"""The content of a study file.

    base: my.yaml                            # a configuration of `train`
    out: runs/study                          # everything is written here
    set: {training.steps: 100}               # overrides of every run
    vary:                                    # a grid: every combination is a run
      optimizer.lr: [1e-4, 2e-4]             # a key with its values
      pairs: [75, 150]                       # a name of your own with values, for placeholders such as {pairs}
      method:                                # or with choices that set several keys
        dpo: {loss.name: dpo, spo.schedule: none}
        dpo+spo: {loss.name: dpo, spo.schedule: penalty}

`runs`, a list of mappings from keys to values, replaces `vary` if the runs are not a grid. In all strings, `{out}`,
`{run}` (the run directory), `{folder}` (its parent), `{scale}` and `{NAME}` of every key that varies or is set are
replaced.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from megatron_spo.config.section import Section
from megatron_spo.config.section_file import read_section
from megatron_spo.errors import UserError

FULL = "full"
"""Value of `{scale}` without --scale."""


class StepSpec(Section):
    """A command of `before` or `after`, split as in a shell; `megatron-spo` and `python` use this installation."""

    name: str
    run: str
    columns: str | None = None
    """JSON file, written by the command, with an object of numbers that become columns of the table"""


class ModelsSpec(Section):
    """Models with random weights that the study writes to OUT/models/NAME; the axis `model` has their names."""

    like: str
    """folder whose config.json and tokenizer the models use"""
    sizes: dict[str, dict[str, Any]] = Field(min_length=1)
    """keys of config.json that differ, by the name of the model"""
    seed: int = 0


class CrossingSpec(Section):
    """When a run counts as unstable; adds the columns `crossed` and `steps`, which the law `stability` reads."""

    metric: str = "spo/chosen_shift"
    below: float
    """bound of the metric on the first held-out set, or on training batches without one"""


class ExpectedSpec(Section):
    """What the table before the start uses as long as model or data do not exist: tokens of a typical pair."""

    prompt: int = Field(ge=1)
    response: int = Field(ge=1)
    pairs: int = Field(60_000, ge=1)
    """pairs in data.train, if data.rows is not set"""
    model: str | None = None
    """folder whose config.json has the shape of the model"""


class FitSpec(Section):
    """A fit of the report: the options of `scaling fit`."""

    law: Literal["chinchilla", "power", "pure_power", "repeats", "repeats_excess", "overoptimization", "stability"]
    columns: dict[str, str] = {}
    """names of columns in the table, by the law's names"""
    by: str | None = None
    """column whose values are fitted separately and compared"""
    only: dict[str, Any] = {}
    """values of columns; other rows are left out"""


class ScatterSpec(Section):
    """A figure of one column of the table over another, with a point per run."""

    x: str
    y: str
    by: str | None = None
    """column that gives the colours"""


class StudySpec(Section):
    """A study file without its `scales`."""

    base: str
    out: str
    title: str | None = None
    """heading of the report"""
    set: dict[str, Any] = {}
    vary: dict[str, list[Any] | dict[str, dict[str, Any]]] = {}
    runs: list[dict[str, Any]] = []
    models: ModelsSpec | None = None
    before: list[StepSpec] = []
    after: list[StepSpec] = []
    crossing: CrossingSpec | None = None
    expected: ExpectedSpec | None = None
    metrics: list[str] | dict[str, str | None] = []
    """columns that the report draws, also with their meaning; none: those of `scaling/page.py`"""
    scatters: list[ScatterSpec] = []
    fits: list[FitSpec] = []


def read_spec(path: Path, scale: str | None) -> StudySpec:
    """Reads a study file, at one of its `scales`: there, mappings add to those of the file, other values replace them.

    `out` gets the name of the scale as suffix, unless the scale sets it.

    Raises:
        UserError: If the file is invalid; the message has one line per error.
    """
    return read_section(path, StudySpec, lambda raw: _scaled(path, raw, scale) if isinstance(raw, dict) else raw)


def _scaled(path: Path, raw: dict[str, Any], scale: str | None) -> dict[str, Any]:
    scales = raw.pop("scales", {})
    if not isinstance(scales, dict) or not all(isinstance(one, dict) for one in scales.values()):
        raise UserError(f"{path}: scales: must map names to keys of a study")
    if scale is None:
        return raw
    if scale not in scales:
        known = f"use {', '.join(scales)}" if scales else "its file has no `scales`; omit --scale"
        raise UserError(f"--scale {scale} is not a scale of {path}; {known}")
    out = {"out": f"{raw.get('out')}-{scale}"}
    return _merged({**raw, **out}, scales[scale])


def _merged(first: Mapping[str, Any], second: Mapping[str, Any], depth: int = 2) -> dict[str, Any]:
    """Returns the keys of both; mappings of the first levels are merged, and other values of `second` win."""
    merged = dict(first)
    for key, value in second.items():
        known = merged.get(key)
        both = depth > 1 and isinstance(known, dict) and isinstance(value, dict)
        merged[key] = _merged(known or {}, value, depth - 1) if both else value
    return merged
