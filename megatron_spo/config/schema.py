"""All configuration keys with type, default, range and description.

The docstring under a field is the description that `--help` and `examples/reference.yaml` show. Rules that involve
several keys are in `rules.py`. `load.py` reads files and overrides.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, ValidationInfo, field_validator

from megatron_spo.config.data_source import Sources
from megatron_spo.config.fp8 import RECIPES, Recipe
from megatron_spo.config.losses import LOSS_SPECS, LossTerm
from megatron_spo.config.model_shape import PROJECTIONS
from megatron_spo.config.monitoring import MonitorConfig
from megatron_spo.config.section import Decay, NotNegative, OneOrEach, Positive, Section, as_tuple, form
from megatron_spo.config.spo import SpoConfig

LossName = Literal[tuple(LOSS_SPECS)]  # type: ignore[valid-type]
Projection = Literal[PROJECTIONS]  # type: ignore[valid-type]


class ModelConfig(Section):
    """The model to train."""

    path: str = Field(min_length=1)
    """folder in Hugging Face format (config.json, safetensors, tokenizer) or Megatron format, or a hub id"""
    init: Literal["load", "random"] = "load"
    """load the weights, or initialise them at random from config.json and training.seed"""
    tokenizer: str | None = None
    """folder or hub id of the tokenizer; null: model.path"""
    router_aux_loss: float | None = Field(None, ge=0)
    """weight of the load-balancing loss; a number also trains the routers of the experts; null: frozen routers; >= 0"""


class DataConfig(Section):
    """The data to train and evaluate on."""

    train: Sources = Field(min_length=1)
    """training data: path, hub id, {path, weight, split}, or a list of these"""
    eval: Sources = []
    """held-out data, each data set is evaluated separately; same format as data.train"""
    rows: int | None = Field(None, ge=1)
    """number of rows of data.train to use, drawn by training.seed, smaller sets from larger ones; null: all; >= 1"""
    max_length: int = Field(2048, ge=2)
    """maximum length of prompt + response in tokens; if not given, at most the model's context length; >= 2"""
    truncation: Literal["error", "drop", "left", "right"] = "error"
    """rows that are too long: fail, drop the row, cut the prompt's start (left) or the response's end (right)"""
    bad_rows: Literal["error", "drop"] = "error"
    """rows with a missing or empty field or equal responses: fail, or drop and list them"""
    row_length: int | None = Field(None, ge=16)
    """maximum tokens of a packed row, which holds one or more pairs; null: 2 * data.max_length; >= 16"""
    shuffle: bool = True
    """shuffle the rows of each epoch"""
    num_proc: int = Field(1, ge=1)
    """number of processes for tokenisation; >= 1"""
    chat_template: str | None = None
    """file with a Jinja chat template; null: the tokenizer's chat template"""

    @property
    def longest_row(self) -> int:
        """Maximum tokens of a packed row."""
        return self.row_length or 2 * self.max_length


class ReferenceConfig(Section):
    """Log-probs of the frozen reference model."""

    cache: str | None = None
    """cache folder, filled by `reference` or `train`; null: no cache (with lora: run the model without adapters)"""
    make: bool = True
    """`train` computes a missing cache before step 1; false: a missing cache is an error"""
    model: str | None = None
    """folder or hub id of the reference, with the tokenizer of the model; requires a cache; null: model.path"""


