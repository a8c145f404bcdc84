"""Every key of a configuration: type, default, range and one line of text.

The docstring under a field is what `--help` and `examples/reference.yaml` show. Rules that concern several
keys are in `rules.py`; files and overrides are read by `load.py`.
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
    """What is trained."""

    path: str = Field(min_length=1)
    """folder in Hugging Face format (config.json, safetensors, tokenizer), or a hub id"""
    init: Literal["load", "random"] = "load"
    """load the weights, or draw them at random from config.json and training.seed"""
    tokenizer: str | None = None
    """folder or hub id of the tokenizer; null: model.path"""
    router_aux_loss: float | None = Field(None, ge=0)
    """train the routers of a mixture of experts, with this weight of the load-balancing loss; null: frozen; >= 0"""


class DataConfig(Section):
    """What it is trained on."""

    train: Sources = Field(min_length=1)
    """training data: path, hub id, {path, weight, split}, or a list of these"""
    eval: Sources = []
    """held-out data, each set evaluated by itself; same forms as data.train"""
    max_length: int = Field(2048, ge=2)
    """longest prompt + response, tokens; when not given, the model's own limit if that is smaller; >= 2"""
    truncation: Literal["error", "drop", "left", "right"] = "error"
    """overlong rows: stop, drop the row, cut the prompt's start (left) or the response's end (right)"""
    bad_rows: Literal["error", "drop"] = "error"
    """rows with a missing, empty or equal field: stop, or drop and list them"""
    row_length: int | None = Field(None, ge=16)
    """tokens of a packed row, each holding one or more pairs; null: 2 * data.max_length; >= 16"""
    shuffle: bool = True
    """draw the rows of an epoch in random order"""
    num_proc: int = Field(1, ge=1)
    """processes that tokenise; >= 1"""
    chat_template: str | None = None
    """file with a Jinja chat template; null: the tokenizer's own"""

    @property
    def longest_row(self) -> int:
        """Tokens of a packed row at most."""
        return self.row_length or 2 * self.max_length


class ReferenceConfig(Section):
    """The frozen reference's log-probs."""

    cache: str | None = None
    """folder of the cache that `megatron-spo reference` fills; null: none (lora: the bare model is run)"""


class LossConfig(Section):
    """The preference loss (upper level), or several with weights. A null parameter takes the loss's own default."""

    name: Annotated[
        Annotated[LossName, Tag("one")]  # type: ignore[valid-type]
        | Annotated[list[LossName], Field(min_length=1), Tag("each")],  # type: ignore[valid-type]
        Discriminator(form),
    ] = "dpo"
    """the preference loss, or a list (f = sum of weight * loss; parameters then: one for all, or a list of one each)"""
    weights: list[Positive] | None = None
    """weights of a list of losses; null: all 1; each > 0"""
    beta: OneOrEach[Positive] | None = None
    """inverse temperature of the rewards; > 0"""
    gamma_beta_ratio: OneOrEach[NotNegative] | None = None
    """target margin divided by beta, nats per token; >= 0"""
    alpha: OneOrEach[NotNegative] | None = None
    """weight of the normalised reference gap in alpha_dpo's margin; >= 0"""
    label_smoothing: OneOrEach[Annotated[float, Field(ge=0, lt=0.5)]] | None = None
    """assumed share of swapped labels; >= 0, < 0.5"""
    average: OneOrEach[bool] | None = None
    """mean instead of sum of a response's log-probs"""
    penalty: OneOrEach[NotNegative] | None = None
    """weight of dpop's penalty on a falling chosen log-prob; >= 0"""
    nll_weight: OneOrEach[NotNegative] | None = None
    """weight of the chosen response's negative log-likelihood inside the loss; >= 0"""
    discopop_tau: OneOrEach[Positive] | None = None
    """temperature of discopop's blend; > 0"""

    @property
    def names(self) -> list[str]:
        """The losses, however many."""
        return self.name if isinstance(self.name, list) else [self.name]

    @property
    def needing_reference(self) -> str:
        """The losses, as a text, whose formula needs the reference's log-probs."""
        return ", ".join(name for name in self.names if LOSS_SPECS[name].needs_reference)

    @property
    def unscaled(self) -> str:
        """The losses, as a text, that have no common scale on the chosen log-prob."""
        return ", ".join(name for name in self.names if LOSS_SPECS[name].statistic is None)

    def terms(self) -> tuple[LossTerm, ...]:
        """The losses with their weights, each parameter as given or at the loss's own default."""
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
        """The parameters that the losses accept, resolved: values for one loss, lists for a list of losses."""
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
            raise ValueError("a list needs a list of losses in loss.name")
        if len(value) != len(names):
            raise ValueError(f"must have an entry for each of the {len(names)} losses of loss.name")
        for name, entry in zip(names, value, strict=True):
            if entry is not None and info.field_name not in {"weights", *LOSS_SPECS[name].parameters}:
                raise ValueError(f"the entry of {name}, which has no such parameter, must be null")
        return value


