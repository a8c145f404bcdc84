"""Reads a file of `megatron-spo rounds`, and checks it before the first command is run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from megatron_spo.config.load import load_config
from megatron_spo.config.schema import Config
from megatron_spo.config.section import Section
from megatron_spo.config.section_file import read_section
from megatron_spo.errors import UserError
from megatron_spo.on_policy.rules import PairRules, read_rules


class SamplingSpec(Section):
    """How answers are sampled for pairs."""

    samples: int = Field(8, ge=2)
    """answers per prompt; >= 2"""
    temperature: float = Field(1.0, gt=0)
    """sampling temperature; > 0"""
    max_new_tokens: int = Field(256, ge=1)
    """maximum tokens of an answer, also of the test answers; >= 1"""
    batch_size: int = Field(64, ge=1)
    """answers per batch; not used by vllm; >= 1"""
    engine: Literal["transformers", "vllm"] = "transformers"
    """library to generate with"""
    parts: int = Field(1, ge=1)
    """number of commands that sample the prompts of a round; an interruption loses at most one part; >= 1"""


class TestSpec(Section):
    """What every model is tested on, the first one included."""

    prompts: str | None = None
    """JSONL file of prompts, with a key `answer` for exact match; null: no test answers"""
    temperatures: list[float] = Field([0.0], min_length=1)
    """temperatures of the test answers; 0: greedy decoding"""
    pairs: str | None = None
    """preference pairs whose log-probs are compared with those of the first model; null: none"""


class RoundsSpec(Section):
    """The content of a file of `rounds`."""

    base: str
    """configuration of `train`; model.path, data.train, reference and output are set for each round"""
    out: str
    """folder for everything that is written"""
    rounds: int = Field(ge=1)
    """number of rounds; may be raised later; >= 1"""
    model: str | None = None
    """folder of the first model; null: model.path of the base"""
    prompts: str
    """JSONL file of the prompts to sample answers to"""
    prompts_per_round: int | None = Field(None, ge=1)
    """number of prompts per round, drawn without repetition over all rounds; null: all prompts in every round; >= 1"""
    sampling: SamplingSpec = SamplingSpec()
    pairs: dict[str, Any]
    """options of `pairs`, such as scorer: exact_match"""
    reference: Literal["round", "first"] = "round"
    """model that gives the reference's log-probs and v: the one at the start of the round, or the first model"""
    test: TestSpec = TestSpec()
    seed: int = Field(0, ge=0)
    """random seed of the prompts of each round, of the samples and of `pairs`; >= 0"""


@dataclass(frozen=True)
class Rounds:
    """A checked file.

    Attributes:
        path: The file.
        spec: Its content.
        rules: Options of `pairs`.
        overrides: Overrides of the base.
        config: The base with its overrides, as it is in the first round.
        first: Folder of the first model.
    """

    path: Path
    spec: RoundsSpec
    rules: PairRules
    overrides: tuple[str, ...]
    config: Config
    first: Path

    @property
    def out(self) -> Path:
        """The folder for everything that is written."""
        return Path(self.spec.out)

    def folder(self, number: int) -> Path:
        """Returns the folder of a round; 0 is for the tests of the first model."""
        return self.out / f"round-{number}"

    def model(self, number: int) -> Path:
        """Returns the folder of the model that a round gives; 0 is the first model."""
        return self.folder(number) / "model" if number else self.first


def read_rounds(path: Path, overrides: Sequence[str], out: Path | None = None) -> Rounds:
    """Reads and checks a file and the configuration of its trainings; `out` replaces its key.

    Raises:
        UserError: with one line per mistake.
    """
    spec = read_section(path, RoundsSpec)
    spec = spec if out is None else spec.model_copy(update={"out": str(out)})
    rules = read_rules({"seed": spec.seed, **spec.pairs}, lambda field: f"{path}: pairs.{field}")
    for key, file in (("base", spec.base), ("prompts", spec.prompts), ("test.prompts", spec.test.prompts)):
        if file is not None and not Path(file).is_file():
            raise UserError(f"{path}: {key}: {file} does not exist; paths are relative to the working directory")
    if any(temperature < 0 for temperature in spec.test.temperatures):
        raise UserError(f"{path}: test.temperatures: {spec.test.temperatures} must be 0 (greedy) or positive")
    first = [] if spec.model is None else [f"model.path={spec.model}"]
    config = _load(spec, [*overrides, *first, f"output={spec.out}"])
    if not (Path(config.model.path) / "config.json").is_file():
        raise UserError(f"{path}: the first model {config.model.path} is not a Hugging Face folder; set `model` to one")
    if config.reference.model is not None:
        raise UserError(f"{spec.base}: reference.model is set by `rounds`; remove it, and set `reference` in {path}")
    return Rounds(path, spec, rules, tuple(overrides), config, Path(config.model.path))


def _load(spec: RoundsSpec, overrides: Sequence[str]) -> Config:
    """Returns the base; it gets a reference cache, which each round fills, if it has none but requires one."""
    cached = [*overrides, f"reference.cache={spec.out}/reference"]
    if spec.reference == "first":
        return load_config(spec.base, cached, elsewhere=True)
    try:
        return load_config(spec.base, overrides, elsewhere=True)
    except UserError:
        return load_config(spec.base, cached, elsewhere=True)
