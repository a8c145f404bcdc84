"""The policy: a Megatron-Core GPTModel that turns packed rows into response log-probabilities."""

import megatron_spo.runtime  # noqa: F401  (before the modules of this package import Megatron)
