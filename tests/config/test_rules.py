"""Combinations that are rejected at load, each with its own message."""

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_spo.config import rules
from megatron_spo.config.schema import Config
from megatron_spo.errors import UserError

Load = Callable[..., Config]
MIXTURE = {"model_type": "mixtral", "intermediate_size": 9, "num_local_experts": 6, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        ("parallel.tensor=3", "parallel.tensor = 3 does not divide the model's 4 attention heads"),
        ("parallel.tensor=4", "parallel.tensor = 4 does not divide the model's 2 key-value heads"),
        ("parallel.pipeline=5", "more stages than the model's 4 layers"),
        ("parallel.pipeline=2 parallel.virtual_pipeline=3", "more stages than the model's 4 layers"),
        ("parallel.pipeline=2 parallel.layers_per_stage=[4]", "must have one number for each"),
        ("parallel.pipeline=2 parallel.layers_per_stage=[2,1]", "must add up to the model's 4 layers"),
        ("parallel.sequence=true", "parallel.sequence: true requires parallel.tensor > 1"),
        ("parallel.expert=2", "parallel.expert = 2 requires a model with experts, but llama has none"),
        ("model.router_aux_loss=0", "model.router_aux_loss = 0.0 requires a model with experts, but llama has none"),
        ("parallel.virtual_pipeline=2", "parallel.virtual_pipeline = 2 requires parallel.pipeline > 1"),
        ("data.max_length=513", "data.max_length = 513 exceeds the model's context of 512 tokens"),
        (
            "loss.gamma_beta_ratio=0.3",
            "loss.gamma_beta_ratio has no effect with loss.name: dpo; it is used by simpo, alpha_dpo",
        ),
        ("loss.name=simpo loss.alpha=0.3", "loss.alpha has no effect with loss.name: simpo"),
        ("loss.name=exo_pair loss.label_smoothing=0", "set loss.label_smoothing > 0"),
        (
            "spo.schedule=none spo.lambda=2",
            "spo.lambda has no effect with spo.schedule: none; it is used by penalty, dual",
        ),
        ("spo.schedule=none spo.lambda=1.0", "spo.lambda has no effect"),
        ("spo.schedule=sft spo.lambda_unit=token", "spo.lambda_unit has no effect with spo.schedule: sft"),
        ("spo.schedule=dual spo.constraint=pair", "spo.constraint has no effect with spo.schedule: dual"),
        ("spo.schedule=dual spo.ramp_steps=5", "spo.ramp_steps has no effect with spo.schedule: dual"),
        ("spo.dual_lr=0.2", "spo.dual_lr has no effect with spo.schedule: penalty; it is used by dual"),
        (
            "spo.sft_steps=2",
            "spo.sft_steps has no effect with spo.schedule: penalty; it is used by alternating",
        ),
        ("spo.preference_steps=2", "it is used by alternating"),
        ("spo.epsilon=0.1", "spo.epsilon has no effect with spo.constraint: none"),
        ("optimizer.min_lr_ratio=0.1", "optimizer.min_lr_ratio has no effect with optimizer.decay: constant"),
        ("loss.name=ipo", "spo.lambda_unit: relative is undefined for loss.name: ipo"),
        ("loss.name=orpo spo.schedule=dual", "set spo.lambda_unit=token"),
        ("monitor.generate_prompts=3", "monitor.generate_prompts has no effect with monitor.generate_every: 0"),
        (
            "loss.name=simpo reference.cache=null monitor.both_down=0.4",
            "monitor.both_down has no effect with reference",
        ),
        (
            "spo.schedule=none monitor.on_alarm=raise_lambda",
            "is not supported with spo.schedule: none and spo.lambda = 1.0",
        ),
        (
            "monitor.generate_every=5 data.eval=null training.eval_every=0",
            "monitor.generate_every = 5 requires data.eval",
        ),
        ("reference.cache=null", "loss.name: dpo requires log-probs of the reference; set reference.cache"),
        (
            "loss.name=simpo reference.cache=null spo.constraint=pair",
            "spo.constraint: pair requires log-probs",
        ),
        ("loss.name=simpo reference.cache=null spo.constraint=batch", "spo.constraint: batch requires the gap"),
        ("loss.name=simpo reference.cache=null spo.schedule=dual", "spo.schedule: dual requires the gap"),
        ("spo.schedule=dual spo.lambda=11", "spo.lambda = 11.0 exceeds spo.lambda_max = 10.0"),
        ("training.steps=5 training.epochs=2", "training.steps = 5 and training.epochs = 2.0 are both set"),
        (
            "training.steps=5 optimizer.warmup_steps=6",
            "optimizer.warmup_steps = 6 exceeds training.steps = 5",
        ),
        ("training.eval_every=5", "training.eval_every = 5 requires data.eval"),
        ("lora.alpha=8", "lora.alpha has no effect without lora.rank > 0"),
        ("lora.rank=0 lora.targets=[q_proj]", "lora.targets has no effect without lora.rank > 0"),
        ("lora.rank=8 lora.targets=[q_proj,qkv_proj]", "lora.targets[1] = 'qkv_proj': must be 'q_proj', 'k_proj'"),
        ("lora.rank=8 lora.targets=[]", "lora.targets = []"),
        (
            "lora.rank=17",
            "lora.rank = 17 exceeds a dimension of k_proj, which has 32 input and 16 output features; set",
        ),
        (
            "lora.rank=33 lora.targets=[up_proj]",
            "lora.rank = 33 exceeds a dimension of up_proj, which has 32 input",
        ),
        ("lora.rank=8 model.init=random", "lora.rank = 8 requires trained weights, but model.init is random"),
    ],
)
def test_refused(load: Load, overrides: str, part: str) -> None:
    with pytest.raises(UserError) as raised:
        load(*overrides.split())
    assert part in str(raised.value)


