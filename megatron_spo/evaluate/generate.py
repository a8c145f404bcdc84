"""Generates responses of a Hugging Face model to a JSONL file of prompts.

The noise of a sampled response depends only on (seed, row, sample number): neither the batch size nor the other prompts
of the file change it.
"""

import inspect
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from megatron_spo.data.json_lines import write_rows
from megatron_spo.data.prompts import tokenize_prompts
from megatron_spo.errors import UserError
from megatron_spo.evaluate.limits import NEW_TOKENS, limits_of
from megatron_spo.evaluate.pretrained import load_model, load_tokenizer
from megatron_spo.files import check_output
from megatron_spo.meter import Meter

LOG = logging.getLogger(__name__)

SEGMENT = 32
"""Tokens generated before finished responses leave the batch."""
BLOCK = 512
"""Tokens of the vocabulary that are summed at once when a token is sampled."""
BELOW_ONE = 1 - 1e-9
"""Largest number of the noise: times a sum, it is still below that sum after rounding."""


@dataclass(frozen=True)
class Sampling:
    """How responses are sampled.

    Attributes:
        samples: Responses per prompt.
        temperature: 0 for greedy decoding.
        max_new_tokens: Most new tokens of a response, the end-of-text token included.
        seed: Seed of the noise.
    """

    samples: int = 1
    temperature: float = 0.0
    max_new_tokens: int = NEW_TOKENS
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1 or self.max_new_tokens < 1:
            raise UserError("generate: samples and max_new_tokens must be at least 1")
        if self.temperature < 0:
            raise UserError(f"generate: temperature = {self.temperature} must be 0 (greedy) or positive")
        if self.samples > 1 and self.temperature == 0:
            raise UserError(f"generate: samples = {self.samples} with temperature = 0 gives identical responses; set a "
                            "temperature")  # fmt: skip


@dataclass(frozen=True)
class Response:
    """A response: `text` without special tokens; `finished` is False if the length limit cut it off."""

    text: str
    finished: bool


def generate_file(
    model_dir: str | Path,
    prompts_file: str | Path,
    out_file: str | Path,
    *,
    batch_size: int = 64,
    engine: str = "transformers",
    max_new_tokens: int | None = None,
    **sampled: Any,
) -> None:
    """Writes responses to all prompts of a file, and logs their number.

    Every row of the output is a row of the input with two more fields: `responses` (`samples` strings) and `finished`
    (as many booleans: whether the response ended within `max_new_tokens`). Prompts are found and tokenised as in
    training rows; an implicit prompt is written as a field `prompt`. The output is written atomically.

    Args:
        model_dir: Hugging Face folder of the model.
        prompts_file: JSONL file of prompts.
        out_file: File to write.
        batch_size: Responses generated at a time; ignored by vLLM, which does its own batching.
        engine: "transformers" or "vllm".
        max_new_tokens: Most new tokens of a response; None: NEW_TOKENS, or as many as the context leaves.
        sampled: Other fields of Sampling.

    Raises:
        UserError: If an argument, the model or a prompt is invalid.
    """
    if batch_size < 1:
        raise UserError(f"generate: batch_size = {batch_size} must be at least 1")
    sampling = Sampling(**sampled) if max_new_tokens is None else Sampling(max_new_tokens=max_new_tokens, **sampled)
    check_output(Path(out_file))
    folder = Path(model_dir)
    tokenizer = load_tokenizer(folder)
    places, rows, prompts = zip(*tokenize_prompts(Path(prompts_file), tokenizer), strict=True)
    limits = limits_of(folder)
    if max_new_tokens is None:
        sampling = replace(sampling, max_new_tokens=limits.new_tokens(prompts))
    limits.check_prompts(prompts, sampling.max_new_tokens, places)
    responses = generate_by(engine, folder, tokenizer, prompts, sampling, batch_size)
    for row, answers in zip(rows, responses, strict=True):
        row["responses"] = [answer.text for answer in answers]
        row["finished"] = [answer.finished for answer in answers]
    write_rows(Path(out_file), rows)
    cut_off = sum(not answer.finished for answers in responses for answer in answers)
    LOG.info(f"{out_file}: {len(rows) * sampling.samples} answers to {len(rows)} prompts; {cut_off} reached the limit "
             f"of {sampling.max_new_tokens} tokens")  # fmt: skip


def generate_by(
    engine: str,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    batch_size: int,
) -> list[list[Response]]:
    """Returns `sampling.samples` responses to each prompt (token ids), generated by "transformers" or "vllm"."""
    if engine == "vllm":
        from megatron_spo.evaluate.vllm_engine import generate_by_vllm

        return generate_by_vllm(folder, tokenizer, prompts, sampling)
    return generate(load_model(folder), tokenizer, prompts, sampling, batch_size)


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    batch_size: int,
) -> list[list[Response]]:
    """Returns `sampling.samples` responses to each prompt (token ids), in the order of the prompts."""
    stops = end_tokens(model.generation_config, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(stops), 0)
    # replaces the model's own generation config, which may set penalties and cut-offs
    model.generation_config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=False,
        eos_token_id=sorted(stops) or None,
        pad_token_id=pad,
    )
    found: dict[tuple[int, int], Response] = {}
    total = len(prompts) * sampling.samples
    with Meter("generating", total, "answers") as meter:
        for jobs in batches(prompts, sampling.samples, batch_size):
            ids, mask = pad_left([prompts[row] for row, _ in jobs], pad)
            tokens = respond(model, ids, mask, jobs, sampling, meter)
            for job, response in zip(jobs, tokens, strict=True):
                found[job] = cut(tokenizer, response, stops)
    return [[found[row, sample] for sample in range(sampling.samples)] for row in range(len(prompts))]


