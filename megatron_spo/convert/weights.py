"""The weights of a model folder, in Hugging Face or Megatron format, as training reads them: slices by name."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Self

from torch import Tensor

from megatron_spo.checkpoint.lazy import Lazy
from megatron_spo.config.model_folder import is_megatron
from megatron_spo.config.model_shape import ModelShape
from megatron_spo.convert.source import open_model
from megatron_spo.model.hf_files import HFWeights, check_weights
from megatron_spo.model.transforms import Index, LazyTensor
from megatron_spo.model.weights import Weights


def open_weights(folder: Path, shape: ModelShape) -> AbstractContextManager[Weights]:
    """Opens the weights of a model folder.

    Raises:
        UserError: a file is damaged, or the tensors are not those of the model.
    """
    return _MegatronWeights(folder) if is_megatron(folder) else HFWeights(folder, shape)


def check_folder_weights(folder: Path, shape: ModelShape) -> None:
    """Checks, without reading the tensors, that a folder holds this model.

    Raises:
        UserError: as `open_weights`.
    """
    if is_megatron(folder):
        open_model(folder, check=False)
    else:
        check_weights(folder, shape)


class _MegatronWeights:
    def __init__(self, folder: Path) -> None:
        self._tensors: Mapping[str, Lazy] = open_model(folder, check=False).tensors

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._tensors = {}

    def slice(self, name: str) -> LazyTensor:
        return _ByRows(self._tensors[name])


class _ByRows:
    """A `LazyTensor` that reads whole rows of another tensor."""

    def __init__(self, tensor: Lazy) -> None:
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def __getitem__(self, index: Index) -> Tensor:
        start, stop, _ = index[0].indices(self._tensor.shape[0])
        return self._tensor.rows(start, stop)[(slice(None), *index[1:])]
