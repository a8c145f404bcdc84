"""Chooses which of the scored answers to a prompt form pairs: pure functions."""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from megatron_spo.evaluate.scores import split_words
from megatron_spo.on_policy.rules import PairRules

RUN = 3
"""Words of the runs whose overlap is the similarity of two answers."""
NO_PAIR = ("too few answers", "all right", "all wrong", "equal scores", "margin", "length ratio", "similarity")
"""Reasons why a prompt gives no pair."""
NOT_USED = ("unfinished", "empty", "duplicate")
"""Reasons why an answer is not used."""
Couple = tuple[int, int]
"""Sample numbers of a chosen and a rejected answer."""


@dataclass(frozen=True)
class Choice:
    """The pairs of one prompt.

    Attributes:
        pairs: Sample numbers of chosen and rejected.
        reason: Why there is none, one of NO_PAIR; "" if there is one.
        scores: Scores of the answers that were used; identical answers have their mean.
        not_used: The reason, one of NOT_USED, of every answer that was not used, by sample number.
    """

    pairs: list[Couple]
    reason: str
    scores: dict[int, float]
    not_used: dict[int, str] = field(default_factory=dict)


def choose(
    texts: Sequence[str], finished: Sequence[bool], scores: Sequence[float], rules: PairRules, rng: random.Random
) -> Choice:
    """Returns the pairs of one prompt from its answers, whether they ended by themselves, and their scores."""
    not_used = {i: "empty" for i, text in enumerate(texts) if not text.strip()}
    if rules.unfinished == "drop":
        not_used |= {i: "unfinished" for i, ended in enumerate(finished) if not ended and i not in not_used}
    found = _merged(texts, finished, scores, not_used)
    if rules.max_similarity is not None:
        _drop_alike(texts, finished, found, not_used, rules.max_similarity)

    def result(couples: Iterable[Couple], reason: str = "") -> Choice:
        return Choice(list(couples), reason, found, not_used)

    if len(found) + list(not_used.values()).count("duplicate") < 2:
        return result([], "too few answers")
    couples = [(i, j) for i in found for j in found if found[i] > found[j] and finished[i]]
    if rules.decides:
        couples = [(i, j) for i, j in couples if found[i] >= rules.right > found[j]]
    if not couples:
        return result([], _why_none(found, finished, rules))
    for reason, allowed in _limits(texts, found, rules):
        if not (couples := [couple for couple in couples if allowed(*couple)]):
            return result([], reason)
    if rules.choose == "right-wrong":
        return result(rng.sample(couples, min(rules.per_prompt, len(couples))))
    return result(_most_different(couples, found, rules.per_prompt))


def similarity(one: str, other: str) -> float:
    """Returns the share of runs of RUN words that two texts have in common: intersection over union, 0 to 1."""
    mine, theirs = _runs(one), _runs(other)
    return len(mine & theirs) / len(mine | theirs)


def length_ratio(one: str, other: str) -> float:
    """Returns the characters of the longer text per character of the shorter one; neither is empty."""
    short, long = sorted((len(one.strip()), len(other.strip())))
    return long / short


def _runs(text: str) -> set[tuple[str, ...]]:
    words = split_words(text)
    return {tuple(words[i : i + RUN]) for i in range(max(1, len(words) - RUN + 1))}


def _merged(
    texts: Sequence[str], finished: Sequence[bool], scores: Sequence[float], not_used: dict[int, str]
) -> dict[int, float]:
    """Returns the score of each different answer, by its first sample number; the others become duplicates."""
    same: dict[tuple[str, bool], list[int]] = {}
    for i, text in enumerate(texts):
        if i not in not_used:
            same.setdefault((text.strip(), finished[i]), []).append(i)
    for numbers in same.values():
        not_used |= dict.fromkeys(numbers[1:], "duplicate")
    return {numbers[0]: sum(scores[i] for i in numbers) / len(numbers) for numbers in same.values()}


def _drop_alike(
    texts: Sequence[str], finished: Sequence[bool], found: dict[int, float], not_used: dict[int, str], most: float
) -> None:
    for i in list(found):
        before = [j for j in found if j < i and found[j] == found[i] and finished[j] == finished[i]]
        if any(similarity(texts[i], texts[j]) > most for j in before):
            del found[i]
            not_used[i] = "duplicate"


def _why_none(found: dict[int, float], finished: Sequence[bool], rules: PairRules) -> str:
    """Returns the reason if no answer is better than another one and may be chosen."""
    if not rules.decides:
        return "equal scores" if len(set(found.values())) == 1 else "too few answers"
    right = [finished[i] for i, score in found.items() if score >= rules.right]
    if not right:
        return "all wrong"
    return "all right" if len(right) == len(found) else "too few answers"  # the right ones are unfinished


def _limits(
    texts: Sequence[str], scores: dict[int, float], rules: PairRules
) -> list[tuple[str, Callable[[int, int], bool]]]:
    """Returns, by the reason that it gives, each limit that a pair must keep."""
    ratio, alike = rules.max_length_ratio, rules.max_similarity
    limits: list[tuple[str, Callable[[int, int], bool]]] = [
        ("margin", lambda i, j: scores[i] - scores[j] >= rules.margin)
    ]
    if ratio is not None:
        limits.append(("length ratio", lambda i, j: length_ratio(texts[i], texts[j]) <= ratio))
    if alike is not None:
        limits.append(("similarity", lambda i, j: similarity(texts[i], texts[j]) <= alike))
    # also without a limit, as identical texts are no pair
    return [*limits, ("similarity", lambda i, j: texts[i].strip() != texts[j].strip())]


def _most_different(couples: list[Couple], scores: dict[int, float], most: int) -> list[Couple]:
    """Returns the pairs with the largest differences, each answer in one pair; of equal ones the first."""
    taken: list[Couple] = []
    used: set[int] = set()
    for i, j in sorted(couples, key=lambda couple: (scores[couple[1]] - scores[couple[0]], couple)):
        if len(taken) < most and not used & {i, j}:
            taken.append((i, j))
            used |= {i, j}
    return taken