class LoraConfig(Section):
    """Low-rank adapters: the model is frozen, their product alpha / rank * B A beside its projections is trained."""

    rank: int = Field(0, ge=0)
    """rank of the adapters; 0: none, all weights are trained; >= 0"""
    alpha: float = Field(16.0, gt=0)
    """scale of the adapters, of which alpha / rank counts; > 0"""
    targets: list[Projection] = Field(list(PROJECTIONS), min_length=1)
    """projections that get adapters, in every layer"""


class OptimizerConfig(Section):
    """AdamW and its learning rate."""

    lr: float = Field(1e-6, gt=0)
    """peak learning rate; > 0"""
    betas: Annotated[tuple[Decay, Decay], BeforeValidator(as_tuple)] = (0.9, 0.999)
    """decay of the first and the second moment, per step; each >= 0, < 1"""
    eps: float = Field(1e-8, gt=0)
    """added to the root of the second moment; > 0"""
    weight_decay: float = Field(0.0, ge=0)
    """decoupled weight decay, relative to lr; >= 0"""
    clip_grad: float = Field(1.0, ge=0)
    """largest gradient norm; 0: no clipping; >= 0"""
    warmup_steps: int = Field(0, ge=0)
    """optimizer steps over which lr rises from 0; >= 0"""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """shape of lr after the warm-up"""
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    """lr at the end of a linear or cosine decay, as a share of optimizer.lr; 0 to 1"""


class ParallelConfig(Section):
    """The layout; data parallelism takes the processes that are left."""

    tensor: int = Field(1, ge=1)
    """processes that share each layer; >= 1"""
    pipeline: int = Field(1, ge=1)
    """stages into which the layers are cut; >= 1"""
    virtual_pipeline: int | None = Field(None, ge=2)
    """chunks of layers per pipeline stage (interleaved schedule, smaller bubble); null: one; needs pipeline > 1"""
    layers_per_stage: list[Annotated[int, Field(ge=1)]] | None = None
    """layers of each stage in the model's order; null: even, or fewer beside head and embedding; each >= 1"""
    context: int = Field(1, ge=1)
    """processes that share each row's tokens, for long pairs; >= 1"""
    expert: int = Field(1, ge=1)
    """processes that share out the experts of each layer, among tensor-, context- and data-parallel ones; >= 1"""
    sequence: bool = False
    """cut activations along the tokens between tensor-parallel blocks; needs tensor > 1"""
    recompute: Literal["none", "selective", "full"] = "none"
    """activations computed again in the backward pass, to save memory: those of attention's core, or of whole layers"""


