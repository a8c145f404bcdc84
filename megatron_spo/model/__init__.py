"""The policy: a Megatron-Core GPTModel that turns packed rows into response log-probabilities."""
