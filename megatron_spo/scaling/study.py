"""Reads a study file: a base configuration, what varies, and the steps before and after each run."""

import itertools
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_spo.config.load import load_config
from megatron_spo.config.yaml_text import format_yaml
from megatron_spo.errors import UserError
from megatron_spo.scaling.spec import FULL, StepSpec, StudySpec, read_spec
from megatron_spo.subcommands import OURS, PYTHON

PROGRAMS = {"megatron-spo": OURS, "python": PYTHON}
PLACEHOLDER = re.compile(r"\{([A-Za-z_][\w./]*)\}")
NAME = re.compile(r"[\w.+=-]+")


@dataclass(frozen=True)
class Step:
    """One command of a run; a `shared` command is run once for all runs that need it."""

    name: str
    words: tuple[str, ...]
    shared: bool = False
    columns: Path | None = None


@dataclass(frozen=True)
class StudyRun:
    """One run of a study.

    Attributes:
        number: Number of the run, from 1.
        folder: Folder of the run directory, step logs and marks.
        choices: Values of what varies, which become columns of the table.
        overrides: Configuration overrides of `train`.
        before: Commands before training.
        after: Commands after training.
    """

    number: int
    folder: Path
    choices: Mapping[str, Any]
    overrides: tuple[str, ...]
    before: tuple[Step, ...]
    after: tuple[Step, ...]

    @property
    def directory(self) -> Path:
        """The run directory of `train`."""
        return self.folder / "run"


@dataclass(frozen=True)
class Study:
    """A study whose file has been checked."""

    path: Path
    spec: StudySpec
    runs: tuple[StudyRun, ...]

    @property
    def base(self) -> Path:
        """The configuration of `train`."""
        return Path(self.spec.base)

    @property
    def out(self) -> Path:
        """The folder of the study."""
        return Path(self.spec.out)


def read_study(path: Path, scale: str | None = None) -> Study:
    """Reads and checks a study file; `check_configurations` checks the configurations of its runs.

    Raises:
        UserError: If the file is invalid; the message has one line per error.
    """
    spec = read_spec(path, scale)
    if bool(spec.vary or spec.models) == bool(spec.runs):
        raise UserError(f"{path}: give either `vary` (a grid, with or without `models`) or `runs` (a list)")
    if not Path(spec.base).is_file():
        raise UserError(f"{path}: base: {spec.base} does not exist; paths are relative to the working directory")
    _check_own_names(path, spec)
    fixed = {"out": Path(spec.out), "scale": scale or FULL}
    runs = tuple(_run(path, spec, fixed, number, *chosen) for number, chosen in enumerate(_choices(spec), 1))
    if not runs:
        raise UserError(f"{path}: vary: an entry has no values, so there are no runs; give it at least one")
    study = Study(path, spec, runs)
    _check_names(study)
    return study


def run_name(run: StudyRun, varied: Sequence[str]) -> str:
    """Returns what distinguishes a run from the others, such as "model=w64, method=dpo"."""
    return ", ".join(f"{name.rpartition('.')[2]}={run.choices[name]}" for name in varied)


def varied_names(runs: Sequence[StudyRun]) -> list[str]:
    """Returns the names of the choices in which the runs differ."""
    values: dict[str, set[Any]] = {}
    for run in runs:
        for name, value in run.choices.items():
            values.setdefault(name, set()).add(str(value))
    return [name for name, seen in values.items() if len(seen) > 1] or list(values)


def interleaved(runs: Sequence[StudyRun]) -> list[StudyRun]:
    """Returns the runs in the order in which to start them, so that different shared commands can run at once.

    Runs take turns by the first command of `before` that not all of them share, such as the SFT of their model.
    """
    names = [[step.name for step in run.before] for run in runs]
    everywhere = set.intersection(*map(set, names)) if names else set()
    places: dict[str, int] = {}
    ranked = []
    for run, own in zip(runs, names, strict=True):
        first = next((name for name in own if name not in everywhere), "")
        places[first] = places.get(first, -1) + 1
        ranked.append((places[first], run))
    return [run for _, run in sorted(ranked, key=lambda one: one[0])]


def check_configurations(study: Study) -> None:
    """Checks each run's configuration; raises UserError with one line per error."""
    lines: dict[str, list[int]] = {}
    for run in study.runs:
        try:
            load_config(study.base, [f"output={run.directory}", *run.overrides], elsewhere=True)
        except UserError as error:
            for line in str(error).splitlines():
                lines.setdefault(line, []).append(run.number)
    if lines:
        said = [f"{line} (run {numbers[0]}{f' and {len(numbers) - 1} more' if numbers[1:] else ''})"
                for line, numbers in lines.items()]  # fmt: skip
        raise UserError(f"{study.path}: no run was started; correct these errors:\n" + "\n".join(said))


