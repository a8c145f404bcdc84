"""The fp8 recipes of Transformer Engine and their requirements on model, rows and GPU. Does not import torch.

Sources: transformer-engine 2.11 (pytorch/utils.py `assert_dim_for_fp8_exec`, the quantizers' `is_quantizable`,
pytorch/quantization.py `check_*_support`) and megatron-core 0.16.1 (fp8_utils.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Recipe:
    """How the operands of matrix products are scaled to fp8, and what that requires.

    Attributes:
        number_format: "hybrid" (e5m2, with a wider range, for gradients; e4m3 for the rest) or "e4m3".
        multiple: both dimensions of every multiplied matrix must be multiples of this.
        gathered: both dimensions, on each rank, of matrices that sequence parallelism gathers in fp8 must be multiples
            of this.
        oldest, before: supported compute capabilities, from `oldest` to below `before`.
        cuda: minimum CUDA version of torch.
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
        # one scale per matrix, from its largest value
        "tensorwise": Recipe("hybrid", 16, 16, oldest=(8, 9)),
        # one scale per 128 values of a token, or per 128 x 128 values of a weight
        "blockwise": Recipe("e4m3", 16, 128, oldest=(9, 0), cuda=(12, 9)),
        # one scale per 32 values
        "mxfp8": Recipe("e4m3", 32, 32, oldest=(10, 0), before=(12, 0), cuda=(12, 8)),
    }
)


def obstacle(recipe: str, capability: tuple[int, int], cuda: str) -> str | None:
    """Returns why a GPU of this compute capability and CUDA version of torch cannot run `recipe`, or None if it can."""
    needs = RECIPES[recipe]
    newest = f" and below {_version(needs.before)}" if needs.before else ""
    if capability < needs.oldest or (needs.before is not None and capability >= needs.before):
        return f"it requires a GPU of compute capability {_version(needs.oldest)} or above{newest}"
    if tuple(int(part) for part in cuda.split(".")[:2]) < needs.cuda:
        return f"it requires torch for CUDA {_version(needs.cuda)} or above, but the installed torch is for {cuda}"
    return None


def _version(pair: tuple[int, int]) -> str:
    return f"{pair[0]}.{pair[1]}"