class LossConfig(Section):
    """The preference loss (upper level), or several with weights. null: use the default of the loss."""

    name: Annotated[
        Annotated[LossName, Tag("one")]  # type: ignore[valid-type]
        | Annotated[list[LossName], Field(min_length=1), Tag("each")],  # type: ignore[valid-type]
        Discriminator(form),
    ] = "dpo"
    """preference loss, or a list of losses (f = sum of weight * loss; parameters are one value for all, or a list)"""
    weights: list[Positive] | None = None
    """weights of the losses of a list; null: all 1; each > 0"""
    beta: OneOrEach[Positive] | None = None
    """inverse temperature of the rewards; > 0"""
    gamma_beta_ratio: OneOrEach[NotNegative] | None = None
    """target margin divided by beta, nats per token; >= 0"""
    alpha: OneOrEach[NotNegative] | None = None
    """weight of the normalised reference gap in the margin of alpha_dpo; >= 0"""
    label_smoothing: OneOrEach[Annotated[float, Field(ge=0, lt=0.5)]] | None = None
    """assumed fraction of swapped labels; >= 0, < 0.5"""
    average: OneOrEach[bool] | None = None
    """use the mean instead of the sum of the log-probs of a response"""
    penalty: OneOrEach[NotNegative] | None = None
    """weight of the dpop penalty on chosen log-probs below the reference; >= 0"""
    nll_weight: OneOrEach[NotNegative] | None = None
    """weight of the negative log-likelihood of the chosen response in the loss; >= 0"""
    discopop_tau: OneOrEach[Positive] | None = None
    """temperature of the blend in discopop; > 0"""

    @property
    def names(self) -> list[str]:
        """Names of the losses, as a list even for one loss."""
        return self.name if isinstance(self.name, list) else [self.name]

    @property
    def needing_reference(self) -> str:
        """Comma-separated names of the losses that need log-probs of the reference."""
        return ", ".join(name for name in self.names if LOSS_SPECS[name].needs_reference)

    @property
    def unscaled(self) -> str:
        """Comma-separated names of the losses that have no single scale on the chosen log-prob."""
        return ", ".join(name for name in self.names if LOSS_SPECS[name].statistic is None)

    def terms(self) -> tuple[LossTerm, ...]:
        """Returns the losses with their weights and parameters; parameters that are null have the loss's default."""
        weights = self.weights or [1.0] * len(self.names)
        terms = []
        for i, (name, weight) in enumerate(zip(self.names, weights, strict=True)):
            parameters = dict(LOSS_SPECS[name].parameters)
            for key in parameters:
                value = getattr(self, key)
                value = value[i] if isinstance(value, list) else value
                parameters[key] = parameters[key] if value is None else value
            terms.append(LossTerm(LOSS_SPECS[name], weight, parameters))
        return tuple(terms)

    def parameters(self) -> dict[str, Any]:
        """Returns the resolved parameters that the losses accept: values for one loss, lists for a list of losses."""
        terms = self.terms()
        if not isinstance(self.name, list):
            return dict(terms[0].parameters)
        accepted = dict.fromkeys(key for term in terms for key in term.parameters)
        return {key: [term.parameters.get(key) for term in terms] for key in accepted}

    @field_validator("*")
    @classmethod
    def _one_entry_per_loss(cls, value: Any, info: ValidationInfo) -> Any:
        names = info.data.get("name")
        if info.field_name == "name" or names is None or not isinstance(value, list):
            return value
        if not isinstance(names, list):
            raise ValueError("a list requires a list of losses in loss.name")
        if len(value) != len(names):
            raise ValueError(f"must have one entry for each of the {len(names)} losses in loss.name")
        for name, entry in zip(names, value, strict=True):
            if entry is not None and info.field_name not in {"weights", *LOSS_SPECS[name].parameters}:
                raise ValueError(f"the entry for {name} must be null, because {name} has no such parameter")
        return value


class LoraConfig(Section):
    """Low-rank adapters: the model is frozen; alpha / rank * B A is added to its projections and trained."""

    rank: int = Field(0, ge=0)
    """rank of the adapters; 0: no adapters, train all weights; >= 0"""
    alpha: float = Field(16.0, gt=0)
    """scale of the adapters: their output is multiplied by alpha / rank; > 0"""
    targets: list[Projection] = Field(list(PROJECTIONS), min_length=1)
    """projections that get adapters in every layer"""


