"""Rules over several keys: a table of predicate and message, checked before anything is built."""

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from megatron_spo.config.losses import LOSS_SPECS
from megatron_spo.config.model_shape import PROJECTIONS, ModelShape
from megatron_spo.config.monitoring import MONITORING
from megatron_spo.config.monitoring import unused as unused_monitoring
from megatron_spo.config.schema import Config, LossConfig, keys_of, section_class
from megatron_spo.config.spo import SpoConfig, schedules_with
from megatron_spo.config.topology import expert_tensor, make_topology
from megatron_spo.errors import UserError


@dataclass(frozen=True)
class Facts:
    """What the rules may look at; `given` holds the keys that the user wrote, such as `spo.lambda`.

    `elsewhere`: the run is to take place on another machine, so that nothing is asked of this one.
    """

    config: Config
    given: frozenset[str]
    shape: ModelShape | None
    world_size: int | None
    elsewhere: bool = False


class Rule(NamedTuple):
    """`message` is shown where `broken` holds; {c.section.key} and {shape.field} in it are filled in.

    `of_machine`: it asks something of the machine that the run takes place on.
    """

    broken: Callable[[Config, ModelShape | None], bool]
    message: str
    of_machine: bool = False


def installed(module: str) -> bool:
    """Whether a package is there, without importing it; a mere folder of that name does not count."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return False
    return spec is not None and spec.origin is not None


def broken_rules(facts: Facts) -> list[str]:
    """The messages of all broken rules, and of all keys given without effect."""
    config, shape = facts.config, facts.shape
    messages = [message for key, message in unused_keys(config).items() if key in facts.given and _is_set(config, key)]
    if facts.world_size is not None:
        try:
            make_topology(config.parallel, facts.world_size)
        except UserError as error:
            messages.append(str(error))
    rules = [rule for rule in RULES if not (facts.elsewhere and rule.of_machine)]
    broken = [rule.message for rule in rules if rule.broken(config, shape)]
    return messages + [message.format(c=config, shape=shape) for message in broken]


def unused_keys(config: Config) -> dict[str, str]:
    """Keys that have no effect in this configuration, each with the message for whoever sets it."""
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


def _no_effect(key: str, beside: str, users: Iterable[str]) -> str:
    return f"{key} has no effect with {beside}; it belongs to {', '.join(users)}"


def _is_set(config: Config, key: str) -> bool:
    """Null, and a list of nothing, mean not set."""
    section, name = key.split(".")
    values = getattr(config, section)
    return getattr(values, keys_of(type(values))[name]) not in (None, [])


def _knows_gap(config: Config) -> bool:
    return config.has_reference or config.spo.v is not None


def _not_divisible(key: str, attribute: str, what: str) -> Rule:
    """`attribute` of the model's shape must be a multiple of `parallel.<key>`."""
    return Rule(
        lambda c, shape: shape is not None and getattr(shape, attribute) % getattr(c.parallel, key) != 0,
        f"parallel.{key} = {{c.parallel.{key}}} does not divide the model's {{shape.{attribute}}} {what}",
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
"""Sides of the layers' matrices on one of so many tensor-parallel ranks, and what they are."""


def _not_in_blocks(size: Callable[[ModelShape, int], int], text: str) -> Rule:
    """`size` of the model on a tensor-parallel rank must be a multiple of what the fp8 recipe multiplies."""
    return Rule(
        lambda c, shape: (
            c.precision.recipe is not None
            and shape is not None
            and size(shape, c.parallel.tensor) % c.precision.recipe.multiple != 0
        ),
        f"precision.fp8 = {{c.precision.fp8}} multiplies in blocks of {{c.precision.recipe.multiple}} values: the "
        f"model's {text} with parallel.tensor = {{c.parallel.tensor}} are no multiple of it; set precision.fp8=null",
    )


def _names_engine(config: Config) -> bool:
    return config.precision.layers == "transformer_engine" or config.precision.fp8 is not None


def _thinner_than_rank(projection: str) -> Rule:
    """`lora.rank` must not exceed the dimensions of the projections; told of the smallest one only."""

    def broken(config: Config, shape: ModelShape | None) -> bool:
        if shape is None:
            return False
        smallest = {name: min(shape.projections[name]) for name in config.lora.targets}
        return projection == min(smallest, key=smallest.__getitem__) and config.lora.rank > smallest[projection]

    return Rule(
        broken,
        f"lora.rank = {{c.lora.rank}} exceeds a dimension of {projection}, which takes "
        f"{{shape.projections[{projection}][0]}} features to {{shape.projections[{projection}][1]}}; lower it, or take "
        f"{projection} out of lora.targets",
    )


def _stages(config: Config) -> int:
    return config.parallel.pipeline * (config.parallel.virtual_pipeline or 1)


def _experts(shape: ModelShape | None, unknown: int) -> int:
    """Experts of the model: 0 for a dense one, `unknown` while the shape is."""
    if shape is None:
        return unknown
    return 0 if shape.experts is None else shape.experts.count


def _unknown(names: Iterable[str]) -> list[str]:
    """Names that are neither sections nor keys."""
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
        "parallel.tensor = {c.parallel.tensor} does not divide the model's {shape.ffn} feed-forward columns",
    ),
    Rule(
        lambda c, shape: c.parallel.sequence and c.parallel.tensor == 1,
        "parallel.sequence: true needs parallel.tensor > 1, got {c.parallel.tensor}",
    ),
    Rule(
        lambda c, shape: c.parallel.virtual_pipeline is not None and c.parallel.pipeline == 1,
        "parallel.virtual_pipeline = {c.parallel.virtual_pipeline} needs parallel.pipeline > 1",
    ),
    Rule(
        lambda c, shape: shape is not None and _stages(c) > shape.layers,
        "parallel.pipeline * parallel.virtual_pipeline asks for more stages than the model's {shape.layers} layers",
    ),
    Rule(
        lambda c, shape: c.parallel.layers_per_stage is not None and len(c.parallel.layers_per_stage) != _stages(c),
        "parallel.layers_per_stage = {c.parallel.layers_per_stage} must give one number for each of the "
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
        "parallel.expert = {c.parallel.expert} does not divide the model's {shape.experts.count} experts",
    ),
    Rule(
        lambda c, shape: (
            shape is not None and shape.experts is not None and shape.experts.ffn % expert_tensor(c.parallel) != 0
        ),
        "parallel.tensor = {c.parallel.tensor} does not divide the {shape.experts.ffn} feed-forward columns of the "
        "model's experts; share them out with parallel.expert > 1",
    ),
    Rule(
        lambda c, shape: _experts(shape, 0) > 0 and c.parallel.tensor > 1 and not c.parallel.sequence,
        "parallel.tensor = {c.parallel.tensor} on a model with experts needs parallel.sequence: true, or every "
        "process would send the same tokens to the experts",
    ),
    Rule(
        lambda c, shape: _experts(shape, 1) == 0 and c.parallel.expert > 1,
        "parallel.expert = {c.parallel.expert} needs a model with experts; {shape.family} has none",
    ),
    Rule(
        lambda c, shape: _experts(shape, 1) == 0 and c.model.router_aux_loss is not None,
        "model.router_aux_loss = {c.model.router_aux_loss} needs a model with experts; {shape.family} has none; set it "
        "to null",
    ),
    Rule(
        lambda c, shape: _experts(shape, 0) > 0 and c.lora.rank > 0 and bool(_of_mlp(c.lora.targets)),
        "lora.targets = {c.lora.targets} names feed-forward projections, in whose place the {shape.family} model has "
        "experts, which get no adapters; set lora.targets=[q_proj,k_proj,v_proj,o_proj]",
    ),
    Rule(
        lambda c, shape: _experts(shape, 0) > 0 and _names_engine(c),
        "{c.precision.reason}: the {shape.family} model's experts are not built with Transformer Engine's layers; set "
        "precision.fp8=null precision.layers=auto",
    ),
    # adapters
    *(_thinner_than_rank(projection) for projection in PROJECTIONS),
    Rule(
        lambda c, shape: c.lora.rank > 0 and c.model.init == "random",
        "lora.rank = {c.lora.rank} adapts a trained model, but model.init: random draws one; set model.init=load, or "
        "lora.rank=0",
    ),
    # precision
    Rule(
        lambda c, shape: _names_engine(c) and not installed("transformer_engine"),
        "{c.precision.reason} needs an NVIDIA GPU and Transformer Engine, which is not installed: pip install "
        "--no-build-isolation -e '.[gpu]' on a GPU machine, or set precision.fp8=null precision.layers=auto",
        of_machine=True,
    ),
    Rule(
        lambda c, shape: _names_engine(c) and c.precision.dtype == "fp32",
        "{c.precision.reason} needs precision.dtype: bf16; Transformer Engine computes fp32 products in TF32",
    ),
    Rule(
        lambda c, shape: c.precision.fp8 is not None and c.precision.layers == "torch",
        "precision.fp8 = {c.precision.fp8} needs Transformer Engine's layers; set precision.layers=auto",
    ),
    Rule(
        lambda c, shape: c.precision.fp8 == "delayed" and c.has_reference,
        "precision.fp8: delayed scales by the rows seen before, of which a reference pass has none, so the policy does "
        "not start from its reference; set precision.fp8=tensorwise (or blockwise), or reference.cache=null with a "
        "loss that needs none and without adapters",
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
        "values, which do not divide the model's hidden size of {shape.hidden}; set parallel.sequence=false, or "
        "another recipe",
    ),
    # data
    Rule(
        lambda c, shape: shape is not None and c.data.max_length > shape.max_positions,
        "data.max_length = {c.data.max_length} exceeds the model's context of {shape.max_positions} tokens",
    ),
    # objective
    Rule(
        lambda c, shape: any(
            term.spec.name == "exo_pair" and term.parameters["label_smoothing"] == 0 for term in c.loss.terms()
        ),
        "loss.label_smoothing = 0 makes loss.name: exo_pair infinite; it must be > 0",
    ),
    Rule(
        lambda c, shape: c.spo.spec.has_unit and c.spo.lambda_unit == "relative" and c.loss.unscaled != "",
        "spo.lambda_unit: relative is undefined for loss.name: {c.loss.unscaled}, which has no single scale on "
        "the chosen log-prob; set spo.lambda_unit=token",
    ),
    Rule(
        lambda c, shape: c.spo.spec.preference and c.loss.needing_reference != "" and not c.has_reference,
        "loss.name: {c.loss.needing_reference} needs the reference's log-probs; set reference.cache to a folder and "
        "fill it with `megatron-spo reference CONFIG.yaml`",
    ),
    Rule(
        lambda c, shape: "constraint" in c.spo.spec.keys and c.spo.constraint == "pair" and not c.has_reference,
        "spo.constraint: pair compares each pair with the reference; set reference.cache",
    ),
    Rule(
        lambda c, shape: "constraint" in c.spo.spec.keys and c.spo.constraint == "batch" and not _knows_gap(c),
        "spo.constraint: batch needs the gap g - v; set reference.cache, or spo.v to a number or running_min",
    ),
    Rule(
        lambda c, shape: c.spo.spec.needs_gap and not _knows_gap(c),
        "spo.schedule: {c.spo.schedule} needs the gap g - v; set reference.cache, or spo.v to a number or running_min",
    ),
    Rule(
        lambda c, shape: "lambda_max" in c.spo.spec.keys and c.spo.lambda_ > c.spo.lambda_max,
        "spo.lambda = {c.spo.lambda_} is above spo.lambda_max = {c.spo.lambda_max}",
    ),
    # monitoring
    *(Rule(lambda c, shape, broken=broken: broken(c), message) for broken, message in MONITORING),  # type: ignore[misc]
    # training
    Rule(
        lambda c, shape: c.training.steps is not None and c.training.epochs is not None,
        "training.steps = {c.training.steps} and training.epochs = {c.training.epochs} are both given; set "
        "one of them to null",
    ),
    Rule(
        lambda c, shape: c.training.steps is not None and c.optimizer.warmup_steps > c.training.steps,
        "optimizer.warmup_steps = {c.optimizer.warmup_steps} exceeds training.steps = {c.training.steps}",
    ),
    Rule(
        lambda c, shape: c.training.eval_every > 0 and not c.data.eval,
        "training.eval_every = {c.training.eval_every} without data.eval; name held-out data, or remove it",
    ),
    Rule(
        lambda c, shape: c.checkpoint.best is not None and not c.data.eval,
        "checkpoint.best = {c.checkpoint.best} without data.eval; name held-out data, or remove it",
    ),
    Rule(
        lambda c, shape: bool(_unknown(c.checkpoint.allow_changed)),
        "checkpoint.allow_changed = {c.checkpoint.allow_changed} holds what is neither a key nor a section",
    ),
    Rule(
        lambda c, shape: c.logging.wandb != "off" and not installed("wandb"),
        "logging.wandb: {c.logging.wandb} needs the package wandb; pip install -e '.[wandb]', or set off",
        of_machine=True,
    ),
    Rule(
        lambda c, shape: c.logging.tensorboard and not installed("tensorboard"),
        "logging.tensorboard: true needs the package tensorboard; pip install -e '.[tensorboard]', or set false",
        of_machine=True,
    ),
)
