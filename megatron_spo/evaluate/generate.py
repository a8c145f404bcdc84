"""Responses of a Hugging Face model to a JSONL file of prompts.

The noise of a sampled response comes from (seed, row, sample number) alone: neither the batch size nor the
other prompts of the file change it.
"""

import importlib.util
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from megatron_spo.config.model_folder import check_folder, count_numbers, is_needless, is_tied, read_config, shard_files
from megatron_spo.data import tokenize
from megatron_spo.data.prompts import tokenize_prompts
from megatron_spo.errors import UserError
from megatron_spo.evaluate.limits import config_of, does_not_load, limits_of
from megatron_spo.files import write_output

ROOM_FOR_WEIGHTS = 0.7
"""Share of a GPU's memory that weights may take, beside the keys and values of the answers."""


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn: `temperature` 0 is greedy; `max_new_tokens` counts the end-of-text token."""

    samples: int = 1
    temperature: float = 0.0
    max_new_tokens: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1 or self.max_new_tokens < 1:
            raise UserError("generate: samples and max_new_tokens must be at least 1")
        if self.temperature < 0:
            raise UserError(f"generate: temperature is {self.temperature}, it must be 0 (greedy) or positive")
        if self.samples > 1 and self.temperature == 0:
            raise UserError("generate: samples of a greedy response are all the same; set a temperature")


@dataclass(frozen=True)
class Response:
    """`text` without special tokens; `finished` is False where the length limit cut it off."""

    text: str
    finished: bool


def generate_file(
    model_dir: str | Path,
    prompts_file: str | Path,
    out_file: str | Path,
    *,
    batch_size: int = 64,
    engine: str = "transformers",
    **sampled: Any,
) -> None:
    """Writes `out_file`: the rows of `prompts_file` with two fields more, `responses` (`samples` strings) and
    `finished` (as many booleans: ended by itself within `max_new_tokens`).

    Prompts are found and tokenised as in training rows; one that is implicit is written as a field `prompt`.
    `engine`: "transformers", or "vllm", which batches by itself. `sampled`: fields of Sampling. The output appears
    complete or not at all. Raises UserError for wrong input.
    """
    if batch_size < 1:
        raise UserError(f"generate: batch_size is {batch_size}, it must be at least 1")
    sampling = Sampling(**sampled)
    folder = Path(model_dir)
    tokenizer = load_tokenizer(folder)
    places, rows, prompts = zip(*tokenize_prompts(Path(prompts_file), tokenizer), strict=True)
    limits_of(folder).check_prompts(prompts, sampling.max_new_tokens, places)
    responses = generate_by(engine, folder, tokenizer, prompts, sampling, batch_size)
    for row, answers in zip(rows, responses, strict=True):
        row["responses"] = [answer.text for answer in answers]
        row["finished"] = [answer.finished for answer in answers]
    write_rows(Path(out_file), rows)


def generate_by(
    engine: str,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    batch_size: int,
) -> list[list[Response]]:
    """`sampling.samples` responses to each prompt (token ids) by "transformers" or "vllm"."""
    if engine == "vllm":
        from megatron_spo.evaluate.vllm_engine import generate_by_vllm

        return generate_by_vllm(folder, tokenizer, prompts, sampling)
    return generate(load_model(folder), tokenizer, prompts, sampling, batch_size)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of an HF folder. Raises UserError where it is none."""
    read_config(folder)
    return tokenize.load_tokenizer(str(folder))


def load_model(folder: Path) -> Any:
    """The transformers model of an HF folder: on the GPU, over all of them where one is too small, or on the CPU.

    Raises UserError where it is none, or holds other weights than its config.json calls for.
    """
    check_folder(folder)
    _check_size(folder)
    transformers_logging.disable_progress_bar()
    gpus = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
    place = placement(sum(file.stat().st_size for file in shard_files(folder)), gpus)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", output_loading_info=True, device_map=place
        )
    except Exception as error:  # whatever transformers raises for a folder that it cannot read
        raise does_not_load(folder, error) from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"{folder} lacks the tensor {missing[0]}, which its config.json calls for ({len(missing)} such)"
        )
    if stray := sorted(name for name in info["unexpected_keys"] if not is_needless(name, tied=False)):
        raise UserError(f"{folder} holds {stray[0]}, which a model of its config.json does not have ({len(stray)} such "
                        "tensors); take the model as it is on the hub")  # fmt: skip
    if wrong := sorted(str(one) for one in info["mismatched_keys"]):
        raise UserError(f"{folder}: {wrong[0]} has another shape than its config.json calls for ({len(wrong)} such)")
    return (model if place else model.to("cuda" if gpus else "cpu")).eval()


