"""What `train` and `reference` build alike: data, model and the fingerprint that ties the cache to both."""

import hashlib
import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

import megatron_spo.runtime.megatron_import  # noqa: F401  (before the modules that import Megatron)
from megatron_spo.config.model_folder import shard_files
from megatron_spo.config.model_shape import ModelShape, read_model_shape
from megatron_spo.config.rules import Facts, broken_rules
from megatron_spo.config.schema import Config, DataSource, PrecisionConfig
from megatron_spo.config.topology import make_topology
from megatron_spo.data.chat_template import template_date
from megatron_spo.data.dataset import TokenizedSet, build_dataset
from megatron_spo.data.reference_store import ReferenceFingerprint
from megatron_spo.data.tokenize import load_tokenizer, tokenizer_fingerprint
from megatron_spo.errors import UserError
from megatron_spo.evaluate.limits import Limits, config_of
from megatron_spo.model.build import PairModel, build_model
from megatron_spo.model.experts import freeze_routers
from megatron_spo.model.hf_files import check_weights, file_digest, locate_model, weights_digest
from megatron_spo.model.settings import transformer_config
from megatron_spo.model.weights import fill_randomly, load_hf_weights
from megatron_spo.planner.at_start import memory_at_start, memory_line, shortage
from megatron_spo.planner.memory import Kernels, Setting
from megatron_spo.planner.rows import lengths_of
from megatron_spo.runtime import env, processes
from megatron_spo.runtime.device import check_device, memory_of, uses_transformer_engine
from megatron_spo.runtime.processes import Runtime, agree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TRAIN, SFT = "train", "sft"
"""Names of the training sets; the held-out ones have those of their files."""


@dataclass(frozen=True)
class Sources:
    """The inputs of a run, found and checked, before any model is built."""

    folder: Path
    shape: ModelShape
    tokenizer: "PreTrainedTokenizerFast"
    train: TokenizedSet
    sft: TokenizedSet | None
    evals: dict[str, TokenizedSet]

    def named_sets(self) -> dict[str, TokenizedSet]:
        """All data sets by name: those of training, and the held-out ones."""
        separate = {} if self.sft is None else {SFT: self.sft}
        return {TRAIN: self.train, **separate, **self.evals}


def join(config: Config) -> Runtime:
    """Join the job's processes in the configured layout.

    Raises:
        UserError: on every rank alike; some process has no device that runs what the config asks for.
    """
    runtime = processes.start(
        make_topology(config.parallel, env.world_size()),
        seed=config.training.seed,
        threads=config.training.threads,
        hang_minutes=config.training.hang_timeout,
    )
    error: UserError | None = None
    try:
        check_device(config.precision)
    except UserError as raised:
        error = raised
    agree(error)
    return runtime


def read_sources(config: Config, runtime: Runtime) -> Sources:
    """Find the model folder and tokenise all data.

    Raises:
        UserError: on every rank alike.
    """
    error: UserError | None = None
    for turn in (True, False):  # the main process downloads and tokenises, the others find it on disk
        if runtime.is_main == turn:
            try:
                sources = _read_sources(config, is_main=turn)
            except UserError as raised:
                error = raised
        agree(error)
    return sources


def _read_sources(config: Config, *, is_main: bool) -> Sources:
    folder = locate_model(config.model.path)
    shape, progress = read_model_shape(folder), is_main and config.logging.progress
    if is_main and config.model.init != "random":
        check_weights(folder, shape)
        config_of(folder)
    if broken := broken_rules(Facts(config, frozenset(), shape, None)):  # a hub model's shape is known only now
        raise UserError("\n".join(broken))
    tokenizer = load_tokenizer(config.model.tokenizer or str(folder), config.data.chat_template)
    pairs = "any" if config.spo.schedule == "sft" else "preference"

    def build(sources: list[DataSource], kind: str = pairs) -> TokenizedSet:
        return build_dataset(sources, config.data, tokenizer, kind=kind, progress=progress)

    sft = build(config.spo.sft_data, "sft") if config.spo.sft_data else None
    names = _eval_names(config.data.eval, reserved=(TRAIN,) if sft is None else (TRAIN, SFT))
    evals = {name: build([source]) for name, source in zip(names, config.data.eval, strict=True)}
    sources = Sources(folder, shape, tokenizer, build(config.data.train), sft, evals)
    if len(tokenizer) > shape.vocab:  # common and harmless, unless the data has the tokens beyond
        for dataset in sources.named_sets().values():
            Limits(folder, shape.vocab, shape.max_positions).check_pairs(dataset)
    return sources


