"""Executes parts of a run without its GPUs and processes: `weights` builds and checks every rank, `step` runs the
training step of one rank."""