class OptimizerConfig(Section):
    """AdamW and its learning rate."""

    lr: float = Field(1e-6, gt=0)
    """peak learning rate; > 0"""
    betas: Annotated[tuple[Decay, Decay], BeforeValidator(as_tuple)] = (0.9, 0.999)
    """decay rates of the first and second moment; each >= 0, < 1"""
    eps: float = Field(1e-8, gt=0)
    """term added to the square root of the second moment; > 0"""
    weight_decay: float = Field(0.0, ge=0)
    """decoupled weight decay, multiplied by lr; >= 0"""
    clip_grad: float = Field(1.0, ge=0)
    """maximum gradient norm; 0: no clipping; >= 0"""
    warmup_steps: int = Field(0, ge=0)
    """optimizer steps of linear warm-up from 0 to lr; >= 0"""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """learning rate schedule after the warm-up"""
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    """final lr of a linear or cosine decay, as a fraction of optimizer.lr; 0 to 1"""


class ParallelConfig(Section):
    """The parallel layout. Data parallelism uses the remaining processes."""

    tensor: int = Field(1, ge=1)
    """tensor-parallel size: processes that share each layer; >= 1"""
    pipeline: int = Field(1, ge=1)
    """pipeline-parallel size: stages into which the layers are split; >= 1"""
    virtual_pipeline: int | None = Field(None, ge=2)
    """chunks of layers per pipeline stage (interleaved schedule, smaller bubble); null: one; requires pipeline > 1"""
    layers_per_stage: list[Annotated[int, Field(ge=1)]] | None = None
    """layers of each stage, in model order; null: even, or fewer on stages with head or embedding; each >= 1"""
    context: int = Field(1, ge=1)
    """context-parallel size: processes that share the tokens of a row, for long pairs; >= 1"""
    expert: int = Field(1, ge=1)
    """expert-parallel size: tensor-, context- and data-parallel processes that split the experts of a layer; >= 1"""
    sequence: bool = False
    """sequence parallelism: split activations along the tokens between tensor-parallel blocks; requires tensor > 1"""
    recompute: Literal["none", "selective", "full"] = "none"
    """activations to recompute in the backward pass to save memory: none, of core attention, or of whole layers"""


class PrecisionConfig(Section):
    """Number formats. Main parameters and reductions are always in fp32."""

    dtype: Literal["fp32", "bf16"] = "bf16"
    """format of weights and activations"""
    layers: Literal["auto", "torch", "transformer_engine"] = "auto"
    """library for the layers; auto: Transformer Engine for bf16 if it is installed and there is a GPU, else torch"""
    fp8: Literal[tuple(RECIPES)] | None = None  # type: ignore[valid-type]
    """fp8 recipe for the matrix products of the layers; requires Transformer Engine, bf16 and a GPU; null: off"""

    @property
    def recipe(self) -> Recipe | None:
        """The fp8 recipe, or None without fp8."""
        return None if self.fp8 is None else RECIPES[self.fp8]

    @property
    def reason(self) -> str:
        """The key that requires Transformer Engine and its value, for messages."""
        return f"precision.layers: {self.layers}" if self.fp8 is None else f"precision.fp8 = {self.fp8}"


class TrainingConfig(Section):
    """Duration, batch size and handling of failures."""

    global_batch_size: int = Field(64, ge=1)
    """pairs per optimizer step over all processes; >= 1"""
    steps: int | None = Field(None, ge=1)
    """number of optimizer steps; null: computed from training.epochs; >= 1"""
    epochs: float | None = Field(None, gt=0)
    """passes over the data; null: 1 unless training.steps is given; > 0"""
    seed: int = Field(0, ge=0, lt=2**31)
    """random seed of the data order and of random weights; >= 0"""
    eval_every: int = Field(0, ge=0)
    """optimizer steps between evaluations of data.eval; 0: only at the end; >= 0"""
    threads: int = Field(0, ge=0)
    """CPU threads per process; 0: OMP_NUM_THREADS, or number of cores / processes on this machine; >= 0"""
    time_limit: float | None = Field(None, gt=0)
    """save a checkpoint and stop before this many minutes since the start; null: no limit; > 0"""
    hang_timeout: float = Field(30.0, gt=0)
    """minutes without progress after which the job stops; 4 times longer to load or save, a day to tokenise; > 0"""
    on_anomaly: Literal["stop", "skip"] = "stop"
    """if a loss or gradient is not finite or a spike: stop, or skip the step (stops after 10 consecutive skips)"""
    spike_factor: float | None = Field(None, gt=1)
    """gradient norm, relative to its running mean, above which a step is a spike, after 20 steps; null: off; > 1"""


