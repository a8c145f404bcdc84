"""One module for each command: its options, and what runs it. Heavy imports stay inside `run`."""
