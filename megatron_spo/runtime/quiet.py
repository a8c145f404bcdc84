"""Keeps third parties' notices about themselves off a run's screen; `megatron-spo doctor` says what is missing."""

import warnings

NOTICES = (
    (UserWarning, "megatron", "fallbacks without Transformer Engine and apex"),
    (DeprecationWarning, "megatron", "Megatron-Core about its own arguments"),
    (FutureWarning, "megatron", "Megatron-Core about its own arguments"),
    (FutureWarning, r"torch\.distributed", "collectives that Megatron-Core 0.16.1 calls by an older name"),
)
"""(category, module, what it is about)."""


def quiet_third_parties() -> None:
    """Ignore those notices from now on; warnings of other modules stay."""
    for category, module, _ in NOTICES:
        warnings.filterwarnings("ignore", category=category, module=module)
