"""Checkpoints: the folder format, saving and loading in any layout, and reading single tensors."""

import megatron_spo.runtime  # noqa: F401  (before the modules of this package import Megatron)
