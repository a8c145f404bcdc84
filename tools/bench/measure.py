"""Functions that the benchmarks share: length mixes, a random Llama, timed `train` commands, and results.

Time is processor time of the process, so other work on the machine has little influence. Programs that are compared
take turns within one run.
"""

import argparse
import contextlib
import io
import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

MIXES = {"summarise": (400, 40), "chat": (100, 200), "reason": (60, 120)}
"""Median tokens of prompt and response (lognormal, standard deviation of the logarithm 0.5)."""
LETTERS = "abcdefghijklmnopqrstuvwxyz "


@dataclass(frozen=True)
class Result:
    """A measured number; `name` is its key in floors.json, `unit` is "x" for a ratio."""

    name: str
    value: float
    unit: str
    note: str = ""


@dataclass
class Turn:
    """Processor seconds from the end of each step to the end of the next, and the lines of metrics.jsonl."""

    seconds: list[float] = field(default_factory=list)
    lines: list[dict[str, float]] = field(default_factory=list)

    @property
    def losses(self) -> list[float]:
        return [line["loss"] for line in self.lines]


def write_pairs(
    path: Path, count: int, *, prompt: int, response: int, deviation: float = 0.5, seed: int = 0
) -> list[dict[str, str]]:
    """Writes and returns pairs of random letters with lognormal lengths of these medians (a letter is a token)."""
    rng = random.Random(seed)

    def text(median: int) -> str:
        length = max(2, round(rng.lognormvariate(0, deviation) * median))
        return rng.choice(LETTERS[:-1]) + "".join(rng.choices(LETTERS, k=length - 1))

    pairs = []
    for _ in range(count):
        prompt_text, chosen, rejected = text(prompt), text(response), text(response)
        other = rejected[0] if rejected[0] != chosen[0] else LETTERS[(LETTERS.index(chosen[0]) + 1) % 26]
        pairs.append({"prompt": prompt_text, "chosen": chosen, "rejected": other + rejected[1:]})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return pairs


def write_model(folder: Path, *, hidden: int, layers: int = 4, vocab: int = 1024) -> int:
    """Writes a random Llama with a tokenizer of letters; returns the number of its parameters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = {character: i for i, character in enumerate(["<pad>", "<eos>", *LETTERS])}
    raw = Tokenizer(models.WordLevel(letters, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    heads = max(2, hidden // 64)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=11 * hidden // 4,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            max_position_embeddings=16384,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
    )
    model.save_pretrained(folder)
    return model.num_parameters()


def write_config(folder: Path, **sections: Mapping[str, Any]) -> Path:
    """Writes config.yaml for the model and pairs in `folder`: plain DPO, fp32, one thread, updated with `sections`."""
    config: dict[str, Any] = {
        "output": str(folder / "unset"),
        "model": {"path": str(folder / "model")},
        "data": {"train": str(folder / "pairs.jsonl"), "max_length": 8192, "row_length": 4096, "shuffle": False},
        "reference": {"cache": str(folder / "cache")},
        "spo": {"schedule": "none"},
        "precision": {"dtype": "fp32"},
        "training": {"threads": 1},
        "logging": {"progress": False},
    }
    for name, section in sections.items():
        config[name] = {**config.get(name, {}), **section}
    path = folder / "config.yaml"
    path.write_text(json.dumps(config))
    return path


def command(*arguments: str) -> None:
    """Runs `megatron-spo ARGUMENTS` in this process and asserts that it succeeds."""
    from megatron_spo.cli import main

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main(list(arguments))
    assert code == 0, said.getvalue()


def train(config: Path, output: Path, *overrides: str) -> Turn:
    """Runs `megatron-spo train` in this process; the first step is a warm-up and not timed."""
    from megatron_spo.train.run_directory import RunDirectory

    stamps: list[float] = []
    log = RunDirectory.log

    def stamped(self: RunDirectory, kind: str, step: int, metrics: Mapping[str, Any]) -> None:
        log(self, kind, step, metrics)
        stamps.append(time.process_time())

    with replaced(RunDirectory, "log", stamped):
        command("train", str(config), f"output={output}", *overrides)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return Turn([b - a for a, b in zip(stamps, stamps[1:], strict=False)], lines)


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """Yields a temporary folder, in which tokenised rows of this process and its children are cached, too."""
    with tempfile.TemporaryDirectory() as name:
        os.environ["HF_DATASETS_CACHE"] = f"{name}/tokenised"
        yield Path(name)


@contextlib.contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """Replaces an attribute temporarily."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def take_turns(ways: Mapping[str, Callable[[], Turn]], rounds: int) -> dict[str, list[Turn]]:
    """Runs all functions `rounds` times in turn, every other round in reverse order, so that none is always last."""
    turns: dict[str, list[Turn]] = {name: [] for name in ways}
    for i in range(rounds):
        for name in reversed(list(ways)) if i % 2 else ways:
            turns[name].append(ways[name]())
    return turns


def seconds(turns: Sequence[Turn]) -> float:
    """Returns the sum over the timed steps of the least time over the turns, as disturbances only make steps longer."""
    return sum(min(step) for step in zip(*(turn.seconds for turn in turns), strict=True))


def cpu_seconds(function: Callable[[], object], *, repeats: int = 3) -> float:
    """Returns the processor seconds of a call, the least of several measurements."""
    taken = []
    for _ in range(repeats):
        begin = time.process_time()
        function()
        taken.append(time.process_time() - begin)
    return min(taken)


def parser(description: str | None) -> argparse.ArgumentParser:
    """Returns a parser with the options of every benchmark."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path, help="JSON file for the results")
    made.add_argument("--quick", action="store_true", help="tiny sizes to test the code; the numbers are meaningless")
    return made


def report(results: Sequence[Result], path: Path | None, **more: Any) -> None:
    """Prints a table; writes {"results": [...], **more} to `path`."""
    width = max(len(result.name) for result in results)
    for result in results:
        print(f"{result.name:{width}s} {result.value:12.4g} {result.unit:8s} {result.note}".rstrip(), flush=True)
    if path is not None:
        path.write_text(json.dumps({"results": [asdict(result) for result in results], **more}, indent=1))
