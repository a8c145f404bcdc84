"""Generates answers in a separate process, which frees all its memory, and whose crash does not end this process."""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from megatron_spo.evaluate.generate import generate_by
from megatron_spo.evaluate.pretrained import load_tokenizer
from megatron_spo.evaluate.sampling import Response, Sampling

BATCH = 64
_CONTEXT = get_context("forkserver")
_CONTEXT.set_forkserver_preload([__name__])  # so that only the first answers of a run wait for the imports


def answer_in_subprocess(folder: Path, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[Response]]:
    """Calls `generate_by` for prompts (token ids) in a separate process.

    Raises:
        Exception: Whatever the process raised; BrokenProcessPool if it was killed.
    """
    with ProcessPoolExecutor(1, mp_context=_CONTEXT) as pool:
        return pool.submit(_answer, folder, prompts, sampling, torch.get_num_threads()).result()


def _answer(folder: Path, prompts: Sequence[Sequence[int]], sampling: Sampling, threads: int) -> list[list[Response]]:
    torch.set_num_threads(threads)
    return generate_by("transformers", folder, load_tokenizer(folder), prompts, sampling, BATCH)
