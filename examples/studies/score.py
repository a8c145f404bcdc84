"""Scores a run: `score.py RUN REFERENCE PROBLEMS OUT.json SEED [TASK]`, with a task of tasks.py [sums].

RUN is exported to a folder `hf` next to it, and answers PROBLEMS. OUT.json then holds the task's scores at each
temperature, such as t0.5_win, and kl: the mean log-prob ratio in nats per answer of the answers at temperature 1, under
the run's model and REFERENCE (a Hugging Face folder). If sft_scores.json, the scores of REFERENCE, is next to PROBLEMS,
it also holds gain: t1_win minus that of REFERENCE. All problems are answered in one batch.
"""

import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `import examples`

import torch  # noqa: E402

from examples.common import write_text  # noqa: E402
from examples.studies.tasks import SCORED, Scored  # noqa: E402
from megatron_spo.convert.export import convert  # noqa: E402
from megatron_spo.data.prompts import tokenize_prompts  # noqa: E402
from megatron_spo.evaluate.generate import generate  # noqa: E402
from megatron_spo.evaluate.pretrained import load_model, load_tokenizer  # noqa: E402
from megatron_spo.evaluate.sampling import Response, Sampling  # noqa: E402

TEMPERATURES = (0.0, 0.5, 1.0)


def write_scores(model_folder: Path, reference: Path, problems: Path, out: Path, seed: int, task: Scored) -> None:
    """Writes the scores of a model in Hugging Face format to `out`."""
    model, tokenizer = load_model(model_folder), load_tokenizer(model_folder)
    _, rows, prompts = map(list, zip(*tokenize_prompts(problems, tokenizer), strict=True))
    scores: dict[str, float] = {}
    for temperature in TEMPERATURES:
        sampling = Sampling(1, temperature, task.MAX_NEW_TOKENS, seed)
        answers = [found for (found,) in generate(model, tokenizer, prompts, sampling, len(prompts))]
        answered = [
            {**row, "responses": [answer.text], "finished": [answer.finished]}
            for row, answer in zip(rows, answers, strict=True)
        ]
        scores |= {f"t{temperature:g}_{name}": value for name, value in asdict(task.score(answered)).items()}
    tokens = [answer_tokens(tokenizer, answer) for answer in answers]  # of the last temperature, 1
    policy, before = (log_probs(each, prompts, tokens) for each in (model, load_model(reference)))
    scores["kl"] = float((policy - before).mean())
    known = problems.with_name("sft_scores.json")
    if known.is_file() and out != known:
        scores |= {"gain": scores["t1_win"] - json.loads(known.read_text())["t1_win"]} if "t1_win" in scores else {}
    write_text(out, json.dumps(scores))


def answer_tokens(tokenizer: Any, answer: Response) -> list[int]:
    """Returns the tokens of an answer's text, and the end token if it ended.

    The model may have generated the same text from other tokens.
    """
    ids: list[int] = tokenizer(answer.text, add_special_tokens=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id] if answer.finished else ids


@torch.inference_mode()
def log_probs(model: Any, prompts: list[list[int]], answers: list[list[int]]) -> torch.Tensor:
    """Returns each answer's log-prob in nats, summed over its tokens: fp64 [answers]."""
    width = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    counted = torch.zeros(len(prompts), width, dtype=torch.bool)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        ids[i, :end] = torch.tensor(prompt + answer)
        counted[i, len(prompt) : end] = True
    logits = model(input_ids=ids.to(model.device)).logits[:, :-1].float().cpu()  # right padding is not attended to
    found = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return found.where(counted[:, 1:], 0.0).sum(1).double()


def main() -> None:
    task = SCORED[sys.argv[6] if len(sys.argv) > 6 else "sums"]
    run, reference, problems, out = map(Path, sys.argv[1:5])
    model = run.with_name("hf")
    shutil.rmtree(model, ignore_errors=True)  # left by an earlier training
    convert(run, model, "hf")
    write_scores(model, reference, problems, out, int(sys.argv[5]), task)


if __name__ == "__main__":
    main()
