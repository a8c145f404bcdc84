"""Which cells of a grid the default tests have."""

import itertools

from tests.parallel import test_experts, test_gemma, test_layouts
from tests.support.grids import layout_settings, pairwise


def test_every_two_settings_meet() -> None:
    for cells in (test_layouts.CELLS, test_gemma.CELLS, test_experts.CELLS):
        kept = pairwise(cells)
        assert len(kept) < len(cells)
        for one, other in itertools.combinations(sorted(set().union(*cells.values())), 2):
            together = [cell for cell, settings in cells.items() if {one, other} <= set(settings)]
            assert not together or kept & set(together), (one, other)


def test_data_parallelism_is_a_setting() -> None:
    assert layout_settings(4, ["parallel.pipeline=2"]) == ["parallel.pipeline=2", "data parallel=2"]
    assert layout_settings(2, ["parallel.context=2"]) == ["parallel.context=2"]
