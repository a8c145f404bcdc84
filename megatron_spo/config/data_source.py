"""Configuration of a data set."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from megatron_spo.config.section import Section


def _sources(value: Any) -> Any:
    """Converts a path, a mapping, or a list of these to a list of mappings."""
    if value is None:
        return []
    entries = value if isinstance(value, list) else [value]
    return [{"path": entry} if isinstance(entry, str) else entry for entry in entries]


class DataSource(Section):
    """One data set."""

    path: str = Field(min_length=1)
    """JSONL or Parquet file, folder of save_to_disk, or id of a data set on the Hugging Face hub"""
    weight: float = Field(1.0, gt=0)
    """how often each row is used in an epoch (1: once); > 0"""
    split: str = "train"
    """split of a hub data set or of a folder; ignored for files"""


Sources = Annotated[list[DataSource], BeforeValidator(_sources)]
