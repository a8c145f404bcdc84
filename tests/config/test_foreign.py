"""The names of other trainers: every key they lead to exists, and the page and the messages come from one table."""

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_spo.config import foreign
from megatron_spo.config.losses import LOSS_SPECS
from megatron_spo.config.schema import Config, keys_of, section_class
from megatron_spo.errors import UserError

ROOT = Path(__file__).parents[2]
OLDER = {"rpo_alpha", "warmup_ratio", "evaluation_strategy", "torch_dtype", "overwrite_output_dir", "max_prompt_length"}
"""Names that current versions no longer have, but scripts do."""
ARGUMENTS = {"r", "target_modules", "modules_to_save", "init_lora_weights", "ref_model"}
"""Arguments of PEFT's LoraConfig and of the trainer."""


def test_the_page_is_up_to_date() -> None:
    assert (ROOT / "docs/coming_from.md").read_text() == foreign.page(), (
        "run: python -m megatron_spo.config.foreign > docs/coming_from.md"
    )


def test_every_key_here_exists_and_is_named_once() -> None:
    keys = {f"{name}.{key}" for name in Config.model_fields if (cls := section_class(name)) for key in keys_of(cls)}
    named = [row.here for row in foreign.KEYS]
    assert set(named) <= keys | {"output"} and len(set(named)) == len(named)
    assert not any(row.here for row in foreign.ABSENT) and all(row.note for row in foreign.ABSENT)
    assert not set(foreign.LOSSES) & set(LOSS_SPECS)


def test_the_names_of_trl_are_those_of_the_installed_version() -> None:
    """Found as fields in the sources, since importing them takes seconds."""
    found: set[str] = set()
    trl = [
        f"{name}_config.py"
        for name in ("trainer/dpo", "trainer/model", "trainer/base", "trainer/sft", "experimental/cpo/cpo")
    ]
    trl.append("scripts/utils.py")
    for package, files in (("trl", trl), ("transformers", ["training_args.py"])):
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            pytest.skip(f"{package} is not installed")
        for file in files:
            found |= set(re.findall(r"^    (\w+):", (Path(spec.origin).parent / file).read_text(), re.MULTILINE))
    names = {name for row in (*foreign.KEYS, *foreign.ABSENT) for name in row.trl.split()}
    assert names - found == OLDER | ARGUMENTS


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("optimizer.learning_rate=1e-6", "'optimizer.learning_rate'; it is optimizer.lr here"),
        ("learning_rate=1e-6", "it is optimizer.lr here"),
        ("lora.r=8", "it is lora.rank here (0 trains all weights)"),
        ("lora.dropout=0.1", "there is no such key here: training has no random operations"),
        ("gradient_accumulation_steps=8", "it is training.global_batch_size here (pairs per step"),
        ("training.per_device_train_batch_size=8", "it is training.global_batch_size here"),
        ("data.max_prompt_length=8", "there is no such key here: data.max_length limits"),
        ("dpo.max_num_steps=8", "unknown section 'dpo'; it is training.steps here"),
        ("policy={}", "unknown key 'policy'; its keys are in model, data, lora, optimizer"),
        ("optim=adamw_8bit", "8-bit and paged optimizers are absent"),
        ("loss.name=sigmoid", "loss.name = 'sigmoid': it is dpo here"),
        ("loss.name=DPO", "loss.name = 'DPO': must be written dpo"),
        ("loss.name=[dpo, kto]", "loss.name[1] = 'kto': not supported, because it is for data without pairs"),
        ("loss.name=sft", "set spo.schedule=sft"),
        ("loss.lr=1", "did you mean 'optimizer.lr'?"),
        ("beta=1", "did you mean 'loss.beta'?"),
    ],
)
def test_messages_name_our_key(load: Callable[..., Config], override: str, part: str) -> None:
    with pytest.raises(UserError) as raised:
        load(override)
    assert part in str(raised.value)
