"""Grids of settings: which cells must be tested so that every two settings meet, and which cells a session tests."""

import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import pytest

Cell = TypeVar("Cell", bound=tuple[str, ...])
_MODEL_PARALLEL = ("parallel.tensor=", "parallel.pipeline=", "parallel.context=")


def pairwise(cells: Mapping[Cell, Iterable[str]]) -> set[Cell]:
    """A small set of cells in which every two settings meet that meet in any cell.

    Args:
        cells: the settings of each cell, such as "parallel.tensor=2" or "spo.schedule=dual".
    """
    pairs = {cell: set(itertools.combinations(sorted(set(settings)), 2)) for cell, settings in cells.items()}
    missing, chosen = set[tuple[str, str]]().union(*pairs.values()), set()
    while missing:
        best = max(pairs, key=lambda cell: (len(pairs[cell] & missing), cell))  # the same ones in every session
        chosen.add(best)
        missing -= pairs[best]
    return chosen


def grid(names: str, cells: Mapping[Cell, Iterable[str]]) -> pytest.MarkDecorator:
    """Parametrize a test by all cells; those that `pairwise` leaves out are marked slow."""
    kept = pairwise(cells)
    marked = [pytest.param(*cell, marks=[] if cell in kept else [pytest.mark.slow]) for cell in cells]
    return pytest.mark.parametrize(names.split(","), marked)


def selected(request: pytest.FixtureRequest, *names: str) -> set[tuple[str, ...]]:
    """Values of these parameters in those tests of the fixture's module that this session runs: what the fixture need
    not compute for others."""
    here = [item for item in request.session.items if getattr(item, "module", None) is request.module]
    values: list[Mapping[str, Any]] = [item.callspec.params for item in here if hasattr(item, "callspec")]
    return {tuple(value[name] for name in names) for value in values if value.keys() >= set(names)}


def layout_settings(processes: int, overrides: Iterable[str]) -> list[str]:
    """The settings of a layout: its overrides, and the data parallelism that follows from them."""
    given = list(overrides)
    sizes = (int(key.partition("=")[2]) for key in given if key.startswith(_MODEL_PARALLEL))
    data = processes // math.prod(sizes)
    return [*given, *([f"data parallel={data}"] if data > 1 else [])]
