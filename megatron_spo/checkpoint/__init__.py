"""Checkpoints: the folder format, saving and loading in any layout, and reading single tensors."""
