"""The training loop: runs the planned optimizer steps, evaluates, saves checkpoints and logs, in any layout."""

import megatron_spo.runtime  # noqa: F401  (before the modules of this package import Megatron)
