"""The formats that `convert` writes, by name."""

from megatron_spo.convert.formats.base import Format
from megatron_spo.convert.formats.hugging_face import HuggingFace
from megatron_spo.convert.formats.nemo import Nemo
from megatron_spo.convert.formats.torch_dist import TorchDist

FORMATS: dict[str, Format] = {"hf": HuggingFace(), "megatron": TorchDist(), "nemo": Nemo()}
