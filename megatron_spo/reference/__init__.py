"""The reference model's log-probs: computing them, the cache, and reading them in training."""
