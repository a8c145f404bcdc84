"""Answers of a model in a process of its own: its memory goes with it, and its end is not ours."""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from megatron_spo.evaluate.generate import Response, Sampling, generate_by, load_tokenizer

BATCH = 64


def answer_apart(folder: Path, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[Response]]:
    """What `generate_by` gives for these prompts (token ids) with the model in a Hugging Face folder.

    Raises whatever the other process has raised, or BrokenProcessPool where it was killed.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_answer, folder, prompts, sampling, torch.get_num_threads()).result()


def _answer(folder: Path, prompts: Sequence[Sequence[int]], sampling: Sampling, threads: int) -> list[list[Response]]:
    torch.set_num_threads(threads)
    return generate_by("transformers", folder, load_tokenizer(folder), prompts, sampling, BATCH)
