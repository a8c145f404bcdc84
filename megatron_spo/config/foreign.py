# ruff: noqa: E501  (one row of a table per line)
"""Names of other trainers (TRL, Axolotl, NeMo-RL) for the keys and losses here: hints in messages, and a page of docs.

`python -m megatron_spo.config.foreign > docs/coming_from.md` writes the page.
"""

from collections.abc import Mapping
from typing import NamedTuple

from megatron_spo.config.losses import LOSS_SPECS

NAMES = ("TRL", "Axolotl", "NeMo-RL, Megatron")


class Row(NamedTuple):
    """One thing and its names; several names of a trainer are separated by spaces.

    Attributes:
        here: the key here, or several; "" if there is none.
        trl, axolotl, nemo: the names there; "" if there is none.
        note: how the values differ, or why there is no such key here.
    """

    here: str
    trl: str
    axolotl: str
    nemo: str
    note: str = ""

    def others(self) -> list[str]:
        """Returns the names of all trainers."""
        return [name for names in (self.trl, self.axolotl, self.nemo) for name in names.split()]


KEYS = (
    Row("model.path", "model_name_or_path", "base_model", "policy.model_name"),
    Row("model.tokenizer", "", "tokenizer_config", "policy.tokenizer.name", "default: the model's"),
    Row("model.router_aux_loss", "router_aux_loss_coef", "", "", "default: routers are frozen"),
    Row("data.train", "dataset_name", "datasets", "data.train.data_path", "TRL's preference format"),
    Row("data.eval", "", "test_datasets val_set_size", "data.validation.data_path", "a file of its own, never a part of data.train"),
    Row("data.max_length", "max_length", "sequence_len", "policy.max_total_sequence_length", "prompt + response, for each of the two"),
    Row("data.truncation", "truncation_mode", "excess_length_strategy", "", "keep_end is left, keep_start is right; the default is an error"),
    Row("data.row_length", "padding_free pad_to_multiple_of", "sample_packing pad_to_sequence_len", "policy.sequence_packing", "rows are always packed"),
    Row("data.num_proc", "dataset_num_proc", "dataset_processes dataset_num_proc", "data.num_workers"),
    Row("data.chat_template", "chat_template_path", "chat_template chat_template_jinja", "policy.tokenizer.chat_template", "a file; default: the tokenizer's"),
    Row("reference.cache", "precompute_ref_log_probs ref_model", "precompute_ref_log_probs", "", "a folder that `megatron-spo reference` fills, for all runs"),
    Row("loss.name", "loss_type", "rl", "dpo.preference_loss", "see the table of losses"),
    Row("loss.weights", "loss_weights", "", "dpo.preference_loss_weight"),
    Row("loss.beta", "beta", "rl_beta dpo_beta", "dpo.reference_policy_kl_penalty"),
    Row("loss.gamma_beta_ratio", "simpo_gamma", "simpo_gamma", "", "simpo_gamma divided by beta"),
    Row("loss.label_smoothing", "label_smoothing", "dpo_label_smoothing", ""),
    Row("loss.average", "", "dpo_norm_loss", "dpo.preference_average_log_probs", "only ipo; simpo is always a mean"),
    Row("spo.lambda", "rpo_alpha cpo_alpha", "rpo_alpha cpo_alpha", "dpo.sft_loss_weight", "weight of the SFT term; with spo.lambda_unit=token in nats per token of the global batch"),
    Row("lora.rank", "lora_r r", "lora_r peft_r", "policy.dtensor_cfg.lora_cfg.dim", "0 trains all weights"),
    Row("lora.alpha", "lora_alpha", "lora_alpha", "policy.dtensor_cfg.lora_cfg.alpha"),
    Row("lora.targets", "lora_target_modules target_modules", "lora_target_modules lora_target_linear", "policy.dtensor_cfg.lora_cfg.target_modules", "default: all projections"),
    Row("optimizer.lr", "learning_rate", "learning_rate", "policy.optimizer.kwargs.lr"),
    Row("optimizer.betas", "adam_beta1 adam_beta2", "adam_beta1 adam_beta2", "policy.optimizer.kwargs.betas", "both in one list"),
    Row("optimizer.eps", "adam_epsilon", "adam_epsilon", "policy.optimizer.kwargs.eps"),
    Row("optimizer.weight_decay", "weight_decay", "weight_decay", "policy.optimizer.kwargs.weight_decay"),
    Row("optimizer.clip_grad", "max_grad_norm", "max_grad_norm", "policy.max_grad_norm"),
    Row("optimizer.warmup_steps", "warmup_steps warmup_ratio", "warmup_steps warmup_ratio", "policy.megatron_cfg.scheduler.lr_warmup_iters", "in steps, not as a ratio"),
    Row("optimizer.decay", "lr_scheduler_type", "lr_scheduler", "policy.megatron_cfg.scheduler.lr_decay_style", "TRL's default is linear, ours is constant"),
    Row("optimizer.min_lr_ratio", "lr_scheduler_kwargs", "cosine_min_lr_ratio", "policy.megatron_cfg.optimizer.min_lr", "as a fraction of optimizer.lr"),
    Row("parallel.tensor", "", "tensor_parallel_size", "policy.megatron_cfg.tensor_model_parallel_size"),
    Row("parallel.pipeline", "", "", "policy.megatron_cfg.pipeline_model_parallel_size"),
    Row("parallel.virtual_pipeline", "", "", "virtual_pipeline_model_parallel_size", "chunks per stage"),
    Row("parallel.context", "", "context_parallel_size", "policy.megatron_cfg.context_parallel_size"),
    Row("parallel.expert", "", "expert_parallel_size", "policy.megatron_cfg.expert_model_parallel_size"),
    Row("parallel.sequence", "", "", "policy.megatron_cfg.sequence_parallel"),
    Row("parallel.recompute", "gradient_checkpointing", "gradient_checkpointing", "policy.megatron_cfg.activation_checkpointing", "true is full; off by default, on in TRL"),
    Row("precision.dtype", "bf16 fp16 dtype torch_dtype", "bf16 fp16", "policy.precision", "bf16 is the default; fp16 is not supported"),
    Row("precision.fp8", "", "fp8", "policy.megatron_cfg.fp8_cfg"),
    Row("training.global_batch_size", "per_device_train_batch_size gradient_accumulation_steps", "micro_batch_size gradient_accumulation_steps batch_size", "policy.train_global_batch_size policy.train_micro_batch_size", "pairs per step over all GPUs: per-device size x accumulation x data-parallel GPUs. There is no micro-batch size; data.row_length bounds the memory"),
    Row("training.steps", "max_steps", "max_steps", "dpo.max_num_steps"),
    Row("training.epochs", "num_train_epochs", "num_epochs", "dpo.max_num_epochs", "TRL's default is 3, ours is 1"),
    Row("training.seed", "seed data_seed", "seed", "dpo.seed"),
    Row("training.eval_every", "eval_steps eval_strategy evaluation_strategy", "eval_steps evals_per_epoch", "dpo.val_period", "in steps"),
    Row("training.time_limit", "", "", "checkpointing.checkpoint_must_save_by", "minutes"),
    Row("checkpoint.every", "save_steps save_strategy", "save_steps saves_per_epoch", "checkpointing.save_period", "in steps; the end is always saved"),
    Row("checkpoint.keep", "save_total_limit", "save_total_limit", "checkpointing.keep_top_k", "the newest"),
    Row("checkpoint.best", "metric_for_best_model load_best_model_at_end", "metric_for_best_model load_best_model_at_end", "checkpointing.metric_name", "kept next to the newest"),
    Row("monitor.generate_every", "generate_during_eval", "", "logger.num_val_samples_to_print", "in steps"),
    Row("logging.every", "logging_steps", "logging_steps", ""),
    Row("logging.wandb", "report_to", "wandb_mode use_wandb wandb_project", "logger.wandb_enabled", "the project is the environment variable WANDB_PROJECT"),
    Row("logging.tensorboard", "", "use_tensorboard", "logger.tensorboard_enabled"),
    Row("output", "output_dir", "output_dir", "checkpointing.checkpoint_dir logger.log_dir"),
)  # fmt: skip

