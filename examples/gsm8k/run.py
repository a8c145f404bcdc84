"""Collapse and rescue of a real chat model on GSM8K: pairs from its own answers, runs, answers to held-out problems.

Every finished part leaves files in the folder of results, which is committed: the sampled answers until there are
pairs, the pairs, and one small JSON file per run. What is there is not done again, so that the study can be spread
over many sessions and machines.
"""

import argparse
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # for `import examples`: a script has only its own folder on the path

from examples import common  # noqa: E402
from examples.common import StageFailed, Stages, metrics_lines, read_jsonl, write_jsonl, write_text  # noqa: E402
from examples.gsm8k import page  # noqa: E402
from examples.gsm8k.study import (  # noqa: E402
    LONGER,
    OTHER_PROMPT,
    PROMPT,
    SAMPLING_TEMPERATURE,
    SHORT_PROMPT,
    TINY,
    Problem,
    Run,
    Scale,
    all_runs,
    draw,
    other_questions,
    prompt_row,
    read_problems,
    solution_row,
)
from megatron_spo.evaluate.answers import read_answers  # noqa: E402
from megatron_spo.evaluate.pretrained import load_tokenizer  # noqa: E402
from megatron_spo.evaluate.scores import split_words  # noqa: E402
from megatron_spo.model.hf_files import locate_model  # noqa: E402

DEFAULT_MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
EVALUATED = (
    "loss/sft", "spo/chosen_shift", "spo/rejected_shift", "spo/both_down", "rewards/accuracies",
    "policy/entropy", "pairs", "chosen_tokens",
)  # fmt: skip
"""Metrics of the held-out pairs that a result file keeps."""
UNIMPORTANT = ("part", "batch_size", "sampled_problems")
"""Sizes that a study may change: the pairs that exist stay as they are."""


