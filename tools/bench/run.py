"""`make bench`: pairs per second of training steps, as ratios within one run.

One thread, fp32, a Llama of 4 layers and width 256 with a byte vocabulary, DPO, 16 pairs a step. The ways take turns,
so that a slow moment of the machine meets all of them; the figure is the median over all timed steps:

    plain      transformers and AdamW, chosen and rejected padded side by side (micro-batches of 4 pairs), the
               reference's log-probs given
    one pair   `megatron-spo train`, rows of one pair: the prompt is computed once for both responses
    packed     `megatron-spo train`, rows of 4096 tokens: no padding either
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import logsigmoid
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from megatron_spo.cli import main as megatron_spo

MIXES = {"summarise": (400, 40), "chat": (100, 200), "reason": (60, 120)}
"""Median tokens of prompt and response (lognormal)."""
BATCH, STEPS, LETTERS = 16, 4, "abcdefghijklmnopqrstuvwxyz "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="turns of each way [%(default)s]")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'mix':12s}{'way':12s}{'pairs/s':>9s}{'over plain':>12s}")
    for mix, lengths in MIXES.items():
        with tempfile.TemporaryDirectory() as folder:
            ways = _ways(Path(folder), *lengths)
            seconds: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(options.rounds):
                for name, run in ways.items():
                    seconds[name] += run()[1:]  # the first step warms up
        speed = {name: BATCH / statistics.median(values) for name, values in seconds.items()}
        for name, value in speed.items():
            print(f"{mix:12s}{name:12s}{value:9.2f}{value / speed['plain']:12.2f}", flush=True)


def _ways(folder: Path, prompt: int, response: int) -> dict[str, Callable[[], list[float]]]:
    """Each returns the seconds of `STEPS` steps on the same pairs."""
    pairs = write_pairs(folder / "pairs.jsonl", BATCH, prompt=prompt, response=response)
    write_model(folder / "model", hidden=256)
    longest = max(len(p["prompt"]) + len(p["chosen"]) + len(p["rejected"]) + 2 for p in pairs)
    config = {
        "model": {"path": str(folder / "model")},
        "data": {"train": str(folder / "pairs.jsonl"), "row_length": 4096},
        "reference": {"cache": str(folder / "cache")},
        "spo": {"schedule": "none"},
        "precision": {"dtype": "fp32"},
        "training": {"global_batch_size": BATCH, "steps": STEPS, "threads": 1},
        "logging": {"progress": False},
    }
    (folder / "config.yaml").write_text(json.dumps({"output": str(folder / "unset"), **config}))
    assert megatron_spo(["reference", str(folder / "config.yaml")]) == 0
    runs = iter(range(10**6))

    def train(row_length: int) -> list[float]:
        run = folder / f"run-{next(runs)}"
        overrides = [f"output={run}", f"data.row_length={row_length}"]
        assert megatron_spo(["train", str(folder / "config.yaml"), *overrides]) == 0
        return [json.loads(line)["seconds"] for line in (run / "metrics.jsonl").read_text().splitlines()]

    return {
        "plain": lambda: _plain(folder / "model", pairs),
        "one pair": lambda: train(longest),
        "packed": lambda: train(4096),
    }


def write_pairs(path: Path, count: int, *, prompt: int, response: int) -> list[dict[str, str]]:
    """Pairs of random letters, lengths lognormal around these medians (a letter is a token)."""
    rng = random.Random(0)

    def text(median: int) -> str:
        return "".join(rng.choices(LETTERS, k=max(2, round(rng.lognormvariate(0, 0.5) * median))))

    pairs = [{"prompt": text(prompt), "chosen": text(response), "rejected": text(response)} for _ in range(count)]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return pairs


def write_model(folder: Path, *, hidden: int) -> int:
    """A random Llama of 4 layers with a tokenizer of letters; returns the number of its parameters."""
    vocab = {character: i for i, character in enumerate(["<pad>", "<eos>", *LETTERS])}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    shape = {"hidden_size": hidden, "intermediate_size": 11 * hidden // 4, "num_hidden_layers": 4}
    heads = {"num_attention_heads": hidden // 32, "num_key_value_heads": hidden // 64}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=1024, max_position_embeddings=8192, **shape, **heads))
    model.save_pretrained(folder)
    return model.num_parameters()


def _plain(folder: Path, pairs: list[dict[str, str]]) -> list[float]:
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    sides = [tokenizer(p["prompt"] + p[side]).input_ids + [1] for side in ("chosen", "rejected") for p in pairs]
    prompts = [len(p["prompt"]) for p in pairs] * 2
    micro, seconds = 4, []
    for _ in range(STEPS):
        begin = time.perf_counter()
        for i in range(0, BATCH, micro):
            rows = [*range(i, i + micro), *range(BATCH + i, BATCH + i + micro)]
            width = max(len(sides[r]) for r in rows)
            tokens, scored = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width - 1)
            for at, r in enumerate(rows):
                tokens[at, : len(sides[r])] = torch.tensor(sides[r])
                scored[at, prompts[r] - 1 : len(sides[r]) - 1] = 1
            logprobs = model(tokens).logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
            sums = (logprobs * scored).sum(-1)
            (-logsigmoid(0.1 * (sums[:micro] - sums[micro:])).sum() / BATCH).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - begin)
    return seconds


if __name__ == "__main__":
    main()