def _eval_names(sources: list[DataSource], *, reserved: tuple[str, ...]) -> list[str]:
    """File stems, numbered where two are the same or one is called like a training set."""
    names: list[str] = []
    for source in sources:
        stem = Path(source.path).stem or source.path
        candidates = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
        names.append(next(name for name in candidates if name not in (*reserved, *names)))
    return names


def make_model(config: Config, sources: Sources) -> list[PairModel]:
    """This rank's chunks of the policy, with their initial weights.

    Raises:
        UserError: on every rank alike.
    """
    chunks = build_model(sources.shape, transformer_config(sources.shape, config.parallel, config.precision))
    if config.model.freeze_router:
        freeze_routers(chunks)
    error: UserError | None = None
    if config.model.init == "random":
        for chunk in chunks:
            fill_randomly(chunk, sources.shape, config.training.seed)
    else:
        try:
            for chunk in chunks:
                load_hf_weights(chunk, sources.shape, sources.folder)
        except UserError as raised:
            error = raised
    agree(error)
    return chunks


def reference_fingerprint(
    config: Config, sources: Sources, dataset: TokenizedSet, weights: str
) -> ReferenceFingerprint:
    """What a cached log-prob of this data set depends on."""
    return ReferenceFingerprint(
        weights=weights,
        tokenizer=tokenizer_fingerprint(sources.tokenizer),
        truncation=f"{config.data.truncation} at {config.data.max_length} tokens",
        precision=numerics(config.precision, experts=sources.shape.experts is not None),
        dataset=dataset.fingerprint,
        date=template_date(sources.tokenizer),
    )


def numerics(precision: PrecisionConfig, *, experts: bool) -> str:
    """What computes the log-probs, as far as it shows in their digits."""
    engine = ", Transformer Engine" if uses_transformer_engine(precision, experts=experts) else ""
    return precision.dtype + engine + (f", fp8 {precision.fp8}" if precision.fp8 else "")


def weights_fingerprint(config: Config, sources: Sources) -> str:
    """SHA-256 over the content of the model's weights and shape; the ranks share the reading.

    Random weights are fixed by shape and seed.
    """
    if config.model.init == "random":
        digest = hashlib.sha256(json.dumps(sources.shape.raw, sort_keys=True).encode())
        digest.update(f"random, seed {config.training.seed}".encode())
        return digest.hexdigest()
    files = shard_files(sources.folder)
    mine = {file.name: file_digest(file) for file in files[dist.get_rank() :: dist.get_world_size()]}
    parts: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, mine)
    return weights_digest(sources.shape.raw, {name: content for part in parts for name, content in part.items()})


def announce_memory(config: Config, sources: Sources, runtime: Runtime) -> None:
    """Say what memory the run needs by the plan, and warn where that is more than there is."""
    if not runtime.is_main:
        return
    kernels: Kernels = "cpu"
    if runtime.device.type == "cuda":
        engine = uses_transformer_engine(config.precision, experts=sources.shape.experts is not None)
        kernels = "engine" if engine else "torch"
    size = config.training.global_batch_size
    sets = [(lengths_of(sources.train, TRAIN), size)]
    if sources.sft is not None:
        sets.append((lengths_of(sources.sft, SFT), config.spo.sft_batch_size or size))
    memory = memory_at_start(Setting(config, sources.shape, runtime.topology, kernels), sets)
    sharing = env.local_world_size() if kernels == "cpu" else 1
    available = memory_of(runtime.device)
    print(memory_line(memory, processes=sharing, available=available), file=sys.stderr)
    if warning := shortage(memory, processes=sharing, available=available):
        print(warning, file=sys.stderr)
