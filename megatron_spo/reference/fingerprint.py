"""Fingerprints of everything that a cached log-prob depends on."""

import hashlib
import json

import torch.distributed as dist

from megatron_spo.config.model_folder import weight_files
from megatron_spo.config.schema import Config, PrecisionConfig
from megatron_spo.data.chat_template import template_date
from megatron_spo.data.dataset import TokenizedSet
from megatron_spo.data.tokenize import tokenizer_fingerprint
from megatron_spo.meter import BYTES, Meter
from megatron_spo.model.hf_files import file_digest, weights_digest
from megatron_spo.prepare import Inputs, shows_progress
from megatron_spo.reference.cache import ReferenceFingerprint
from megatron_spo.runtime.device import uses_transformer_engine


def reference_fingerprint(config: Config, inputs: Inputs, dataset: TokenizedSet, weights: str) -> ReferenceFingerprint:
    """Returns the fingerprint of everything that a cached log-prob of this data set depends on."""
    return ReferenceFingerprint(
        weights=weights,
        tokenizer=tokenizer_fingerprint(inputs.tokenizer),
        truncation=f"{config.data.truncation} at {config.data.max_length} tokens",
        precision=numerics(config.precision, experts=inputs.shape.experts is not None),
        dataset=dataset.fingerprint,
        date=template_date(inputs.tokenizer),
    )


def numerics(precision: PrecisionConfig, *, experts: bool) -> str:
    """Describes the numerics of the log-probs: precision, kind of layers and fp8 recipe."""
    engine = ", Transformer Engine" if uses_transformer_engine(precision, experts=experts) else ""
    return precision.dtype + engine + (f", fp8 {precision.fp8}" if precision.fp8 else "")


def weights_fingerprint(config: Config, inputs: Inputs) -> str:
    """Returns the SHA-256 of the model's weights and shape.

    For random weights it covers shape and seed, which determine them.
    """
    if config.model.init == "random":
        digest = hashlib.sha256(json.dumps(inputs.shape.raw, sort_keys=True).encode())
        digest.update(f"random, seed {config.training.seed}".encode())
        return digest.hexdigest()
    files = weight_files(inputs.folder)
    own, mine = files[dist.get_rank() :: dist.get_world_size()], {}
    total = sum(file.stat().st_size for file in own)
    with Meter("reading the weights for their fingerprint", total, BYTES, shown=shows_progress(config)) as meter:
        for file in own:
            mine[file.name] = file_digest(file)
            meter.advance(file.stat().st_size)
    parts: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, mine)
    return weights_digest(inputs.shape.raw, {name: content for part in parts for name, content in part.items()})
