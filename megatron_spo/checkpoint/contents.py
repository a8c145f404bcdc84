"""The content of a checkpoint as Megatron's sharded state dicts."""

from typing import Any

from megatron.core import parallel_state

from megatron_spo.checkpoint.optimizer_state import OptimizerState
from megatron_spo.model.build import PairModel
from megatron_spo.model.lora import without_base
from megatron_spo.model.optimizer import Trainable


def weights(trainable: Trainable) -> dict[str, Any]:
    """Returns the sharded state dict of the model."""
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    return {name: without_base(chunk.sharded_state_dict(metadata=metadata)) for name, chunk in named_chunks(trainable)}


def contents(trainable: Trainable, *, loading: bool) -> tuple[dict[str, Any], list[OptimizerState]]:
    """Returns the sharded state dict of model and optimizer, and the objects that receive each inner optimizer's state.

    The state of each inner optimizer is collected separately, because the keys that megatron-core 0.16.1 makes for
    several of them ("chained_0.") tie a checkpoint to their number. Names depend only on the model's parameters, so any
    layout can load them.
    """
    contents = weights(trainable)
    inner = trainable.optimizer.chained_optimizers
    states = [OptimizerState(one, contents, loading=loading) for one in inner]
    contents["optimizer"] = {str(i): state.sharded for i, state in enumerate(states)}
    contents["optimizer_step"] = max(group["step"] for one in inner for group in one.optimizer.param_groups)
    return contents, states


def named_chunks(trainable: Trainable) -> list[tuple[str, PairModel]]:
    """Returns this rank's chunks with the names that the distributed optimizer expects: model or model0, model1, ..."""
    if len(trainable.chunks) == 1:
        return [("model", trainable.chunks[0])]
    return [(f"model{i}", chunk) for i, chunk in enumerate(trainable.chunks)]
