"""Hides warnings of third-party packages about themselves; `megatron-spo doctor` shows what is missing."""

import logging
import warnings

NOTICES = (
    (UserWarning, "megatron", "fallbacks without Transformer Engine and apex"),
    (DeprecationWarning, "megatron", "Megatron-Core about its own arguments"),
    (FutureWarning, "megatron", "Megatron-Core about its own arguments"),
    (FutureWarning, r"torch\.distributed", "collectives that Megatron-Core 0.16.1 calls by an older name"),
)
"""(warning category, module, what the warning is about)."""
MESSAGES = (
    ("megatron.core.models.gpt.gpt_model", "GPTModel IS DEPRECATED"),
    ("megatron.core.distributed.distributed_data_parallel", "DistributedDataParallel: full_param_layout not provided"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCore's async save is deprecated"),
    ("torch.utils.cpp_extension", "No CUDA runtime is found"),
)
"""(logger, start of a message): Megatron-Core 0.19 to its own developers, and torch about nvcc without a GPU."""


def quiet_third_parties() -> None:
    """Ignores these warnings and messages from now on; others of the same modules are still shown."""
    for category, module, _ in NOTICES:
        warnings.filterwarnings("ignore", category=category, module=module)
    for logger, _ in MESSAGES:
        logging.getLogger(logger).addFilter(_is_shown)


def _is_shown(record: logging.LogRecord) -> bool:
    return not any(record.name == logger and record.getMessage().startswith(start) for logger, start in MESSAGES)
