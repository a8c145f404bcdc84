"""The reference model's log-probs: computing them, caching them, and reading them in training."""
