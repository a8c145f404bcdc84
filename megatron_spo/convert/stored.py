"""The tensors of a checkpoint, whatever layout wrote it; no processes needed."""

import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_spo.errors import UserError


class StoredTensors:
    """The global tensors of a checkpoint by their keys; one is read when it is asked for.

    Raises:
        UserError: the checkpoint lacks one of the keys `needed`.
    """

    def __init__(self, checkpoint: Path, needed: Iterable[str]) -> None:
        self._reader = dcp.FileSystemReader(checkpoint)
        self._stored = self._reader.read_metadata().state_dict_metadata
        absent = sorted(set(needed) - set(self._stored))
        if absent:
            raise UserError(
                f"{checkpoint} lacks {absent[0]}, which the run's model has; it is damaged or of another model"
            )

    def dtype(self, key: str) -> torch.dtype:
        """Number format of a tensor."""
        return self._tensor(key).properties.dtype

    def load(self, key: str) -> Tensor:
        """A whole tensor, that of all layers where they are stacked."""
        whole = {key: torch.empty(self._tensor(key).size, dtype=self.dtype(key))}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as asked for
            dcp.load(whole, storage_reader=self._reader, no_dist=True)
        return whole[key]

    def _tensor(self, key: str) -> TensorStorageMetadata:
        metadata = self._stored[key]
        assert isinstance(metadata, TensorStorageMetadata)
        return metadata