BestMetric = Literal[
    "loss", "loss/preference", "loss/sft", "spo/gap", "spo/both_down",
    "rewards/accuracies", "rewards/margins", "rewards/chosen", "logps/chosen", "spo/chosen_shift",
]  # fmt: skip


class CheckpointConfig(Section):
    """When checkpoints are written and which are kept."""

    every: int = Field(0, ge=0)
    """optimizer steps between checkpoints; 0: only at the end; >= 0"""
    keep: int = Field(2, ge=1)
    """number of newest checkpoints to keep; >= 1"""
    best: BestMetric | None = None
    """metric of the first data.eval set; the checkpoint with the best value is kept (losses: lowest); null: none"""
    async_: bool = Field(True, alias="async")
    """write checkpoints in the background; training waits only for the last one"""
    allow_changed: list[str] = []
    """keys or sections that may differ from the checkpoint although they change the training"""


class LoggingConfig(Section):
    """Metrics, progress and reports of a run."""

    every: int = Field(1, ge=1)
    """optimizer steps between lines of metrics.jsonl; >= 1"""
    wandb: Literal["off", "online", "offline"] = "off"
    """also log to Weights & Biases, in the project of the environment variable WANDB_PROJECT (default megatron-spo)"""
    tensorboard: bool = False
    """also write TensorBoard event files to tensorboard/ in the run directory"""
    progress: bool = True
    """log every step that is in metrics.jsonl, and the progress of long tasks once a minute"""
    report: bool = True
    """write report.html at the end of the run (`megatron-spo report` writes it at any time)"""


class Config(Section):
    """One run."""

    output: str = Field(min_length=1)
    """the run directory"""
    model: ModelConfig
    data: DataConfig
    reference: ReferenceConfig = ReferenceConfig()
    loss: LossConfig = LossConfig()
    spo: SpoConfig = SpoConfig()
    lora: LoraConfig = LoraConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    parallel: ParallelConfig = ParallelConfig()
    precision: PrecisionConfig = PrecisionConfig()
    training: TrainingConfig = TrainingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    monitor: MonitorConfig = MonitorConfig()
    logging: LoggingConfig = LoggingConfig()

    @property
    def runs_reference(self) -> bool:
        """Whether the reference is the model without its adapters, because there is no cache."""
        return self.lora.rank > 0 and self.reference.cache is None and self.spo.spec.preference

    @property
    def of_reference(self) -> "Config":
        """The configuration whose model is the reference, with the same tokenizer."""
        if self.reference.model is None:
            return self
        tokenizer = self.model.tokenizer or self.model.path
        model = ModelConfig(path=self.reference.model, tokenizer=tokenizer)
        return self.model_copy(update={"model": model})

    @property
    def has_reference(self) -> bool:
        """Whether log-probs of the reference are available."""
        return self.reference.cache is not None or self.runs_reference


def section_class(name: str) -> type[Section] | None:
    """Returns the class of a section of `Config`, or None for a plain key such as `output`."""
    annotation = Config.model_fields[name].annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def keys_of(section: type[Section]) -> dict[str, str]:
    """Returns a mapping of YAML names to attribute names for the keys of a section."""
    return {field.alias or name: name for name, field in section.model_fields.items()}
