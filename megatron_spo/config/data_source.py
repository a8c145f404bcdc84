"""A data set as a key of the configuration."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from megatron_spo.config.section import Section


def _sources(value: Any) -> Any:
    """A source may be a path, a mapping, or a list of either."""
    if value is None:
        return []
    entries = value if isinstance(value, list) else [value]
    return [{"path": entry} if isinstance(entry, str) else entry for entry in entries]


class DataSource(Section):
    """One data set."""

    path: str = Field(min_length=1)
    """JSONL or Parquet file, or the id of a data set on the hub"""
    weight: float = Field(1.0, gt=0)
    """how often a row is drawn in an epoch, relative to rows of weight 1; > 0"""
    split: str = "train"
    """split of a hub data set; files have none"""


Sources = Annotated[list[DataSource], BeforeValidator(_sources)]
