"""Checkpoints: the folder format, saving and loading in any layout, reading single tensors."""
