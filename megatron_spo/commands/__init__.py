"""The commands, one module each with `add_options` and `run`. Heavy imports are inside `run`."""
