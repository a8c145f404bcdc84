"""The model formats that `convert` writes."""
