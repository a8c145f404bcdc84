"""Plans a run for `megatron-spo plan` and formats the results as a table and JSON."""

import json
from pathlib import Path

from megatron_spo.config.load import load_config
from megatron_spo.config.rules import Facts, broken_rules
from megatron_spo.config.schema import Config, ModelConfig
from megatron_spo.errors import UserError
from megatron_spo.files import write_output
from megatron_spo.planner.gpus import find_gpu
from megatron_spo.planner.layouts import PlannedRun, plan_layout, ranked
from megatron_spo.planner.options import Options
from megatron_spo.planner.presets import shape_of
from megatron_spo.planner.rows import Lengths, assumed_lengths, is_at_hand, measured_lengths
from megatron_spo.planner.tables import as_json, as_text

CHAT, PAIRS = (100, 200), 60_000
"""Default median tokens of prompt and response, and number of pairs, without data and options."""


def plan(options: Options) -> str:
    """Plans a run, writes the JSON file if requested, and returns the table.

    Raises:
        UserError: options, configuration, model or data are invalid.
    """
    job, notes = planned_run(options)
    own = plan_layout(job, job.config.parallel)
    fitting, others = ranked(job)
    if options.json is not None:
        text = json.dumps(as_json(job, own, fitting, others, notes=notes, price=options.price), indent=1)
        write_output(options.json, text + "\n")
    return as_text(job, own, fitting[: options.top], others, notes=notes, price=options.price)


def planned_run(options: Options) -> tuple[PlannedRun, list[str]]:
    """Returns what the options describe, and notes on it.

    Raises:
        UserError: options, configuration, model or data are invalid.
    """
    config = load_config(options.config, options.overrides, elsewhere=True)
    shape = shape_of(options.model or config.model.path)
    if broken := broken_rules(Facts(_any_layout(config), frozenset(), shape, None, elsewhere=True)):
        raise UserError("\n".join(f"{options.config}: {message}" for message in broken))
    gpu = find_gpu(options.gpu, options.gpu_changes)
    if config.precision.fp8 is not None and gpu.fp8 is None:
        raise UserError(f"precision.fp8 = {config.precision.fp8} is not supported with --gpu {gpu.name}, whose fp8 "
                        "rate is not known; set precision.fp8=null, or give --fp8")  # fmt: skip
    lengths = _lengths(options, config)
    notes, sft = [lengths.source], None
    if config.spo.sft_data:
        sft = _sft_lengths(options, config)
        notes.append(f"rows of spo.sft_data in each step {sft.source}")
        if config.spo.spec.one_term:
            notes.append("each step is counted with pairs and SFT rows although it trains on only one of them, so "
                         "the seconds are an upper bound")  # fmt: skip
    if shape.experts is not None:
        notes.append("experts are computed one after another in small products, so the seconds are a lower bound")
    if shape.gemma is not None and shape.gemma.attention_softcap is not None:
        notes.append("there is no fused kernel for attention with a soft cap, so the seconds are a lower bound")
    return PlannedRun(config, shape, gpu, options.gpus, lengths, sft), notes


def _any_layout(config: Config) -> Config:
    """Returns the configuration with the default layout. The configured layout is checked with the other layouts."""
    return config.model_copy(update={"parallel": type(config.parallel)()})


def _tokenizer(options: Options, model: ModelConfig) -> str:
    """Returns the folder or hub id of the tokenizer."""
    given = options.model if options.model and Path(options.model).is_dir() else None
    return model.tokenizer or given or model.path


def _sft_lengths(options: Options, config: Config) -> Lengths:
    """Returns the lengths of the separate SFT set: like those of the pairs, without rejected responses."""
    tokenizer = _tokenizer(options, config.model)
    if options.prompt_tokens is None and is_at_hand(config.spo.sft_data, tokenizer):
        return measured_lengths(config.data, config.spo.sft_data, tokenizer, "sft")
    prompt, response = options.prompt_tokens or CHAT[0], options.response_tokens or CHAT[1]
    return assumed_lengths(prompt, response, options.pairs or PAIRS, config.data.max_length).without_rejected()


def _lengths(options: Options, config: Config) -> Lengths:
    given = [options.prompt_tokens, options.response_tokens]
    if any(given) and not all(given):
        raise UserError("--prompt-tokens and --response-tokens must be given together; give both or neither")
    tokenizer = _tokenizer(options, config.model)
    if not any(given) and is_at_hand(config.data.train, tokenizer):
        kind = "preference" if config.spo.spec.preference else "any"
        return measured_lengths(config.data, config.data.train, tokenizer, kind, seed=config.training.seed)
    prompt, response = (options.prompt_tokens, options.response_tokens) if all(given) else CHAT
    longest = config.data.max_length
    assert prompt and response
    if prompt + response > longest:
        raise UserError(f"--prompt-tokens {prompt} and --response-tokens {response} exceed data.max_length = {longest}"
                        "; give smaller values, or set data.max_length")  # fmt: skip
    return assumed_lengths(prompt, response, options.pairs or config.data.rows or PAIRS, longest)