def end_tokens(config: Any, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Returns the tokens that end a response: those of the generation config (or config) and of the tokenizer."""
    of_model = config.eos_token_id if config else None
    listed = of_model if isinstance(of_model, list) else [of_model]
    return {token for token in [*listed, tokenizer.eos_token_id] if token is not None}


def batches(prompts: Sequence[Sequence[int]], samples: int, batch_size: int) -> Iterator[list[tuple[int, int]]]:
    """Yields batches of (row, sample number) that cover all responses, the longest prompts first."""
    rows = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    jobs = [(row, sample) for row in rows for sample in range(samples)]
    for start in range(0, len(jobs), batch_size):
        yield jobs[start : start + batch_size]


def pad_left(prompts: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns left-padded token ids [batch, longest] and the attention mask of the same shape."""
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
    meter: Meter,
) -> list[list[int]]:
    """Returns the new token ids of one batch, and counts the finished responses.

    After the end token of a response, more tokens may follow. Every SEGMENT tokens, the finished responses leave the
    batch, as the longest may be many times as long as most.
    """
    noise = torch.empty(len(jobs), 0)
    if sampling.temperature > 0:
        numbers = [np.random.default_rng((sampling.seed, *job)).random(sampling.max_new_tokens) for job in jobs]
        noise = torch.from_numpy(np.stack(numbers))
    ids, mask = ids.to(model.device), mask.to(model.device)
    rows, name, width = [row for row, _ in jobs], _cache_name(model), ids.shape[1]
    cache = shared_cache(model, ids, mask, rows) if len(set(rows)) < len(rows) and width > 1 else None
    stops = torch.tensor(model.generation_config.eos_token_id or [])
    found: list[list[int]] = [[] for _ in jobs]
    left = torch.arange(len(jobs))
    while len(left):
        choosers = LogitsProcessorList()
        if sampling.temperature > 0:
            choosers.append(TemperatureSampler(noise[left], sampling.temperature, width))
        room = width + sampling.max_new_tokens - ids.shape[1]
        output = model.generate(input_ids=ids, attention_mask=mask, logits_processor=choosers,
                                max_new_tokens=min(SEGMENT, room), return_dict_in_generate=True,
                                **({} if cache is None else {name: cache}))  # fmt: skip
        new = output.sequences[:, ids.shape[1] :].cpu()
        for job, tokens in zip(left.tolist(), new.tolist(), strict=True):
            found[job] += tokens
        unfinished = ~torch.isin(new, stops).any(-1) & (new.shape[1] < room)
        kept, cache = unfinished.nonzero()[:, 0], output[name]
        cache.batch_select_indices(kept)
        ids = output.sequences[kept]
        mask = torch.cat([mask[kept], mask.new_ones(len(kept), new.shape[1])], dim=1)
        meter.advance(len(left) - len(kept))
        left = left[kept]
    return found


def _cache_name(model: Any) -> str:
    # transformers 5 renamed `past_key_values`, in one of its minor versions
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def shared_cache(model: Any, ids: torch.Tensor, mask: torch.Tensor, rows: Sequence[int]) -> Any:
    """Returns the KV cache of all prompt tokens but the last.

    Equal `rows` have equal prompts, whose tokens are computed once.
    """
    first = list(dict.fromkeys(rows))
    where = [rows.index(row) for row in first]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    output = model(
        input_ids=ids[where, :-1],
        attention_mask=mask[where, :-1],
        position_ids=positions[where, :-1],
        use_cache=True,
        logits_to_keep=1,
    )
    cache = output[_cache_name(model)]
    cache.batch_select_indices(torch.tensor([first.index(row) for row in rows]))
    return cache


class TemperatureSampler(LogitsProcessor):
    """Samples one token per row by inverting the cumulative distribution at the row's uniform number.

    First over blocks of tokens, then within a block: cumulative sums over a vocabulary of 262,144 would take longer
    than a small model.
    """

    def __init__(self, noise: torch.Tensor, temperature: float, prompt_width: int) -> None:
        """Takes `noise` [batch, new tokens], uniform in [0, 1)."""
        self.noise = noise.clamp(max=BELOW_ONE)
        self.temperature = temperature
        self.prompt_width = prompt_width

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Returns `scores` [batch, vocabulary], changed in place: 0 for the drawn token, -inf for all others."""
        step, size = input_ids.shape[1] - self.prompt_width, scores.shape[-1]
        weights = scores.sub(scores.amax(-1, keepdim=True)).div_(self.temperature).exp_()
        blocks = torch.nn.functional.pad(weights, (0, -size % BLOCK)).unflatten(-1, (-1, BLOCK))
        block, rest = _invert(blocks.sum(-1), self.noise[:, step : step + 1].to(scores.device))
        token, _ = _invert(blocks[torch.arange(len(blocks)), block[:, 0]], rest)
        token = (block * BLOCK + token).clamp_(max=size - 1)
        return scores.fill_(-torch.inf).scatter_(1, token, 0.0)  # type: ignore[return-value]


def _invert(weights: torch.Tensor, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns where the cumulative share of `weights` [batch, n] first exceeds `at` [batch, 1], and how far into that
    entry `at` is, in [0, 1). An entry of weight 0 is never found."""
    weights = weights.double()
    cumulative = weights.cumsum(-1)
    target = at * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, target, right=True).clamp_(max=weights.shape[-1] - 1)
    weight = weights.gather(1, index)
    return index, ((target - cumulative.gather(1, index) + weight) / weight).clamp(0, BELOW_ONE)


def cut(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], stops: set[int]) -> Response:
    """Returns the response up to the first end token."""
    end = next((i for i, token in enumerate(tokens) if token in stops), None)
    text = tokenizer.decode(list(tokens[:end]), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Response(str(text), finished=end is not None)
