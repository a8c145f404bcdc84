"""Options of `megatron-spo plan`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """Options of `plan`.

    Attributes:
        gpus, gpu: number and name of the GPUs.
        gpu_changes: properties of the GPU to replace, in SI units.
        model: preset or folder of the model to plan for; None: model.path.
        prompt_tokens, response_tokens: assumed median lengths.
        pairs: assumed number of pairs of an epoch.
        price: price of a GPU hour.
        top: number of layouts to show.
        json: file to write all results to.
    """

    config: str
    overrides: list[str]
    gpus: int
    gpu: str
    gpu_changes: Mapping[str, float]
    model: str | None
    prompt_tokens: int | None
    response_tokens: int | None
    pairs: int | None
    price: float | None
    top: int
    json: Path | None