ABSENT = (
    Row("", "max_prompt_length max_completion_length", "", "", "data.max_length limits prompt + response; what is longer is an error unless data.truncation says what to cut"),
    Row("", "lora_dropout disable_dropout", "lora_dropout", "policy.dtensor_cfg.lora_cfg.dropout", "training has no random operations, so that every layout and restart gives the same result. TRL's DPO also turns dropout off by default"),
    Row("", "modules_to_save lora_modules_to_save", "lora_modules_to_save", "", "embedding and head stay frozen with LoRA; train all weights (lora.rank=0) to train them"),
    Row("", "use_dora use_rslora init_lora_weights", "peft_use_dora peft_use_rslora", "", "plain LoRA only; for rsLoRA set lora.alpha to alpha * sqrt(rank)"),
    Row("", "load_in_4bit load_in_8bit", "load_in_4bit load_in_8bit adapter", "", "no quantised base model; parallel.tensor and parallel.pipeline split a model that is too large"),
    Row("", "optim", "optimizer_type", "policy.optimizer.name", "AdamW with fp32 state, sharded over the data-parallel GPUs; 8-bit and paged optimizers are absent"),
    Row("", "deepspeed fsdp fsdp_config", "deepspeed fsdp fsdp_config fsdp_version", "policy.dtensor_cfg policy.megatron_cfg", "Megatron's parallelism: see the section parallel"),
    Row("", "attn_implementation use_liger_kernel", "flash_attention sdp_attention xformers_attention", "policy.megatron_cfg.apply_rope_fusion", "the fastest kernel is chosen; logits are never stored for all positions"),
    Row("", "save_only_model", "save_only_model", "", "every checkpoint can resume, at 14 bytes per parameter in bf16; set checkpoint.keep=1 and remove checkpoints/ after the export"),
    Row("", "resume_from_checkpoint overwrite_output_dir", "resume_from_checkpoint auto_resume_from_checkpoints", "", "the same command resumes; use another output to start anew"),
    Row("", "push_to_hub hub_model_id", "hub_model_id hub_strategy", "", "after training: megatron-spo convert RUN DST --to hf --push REPO"),
    Row("", "sync_ref_model ref_model_mixup_alpha", "", "", "the reference is fixed: SPO needs its optimum v"),
    Row("", "f_divergence_type ld_alpha use_weighting", "dpo_use_weighting dpo_use_logits_to_keep", "", "not supported"),
    Row("", "neftune_noise_alpha", "neftune_noise_alpha", "", "not supported: noise would make layouts differ"),
    Row("", "trust_remote_code", "trust_remote_code", "", "code of a model repository is never run; docs/convert.md lists the model families"),
    Row("", "remove_unused_columns", "train_on_inputs group_by_length", "", "other columns of a row are ignored; prompts are never trained on; rows are balanced by cost"),
)  # fmt: skip

