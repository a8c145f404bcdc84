"""Options of `megatron-spo pairs`: how answers are scored, and which of them form pairs."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

from pydantic import Field, ValidationError

from megatron_spo.config.section import Section, message_of
from megatron_spo.errors import UserError

SCORERS = ("exact_match", "model", "column", "function")
SCORER_HELP = """exact_match: 1 if the final answer is the row's `answer`, else 0; model=FOLDER: a reward model, a
Hugging Face sequence classifier with one output; column=KEY: scores in the file, a list with one number per response;
function=MODULE:NAME: a Python function with the signature of TRL's reward functions"""


class PairRules(Section):
    """Which answers form pairs. The docstrings are the help texts of the command."""

    scorer: str
    """exact_match, model=FOLDER, column=KEY or function=MODULE:NAME"""
    choose: Literal["best-worst", "right-wrong"] = "best-worst"
    """best-worst: the pairs with the largest differences, each answer in one pair; right-wrong: random pairs of a right
    and a wrong answer"""
    right: float = 1.0
    """lowest score of a right answer, for right-wrong and exact_match"""
    margin: float = Field(0.0, ge=0)
    """minimum difference of the two scores; pairs with equal scores are never made; >= 0"""
    per_prompt: int = Field(1, ge=1)
    """maximum number of pairs per prompt; >= 1"""
    max_length_ratio: float | None = Field(None, ge=1)
    """maximum length of the longer answer of a pair divided by that of the shorter one, in characters; >= 1"""
    max_similarity: float | None = Field(None, gt=0, le=1)
    """maximum similarity of the two answers of a pair; of answers with equal scores that are more similar, only the
    first is used. The similarity is the share of runs of 3 words that both have; > 0, at most 1"""
    unfinished: Literal["drop", "reject"] = "drop"
    """answers that reached the length limit are never chosen; drop: nor rejected; reject: they may be rejected"""
    seed: int = Field(0, ge=0)
    """random seed of right-wrong; >= 0"""
    batch_size: int = Field(16, ge=1)
    """answers per batch of a reward model; >= 1"""
    timeout: float = Field(60.0, gt=0)
    """seconds that a function may take per prompt; > 0"""

    @property
    def scoring(self) -> tuple[str, str]:
        """Kind of the scorer, and its folder, key or function ("" for exact_match)."""
        kind, _, of = self.scorer.partition("=")
        return kind, of

    @property
    def decides(self) -> bool:
        """Whether a score says whether an answer is right."""
        return self.choose == "right-wrong" or self.scorer == "exact_match"


def read_rules(given: Mapping[str, Any], name: Callable[[str], str]) -> PairRules:
    """Returns checked rules.

    Args:
        given: values by field.
        name: gives the name of a field in messages, such as "pairs: --max-similarity".

    Raises:
        UserError: a value is invalid; the message has one line per error.
    """
    try:
        rules = PairRules.model_validate(dict(given))
    except ValidationError as error:
        raise UserError("\n".join(_problem(one, name) for one in error.errors())) from None
    kind, of = rules.scoring
    if kind not in SCORERS or (kind == "exact_match") == bool(of) or rules.scorer == "exact_match=":
        raise UserError(f"{name('scorer')} is {rules.scorer!r}; must be exact_match, model=FOLDER, column=KEY "
                        "or function=MODULE:NAME")  # fmt: skip
    module, colon, function = of.partition(":")
    if kind == "function" and not (module and colon and function):
        raise UserError(f"{name('scorer')} is {rules.scorer!r}; a function is given as function=MODULE:NAME")
    if "right" in given and not rules.decides:
        raise UserError(f"{name('right')} has no effect with best-worst of graded scores; remove it, or choose "
                        "right-wrong")  # fmt: skip
    return rules


def _problem(details: Any, name: Callable[[str], str]) -> str:
    field = str(details["loc"][0])
    if details["type"] == "missing":
        return f"{name(field)} is missing"
    if details["type"] == "extra_forbidden":
        return f"{name(field)} is unknown; known: {', '.join(PairRules.model_fields)}"
    about = " ".join((PairRules.model_fields[field].description or "").split())
    return f"{name(field)} is {details['input']!r}: {message_of(details)} ({about})"
