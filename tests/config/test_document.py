"""The documentation of the keys agrees with the schema."""

from pathlib import Path
from typing import Any

import pytest

from megatron_spo.config.document import help_about, help_text, key_docs, reference_yaml
from megatron_spo.config.load import load_config
from megatron_spo.config.losses import LOSS_SPECS
from megatron_spo.config.schema import LossConfig
from megatron_spo.config.topology import make_topology, stage_layers

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_every_key_has_one_line() -> None:
    for section, text, docs in key_docs():
        assert text or not section
        for doc in docs:
            assert doc.text and "\n" not in doc.text, f"{section}.{doc.name}"
            line = f"{section + '.' if section else ''}{doc.name}  [{doc.default}]"
            assert all(line in (help_about(topic) or "") for topic in (section or doc.name, "all"))
    assert help_about("optimizr") is None


def test_the_short_help_names_every_section() -> None:
    names = [section or docs[0].name for section, _, docs in key_docs()]
    assert [line.split()[0] for line in help_text().splitlines()[1:-2]] == names


def test_reference_yaml_is_up_to_date() -> None:
    assert (EXAMPLES / "reference.yaml").read_text() == reference_yaml(), (
        "run: python -m megatron_spo.config.document > examples/reference.yaml"
    )


CONFIGURATIONS = sorted(path for path in EXAMPLES.rglob("*.yaml") if path.parent.name != "studies")


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_every_example_loads(path: Path) -> None:
    load_config(path)


def test_every_loss_parameter_has_a_key() -> None:
    accepted = {key for spec in LOSS_SPECS.values() for key in spec.parameters}
    assert accepted == set(LossConfig.model_fields) - {"name", "weights"}
    for name, spec in LOSS_SPECS.items():
        assert [term.spec for term in LossConfig(name=name).terms()] == [spec]
        assert LossConfig(name=name).parameters() == dict(spec.parameters)
        LossConfig.model_validate({"name": name, **spec.parameters})  # the defaults are in range


def test_topology() -> None:
    from megatron_spo.config.schema import ParallelConfig

    topology = make_topology(ParallelConfig(tensor=2, pipeline=2), 16)
    assert (topology.data, topology.virtual, topology.world) == (4, 1, 16)


@pytest.mark.parametrize(
    ("layers", "keys", "expected"),
    [
        (80, {"pipeline": 8}, (10,) * 8),
        (80, {"pipeline": 6}, (13, 14, 14, 14, 13, 12)),  # the head of Llama-3-70B has the cost of 1.23 layers
        (32, {"pipeline": 3}, (11, 11, 10)),
        (10, {"pipeline": 2, "virtual_pipeline": 2}, (3, 3, 3, 1)),
        (6, {"pipeline": 2, "layers_per_stage": [5, 1]}, (5, 1)),
    ],
)
def test_layers_of_uneven_stages(layers: int, keys: dict[str, Any], expected: tuple[int, ...]) -> None:
    from megatron_spo.config.schema import ParallelConfig

    counts = stage_layers(layers, ParallelConfig(**keys), head=1.23)
    assert sum(counts) == layers
    assert counts == expected
