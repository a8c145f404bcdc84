"""Responses by vLLM, where it is installed: the model is split over the visible GPUs, and requests are batched by vLLM.

Its random numbers are its own, so that samples differ from those of transformers; they too follow from (seed, row,
sample number) alone.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from megatron_spo.errors import UserError
from megatron_spo.evaluate.generate import Response, Sampling, cut, end_tokens

SHARE_OF_FREE = 0.9
"""Of the GPUs' free memory that vLLM takes: a training may hold the rest."""
SHARE_OF_HOST = 0.3
"""Of a computer's memory that vLLM takes where there is no GPU."""


def generate_by_vllm(
    folder: Path, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], sampling: Sampling
) -> list[list[Response]]:
    """`sampling.samples` responses to each prompt (token ids), in the order of the prompts.

    Raises:
        UserError: vLLM is not installed.
    """
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise UserError(f"generate: --engine vllm needs vLLM ({error}); install it in the environment of this command, "
                        "or leave --engine out") from error  # fmt: skip
    config = AutoConfig.from_pretrained(folder)
    visible = max(torch.cuda.device_count(), 1)
    ranks = max(n for n in range(1, visible + 1) if config.num_attention_heads % n == 0)
    has_its_own = (folder / "generation_config.json").exists()
    stops = end_tokens(GenerationConfig.from_pretrained(folder) if has_its_own else config, tokenizer)
    jobs = [(row, sample) for row in range(len(prompts)) for sample in range(sampling.samples)]
    settings = [
        SamplingParams(
            temperature=sampling.temperature,
            max_tokens=sampling.max_new_tokens,
            stop_token_ids=sorted(stops),
            seed=int(np.random.SeedSequence((sampling.seed, *job)).generate_state(1)[0]),
            detokenize=False,
        )
        for job in jobs
    ]
    engine: Any = LLM(
        model=str(folder),
        tensor_parallel_size=ranks,
        dtype=config.dtype or "auto",  # its own choice would turn fp32 into 16 bits
        gpu_memory_utilization=memory_share(),
    )
    try:
        outputs = engine.generate([{"prompt_token_ids": list(prompts[row])} for row, _ in jobs], settings)
    finally:  # a process of multiprocessing would wait at its end for vLLM's, which nothing else ends there
        engine.llm_engine.engine_core.shutdown()
    # vLLM ends a response with its stop token, as transformers does
    found = [cut(tokenizer, output.outputs[0].token_ids, stops) for output in outputs]
    return [found[start : start + sampling.samples] for start in range(0, len(found), sampling.samples)]


def memory_share() -> float:
    """Of each device's memory, what vLLM may take of the fullest one; vLLM refuses to start where it is not free."""
    found = [torch.cuda.mem_get_info(i) for i in range(torch.cuda.device_count())]
    return min((SHARE_OF_FREE * free / total for free, total in found), default=SHARE_OF_HOST)