@pytest.mark.parametrize(
    "overrides",
    [
        "parallel.tensor=2 parallel.sequence=true parallel.pipeline=2",
        "loss.name=ipo spo.lambda_unit=token",
        "loss.name=ipo spo.schedule=none",
        "loss.name=ipo spo.schedule=alternating",
        "loss.gamma_beta_ratio=null",
        "loss.name=simpo reference.cache=null",
        "loss.name=simpo reference.cache=null spo.constraint=batch spo.v=0.7 spo.epsilon=0.1",
        "loss.name=simpo reference.cache=null spo.schedule=dual spo.v=0.7 spo.epsilon=0.1",
        "spo.schedule=sft reference.cache=null",
        "optimizer.decay=cosine optimizer.min_lr_ratio=0.1",
        "training.steps=5 optimizer.warmup_steps=5",
        "data.eval=held_out.jsonl training.eval_every=5",
        "lora.rank=16 reference.cache=null spo.constraint=pair",
        "lora.rank=16 reference.cache=null spo.schedule=dual",
        "lora.rank=32 lora.targets=[q_proj,up_proj] lora.alpha=64",
    ],
)
def test_accepted(load: Load, overrides: str) -> None:
    load(*overrides.split())


def test_world_size(load: Load) -> None:
    with pytest.raises(UserError) as raised:
        load("parallel.tensor=2", "parallel.pipeline=2", world_size=6)
    assert "6 processes" in str(raised.value)
    assert "2 * 2 * 1 = 4" in str(raised.value)
    with pytest.raises(UserError, match="1 process is not a multiple"):
        load("parallel.tensor=2", world_size=1)
    load("parallel.tensor=2", "parallel.pipeline=2", world_size=8)


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        ("parallel.expert=4", "parallel.expert = 4 does not divide the model's 6 experts"),
        ("parallel.tensor=2", "on a model with experts requires parallel.sequence: true"),
        ("parallel.tensor=2 parallel.sequence=true", "does not divide the 9 feed-forward columns of the model's exp"),
    ],
)
def test_refused_with_experts(load: Load, write_model: Callable[..., Path], overrides: str, part: str) -> None:
    write_model(**MIXTURE)
    with pytest.raises(UserError) as raised:
        load(*overrides.split())
    assert part in str(raised.value)