LOSSES: Mapping[str, str] = {
    "sigmoid": "dpo",
    "cdpo": "dpo with loss.label_smoothing",
    "slic": "hinge",
    "exo": "exo_pair",
    "nca": "nca_pair",
    "bco": "bco_pair",
    "sppo": "sppo_hard",
    "rpo": "dpo with spo.lambda",
    "sft": "set spo.schedule=sft, or spo.lambda for a mix",
    "sigmoid_norm": "not supported; simpo also takes means per token",
    "alphapo": "not supported; alpha_dpo has a similar aim",
    "aot": "not supported",
    "aot_unpaired": "not supported",
    "kto": "not supported, because it is for data without pairs",
}
"""Names of losses elsewhere -> the loss here, or what to do."""


def hint(key: str) -> str | None:
    """Returns what a key of another trainer is called here, or why there is none; None if no trainer has such a key.

    `key` may have a section, of this trainer or of the other one; only then it may be a whole section there.
    """
    last = key.rpartition(".")[2]
    for row in (*KEYS, *ABSENT):
        names = row.others()
        if key in names or last in [name.rpartition(".")[2] for name in names]:
            note = f" ({row.note})" if row.note else ""
            return f"it is {row.here} here{note}" if row.here else f"there is no such key here: {row.note}"
    inside = [row.here.partition(".")[0] for row in KEYS if any(name.startswith(f"{key}.") for name in row.others())]
    return f"its keys are in {', '.join(dict.fromkeys(inside))} here" if inside else None