def _choices(spec: StudySpec) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yields, for each run, the values of what varies and the keys that they set."""
    if spec.runs:
        yield from ((dict(run), dict(run)) for run in spec.runs)
        return
    axes: dict[str, list[tuple[Any, dict[str, Any]]]] = {}
    if spec.models is not None:
        axes["model"] = [(name, {}) for name in spec.models.sizes]
    for axis, values in spec.vary.items():
        if isinstance(values, dict):
            axes[axis] = list(values.items())
        else:
            axes[axis] = [(value, {axis: value} if _is_key(axis) else {}) for value in values]
    for combination in itertools.product(*axes.values()):
        columns = {axis: value for axis, (value, _) in zip(axes, combination, strict=True)}
        keys: dict[str, Any] = {}
        for _, settings in combination:
            keys |= settings
        yield columns, keys


def _is_key(axis: str) -> bool:
    """Returns whether an axis is a key of the configuration, which all have a section, and not a name of its own."""
    return "." in axis or axis == "output"


def _check_own_names(path: Path, spec: StudySpec) -> None:
    """Raises UserError for a name with plain values that no placeholder uses, such as a key without its section."""
    text = str(spec.model_dump(exclude={"vary"})) + str([one for one in spec.vary.values() if isinstance(one, dict)])
    for axis, values in spec.vary.items():
        if isinstance(values, list) and not _is_key(axis) and f"{{{axis}}}" not in text:
            raise UserError(f"{path}: vary: {axis} is not a key of the configuration (keys have a section, such as "
                            f"optimizer.lr), and no string uses {{{axis}}}; correct the name")  # fmt: skip


def _run(
    path: Path, spec: StudySpec, fixed: Mapping[str, Any], number: int, columns: dict[str, Any], keys: dict[str, Any]
) -> StudyRun:
    folder = Path(spec.out) / str(number)
    raw = {**spec.set, **keys}
    plain = {key: value for key, value in raw.items() if not PLACEHOLDER.search(str(value))}
    known: dict[str, Any] = {**plain, **fixed, "folder": folder, "run": folder / "run", **columns}

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: filled(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [filled(entry) for entry in value]
        if not isinstance(value, str):
            return value
        single = PLACEHOLDER.fullmatch(value)  # keeps its type, such as that of a number
        return value_of(single) if single else PLACEHOLDER.sub(lambda match: str(value_of(match)), value)

    def value_of(match: re.Match[str]) -> Any:
        if match[1] not in known:
            raise UserError(f"{path}: {{{match[1]}}} is unknown; use one of {', '.join(known)}")
        found = known[match[1]]
        return str(found) if isinstance(found, Path) else found

    def step(given: StepSpec, *, shared: bool) -> Step:
        name = str(filled(given.name))
        if not NAME.fullmatch(name) or name == "train":
            raise UserError(f"{path}: {name!r} is not allowed as the name of a step; use only letters, digits and "
                            "._+=-, and not train")  # fmt: skip
        try:
            program, *rest = shlex.split(given.run)
        except ValueError as error:
            raise UserError(f"{path}: step {name}: {given.run!r} cannot be split into words ({error})") from None
        words = (*PROGRAMS.get(program, [program]), *(str(filled(word)) for word in rest))
        return Step(name, words, shared, None if given.columns is None else Path(filled(given.columns)))

    settings = {key: filled(value) for key, value in raw.items()}
    known = {**settings, **known}  # commands may refer to all of them
    return StudyRun(
        number,
        folder,
        columns,
        tuple(f"{key}={_text(value)}" for key, value in settings.items()),
        tuple(step(given, shared=True) for given in spec.before),
        tuple(step(given, shared=False) for given in spec.after),
    )


def _text(value: Any) -> str:
    """Returns a value as YAML on one line, the form of an override."""
    return format_yaml([value], flow=True).strip()[1:-1]


def _check_names(study: Study) -> None:
    steps: dict[str, tuple[Step, ...]] = {}
    seen: dict[tuple[str, ...], int] = {}
    for run in study.runs:
        for i, step in enumerate(run.before, 1):
            if steps.setdefault(step.name, run.before[:i]) != run.before[:i]:
                raise UserError(
                    f"{study.path}: step {step.name} of `before`, or one ahead of it, is not the same command in all "
                    "runs; put what varies into its name, such as {training.seed}"
                )
        names = [step.name for step in (*run.before, *run.after)]
        if len(set(names)) < len(names):
            raise UserError(f"{study.path}: two steps of a run have the same name; rename one of {', '.join(names)}")
        commands = str([step.words for step in (*run.before, *run.after)]).replace(str(run.folder), "")
        if (first := seen.setdefault((*sorted(run.overrides), commands), run.number)) != run.number:
            raise UserError(f"{study.path}: runs {first} and {run.number} are the same; remove one: "
                            f"{' '.join(run.overrides)}")  # fmt: skip
