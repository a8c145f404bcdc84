"""Rules that involve several keys: predicates with messages, checked before anything else runs."""

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from megatron_spo.config.losses import LOSS_SPECS
from megatron_spo.config.model_shape import PROJECTIONS, ModelShape
from megatron_spo.config.monitoring import MONITORING
from megatron_spo.config.monitoring import unused as unused_monitoring
from megatron_spo.config.schema import Config, LossConfig, ParallelConfig, PrecisionConfig, keys_of, section_class
from megatron_spo.config.spo import SpoConfig, schedules_with
from megatron_spo.config.topology import expert_tensor, make_topology
from megatron_spo.errors import UserError


@dataclass(frozen=True)
class Facts:
    """Input of the rules.

    Attributes:
        given: keys that the user wrote, such as `spo.lambda`.
        shape: shape of the model, or None if it is not known yet.
        world_size: number of processes, or None if it is not known.
        elsewhere: the run takes place on another machine; rules about the machine are skipped.
        in_slurm: messages are for a SLURM job.
    """

    config: Config
    given: frozenset[str]
    shape: ModelShape | None
    world_size: int | None
    elsewhere: bool = False
    in_slurm: bool = False


class Rule(NamedTuple):
    """A predicate for invalid configurations and its error message.

    Attributes:
        broken: returns True if the configuration is invalid.
        message: the error message; {c.section.key} and {shape.field} in it are filled in.
        of_machine: the rule depends on the machine that the run takes place on.
    """

    broken: Callable[[Config, ModelShape | None], bool]
    message: str
    of_machine: bool = False


def installed(module: str) -> bool:
    """Returns whether a package is installed, without importing it. A plain folder of that name does not count."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return False
    return spec is not None and spec.origin is not None


def broken_rules(facts: Facts) -> list[str]:
    """Returns the messages of all broken rules, and of all given keys that have no effect."""
    config, shape = facts.config, facts.shape
    messages = [message for key, message in unused_keys(config).items() if key in facts.given and _is_set(config, key)]
    if facts.world_size is not None:
        try:
            make_topology(config.parallel, facts.world_size, in_slurm=facts.in_slurm)
        except UserError as error:
            messages.append(str(error))
    rules = [rule for rule in RULES if not (facts.elsewhere and rule.of_machine)]
    broken = [rule.message for rule in rules if rule.broken(config, shape)]
    return messages + [message.format(c=config, shape=shape) for message in broken]


def unused_keys(config: Config) -> dict[str, str]:
    """Returns the keys that have no effect in this configuration, with their error messages."""
    unused = {}
    for key in keys_of(LossConfig):
        accepting = [name for name, spec in LOSS_SPECS.items() if key in spec.parameters]
        if accepting and not set(accepting) & set(config.loss.names):
            unused[f"loss.{key}"] = _no_effect(f"loss.{key}", f"loss.name: {', '.join(config.loss.names)}", accepting)
    if not isinstance(config.loss.name, list):
        unused["loss.weights"] = _no_effect("loss.weights", "a single loss.name", ["a list of losses"])
    for key in keys_of(SpoConfig):
        schedules = schedules_with(key)
        if schedules and config.spo.schedule not in schedules:
            unused[f"spo.{key}"] = _no_effect(f"spo.{key}", f"spo.schedule: {config.spo.schedule}", schedules)
    if "constraint" in config.spo.spec.keys and config.spo.constraint == "none":
        users = ("spo.constraint: batch", "spo.constraint: pair", "spo.schedule: dual")
        unused["spo.epsilon"] = _no_effect("spo.epsilon", "spo.constraint: none", users)
    if not config.spo.sft_data or "spo.sft_data" in unused:
        unused["spo.sft_batch_size"] = "spo.sft_batch_size has no effect without spo.sft_data"
    if config.lora.rank == 0:
        unused |= {f"lora.{key}": f"lora.{key} has no effect without lora.rank > 0" for key in ("alpha", "targets")}
    unused |= unused_monitoring(config)
    if config.optimizer.decay == "constant":
        key = "optimizer.min_lr_ratio"
        unused[key] = _no_effect(key, "optimizer.decay: constant", ("linear", "cosine"))
    return unused


def _no_effect(key: str, state: str, users: Iterable[str]) -> str:
    return f"{key} has no effect with {state}; it is used by {', '.join(users)}"


def _is_set(config: Config, key: str) -> bool:
    """Returns whether a key has a value other than null and []."""
    section, name = key.split(".")
    values = getattr(config, section)
    return getattr(values, keys_of(type(values))[name]) not in (None, [])


def _knows_gap(config: Config) -> bool:
    return config.has_reference or config.spo.v is not None


def _not_divisible(key: str, attribute: str, what: str) -> Rule:
    """Returns a rule: `attribute` of the model's shape must be a multiple of `parallel.<key>`."""
    return Rule(
        lambda c, shape: shape is not None and getattr(shape, attribute) % getattr(c.parallel, key) != 0,
        f"parallel.{key} = {{c.parallel.{key}}} does not divide the model's {{shape.{attribute}}} {what}; set "
        f"parallel.{key} to a divisor of {{shape.{attribute}}}",
    )