def test_layouts_of_experts(load: Load, write_model: Callable[..., Path]) -> None:
    write_model(**MIXTURE)
    load("parallel.tensor=2", "parallel.sequence=true", "parallel.expert=2", world_size=2)
    load("parallel.expert=3", "parallel.pipeline=2", world_size=6)
    load("model.router_aux_loss=0.1")
    with pytest.raises(UserError) as raised:
        load("parallel.expert=3", "parallel.pipeline=2", world_size=8)
    assert "parallel.expert = 3 does not divide the 4 processes that hold a layer (8 processes" in str(raised.value)


def test_optional_packages(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "installed", lambda module: False)
    for key in ("precision.fp8=tensorwise", "precision.layers=transformer_engine"):
        with pytest.raises(UserError, match="requires an NVIDIA GPU and Transformer Engine, which is not installed"):
            load(key)
    with pytest.raises(UserError, match=r"requires the package wandb; run pip install -e '.\[wandb\]'"):
        load("logging.wandb=online")
    monkeypatch.setattr(rules, "installed", lambda module: True)
    load("logging.wandb=offline")


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        ("precision.layers=transformer_engine precision.dtype=fp32", "products in TF32"),
        ("precision.fp8=tensorwise precision.dtype=fp32", "precision.fp8 = tensorwise requires precision.dtype: bf16"),
        ("precision.fp8=tensorwise precision.layers=torch", "set precision.layers=auto"),
        ("precision.fp8=delayed", "set precision.fp8=tensorwise (or blockwise), or reference.cache=null"),
        (
            "precision.fp8=mxfp8 parallel.tensor=2",
            "blocks of 32 values: the model's 4 heads of 8 with parallel.tensor = 2 are not a multiple",
        ),
        (
            "precision.fp8=blockwise parallel.tensor=2 parallel.sequence=true",
            "gathers blocks of 128 values, which do not divide the model's hidden size of 32",
        ),
    ],
)
def test_fp8_is_refused(load: Load, monkeypatch: pytest.MonkeyPatch, overrides: str, part: str) -> None:
    monkeypatch.setattr(rules, "installed", lambda module: True)
    with pytest.raises(UserError) as raised:
        load(*overrides.split())
    assert part in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    "overrides",
    [
        "precision.fp8=tensorwise",
        "precision.fp8=blockwise parallel.tensor=2",
        "precision.fp8=mxfp8 precision.layers=transformer_engine",
        "precision.fp8=delayed loss.name=simpo reference.cache=null",
        "precision.layers=transformer_engine",
        "precision.dtype=fp32",
    ],
)
def test_fp8_is_accepted(load: Load, monkeypatch: pytest.MonkeyPatch, overrides: str) -> None:
    monkeypatch.setattr(rules, "installed", lambda module: True)
    load(*overrides.split())


@pytest.mark.parametrize("side", ["hidden_size", "intermediate_size", "head_dim"])
def test_every_side_of_the_layers_must_suit_fp8(
    load: Load, write_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, side: str
) -> None:
    monkeypatch.setattr(rules, "installed", lambda module: True)
    write_model(**{"head_dim": 8, side: 36 if side != "head_dim" else 5})
    with pytest.raises(UserError, match="multiplies in blocks of 16 values"):
        load("precision.fp8=tensorwise")


def test_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_run_folder").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert rules.installed("pydantic")
    assert not rules.installed("a_run_folder")
    assert not rules.installed("no_such_package.part")


def test_a_hub_id_is_not_looked_up(load: Load) -> None:
    assert load("model.path=someone/some-model", "parallel.tensor=3").data.max_length == 2048
