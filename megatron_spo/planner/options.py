"""What `megatron-spo plan` is asked for."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """What `plan` was asked for.

    gpu_changes: numbers of the GPU to replace, in SI units.  model: preset or folder whose shape is planned for, None:
    model.path.  prompt_tokens, response_tokens: medians to assume.  pairs: of an epoch.  price: of a GPU hour.
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
