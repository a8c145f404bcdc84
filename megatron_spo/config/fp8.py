"""Transformer Engine's fp8 recipes: what each asks of the model, the rows and the GPU. No torch.

Read in transformer-engine 2.11 (pytorch/utils.py `assert_dim_for_fp8_exec`, the quantizers' `is_quantizable`,
pytorch/quantization.py `check_*_support`) and megatron-core 0.16.1 (fp8_utils.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Recipe:
    """How the operands of the layers' matrix products are scaled to fp8.

    Attributes:
        number_format: "hybrid" (gradients have the wider range of e5m2) or "e4m3" (for everything).
        multiple: divides both sides of every matrix that is multiplied.
        gathered: divides both sides of a matrix that sequence parallelism gathers in fp8, on each rank.
        oldest, before: compute capabilities of the GPUs that can: from the first on, below the second.
        cuda: lowest CUDA version of torch.
    """

    number_format: str
    multiple: int
    gathered: int
    oldest: tuple[int, int]
    before: tuple[int, int] | None = None
    cuda: tuple[int, int] = (12, 1)


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        # one scale per matrix, from the largest values of earlier rows
        "delayed": Recipe("hybrid", 16, 16, oldest=(8, 9)),
        # one scale per matrix, from its own largest value
        "tensorwise": Recipe("hybrid", 16, 16, oldest=(8, 9)),
        # one scale for 128 values of a token, or for 128 x 128 of a weight
        "blockwise": Recipe("e4m3", 16, 128, oldest=(9, 0), cuda=(12, 9)),
        # one scale for 32 values
        "mxfp8": Recipe("e4m3", 32, 32, oldest=(10, 0), before=(12, 0), cuda=(12, 8)),
    }
)


def obstacle(recipe: str, capability: tuple[int, int], cuda: str) -> str | None:
    """Why a GPU of this compute capability cannot run `recipe` with torch built for this CUDA version; None: it can."""
    needs = RECIPES[recipe]
    newest = f" and below {_version(needs.before)}" if needs.before else ""
    if capability < needs.oldest or (needs.before is not None and capability >= needs.before):
        return f"it needs a GPU of compute capability {_version(needs.oldest)} or above{newest}"
    if tuple(int(part) for part in cuda.split(".")[:2]) < needs.cuda:
        return f"it needs a torch built for CUDA {_version(needs.cuda)} or above, this one is for {cuda}"
    return None


def _version(pair: tuple[int, int]) -> str:
    return f"{pair[0]}.{pair[1]}"
