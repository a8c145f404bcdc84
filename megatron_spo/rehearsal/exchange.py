"""Communication of a rank whose other ranks do not exist: it is counted and returns at once."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch.distributed as dist

from megatron_spo.rehearsal.watch import Watch


def groups_by_name() -> dict[tuple[int, ...], str]:
    """Returns this rank's process groups of more than one rank: their ranks, and the first name of groups with these
    ranks."""
    from megatron.core import parallel_state as groups

    getters = {
        "TP": groups.get_tensor_model_parallel_group,
        "PP": groups.get_pipeline_model_parallel_group,
        "CP": groups.get_context_parallel_group,
        "DP": groups.get_data_parallel_group,
        "DP x CP": lambda: groups.get_data_parallel_group(with_context_parallel=True),
        "EP": groups.get_expert_model_parallel_group,
        "expert DP": groups.get_expert_data_parallel_group,
        "TP x EP": groups.get_expert_tensor_and_model_parallel_group,
        "TP x PP": groups.get_model_parallel_group,
        "world": lambda: dist.group.WORLD,
    }
    found: dict[tuple[int, ...], str] = {}
    for name, getter in getters.items():
        ranks = tuple(dist.get_process_group_ranks(getter()))
        if len(ranks) > 1:
            found.setdefault(ranks, name)
    return found


class _Done:
    """A message that has arrived."""

    def wait(self) -> None:
        return None


@contextmanager
def pipeline_messages(watch: Watch) -> Iterator[None]:
    """Within the context, messages between pipeline stages are counted instead of sent."""

    def batch(operations: Sequence[Any]) -> list[_Done]:
        for one in operations:
            watch.exchange(one.op.__name__.removeprefix("i"), "PP", one.tensor.nbytes)
        return [_Done() for _ in operations]

    with patch.object(dist, "batch_isend_irecv", batch):
        yield


@contextmanager
def lonely_objects() -> Iterator[None]:
    """Within the context, the objects gathered from other ranks are this rank's own."""

    def gather(found: list[Any], own: Any, group: Any = None) -> None:
        found[:] = [own] * len(found)

    with (
        patch.object(dist, "all_gather_object", gather),
        patch.object(dist, "broadcast_object_list", lambda *_, **__: None),
    ):
        yield
