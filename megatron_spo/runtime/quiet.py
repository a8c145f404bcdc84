"""Hides warnings of third-party packages about themselves; `megatron-spo doctor` shows what is missing."""

import warnings

NOTICES = (
    (UserWarning, "megatron", "fallbacks without Transformer Engine and apex"),
    (DeprecationWarning, "megatron", "Megatron-Core about its own arguments"),
    (FutureWarning, "megatron", "Megatron-Core about its own arguments"),
    (FutureWarning, r"torch\.distributed", "collectives that Megatron-Core 0.16.1 calls by an older name"),
)
"""(warning category, module, what the warning is about)."""


def quiet_third_parties() -> None:
    """Ignores these warnings from now on; warnings of other modules are still shown."""
    for category, module, _ in NOTICES:
        warnings.filterwarnings("ignore", category=category, module=module)
