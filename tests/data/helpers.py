"""Small data sets and tokenizers for the tests of megatron_spo.data."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from megatron_spo.config.data_source import DataSource
from megatron_spo.config.schema import DataConfig
from megatron_spo.data.dataset import TokenizedSet, build_dataset

QWEN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(
    special: Sequence[str] = (), *, bos: str | None = None, add_eos: bool = False, template: str | None = None
) -> PreTrainedTokenizerFast:
    """Returns a byte-level tokenizer with the merges "ab" and ":x" and the special tokens <pad>, <eos> and `special`.
    The tokenizer adds `bos` before and, with `add_eos`, <eos> after every text."""
    names = ["<pad>", "<eos>", *([bos] if bos else []), *special]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*names, *alphabet, "ab", ":x"])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b"), (":", "x")]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    if bos or add_eos:
        single = ([bos] if bos else []) + ["$A"] + (["<eos>"] if add_eos else [])
        raw.post_processor = processors.TemplateProcessing(
            single=" ".join(single), special_tokens=[(name, vocab[name]) for name in {*single} - {"$A"}]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", bos_token=bos, extra_special_tokens=list(special)
    )
    tokenizer.chat_template = template
    return tokenizer


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer that adds a space before a text, like sentencepiece."""
    letters = [*"▁abcdefgh0123456789:=.\n|", "=1"]
    vocab = {token: i for i, token in enumerate(["<unk>", "<eos>", *letters])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[("=", "1")], unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    raw.decoder = decoders.Metaspace(prepend_scheme="first")
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", unk_token="<unk>")


def lines(path: Path, rows: Sequence[object]) -> Path:
    """Writes JSON lines; strings are written unchanged."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


def pair(prompt: Any = "1+1=", chosen: Any = "2", rejected: Any = "3") -> dict[str, Any]:
    """Returns a preference row."""
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def chat(*turns: str) -> list[dict[str, str]]:
    """Returns messages from "user: text" strings."""
    parts = [turn.split(": ", 1) for turn in turns]
    return [{"role": role, "content": content} for role, content in parts]


def build(
    sources: Path | Sequence[DataSource],
    tokenizer: PreTrainedTokenizerFast | None = None,
    *,
    kind: str = "preference",
    **data: object,
) -> TokenizedSet:
    """Calls build_dataset with the cache next to the file."""
    if isinstance(sources, Path):
        sources = [DataSource(path=str(sources))]
    config = DataConfig.model_validate({"train": [source.path for source in sources], **data})
    cache = Path(sources[0].path).parent / "cache"
    return build_dataset(sources, config, tokenizer or byte_tokenizer(), kind=kind, cache=cache)
