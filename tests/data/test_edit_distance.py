"""The bit-parallel distance against the table it stands for."""

import random

from megatron_spo.data.edit_distance import edit_distance


def plain(one: list[int], other: list[int]) -> int:
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        above, row = row, [i]
        for j, b in enumerate(other, 1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (a != b)))
    return row[-1]


def test_against_the_table() -> None:
    rng = random.Random(0)
    for _ in range(300):
        one, other = ([rng.randrange(4) for _ in range(rng.randrange(90))] for _ in range(2))
        assert edit_distance(one, other) == plain(one, other)
    assert edit_distance([], []) == 0