class PrecisionConfig(Section):
    """Number formats; main parameters and reductions are fp32 in any case."""

    dtype: Literal["fp32", "bf16"] = "bf16"
    """format of weights and activations"""
    layers: Literal["auto", "torch", "transformer_engine"] = "auto"
    """what computes the layers; auto: Transformer Engine for bf16 where it and an NVIDIA GPU are there, else torch"""
    fp8: Literal[tuple(RECIPES)] | None = None  # type: ignore[valid-type]
    """recipe of the layers' fp8 matrix products by Transformer Engine, needs bf16 and a GPU for it; null: off"""

    @property
    def recipe(self) -> Recipe | None:
        """The facts of the fp8 recipe, None without fp8."""
        return None if self.fp8 is None else RECIPES[self.fp8]

    @property
    def reason(self) -> str:
        """The key that asks for Transformer Engine, as messages name it."""
        return f"precision.layers: {self.layers}" if self.fp8 is None else f"precision.fp8 = {self.fp8}"


class TrainingConfig(Section):
    """How long, and what one step is."""

    global_batch_size: int = Field(64, ge=1)
    """pairs per optimizer step, over all processes; >= 1"""
    steps: int | None = Field(None, ge=1)
    """optimizer steps; null: given by training.epochs; >= 1"""
    epochs: float | None = Field(None, gt=0)
    """passes over the data; null: 1 unless training.steps is given; > 0"""
    seed: int = Field(0, ge=0, lt=2**31)
    """seed of the data order and of random weights; >= 0"""
    eval_every: int = Field(0, ge=0)
    """optimizer steps between evaluations of data.eval; 0: only at the end; >= 0"""
    threads: int = Field(0, ge=0)
    """CPU threads per process; 0: cores divided by the processes of this machine; >= 0"""
    time_limit: float | None = Field(None, gt=0)
    """save and end before so many minutes since the start; null: none; > 0"""
    hang_timeout: float = Field(30.0, gt=0)
    """minutes without progress that end a job; 4 times as many to load or save, a day to tokenise; > 0"""
    on_anomaly: Literal["stop", "skip"] = "stop"
    """a loss or gradient that is not finite, or a spike: end, or skip the step; 10 skips in a row end as well"""
    spike_factor: float | None = Field(None, gt=1)
    """gradient norm, relative to its running mean, that counts as an anomaly after 20 steps; null: none; > 1"""


BestMetric = Literal[
    "loss", "loss/preference", "loss/sft", "spo/gap", "spo/both_down",
    "rewards/accuracies", "rewards/margins", "rewards/chosen", "logps/chosen", "spo/chosen_shift",
]  # fmt: skip


class CheckpointConfig(Section):
    """What is kept of a run."""

    every: int = Field(0, ge=0)
    """optimizer steps between checkpoints; 0: only at the end; >= 0"""
    keep: int = Field(2, ge=1)
    """newest checkpoints kept; >= 1"""
    best: BestMetric | None = None
    """metric of the first data.eval set at whose best a checkpoint is written and kept (losses: lowest); null: none"""
    async_: bool = Field(True, alias="async")
    """write checkpoints while the training goes on; only the one at the end is waited for"""
    allow_changed: list[str] = []
    """keys or sections that may differ from those of the checkpoint, though they alter the training"""


class LoggingConfig(Section):
    """What a run says."""

    every: int = Field(1, ge=1)
    """optimizer steps between lines of metrics.jsonl; >= 1"""
    wandb: Literal["off", "online", "offline"] = "off"
    """also log to Weights & Biases, project megatron-spo or as the environment variable WANDB_PROJECT says"""
    tensorboard: bool = False
    """write TensorBoard's event files as well, into the run directory's tensorboard/"""
    progress: bool = True
    """show a progress bar"""
    report: bool = True
    """write report.html when the run is done (`megatron-spo report` writes it at any time)"""


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
        """Whether the reference is the model run without its adapters, for want of a cache."""
        return self.lora.rank > 0 and self.reference.cache is None and self.spo.spec.preference

    @property
    def has_reference(self) -> bool:
        """Whether the reference's log-probs are known."""
        return self.reference.cache is not None or self.runs_reference


def section_class(name: str) -> type[Section] | None:
    """The class of a section of `Config`; None for a plain key such as `output`."""
    annotation = Config.model_fields[name].annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def keys_of(section: type[Section]) -> dict[str, str]:
    """YAML name -> attribute name of every key of a section."""
    return {field.alias or name: name for name, field in section.model_fields.items()}
