"""The stages of a round: the commands of `megatron-spo` that it runs, and the files they make."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_spo.on_policy.rules import PairRules
from megatron_spo.rounds.spec import Rounds


@dataclass(frozen=True)
class Stage:
    """One command of a round.

    Attributes:
        name: Name of the stage, for its log and mark.
        words: Arguments of `megatron-spo`.
        folder: Folder of logs and marks.
        made: File or folder that appears when the stage is done; None if only its mark says so.
        shared: Whether all processes of a job run it (training and reference pass).
    """

    name: str
    words: tuple[str, ...]
    folder: Path
    made: Path | None = None
    shared: bool = False

    @property
    def mark(self) -> Path:
        """JSON file that is written when the stage is done, with the seconds that it took over all attempts."""
        return self.folder / f"{self.name}.json"

    @property
    def log(self) -> Path:
        """File with the output of the last attempt."""
        return self.folder / f"{self.name}.log"

    @property
    def is_done(self) -> bool:
        """Whether the stage need not be run again."""
        if self.mark.is_file() or self.made is None:
            return self.mark.is_file()
        return self.made.exists() and (self.made.name != "status.json" or status(self.made).get("state") == "done")

    @property
    def seconds(self) -> float:
        """Duration of the last attempt; 0 if it is not known."""
        return float(json.loads(self.mark.read_text())["seconds"]) if self.mark.is_file() else 0.0


def status(path: Path) -> dict[str, Any]:
    """Returns the content of `train`'s status.json, empty if there is none."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found


def prompts_of(rounds: Rounds, number: int) -> list[Path]:
    """Returns the files of the prompts of a round, one per part."""
    return [rounds.folder(number) / f"prompts-{part + 1}.jsonl" for part in range(rounds.spec.sampling.parts)]


def pairs_of(rounds: Rounds, number: int) -> Path:
    """Returns the file of the pairs of a round; pairs.json in the same folder has the summary."""
    return rounds.folder(number) / "pairs.jsonl"


def scores_of(rounds: Rounds, number: int) -> dict[str, Path]:
    """Returns the JSON files of `evaluate` for the model of a round, by name: t0, t1 (temperatures), pairs."""
    test, folder = rounds.spec.test, rounds.folder(number)
    names = [f"t{temperature:g}" for temperature in test.temperatures] if test.prompts else []
    names += ["pairs"] if test.pairs and number else []
    return {name: folder / f"scores-{name}.json" for name in names}


def groups_of(rounds: Rounds, number: int) -> list[list[Stage]]:
    """Returns the stages of a round in their order; those of one group may run at the same time."""
    make = _Maker(rounds, number)
    tests = [group for group in (make.test_answers(), make.scores()) if group]
    if number == 0:
        return tests
    reference = [] if rounds.config.reference.cache is None else [make.reference()]
    one_by_one = [make.pairs(), *reference, make.train(), make.export()]
    return [make.samples(), *([stage] for stage in one_by_one), *tests]


class _Maker:
    """Makes the stages of one round."""

    def __init__(self, rounds: Rounds, number: int) -> None:
        self._rounds, self._number, self._spec = rounds, number, rounds.spec
        self._folder = rounds.folder(number)
        self._answers = [self._folder / f"answers-{part + 1}.jsonl" for part in range(self._spec.sampling.parts)]

    def samples(self) -> list[Stage]:
        sampling, model = self._spec.sampling, self._rounds.model(self._number - 1)
        # a seed for each part: the noise depends on seed, row and sample number, and every part has a row 0
        first = (self._spec.seed * 1009 + self._number) * 1009
        parts = enumerate(zip(prompts_of(self._rounds, self._number), self._answers, strict=True))
        return [
            self._generate(f"sample-{part + 1}", model, prompts, answers, "--samples", sampling.samples,
                           "--temperature", sampling.temperature, "--seed", first + part)
            for part, (prompts, answers) in parts
        ]  # fmt: skip

    def pairs(self) -> Stage:
        out = pairs_of(self._rounds, self._number)
        files = [*self._answers, "--out", out, "--summary", out.with_suffix(".json")]
        return self._stage("pairs", "pairs", *files, *_options(self._rounds.rules), made=out)

    def reference(self) -> Stage:
        return self._stage("reference", "reference", *self._configuration(), shared=True)

    def train(self) -> Stage:
        made = self._folder / "run" / "status.json"
        return self._stage("train", "train", *self._configuration(), made=made, shared=True)

    def export(self) -> Stage:
        model = self._rounds.model(self._number)
        return self._stage("export", "convert", self._folder / "run", model, "--to", "hf", made=model)

    def test_answers(self) -> list[Stage]:
        test, model = self._spec.test, self._rounds.model(self._number)
        stages = []
        for temperature in test.temperatures if test.prompts else ():
            out = self._folder / f"test-t{temperature:g}.jsonl"
            more = ("--temperature", temperature, "--seed", self._spec.seed)
            stages.append(self._generate(f"test-t{temperature:g}", model, test.prompts, out, *more))
        return stages

    def scores(self) -> list[Stage]:
        stages, model = [], self._rounds.model(self._number)
        for name, out in scores_of(self._rounds, self._number).items():
            of: list[Any] = [self._folder / f"test-{name}.jsonl"]
            if name == "pairs":
                of = ["--model", model, "--pairs", self._spec.test.pairs, "--reference", self._rounds.first]
            stages.append(self._stage(f"evaluate-{name}", "evaluate", *of, "--out", out, made=out))
        return stages

    def _generate(self, name: str, model: Path, prompts: Any, out: Path, *more: Any) -> Stage:
        sampling = self._spec.sampling
        options = ("--max-new-tokens", sampling.max_new_tokens, "--batch-size", sampling.batch_size,
                   "--engine", sampling.engine)  # fmt: skip
        return self._stage(name, "generate", model, "--prompts", prompts, "--out", out, *options, *more, made=out)

    def _configuration(self) -> Sequence[Any]:
        first = self._spec.reference == "first" and self._number > 1
        return [
            self._spec.base,
            *self._rounds.overrides,
            f"output={self._folder / 'run'}",
            f"model.path={self._rounds.model(self._number - 1)}",
            f"data.train={pairs_of(self._rounds, self._number)}",
            *([f"reference.cache={self._folder / 'reference'}"] if self._rounds.config.reference.cache else []),
            *([f"reference.model={self._rounds.first}"] if first else []),
            "logging.progress=false",
        ]

    def _stage(self, name: str, *words: Any, made: Path | None = None, shared: bool = False) -> Stage:
        return Stage(name, tuple(map(str, words)), self._folder / "stages", made, shared)


def _options(rules: PairRules) -> list[str]:
    given = rules.model_dump(exclude_unset=True)
    return [word for name, value in given.items() if value is not None
            for word in (f"--{name.replace('_', '-')}", str(value))]  # fmt: skip
