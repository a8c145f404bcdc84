"""The training loop: runs the planned optimizer steps, evaluates, saves checkpoints and logs, in any layout."""
