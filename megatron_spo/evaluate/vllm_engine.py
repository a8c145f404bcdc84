"""Generates responses with vLLM, which splits the model over the visible GPUs and does its own batching.

vLLM has its own random numbers, so samples differ from those of transformers. They, too, depend only on (seed, row,
sample number).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from megatron_spo.errors import UserError
from megatron_spo.evaluate.sampling import Response, Sampling, cut, end_tokens

SHARE_OF_FREE = 0.9
"""Share of the GPUs' free memory for vLLM; a training run may need the rest."""
SHARE_OF_HOST = 0.3
"""Share of the host's memory for vLLM if there is no GPU."""


def generate_by_vllm(
    folder: Path, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], sampling: Sampling
) -> list[list[Response]]:
    """Returns `sampling.samples` responses to each prompt (token ids), in the order of the prompts.

    Raises:
        UserError: If vLLM is not installed.
    """
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise UserError(f"generate: --engine vllm requires vLLM ({error}); install it in this environment, or omit "
                        "--engine") from error  # fmt: skip
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
        dtype=config.dtype or "auto",  # vLLM's default would turn fp32 into 16 bits
        gpu_memory_utilization=memory_share(),
    )
    try:
        outputs = engine.generate([{"prompt_token_ids": list(prompts[row])} for row, _ in jobs], settings)
    finally:  # in a multiprocessing child nothing else ends vLLM's processes, and its exit would wait for them
        engine.llm_engine.engine_core.shutdown()
    # vLLM ends a response with its stop token, as transformers does
    found = [cut(tokenizer, output.outputs[0].token_ids, stops) for output in outputs]
    return [found[start : start + sampling.samples] for start in range(0, len(found), sampling.samples)]


def memory_share() -> float:
    """Returns the share of each device's memory that is free for vLLM on the fullest device.

    vLLM refuses to start if the share it is given is not free.
    """
    found = [torch.cuda.mem_get_info(i) for i in range(torch.cuda.device_count())]
    return min((SHARE_OF_FREE * free / total for free, total in found), default=SHARE_OF_HOST)
