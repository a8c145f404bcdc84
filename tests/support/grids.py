"""Grids of settings: the cells that cover every pair of settings, and the cells that the current pytest run tests."""

import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import pytest

Cell = TypeVar("Cell", bound=tuple[str, ...])
_MODEL_PARALLEL = ("parallel.tensor=", "parallel.pipeline=", "parallel.context=")


def pairwise(cells: Mapping[Cell, Iterable[str]]) -> set[Cell]:
    """Returns a small set of cells that covers every pair of settings that occurs in any cell.

    Args:
        cells: the settings of each cell, such as "parallel.tensor=2" or "spo.schedule=dual".
    """
    pairs = {cell: set(itertools.combinations(sorted(set(settings)), 2)) for cell, settings in cells.items()}
    missing, chosen = set[tuple[str, str]]().union(*pairs.values()), set()
    while missing:
        best = max(pairs, key=lambda cell: (len(pairs[cell] & missing), cell))  # deterministic
        chosen.add(best)
        missing -= pairs[best]
    return chosen


def grid(names: str, cells: Mapping[Cell, Iterable[str]]) -> pytest.MarkDecorator:
    """Parametrizes a test with all cells; those not chosen by `pairwise` are marked slow."""
    kept = pairwise(cells)
    marked = [pytest.param(*cell, marks=[] if cell in kept else [pytest.mark.slow]) for cell in cells]
    return pytest.mark.parametrize(names.split(","), marked)


def selected(request: pytest.FixtureRequest, *names: str) -> set[tuple[str, ...]]:
    """Returns the values of these parameters in the tests of the fixture's module that are selected in this pytest run,
    so that the fixture computes only these."""
    here = [item for item in request.session.items if getattr(item, "module", None) is request.module]
    values: list[Mapping[str, Any]] = [item.callspec.params for item in here if hasattr(item, "callspec")]
    return {tuple(value[name] for name in names) for value in values if value.keys() >= set(names)}


def layout_settings(processes: int, overrides: Iterable[str]) -> list[str]:
    """Returns the settings of a layout: its overrides and the resulting data parallelism."""
    given = list(overrides)
    sizes = (int(key.partition("=")[2]) for key in given if key.startswith(_MODEL_PARALLEL))
    data = processes // math.prod(sizes)
    return [*given, *([f"data parallel={data}"] if data > 1 else [])]