@dataclass(frozen=True)
class Study:
    """What all stages need: `results` is the folder of result files, `model` that of the model.

    `sft_steps`: Steps of SFT on solutions that the model was trained for before everything else; its prompts are then
    short.
    """

    stages: Stages
    results: Path
    model: Path
    scale: Scale
    seed: int
    sft_steps: int = 0

    @property
    def prompt(self) -> str:
        """Form of the prompts of the problems."""
        return SHORT_PROMPT if self.sft_steps else PROMPT

    @cached_property
    def chat(self) -> bool:
        """Whether the model has a chat template."""
        return load_tokenizer(self.model).chat_template is not None

    def answer(self, name: str, model: Path, prompts: str, **options: Any) -> Path:
        """Generates answers to OUT/`prompts`.jsonl into OUT/NAME.jsonl; returns that file."""
        settings = {"max-new-tokens": self.scale.max_new_tokens, "batch-size": self.scale.batch_size, **options}
        given = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
        return self.stages.generate(name, model, self.stages.file(prompts), *given)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    scale = TINY if options.tiny else Scale()
    given = {"samples": options.samples, "sampled_problems": options.sampled_problems}
    scale = replace(scale, **{key: value for key, value in given.items() if value is not None})
    model = locate_model(options.model)
    settings = {"model": str(model), "train": str(options.problems), "test": str(options.test), "tiny": options.tiny,
                "seed": options.seed, "sft_steps": options.sft_steps}  # fmt: skip
    stages = Stages.open(options.out, 1, settings, fresh=options.fresh, threads=options.threads)
    results = options.results or HERE / "results" / Path(options.model).name.lower()
    study = Study(stages, results, model, scale, options.seed, options.sft_steps)
    results.mkdir(parents=True, exist_ok=True)
    unused = write_prompts(study, options.problems, options.test)
    identify(study)
    if options.sft_steps:
        study = replace(study, model=train_sft(study, unused))
    make_pairs(study)
    runs = [run for run in all_runs() if not options.only or run.key in options.only]
    wanted = [run for run in runs if not (results / f"{run.key}.json").is_file()]
    stages.say(f"{len(runs) - len(wanted)} of {len(runs)} runs have a result file in {results}")
    if not (results / "base.json").is_file():
        base(study)
    for run in wanted if options.runs is None else wanted[: options.runs]:
        train(study, run)
    print("\n" + page.write(results) + "\n")
    stages.say(f"done: {results / 'table.md'}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = common.parse_arguments(__doc__.splitlines()[0], "runs/gsm8k", "problems", "test", jobs=False)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="Hugging Face folder or hub id [%(default)s]")
    parser.add_argument("--results", type=Path, help="folder of pairs and result files [results/NAME OF THE MODEL]")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a run [%(default)s]")
    parser.add_argument("--sft-steps", type=int, default=0, help="train the model on solutions for so many steps "
                        "before everything else, as a base model needs it [%(default)s]")  # fmt: skip
    parser.add_argument("--samples", type=int, help="answers per training problem; a model that solves few "
                        f"problems needs more to give enough pairs [{Scale.samples}]")  # fmt: skip
    parser.add_argument("--sampled-problems", type=int, help="training problems to sample answers to, of "
                        f"{Scale.pair_problems} [{Scale.sampled_problems}]")  # fmt: skip
    parser.add_argument("--runs", type=int, help="stop after so many runs [all]")
    parser.add_argument("--only", nargs="+", choices=[run.key for run in all_runs()], metavar="RUN", help="runs to do, "
                        "by the name of their result file, such as dpo-lr5e-6 [all]")  # fmt: skip
    parser.add_argument("--tiny", action="store_true", help="sizes that only test the code")
    return parser.parse_args(arguments)


def write_prompts(study: Study, train_file: Path, test_file: Path) -> list[Problem]:
    """Writes the prompts of training, test and other problems; returns the problems of the training file left over.

    No test problem is a training problem.
    """
    scale, stages = study.scale, study.stages
    train_problems = read_problems(train_file)
    known = {one.question for one in train_problems}
    test = [one for one in read_problems(test_file) if one.question not in known]
    drawn = {
        "train": draw(train_problems, scale.pair_problems, study.seed, "training"),
        "test": draw(test, scale.test_problems, study.seed, "test"),
    }
    drawn["first"] = drawn["test"][: scale.traced]
    for name, problems in drawn.items():
        rows = [prompt_row(one.question, one.right, chat=study.chat, prompt=study.prompt) for one in problems]
        write_jsonl(stages.file(f"{name}_problems"), rows)
    rows = [prompt_row(*one, chat=study.chat, prompt=OTHER_PROMPT) for one in other_questions(scale.other_problems)]
    write_jsonl(stages.file("other_problems"), rows)
    return [one for one in train_problems if one not in drawn["train"]]


def identify(study: Study) -> None:
    """Writes what all result files have in common; raises StageFailed if the folder belongs to something else."""
    prompts = {name: digest(study.stages.file(f"{name}_problems")) for name in ("train", "test", "other")}
    weights = sorted(study.model.glob("*.safetensors"))
    identity = {
        "model": study.model.name,
        "weights": digest(*weights),
        "tokenizer": digest(study.model / "tokenizer.json"),
        "prompts": prompts,
        "prompt": study.prompt,
        "seed": study.seed,
        "sft_steps": study.sft_steps,
        "scale": {key: value for key, value in asdict(study.scale).items() if key not in UNIMPORTANT},
    }
    path = study.results / "study.json"
    if not path.is_file():
        write_text(path, json.dumps(identity, indent=1) + "\n")
    there = json.loads(path.read_text())
    if different := [key for key in identity if identity[key] != there.get(key) and key != "model"]:
        raise StageFailed(f"{study.results} has results of another study: its study.json differs in "
                          f"{', '.join(different)}; give the same inputs, or another --results")  # fmt: skip


def train_sft(study: Study, problems: Sequence[Problem]) -> Path:
    """Trains the model on solutions of problems from which no pair is made; returns the folder of the trained model."""
    stages, scale = study.stages, study.scale
    wanted = max(1, min(len(problems), study.sft_steps * scale.sft_batch))
    drawn = draw(problems, wanted, study.seed, "SFT")
    write_jsonl(stages.file("sft"), [solution_row(one, chat=study.chat, prompt=study.prompt) for one in drawn])
    overrides = [
        f"model.path={study.model}",
        f"data.train={stages.file('sft')}",
        f"training.steps={study.sft_steps}",
        f"optimizer.warmup_steps={study.sft_steps // 10}",
        f"training.global_batch_size={scale.sft_batch}",
        f"training.seed={study.seed}",
    ]
    stages.train("sft", HERE / "sft.yaml", overrides)
    return stages.export("sft")


def make_pairs(study: Study) -> None:
    """Samples answers, part by part, and makes training and held-out pairs of different problems from them."""
    done, scale, stages = study.results / "pairs.jsonl", study.scale, study.stages
    if done.is_file():
        stages.say(f"pairs: {done} is there")
        return
    problems, parts = read_jsonl(stages.file("train_problems"))[: scale.sampled_problems], []
    for start in range(0, len(problems), scale.part):
        name = f"sampled_{start:04d}"
        parts.append(kept := study.results / f"{name}.jsonl")
        if not kept.is_file():
            write_jsonl(stages.file(f"problems_{start:04d}"), problems[start : start + scale.part])
            options = {"samples": scale.samples, "temperature": SAMPLING_TEMPERATURE, "seed": study.seed + start}
            shutil.copy(study.answer(name, study.model, f"problems_{start:04d}", **options), kept)
        stages.say(f"sampled: {min(start + scale.part, len(problems))} of {len(problems)} problems")
    drawn = stages.file("all_pairs")
    rules = ["--scorer", "exact_match", "--choose", "right-wrong", "--per-prompt", str(scale.per_problem)]
    summary = study.results / "pairs_summary.json"
    stages.command("pairs", "pairs", *parts, "--out", drawn, "--summary", summary, *rules, done=False)
    training, held_out = split(read_jsonl(drawn), scale)
    write_jsonl(study.results / "pairs_heldout.jsonl", held_out)
    write_jsonl(done, training)
    for part in parts:
        part.unlink()


def split(pairs: Sequence[dict[str, Any]], scale: Scale) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns training pairs and held-out pairs, the latter those of the last problems; the rest is left out."""
    rows = [{key: row[key] for key in ("prompt", "chosen", "rejected", "answer")} for row in pairs]
    held_out = rows[-scale.held_out_pairs :]
    asked = [row["prompt"] for row in held_out]
    training = [row for row in rows if row["prompt"] not in asked]
    if len(training) < (needed := scale.steps * scale.batch):
        raise StageFailed(f"the answers give {len(training)} pairs besides {len(held_out)} held-out ones, but a run "
                          f"needs {needed}; set --samples higher, or take another model")  # fmt: skip
    return training[: scale.pairs], held_out


def base(study: Study) -> None:
    """Writes the result file of the model before training."""
    begin = time.perf_counter()
    answers = answers_of(study, "base", study.model, sampled=True)
    tokenizer = load_tokenizer(study.model)
    rejected = [row["rejected"] for row in read_jsonl(study.results / "pairs_heldout.jsonl")]
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in rejected]
    tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for text in texts)  # + end of turn
    seconds = {"answers": round(time.perf_counter() - begin)}
    write_result(study, "base", {"name": "base", "seconds": seconds, "rejected_tokens": tokens, "answers": answers})


def train(study: Study, run: Run) -> None:
    """Trains a run, answers the problems, writes the result file, and deletes checkpoint and weights."""
    stages, scale, begin = study.stages, study.scale, time.perf_counter()
    shared = [
        f"model.path={study.model}",
        f"data.train={study.results / 'pairs.jsonl'}",
        f"data.eval={study.results / 'pairs_heldout.jsonl'}",
        f"reference.cache={stages.out / 'reference'}",
        f"training.steps={scale.steps}",
        f"training.eval_every={scale.eval_every}",
        f"training.global_batch_size={scale.batch}",
        f"training.threads={stages.threads}",
    ]
    config, filled = HERE / "preference.yaml", stages.out / "reference-filled"
    stages.command("reference", "reference", config, f"output={stages.out / 'reference-run'}", *shared,
                   done=filled.is_file())  # fmt: skip
    filled.touch()
    traced = [f"checkpoint.every={scale.trace_every}", f"checkpoint.keep={scale.steps}"] if run.traced else []
    folder = stages.train(run.key, config, [*shared, *traced, *run.overrides()])
    model = stages.export(run.key)
    trained = time.perf_counter()
    answers = answers_of(study, run.key, model, sampled=run.sampled)
    during = answers_during(study, folder) if run.traced else {}
    evaluations = metrics_lines(folder, "eval")
    found = {
        "name": run.name,
        "lr": float(run.lr),
        "seed": run.seed,
        "overrides": run.overrides(),
        "pairs": digest(study.results / "pairs.jsonl"),
        "seconds": {"steps": round(common.training_seconds(folder)), "answers": round(time.perf_counter() - trained),
                    "all": round(time.perf_counter() - begin)},
        "held_out": [{"step": line["step"], **{key: line[key] for key in EVALUATED if key in line}}
                     for line in evaluations],
        "losses": [round(line["loss"], 5) for line in metrics_lines(folder, "train")],
        "alarms": [{key: line[key] for key in ("step", "data", "alarm")} for line in metrics_lines(folder, "alarm")],
        "answers": answers,
        "during": during,
    }  # fmt: skip
    write_result(study, run.key, found)
    shutil.rmtree(model)
    shutil.rmtree(folder / "checkpoints")


def answers_during(study: Study, folder: Path) -> dict[int, dict[str, Any]]:
    """Returns scores of greedy answers to the first test problems, by the step of each checkpoint but the last."""
    stages, found = study.stages, {}
    for checkpoint in sorted((folder / "checkpoints").glob("step_*"))[:-1]:
        name = f"{folder.name}-{checkpoint.name}"
        if not (answers := stages.file(f"{name}-greedy")).is_file():
            model = stages.out / f"{name}-hf"
            stages.command(f"convert-{name}", "convert", checkpoint, model, "--to", "hf", done=model.is_dir())
            answers = study.answer(f"{name}-greedy", model, "first_problems")
            shutil.rmtree(model)
        found[int(checkpoint.name.rpartition("_")[2])] = scores(answers)
    return found


def answers_of(study: Study, name: str, model: Path, *, sampled: bool) -> dict[str, Any]:
    """Returns scores of each answer: greedy, with a higher limit of tokens to the first problems, to other questions,
    and sampled if asked for."""
    limit = LONGER * study.scale.max_new_tokens
    files = {
        "greedy": study.answer(f"{name}-greedy", model, "test_problems"),
        "longer": study.answer(f"{name}-longer", model, "first_problems", **{"max-new-tokens": limit}),
        "other": study.answer(f"{name}-other", model, "other_problems"),
    }
    if sampled:
        files["sampled"] = study.answer(f"{name}-sampled", model, "test_problems", temperature=SAMPLING_TEMPERATURE,
                                       seed=study.seed)  # fmt: skip
    return {kind: scores(path) for kind, path in files.items()}


def scores(path: Path) -> dict[str, Any]:
    """Returns per answer whether it is right and whether it is malformed (as text of 0 and 1), and its words."""
    answers = read_answers(path)
    ones = [row[0] for row in answers.scores.answers]
    return {
        "right": "".join(str(int(bool(one.exact_match))) for one in ones),
        "malformed": "".join(str(int(one.malformed)) for one in ones),
        "words": [len(split_words(row["responses"][0])) for row in answers.rows],
    }


def write_result(study: Study, key: str, found: dict[str, Any]) -> None:
    versions = {name: version(name) for name in ("megatron_spo", "torch", "transformers")}
    stamp = {"date": time.strftime("%Y-%m-%d"), "versions": versions, "threads": study.stages.threads}
    write_text(study.results / f"{key}.json", json.dumps({**found, **stamp}) + "\n")
    page.write(study.results)
    study.stages.say(f"{key}: {study.results / key}.json")


def digest(*files: Path) -> str:
    """Returns the first 16 digits of the SHA-256 of files."""
    found = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            while block := opened.read(2**24):
                found.update(block)
    return found.hexdigest()[:16]


if __name__ == "__main__":
    common.run_main(main)
