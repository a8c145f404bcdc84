"""The fp8 recipes that each GPU supports, as in Transformer Engine 2.11."""

import pytest

from megatron_spo.config.fp8 import RECIPES, obstacle

A100, ADA, H100, B200, RTX5090 = (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)


@pytest.mark.parametrize(
    ("capability", "cuda", "able"),
    [
        (A100, "13.0", []),
        (ADA, "13.0", ["delayed", "tensorwise"]),
        (H100, "12.8", ["delayed", "tensorwise"]),
        (H100, "12.9", ["delayed", "tensorwise", "blockwise"]),
        (B200, "13.0", ["delayed", "tensorwise", "blockwise", "mxfp8"]),
        (RTX5090, "13.0", ["delayed", "tensorwise", "blockwise"]),
    ],
)
def test_recipes_by_gpu(capability: tuple[int, int], cuda: str, able: list[str]) -> None:
    assert [recipe for recipe in RECIPES if obstacle(recipe, capability, cuda) is None] == able


def test_the_reason_names_what_is_needed() -> None:
    assert "compute capability 8.9 or above" in str(obstacle("delayed", A100, "13.0"))
    assert "10.0 or above and below 12.0" in str(obstacle("mxfp8", H100, "13.0"))
    assert "CUDA 12.9 or above, but the installed torch is for 12.8" in str(obstacle("blockwise", H100, "12.8"))