def loss_hint(name: str) -> str | None:
    """Returns the loss here for the name of a loss elsewhere, or None."""
    name = name.lower().replace("-", "_")
    if name in LOSS_SPECS:
        return f"must be written {name}"
    known = LOSSES.get(name)
    return f"it is {known} here" if known and known.split()[0] in LOSS_SPECS else known


_HEAD = """# Coming from TRL, Axolotl or NeMo-RL

How the keys and losses of other trainers are called here, and which of them are absent. If you write one of these names,
the error message says the same.

```bash
megatron-spo init Qwen/Qwen2.5-0.5B-Instruct pairs.jsonl > my.yaml   # a configuration to start from
megatron-spo train --help optimizer                                  # the keys of a section
```

**Contents:** [A DPO run of TRL](#a-dpo-run-of-trl) · [Keys](#keys) · [Losses](#losses) · [Metrics](#metrics) ·
[What is absent](#what-is-absent)

## A DPO run of TRL

| `DPOConfig`, on 4 GPUs | here |
|---|---|
| `per_device_train_batch_size=4, gradient_accumulation_steps=8` | `training: {global_batch_size: 128}` |
| `learning_rate=5e-7, lr_scheduler_type="cosine", warmup_steps=20` | `optimizer: {lr: 5e-7, decay: cosine, warmup_steps: 20}` |
| `num_train_epochs=1, eval_steps=50, save_steps=100` | `training: {epochs: 1, eval_every: 50}`, `checkpoint: {every: 100}` |
| `beta=0.1, loss_type=["sigmoid"]` | `loss: {name: dpo, beta: 0.1}`, `spo: {schedule: none}` |
| `loss_type=["sigmoid", "sft"]` | `loss: {name: dpo}`, `spo: {lambda_unit: token, lambda: 1.0}` |
| `precompute_ref_log_probs=True` | `reference: {cache: runs/reference}` |

Without `spo: {schedule: none}`, the loss is DPO *plus* the SFT term of SPO, which is what this project is for.

Three steps replace a training script: `megatron-spo reference my.yaml`, `megatron-spo train my.yaml`, and
`megatron-spo convert runs/mine my-model --to hf`. The exported folder loads in transformers, PEFT (`--to peft`) and vLLM.

## Keys

NeMo-RL's names have their section in front. A key without a note has the same meaning and unit.
"""

_METRICS = """## Metrics

| TRL | here | note |
|---|---|---|
| `loss` | `loss` | includes the SFT term; `loss/preference` is the preference loss alone |
| `rewards/chosen`, `rewards/rejected`, `rewards/accuracies`, `rewards/margins` | the same | |
| `logps/chosen`, `logps/rejected` | the same | nats per response |
| `grad_norm`, `learning_rate` | the same | |
| `entropy` | `policy/entropy` | nats per token |
| `aux_loss` | `loss/router_aux` | |
| `logits/chosen`, `logits/rejected`, `mean_token_accuracy` | absent | they need the logits of all positions |
| | `spo/gap`, `spo/chosen_shift`, `spo/rejected_shift`, `spo/both_down` | see [monitoring.md](monitoring.md) |

"""


def page() -> str:
    """Returns the page of the documentation."""
    lines = [_HEAD, *_table("here", KEYS)]
    lines += ["", "## Losses", "", "| elsewhere | here |", "|---|---|"]
    lines += [f"| `{there}` | {_losses_as_code(here)} |" for there, here in LOSSES.items()]
    same = ", ".join(f"`{name}`" for name in LOSS_SPECS)
    lines += ["", f"All losses here ([loss.md](loss.md)): {same}.", "", _METRICS.rstrip()]
    lines += ["", "## What is absent", "", *_table("why", ABSENT)]
    return "\n".join(lines) + "\n"


def _table(first: str, rows: tuple[Row, ...]) -> list[str]:
    last = ["note"] if first == "here" else []
    head = [first, *NAMES, *last] if last else [*NAMES, first]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        names = [_code(names) for names in (row.trl, row.axolotl, row.nemo)]
        cells = [_code(row.here), *names, row.note] if last else [*names, row.note]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _code(names: str) -> str:
    return ", ".join(f"`{name}`" for name in names.split())


def _losses_as_code(text: str) -> str:
    name, _, rest = text.partition(" ")
    return f"`{name}` {rest}".rstrip() if name in LOSS_SPECS else text


if __name__ == "__main__":
    print(page(), end="")
