"""Steps that `train` and `reference` share: connecting the processes, reading the data, building the model."""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import megatron_spo.runtime.megatron_import  # noqa: F401  (before the modules that import Megatron)
from megatron_spo.config.data_source import DataSource
from megatron_spo.config.model_shape import ModelShape, read_model_shape
from megatron_spo.config.rules import Facts, broken_rules
from megatron_spo.config.schema import Config
from megatron_spo.config.topology import make_topology
from megatron_spo.convert.weights import check_folder_weights, open_weights
from megatron_spo.data import packing
from megatron_spo.data.dataset import TokenizedSet, build_dataset
from megatron_spo.data.loader import Loader, row_multiples
from megatron_spo.data.tokenize import load_tokenizer
from megatron_spo.errors import UserError
from megatron_spo.evaluate.limits import ModelLimits, config_of
from megatron_spo.model.build import PairModel, build_model
from megatron_spo.model.experts import freeze_routers
from megatron_spo.model.hf_files import locate_model
from megatron_spo.model.settings import transformer_config
from megatron_spo.model.weights import fill_randomly, load_hf_weights
from megatron_spo.runtime import env, processes
from megatron_spo.runtime.device import check_device
from megatron_spo.runtime.processes import Runtime, agreed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TRAIN, SFT = "train", "sft"
"""Names of the training sets; held-out sets are named after their files."""


@dataclass(frozen=True)
class Inputs:
    """The inputs of a run, found and checked before any model is built."""

    folder: Path
    shape: ModelShape
    tokenizer: "PreTrainedTokenizerFast"
    train: TokenizedSet
    sft: TokenizedSet | None
    evals: dict[str, TokenizedSet]
    reference: Path | None = None
    """folder of reference.model; None: the model itself is the reference"""

    def named_sets(self) -> dict[str, TokenizedSet]:
        """Returns all data sets by name, training sets first."""
        separate = {} if self.sft is None else {SFT: self.sft}
        return {TRAIN: self.train, **separate, **self.evals}


def join(config: Config) -> Runtime:
    """Connects the job's processes in the configured layout.

    Raises:
        UserError: on every rank alike, if the device of any process cannot run the configured precision.
    """
    runtime = processes.start(
        make_topology(config.parallel, env.world_size()),
        seed=config.training.seed,
        threads=config.training.threads,
        hang_minutes=config.training.hang_timeout,
    )
    with agreed():
        check_device(config.precision)
    return runtime


def read_inputs(config: Config, runtime: Runtime) -> Inputs:
    """Finds the model folder and tokenises all data.

    Raises:
        UserError: on every rank alike, if the model or the data are wrong.
    """
    for turn in (True, False):  # the main process downloads and tokenises first, the others then read it from disk
        with agreed():
            if runtime.is_main == turn:
                inputs = _read_inputs(config, is_main=turn)
    return inputs


def _read_inputs(config: Config, *, is_main: bool) -> Inputs:
    folder = locate_model(config.model.path)
    shape, progress = read_model_shape(folder), shows_progress(config)
    if is_main and config.model.init != "random":
        check_folder_weights(folder, shape)
        config_of(folder)
    if broken := broken_rules(Facts(config, frozenset(), shape, None)):  # the shape of a hub model is known only now
        raise UserError("\n".join(broken))
    tokenizer = load_tokenizer(config.model.tokenizer or str(folder), config.data.chat_template)
    pairs = "preference" if config.spo.spec.preference else "any"

    def build(sources: list[DataSource], kind: str = pairs) -> TokenizedSet:
        return build_dataset(sources, config.data, tokenizer, kind=kind, progress=progress)

    sft = build(config.spo.sft_data, "sft") if config.spo.sft_data else None
    names = _eval_names(config.data.eval, reserved=(TRAIN,) if sft is None else (TRAIN, SFT))
    evals = {name: build([source]) for name, source in zip(names, config.data.eval, strict=True)}
    train = build(config.data.train)
    if config.data.rows is not None:
        train = train.drawn(config.data.rows, config.training.seed)
    reference = config.reference.model and locate_model(config.reference.model, "reference.model")
    inputs = Inputs(folder, shape, tokenizer, train, sft, evals, reference or None)
    if len(tokenizer) > shape.vocab:  # common, and harmless unless the data contains the extra tokens
        for dataset in inputs.named_sets().values():
            ModelLimits(folder, shape.vocab, shape.max_positions).check_pairs(dataset)
    return inputs


def _eval_names(sources: list[DataSource], *, reserved: tuple[str, ...]) -> list[str]:
    """Returns the files' stems, with a number if two are the same or one has the name of a training set."""
    names: list[str] = []
    for source in sources:
        stem = Path(source.path).stem or source.path
        candidates = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
        names.append(next(name for name in candidates if name not in (*reserved, *names)))
    return names


def shows_progress(config: Config) -> bool:
    """Returns whether this process shows the progress of long tasks."""
    return env.rank() == 0 and config.logging.progress


def make_loader(config: Config, name: str, dataset: TokenizedSet, runtime: Runtime) -> Loader:
    """Returns the loader of this data-parallel rank for the data set `name`, with the batch sizes of training."""
    size = config.training.global_batch_size
    return Loader(
        dataset,
        config.data,
        global_batch_size=(config.spo.sft_batch_size or size) if name == SFT else size,
        seed=config.training.seed,
        rank=runtime.data_rank,
        ranks=runtime.topology.data,
        multiples=row_multiples(config),
        stream=packing.SFT if name == SFT else packing.PAIRS,
    )


def make_model(config: Config, inputs: Inputs) -> list[PairModel]:
    """Builds this rank's chunks of the policy, with their initial weights.

    Raises:
        UserError: on every rank alike, if the weights cannot be loaded.
    """
    chunks = build_model(inputs.shape, transformer_config(inputs.shape, config.parallel, config.precision))
    if config.model.router_aux_loss is None:
        freeze_routers(chunks)
    with agreed():
        for chunk in chunks:
            if config.model.init == "random":
                fill_randomly(chunk, inputs.shape, config.training.seed)
            else:
                load_hf_weights(
                    chunk, inputs.shape, open_weights(inputs.folder, inputs.shape), shown=shows_progress(config)
                )
    return chunks