LAYER_WIDTHS: tuple[tuple[Callable[[ModelShape, int], int], str], ...] = (
    (lambda shape, ranks: shape.hidden, "{shape.hidden} hidden columns"),
    (lambda shape, ranks: shape.ffn // ranks, "{shape.ffn} feed-forward columns"),
    (lambda shape, ranks: shape.heads * shape.head_dim // ranks, "{shape.heads} heads of {shape.head_dim}"),
    (
        lambda shape, ranks: (shape.heads + 2 * shape.kv_heads) * shape.head_dim // ranks,
        "{shape.heads} + 2 * {shape.kv_heads} query, key and value heads of {shape.head_dim}",
    ),
)
"""Dimensions of the layers' matrices on one tensor-parallel rank, given the number of ranks, with descriptions."""


def _not_in_blocks(size: Callable[[ModelShape, int], int], text: str) -> Rule:
    """Returns a rule: `size` of the model on a tensor-parallel rank must be a multiple of the fp8 recipe's block."""
    return Rule(
        lambda c, shape: (
            c.precision.recipe is not None
            and shape is not None
            and size(shape, c.parallel.tensor) % c.precision.recipe.multiple != 0
        ),
        f"precision.fp8 = {{c.precision.fp8}} multiplies in blocks of {{c.precision.recipe.multiple}} values: the "
        f"model's {text} with parallel.tensor = {{c.parallel.tensor}} are not a multiple of that; set "
        "precision.fp8=null",
    )


def _names_engine(precision: PrecisionConfig) -> bool:
    return precision.layers == "transformer_engine" or precision.fp8 is not None


def _thinner_than_rank(projection: str) -> Rule:
    """Returns a rule: `lora.rank` must not exceed a dimension of `projection`, checked for the smallest one only."""

    def broken(config: Config, shape: ModelShape | None) -> bool:
        if shape is None:
            return False
        smallest = {name: min(shape.projections[name]) for name in config.lora.targets}
        return projection == min(smallest, key=smallest.__getitem__) and config.lora.rank > smallest[projection]

    return Rule(
        broken,
        f"lora.rank = {{c.lora.rank}} exceeds a dimension of {projection}, which has "
        f"{{shape.projections[{projection}][0]}} input and {{shape.projections[{projection}][1]}} output features; set "
        f"a lower lora.rank, or remove {projection} from lora.targets",
    )


def _stages(parallel: ParallelConfig) -> int:
    return parallel.pipeline * (parallel.virtual_pipeline or 1)


def _experts(shape: ModelShape | None, unknown: int) -> int:
    """Returns the number of experts of the model: 0 for a dense model, `unknown` if the shape is unknown."""
    if shape is None:
        return unknown
    return 0 if shape.experts is None else shape.experts.count


def _unknown(names: Iterable[str]) -> list[str]:
    """Returns the names that are neither sections nor keys."""
    known = {f"{section}.{key}" for section in Config.model_fields for key in keys_of(section_class(section) or Config)}
    return [name for name in names if name not in {*known, *Config.model_fields}]


def _of_mlp(targets: Iterable[str]) -> list[str]:
    return [name for name in targets if name in ("gate_proj", "up_proj", "down_proj")]


RULES: tuple[Rule, ...] = (
    # layout
    _not_divisible("tensor", "heads", "attention heads"),
    _not_divisible("tensor", "kv_heads", "key-value heads"),
    Rule(
        lambda c, shape: shape is not None and shape.experts is None and shape.ffn % c.parallel.tensor != 0,
        "parallel.tensor = {c.parallel.tensor} does not divide the model's {shape.ffn} feed-forward columns; set "
        "parallel.tensor to a divisor of {shape.ffn}",
    ),
    Rule(
        lambda c, shape: c.parallel.sequence and c.parallel.tensor == 1,
        "parallel.sequence: true requires parallel.tensor > 1, got {c.parallel.tensor}; set parallel.sequence=false",
    ),
    Rule(
        lambda c, shape: c.parallel.virtual_pipeline is not None and c.parallel.pipeline == 1,
        "parallel.virtual_pipeline = {c.parallel.virtual_pipeline} requires parallel.pipeline > 1; set "
        "parallel.virtual_pipeline=null",
    ),
    Rule(
        lambda c, shape: shape is not None and _stages(c.parallel) > shape.layers,
        "parallel.pipeline * parallel.virtual_pipeline is more stages than the model's {shape.layers} layers; set a "
        "smaller parallel.pipeline or parallel.virtual_pipeline",
    ),
    Rule(
        lambda c, shape: (
            c.parallel.layers_per_stage is not None and len(c.parallel.layers_per_stage) != _stages(c.parallel)
        ),
        "parallel.layers_per_stage = {c.parallel.layers_per_stage} must have one number for each of the "
        "parallel.pipeline * parallel.virtual_pipeline stages",
    ),
    Rule(
        lambda c, shape: (
            shape is not None
            and c.parallel.layers_per_stage is not None
            and sum(c.parallel.layers_per_stage) != shape.layers
        ),
        "parallel.layers_per_stage = {c.parallel.layers_per_stage} must add up to the model's {shape.layers} layers",
    ),
    # experts
    Rule(
        lambda c, shape: _experts(shape, 0) > 0 and _experts(shape, 0) % c.parallel.expert != 0,
        "parallel.expert = {c.parallel.expert} does not divide the model's {shape.experts.count} experts; set "
        "parallel.expert to a divisor of {shape.experts.count}",
    ),
    Rule(
        lambda c, shape: (
            shape is not None and shape.experts is not None and shape.experts.ffn % expert_tensor(c.parallel) != 0
        ),
        "parallel.tensor = {c.parallel.tensor} does not divide the {shape.experts.ffn} feed-forward columns of the "
        "model's experts; set parallel.expert > 1, so that each process holds whole experts",
    ),
    Rule(
        lambda c, shape: _experts(shape, 0) > 0 and c.parallel.tensor > 1 and not c.parallel.sequence,
        "parallel.tensor = {c.parallel.tensor} on a model with experts requires parallel.sequence: true, because "
        "otherwise every process sends the same tokens to the experts; set parallel.sequence=true",
    ),
    Rule(
        lambda c, shape: _experts(shape, 1) == 0 and c.parallel.expert > 1,
        "parallel.expert = {c.parallel.expert} requires a model with experts, but {shape.family} has none; set "
        "parallel.expert=1",
    ),
    Rule(
        lambda c, shape: _experts(shape, 1) == 0 and c.model.router_aux_loss is not None,
        "model.router_aux_loss = {c.model.router_aux_loss} requires a model with experts, but {shape.family} has none; "
        "set model.router_aux_loss=null",
    ),
    Rule(
        lambda c, shape: _experts(shape, 0) > 0 and c.lora.rank > 0 and bool(_of_mlp(c.lora.targets)),
        "lora.targets = {c.lora.targets} includes feed-forward projections, but the {shape.family} model has experts "
        "instead, and adapters on experts are not supported; set lora.targets=[q_proj,k_proj,v_proj,o_proj]",
    ),
    Rule(
        lambda c, shape: _experts(shape, 0) > 0 and _names_engine(c.precision),
        "{c.precision.reason} is not supported for the experts of {shape.family} models; set precision.fp8=null and "
        "precision.layers=auto",
    ),
    # adapters
    *(_thinner_than_rank(projection) for projection in PROJECTIONS),
    Rule(
        lambda c, shape: c.lora.rank > 0 and c.model.init == "random",
        "lora.rank = {c.lora.rank} requires trained weights, but model.init is random; set model.init=load or "
        "lora.rank=0",
    ),
    # precision
    Rule(
        lambda c, shape: _names_engine(c.precision) and not installed("transformer_engine"),
        "{c.precision.reason} requires an NVIDIA GPU and Transformer Engine, which is not installed; run pip install "
        "--no-build-isolation -e '.[gpu]' on a GPU machine, or set precision.fp8=null precision.layers=auto",
        of_machine=True,
    ),
    Rule(
        lambda c, shape: _names_engine(c.precision) and c.precision.dtype == "fp32",
        "{c.precision.reason} requires precision.dtype: bf16, because Transformer Engine computes fp32 products in "
        "TF32; set precision.dtype=bf16",
    ),
    Rule(
        lambda c, shape: c.precision.fp8 is not None and c.precision.layers == "torch",
        "precision.fp8 = {c.precision.fp8} requires the layers of Transformer Engine; set precision.layers=auto",
    ),
    Rule(
        lambda c, shape: c.precision.fp8 == "delayed" and c.has_reference,
        "precision.fp8: delayed is not supported with a reference: its scales depend on earlier rows, so the policy "
        "would not start equal to the reference; set precision.fp8=tensorwise (or blockwise), or reference.cache=null "
        "with a loss that needs no reference and without adapters",
    ),
    *(_not_in_blocks(size, text) for size, text in LAYER_WIDTHS),
    Rule(
        lambda c, shape: (
            c.precision.recipe is not None
            and c.parallel.sequence
            and shape is not None
            and shape.hidden % c.precision.recipe.gathered != 0
        ),
        "precision.fp8 = {c.precision.fp8} with parallel.sequence gathers blocks of {c.precision.recipe.gathered} "
        "values, which do not divide the model's hidden size of {shape.hidden}; set parallel.sequence=false or "
        "another precision.fp8",
    ),
    # data
    Rule(
        lambda c, shape: shape is not None and c.data.max_length > shape.max_positions,
        "data.max_length = {c.data.max_length} exceeds the model's context of {shape.max_positions} tokens; set "
        "data.max_length={shape.max_positions} or less",
    ),
    # objective
    Rule(
        lambda c, shape: c.reference.model is not None and c.reference.cache is None,
        "reference.model = {c.reference.model} requires a cache of its log-probs; set reference.cache",
    ),
    Rule(
        lambda c, shape: any(
            term.spec.name == "exo_pair" and term.parameters["label_smoothing"] == 0 for term in c.loss.terms()
        ),
        "loss.label_smoothing = 0 makes loss.name: exo_pair infinite; set loss.label_smoothing > 0",
    ),
    Rule(
        lambda c, shape: c.spo.spec.has_unit and c.spo.lambda_unit == "relative" and c.loss.unscaled != "",
        "spo.lambda_unit: relative is undefined for loss.name: {c.loss.unscaled}, which has no single scale on "
        "the chosen log-prob; set spo.lambda_unit=token",
    ),
    Rule(
        lambda c, shape: c.spo.spec.preference and c.loss.needing_reference != "" and not c.has_reference,
        "loss.name: {c.loss.needing_reference} requires log-probs of the reference; set reference.cache to a folder "
        "and fill it with `megatron-spo reference CONFIG.yaml`",
    ),
    Rule(
        lambda c, shape: "constraint" in c.spo.spec.keys and c.spo.constraint == "pair" and not c.has_reference,
        "spo.constraint: pair requires log-probs of the reference; set reference.cache",
    ),
    Rule(
        lambda c, shape: "constraint" in c.spo.spec.keys and c.spo.constraint == "batch" and not _knows_gap(c),
        "spo.constraint: batch requires the gap g - v; set reference.cache, or spo.v to a number or running_min",
    ),
    Rule(
        lambda c, shape: c.spo.spec.needs_gap and not _knows_gap(c),
        "spo.schedule: {c.spo.schedule} requires the gap g - v; set reference.cache, or spo.v to a number or "
        "running_min",
    ),
    Rule(
        lambda c, shape: "lambda_max" in c.spo.spec.keys and c.spo.lambda_ > c.spo.lambda_max,
        "spo.lambda = {c.spo.lambda_} exceeds spo.lambda_max = {c.spo.lambda_max}; set a smaller spo.lambda or a "
        "larger spo.lambda_max",
    ),
    # monitoring
    *(Rule(lambda c, shape, broken=broken: broken(c), message) for broken, message in MONITORING),  # type: ignore[misc]
    # training
    Rule(
        lambda c, shape: c.training.steps is not None and c.training.epochs is not None,
        "training.steps = {c.training.steps} and training.epochs = {c.training.epochs} are both set; set one "
        "of them to null",
    ),
    Rule(
        lambda c, shape: c.training.steps is not None and c.optimizer.warmup_steps > c.training.steps,
        "optimizer.warmup_steps = {c.optimizer.warmup_steps} exceeds training.steps = {c.training.steps}; set fewer "
        "optimizer.warmup_steps",
    ),
    Rule(
        lambda c, shape: c.training.eval_every > 0 and not c.data.eval,
        "training.eval_every = {c.training.eval_every} requires data.eval; set data.eval, or training.eval_every=0",
    ),
    Rule(
        lambda c, shape: c.checkpoint.best is not None and not c.data.eval,
        "checkpoint.best = {c.checkpoint.best} requires data.eval; set data.eval, or checkpoint.best=null",
    ),
    Rule(
        lambda c, shape: bool(_unknown(c.checkpoint.allow_changed)),
        "checkpoint.allow_changed = {c.checkpoint.allow_changed} contains a name that is neither a key nor a section",
    ),
    Rule(
        lambda c, shape: c.logging.wandb != "off" and not installed("wandb"),
        "logging.wandb: {c.logging.wandb} requires the package wandb; run pip install -e '.[wandb]', or set "
        "logging.wandb=off",
        of_machine=True,
    ),
    Rule(
        lambda c, shape: c.logging.tensorboard and not installed("tensorboard"),
        "logging.tensorboard: true requires the package tensorboard; run pip install -e '.[tensorboard]', or set "
        "logging.tensorboard=false",
        of_machine=True,
    ),
)
