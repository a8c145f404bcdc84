"""The formats that `convert` writes, by name."""

from megatron_spo.convert.formats.base import Form
from megatron_spo.convert.formats.hugging_face import HuggingFace
from megatron_spo.convert.formats.nemo import Nemo
from megatron_spo.convert.formats.torch_dist import TorchDist

FORMS: dict[str, Form] = {"hf": HuggingFace(), "megatron": TorchDist(), "nemo": Nemo()}
