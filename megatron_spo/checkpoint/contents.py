"""What a checkpoint holds, as Megatron's sharded state dicts."""

from typing import Any

from megatron.core import parallel_state

from megatron_spo.checkpoint.optimizer_state import OptimizerState
from megatron_spo.model.build import PairModel
from megatron_spo.model.lora import without_base
from megatron_spo.model.optimizer import Trainable


def weights(trainable: Trainable) -> dict[str, Any]:
    """The sharded state dict of the model."""
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    return {name: without_base(chunk.sharded_state_dict(metadata=metadata)) for name, chunk in named_chunks(trainable)}


def contents(trainable: Trainable, *, loading: bool) -> tuple[dict[str, Any], list[OptimizerState]]:
    """The sharded state dict of model and optimizer, and what takes the loaded state of each inner optimizer.

    Each is asked by itself: the keys that megatron-core 0.16.1 makes for several ("chained_0.") bind a checkpoint to
    their number. Names follow the model's parameters alone, so any layout can read them.
    """
    contents = weights(trainable)
    inner = trainable.optimizer.chained_optimizers
    states = [OptimizerState(one, contents, loading=loading) for one in inner]
    contents["optimizer"] = {str(i): state.sharded for i, state in enumerate(states)}
    contents["optimizer_step"] = max(group["step"] for one in inner for group in one.optimizer.param_groups)
    return contents, states


def named_chunks(trainable: Trainable) -> list[tuple[str, PairModel]]:
    """This rank's chunks under the names that the distributed optimizer looks for: model, or model0, model1, ..."""
    if len(trainable.chunks) == 1:
        return [("model", trainable.chunks[0])]
    return [(f"model{i}", chunk) for i, chunk in enumerate(trainable.chunks)]
