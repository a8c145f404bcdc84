"""Run by the interpreter of a NeMo environment (nemo-toolkit 2.7.3): builds the model of a NeMo 2 checkpoint from
its context and saves the logits of some tokens. `nemo_reader.py CHECKPOINT OUT.pt`

Without a GPU and Transformer Engine the toolkit's fusions are switched off and its cuda devices are the CPU.
"""

import contextlib
import sys
from pathlib import Path
from typing import Any

import torch
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer import TransformerConfig
from nemo.lightning import io  # type: ignore[import-not-found]
from nemo.lightning.io import pl  # type: ignore[import-not-found]
from torch.overrides import TorchFunctionMode

TOKENS = 194
FUSIONS = ("apply_rope_fusion", "masked_softmax_fusion", "bias_activation_fusion", "bias_dropout_fusion",
           "gradient_accumulation_fusion", "persist_layer_norm", "moe_permute_fusion", "moe_grouped_gemm")  # fmt: skip


class OnCpu(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.cuda:
            return args[0]
        if "cuda" in str(kwargs.get("device", "")):
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


class Stream:
    def wait_stream(self, *_: Any) -> None:
        pass


def bridge() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.synchronize = lambda *_: None
    cuda.Stream = Stream
    cuda.current_stream = lambda *_: Stream()
    cuda.stream = lambda _: contextlib.nullcontext()
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *_: torch.get_rng_state()
    cuda.manual_seed = torch.random.default_generator.manual_seed
    megatron_random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    megatron_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    pl._fix_tensors_device = lambda checkpoint: checkpoint
    validate = TransformerConfig.__post_init__

    def without_fusions(self: Any) -> None:
        for name in FUSIONS:
            setattr(self, name, False)
        self.use_cpu_initialization = True
        validate(self)

    TransformerConfig.__post_init__ = without_fusions


def main(folder: str, out: str) -> None:
    bridge()
    context = io.load_context(Path(folder))
    print(type(context.model).__name__, type(context.model.config).__name__)
    if context.model.config.num_moe_experts:  # Megatron's experts need Transformer Engine or a GPU there
        return
    with OnCpu(), torch.no_grad():
        model = io.load_context(Path(folder), subpath="model")
        module, _ = model.exporter("hf", folder).nemo_load(Path(folder))
        while hasattr(module, "module"):
            module = module.module
        megatron_random.model_parallel_cuda_manual_seed(0)
        places = torch.arange(TOKENS)
        hidden = places[None, :] > places[:, None]
        logits = module.eval()(places[None] + 6, places[None], hidden[None, None])
    torch.save(logits.float(), out)


if __name__ == "__main__":
    main(*sys.argv[1:])
