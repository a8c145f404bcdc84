"""Processes and devices: environment variables, process groups, seeds, and the bridge for machines without a GPU."""

from megatron_spo.runtime.megatron_versions import import_without_triton

import_without_triton()  # here, so that it precedes every import of Megatron
