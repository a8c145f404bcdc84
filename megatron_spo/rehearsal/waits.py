"""Where a training step waits for the GPU, and why.

Between two waits the process prepares work ahead of the GPU. A wait in every row (micro-batch) therefore leaves the GPU
idle until the process has prepared the next work.
"""

from collections.abc import Mapping

REASONS = {
    "megatron_spo/train/metrics.py reduce_sums": "the sums of a pass decide whether the step is taken",
    "megatron_spo/train/gradients.py norm": "the gradient norm decides whether the step is taken",
    "megatron_spo/train/gradients.py dot": "barrier computes its weight of the SFT term from inner products",
    "megatron_spo/model/experts.py balance": "the load of the routers is part of the training state",
    "megatron/core/transformer/moe/": "the number of tokens of each expert is known on the GPU only",
}
"""Function, or the beginning of its name -> why it waits."""


def reason(where: str) -> str:
    """Returns why the process waits in this function, or "" if no reason is known."""
    return next((text for beginning, text in REASONS.items() if where.startswith(beginning)), "")


def unexplained(waits: Mapping[tuple[str, str], int], rows: int) -> list[str]:
    """Returns the waits without a known reason that occur for each of a rank's `rows`."""
    return [f"{what} in {where}: {count}" for (what, where), count in waits.items()
            if count >= rows and not reason(where)]  # fmt: skip
