"""The text model of Gemma 3, extracted as docs/convert.md describes."""

import re
from pathlib import Path
from typing import Any

import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from tests.model.test_against_transformers import pairs
from tests.support.megatron import load_model, megatron_sums, row_of, transformers_sums
from tests.support.processes import ROOT
from tests.support.tiny import tiny_tokenizer


def test_text_part_of_a_model_of_text_and_images(tmp_path: Path) -> None:
    torch.manual_seed(0)
    both = {"hidden_size": 32, "intermediate_size": 64}
    text: dict[str, Any] = {
        **both,
        "vocab_size": 300,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    text |= {"head_dim": 8, "sliding_window": 8, "initializer_range": 0.1}
    vision = {**both, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    whole = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))
    whole.eval().save_pretrained(tmp_path / "whole")
    tiny_tokenizer(tmp_path / "whole")
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/convert.md").read_text(), re.DOTALL)
    exec(program, {"SRC": tmp_path / "whole", "DST": tmp_path / "text"})
    ours = megatron_sums(load_model(tmp_path / "text"), row_of(pairs()))
    torch.testing.assert_close(ours, transformers_sums(whole, pairs()), rtol=1e-5, atol=1e-4)
