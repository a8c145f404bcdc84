"""How far apart two token sequences are."""

from collections.abc import Sequence


def edit_distance(one: Sequence[int], other: Sequence[int]) -> int:
    """Least number of insertions, deletions and replacements that make one of the other (Levenshtein).

    A column of the dynamic programme is two integers with a bit per token of `one`: where the value rises by 1 from the
    token above, and where it falls (Myers 1999, in the form of Hyyro 2003), so that the work is len(other) steps.
    """
    if not one:
        return len(other)
    places: dict[int, int] = {}
    for i, token in enumerate(one):
        places[token] = places.get(token, 0) | 1 << i
    every, last = (1 << len(one)) - 1, 1 << (len(one) - 1)
    rises, falls, distance = every, 0, len(one)
    for token in other:
        equal = places.get(token, 0)
        diagonal = (((equal & rises) + rises) ^ rises) | equal | falls
        across_up, across_down = falls | (every & ~(diagonal | rises)), rises & diagonal
        distance += bool(across_up & last) - bool(across_down & last)
        across_up, across_down = (across_up << 1 | 1) & every, across_down << 1 & every
        rises, falls = across_down | (every & ~(diagonal | across_up)), across_up & diagonal
    return distance
