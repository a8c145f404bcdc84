"""The formats that `convert` writes models in, by name."""

from megatron_spo.convert.form import Form
from megatron_spo.convert.hf_form import HuggingFace
from megatron_spo.convert.nemo_form import Nemo
from megatron_spo.convert.torch_dist import TorchDist

FORMS: dict[str, Form] = {"hf": HuggingFace(), "megatron": TorchDist(), "nemo": Nemo()}
