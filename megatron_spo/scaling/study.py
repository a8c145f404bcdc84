"""Reads a study file: a base configuration, what varies, and the steps before and after each run.

    base: my.yaml                            # a configuration of `train`
    out: runs/study                          # everything is written here
    set: {training.steps: 100}               # overrides of every run
    vary:                                    # a grid: every combination is a run
      optimizer.lr: [1e-4, 2e-4]             # a key with its values
      method:                                # or a name of your own, with choices that set several keys
        dpo: {loss.name: dpo, spo.schedule: none}
        dpo+spo: {loss.name: dpo, spo.schedule: penalty}

`runs`, a list of mappings from keys to values, replaces `vary` if the runs are not a grid. In all strings, `{out}`,
`{run}` (the run directory), `{folder}` (its parent) and `{NAME}` of every key that varies or is set are replaced.
"""

import itertools
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_spo.config.load import load_config
from megatron_spo.config.yaml_text import format_yaml, parse_yaml
from megatron_spo.errors import UserError
from megatron_spo.subcommands import OURS, PYTHON

PROGRAMS = {"megatron-spo": OURS, "python": PYTHON}
PLACEHOLDER = re.compile(r"\{([A-Za-z_][\w./]*)\}")
NAME = re.compile(r"[\w.+=-]+")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StepSpec(_Strict):
    """A command of `before` or `after`, split as in a shell; `megatron-spo` and `python` use this installation."""

    name: str
    run: str
    columns: str | None = None
    """JSON file, written by the command, with an object of numbers that become columns of the table"""


class ModelsSpec(_Strict):
    """Models with random weights that the study writes to OUT/models/NAME; the axis `model` has their names."""

    like: str
    """folder whose config.json and tokenizer the models use"""
    sizes: dict[str, dict[str, Any]] = Field(min_length=1)
    """keys of config.json that differ, by the name of the model"""
    seed: int = 0


class CrossingSpec(_Strict):
    """When a run counts as unstable; adds the columns `crossed` and `steps`, which the law `stability` reads."""

    metric: str = "spo/chosen_shift"
    below: float
    """bound of the metric on the first held-out set, or on training batches without one"""


class StudySpec(_Strict):
    """The content of a study file."""

    base: str
    out: str
    set: dict[str, Any] = {}
    vary: dict[str, list[Any] | dict[str, dict[str, Any]]] = {}
    runs: list[dict[str, Any]] = []
    models: ModelsSpec | None = None
    before: list[StepSpec] = []
    after: list[StepSpec] = []
    crossing: CrossingSpec | None = None


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
    base: Path
    out: Path
    runs: tuple[StudyRun, ...]
    models: ModelsSpec | None
    crossing: CrossingSpec | None


def read_study(path: Path) -> Study:
    """Reads and checks a study file; `check_configurations` checks the configurations of its runs.

    Raises:
        UserError: If the file is invalid; the message has one line per error.
    """
    try:
        spec = StudySpec.model_validate(parse_yaml(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"{path} cannot be read as a study ({error})") from None
    except ValidationError as error:
        lines = [f"{path}: {'.'.join(map(str, e['loc'])) or 'the file'}: {e['msg']}" for e in error.errors()]
        raise UserError("\n".join(lines)) from None
    except ValueError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if bool(spec.vary or spec.models) == bool(spec.runs):
        raise UserError(f"{path}: give either `vary` (a grid, with or without `models`) or `runs` (a list)")
    if not Path(spec.base).is_file():
        raise UserError(f"{path}: base: {spec.base} does not exist; paths are relative to the working directory")
    out = Path(spec.out)
    runs = tuple(_run(path, spec, out, number, *chosen) for number, chosen in enumerate(_choices(spec), 1))
    if not runs:
        raise UserError(f"{path}: vary: an entry has no values, so there are no runs; give it at least one")
    study = Study(path, Path(spec.base), out, runs, spec.models, spec.crossing)
    _check_names(study)
    return study


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
            axes[axis] = [(value, {axis: value}) for value in values]
    for combination in itertools.product(*axes.values()):
        columns = {axis: value for axis, (value, _) in zip(axes, combination, strict=True)}
        keys: dict[str, Any] = {}
        for _, settings in combination:
            keys |= settings
        yield columns, keys


def _run(
    path: Path, spec: StudySpec, out: Path, number: int, columns: dict[str, Any], keys: dict[str, Any]
) -> StudyRun:
    folder = out / str(number)
    raw = {**spec.set, **keys}
    plain = {key: value for key, value in raw.items() if not PLACEHOLDER.search(str(value))}
    known: dict[str, Any] = {**plain, "out": out, "folder": folder, "run": folder / "run", **columns}

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: filled(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [filled(entry) for entry in value]
        return PLACEHOLDER.sub(name_of, value) if isinstance(value, str) else value

    def name_of(match: re.Match[str]) -> str:
        if match[1] not in known:
            raise UserError(f"{path}: {{{match[1]}}} is unknown; use one of {', '.join(known)}")
        return str(known[match[1]])

    def step(given: StepSpec, *, shared: bool) -> Step:
        name = filled(given.name)
        if not NAME.fullmatch(name) or name == "train":
            raise UserError(f"{path}: {name!r} is not allowed as the name of a step; use only letters, digits and "
                            "._+=-, and not train")  # fmt: skip
        try:
            program, *rest = shlex.split(given.run)
        except ValueError as error:
            raise UserError(f"{path}: step {name}: {given.run!r} cannot be split into words ({error})") from None
        words = (*PROGRAMS.get(program, [program]), *map(filled, rest))
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