def _check_size(folder: Path) -> None:
    """Refuse a folder whose config.json calls for far more numbers than are stored: transformers makes them up, and a
    wrong count may exceed the memory. Smaller differences are named tensor by tensor."""
    raw = read_config(folder)
    if raw.get("quantization_config"):
        return
    config = config_of(folder)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever transformers raises for a config.json that it cannot use
        raise does_not_load(folder, error) from error
    expected = sum(weights.numel() for weights in model.parameters())
    if expected > 2 * (stored := count_numbers(folder, tied=is_tied(raw))):
        raise UserError(f"{folder}: its weights are {stored} numbers, but its config.json calls for {expected}; take "
                        "both from the same model")  # fmt: skip


def placement(weights: int, gpus: Sequence[int]) -> str | None:
    """How transformers is to place so many bytes of weights on GPUs of so many: None for one device.

    Raises:
        UserError: they must be split, and the package that does so is not there.
    """
    if len(gpus) < 2 or weights < ROOM_FOR_WEIGHTS * gpus[0]:
        return None
    if importlib.util.find_spec("accelerate") is None:
        raise UserError(f"generate: {weights / 2**30:.0f} GiB of weights do not fit one GPU of {gpus[0] / 2**30:.0f} "
                        f"GiB; to split them over the {len(gpus)} here, pip install accelerate")  # fmt: skip
    return "auto"


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    batch_size: int,
) -> list[list[Response]]:
    """`sampling.samples` responses to each prompt (token ids), in the order of the prompts."""
    stops = end_tokens(model.generation_config, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(stops), 0)
    # our own: a model's saved generation config may carry penalties and cut-offs that nobody asked for here
    model.generation_config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=False,
        eos_token_id=sorted(stops) or None,
        pad_token_id=pad,
    )
    found: dict[tuple[int, int], Response] = {}
    total = len(prompts) * sampling.samples
    with tqdm(total=total, desc="generate", unit="response", disable=None) as progress:
        for jobs in batches(prompts, sampling.samples, batch_size):
            ids, mask = pad_left([prompts[row] for row, _ in jobs], pad)
            tokens = respond(model, ids, mask, jobs, sampling)
            for job, response in zip(jobs, tokens, strict=True):
                found[job] = cut(tokenizer, response, stops)
            progress.update(len(jobs))
    return [[found[row, sample] for sample in range(sampling.samples)] for row in range(len(prompts))]


def end_tokens(config: Any, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end a response: the model's, by its configuration (of generation), and the tokenizer's."""
    of_model = config.eos_token_id if config else None
    listed = of_model if isinstance(of_model, list) else [of_model]
    return {token for token in [*listed, tokenizer.eos_token_id] if token is not None}


def batches(prompts: Sequence[Sequence[int]], samples: int, batch_size: int) -> Iterator[list[tuple[int, int]]]:
    """(row, sample number) of every response wanted, similar lengths together, the longest first."""
    rows = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    jobs = [(row, sample) for row in rows for sample in range(samples)]
    for start in range(0, len(jobs), batch_size):
        yield jobs[start : start + batch_size]


def pad_left(prompts: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [batch, longest] and attention mask of the same shape."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


@torch.inference_mode()
def respond(
    model: Any,
    ids: torch.Tensor,
    mask: torch.Tensor,
    jobs: Sequence[tuple[int, int]],
    sampling: Sampling,
) -> list[list[int]]:
    """New token ids of one batch, padded behind the end token."""
    choosers = LogitsProcessorList()
    if sampling.temperature > 0:
        noise = [np.random.default_rng((sampling.seed, *job)).random(sampling.max_new_tokens) for job in jobs]
        uniform = torch.from_numpy(np.stack(noise))
        choosers.append(TemperatureSampler(uniform, sampling.temperature, ids.shape[1]))
    output: torch.Tensor = model.generate(
        input_ids=ids.to(model.device), attention_mask=mask.to(model.device), logits_processor=choosers
    )
    return output[:, ids.shape[1] :].tolist()


class TemperatureSampler(LogitsProcessor):
    """Leaves one token of each row: the one that its uniform number picks from the distribution."""

    def __init__(self, noise: torch.Tensor, temperature: float, prompt_width: int) -> None:
        """`noise` [batch, new tokens], uniform in [0, 1)."""
        self.noise = noise
        self.temperature = temperature
        self.prompt_width = prompt_width

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        step = input_ids.shape[1] - self.prompt_width
        cumulative = (scores.double() / self.temperature).softmax(-1).cumsum(-1)
        threshold = self.noise[:, step : step + 1].to(scores.device) * cumulative[:, -1:]
        # the first token whose cumulative share exceeds the threshold: never one of probability 0
        token = torch.searchsorted(cumulative, threshold, right=True).clamp_(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)  # type: ignore[return-value]


def cut(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], stops: set[int]) -> Response:
    """The text before the first end token."""
    end = next((i for i, token in enumerate(tokens) if token in stops), None)
    text = tokenizer.decode(list(tokens[:end]), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Response(str(text), finished=end is not None)


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """JSONL that appears complete or not at all."""
    write_output(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
