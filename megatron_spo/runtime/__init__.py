"""Processes and devices: environment variables, process groups, seeds, and the bridge for machines without a GPU."""
