"""Runs `megatron-spo ARGUMENTS`, several times with `--` between them, with the packages alone that setup.py requires.

    python tests/support/only_required.py ARGUMENTS -- ARGUMENTS

Other installed packages, such as those of the extra `dev`, cannot be imported.
"""

import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from itertools import groupby
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]


def required(name: str, extras: frozenset[str], known: set[tuple[str, frozenset[str]]]) -> Iterator[str]:
    """Yields a distribution and all that it requires, if they are installed."""
    if (name, extras) in known:
        return
    known.add((name, extras))
    try:
        needed = requires(name) or []
    except PackageNotFoundError:
        return
    yield canonicalize_name(name)
    for one in map(Requirement, needed):
        if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in extras | {""}):
            yield from required(one.name, frozenset(one.extras), known)


def not_required() -> set[str]:
    """Returns the names of the modules that belong to other distributions."""
    there, owners = set(required("megatron_spo", frozenset(), set())), packages_distributions()
    return {name for name in owners if there.isdisjoint(map(canonicalize_name, owners[name]))} - {"tests"}


class RequiredOnly(PathFinder):
    """Does not find modules of other distributions."""

    hidden = not_required()

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if path is None and name in cls.hidden:
            path = [place for place in sys.path if "_vendor" in place]  # setuptools has copies of some
        return super().find_spec(name, path, target)


def main(words: list[str]) -> int:
    for name in [name for name in sys.modules if name.partition(".")[0] in RequiredOnly.hidden]:
        del sys.modules[name]
    sys.meta_path[:] = [RequiredOnly if finder is PathFinder else finder for finder in sys.meta_path]
    from megatron_spo.cli import main as run

    for separates, arguments in groupby(words, lambda word: word == "--"):
        if not separates and (code := run(list(arguments))):
            return code
    return 0


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    sys.exit(main(sys.argv[1:]))
