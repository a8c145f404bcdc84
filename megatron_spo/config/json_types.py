"""Types of the keys of a model's config.json, as transformers checks them when it loads the model."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_spo.errors import UserError

DTYPES = ("float32", "bfloat16", "float16", "float64", "auto")


def _is_float(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_id_or_null(value: Any) -> bool:
    return value is None or _is_id(value)


def _are_ids(value: Any) -> bool:
    return _is_id_or_null(value) or (isinstance(value, list) and all(_is_id(one) for one in value))


_BOOL: tuple[Callable[[Any], bool], str] = (lambda value: isinstance(value, bool), "true or false")
_FLOAT = (_is_float, "a number with a decimal point or an exponent")
_DTYPE = (lambda value: value is None or value in DTYPES, f"null or one of {', '.join(DTYPES)}")
_RULES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "attention_bias": _BOOL,
    "mlp_bias": _BOOL,
    "tie_word_embeddings": _BOOL,
    "rms_norm_eps": _FLOAT,
    "initializer_range": (lambda value: _is_float(value) and 0 <= value <= 1, f"{_FLOAT[1]}, from 0 to 1"),
    "max_position_embeddings": (_is_id, "an integer"),
    "hidden_act": (lambda value: isinstance(value, str), "the name of an activation"),
    "rope_scaling": (lambda value: value is None or isinstance(value, dict), "null or a JSON object"),
    "dtype": _DTYPE,
    "torch_dtype": _DTYPE,
    "quantization_config": (lambda value: value is None, "absent: quantized models are not supported"),
    "bos_token_id": (_is_id_or_null, "null or an integer"),
    "pad_token_id": (_is_id_or_null, "null or an integer"),
    "eos_token_id": (_are_ids, "null, an integer or a list of integers"),
}


def check_types(path: Path, raw: Mapping[str, Any]) -> None:
    """Check the type of each key of config.json (`raw`, read from `path`) that has a rule here.

    Raises:
        UserError: a key has a value of another type; transformers would not load the model.
    """
    for key, (suits, text) in _RULES.items():
        if key in raw and not suits(raw[key]):
            raise UserError(f"{path}: {key} = {raw[key]!r}; must be {text}")
