"""What the reference says of each pair before any training: which ones are likely to push the chosen answer down."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from megatron_spo.data.dataset import TokenizedSet
from megatron_spo.data.edit_distance import edit_distance
from megatron_spo.errors import UserError
from megatron_spo.reference.cache import DIAGNOSTICS, ReferenceStore

FILE = "pairs.parquet"
"""Beside the records of a data set's cache."""
SHOWN = 10


def write_diagnostics(store: ReferenceStore, dataset: TokenizedSet) -> Path:
    """Write one row a pair: its line in the source, the reference's margin log p(chosen) - log p(rejected) (nats), how
    many tokens the chosen answer has more, the edit distance as a share of the longer answer, and the CHES scores."""
    records = store.records
    table = pa.table(
        {
            "row": [dataset.line(i) for i in range(len(dataset))],
            "source": [dataset.describe(i) for i in range(len(dataset))],
            "reference_margin": records["chosen"] - records["rejected"],
            "length_difference": dataset.chosen_tokens - dataset.rejected_tokens,
            "edit_distance": [_distance(dataset, i) for i in range(len(dataset))],
            **{name: records[name] for name in DIAGNOSTICS},
        }
    )
    path = store.folder / FILE
    new = path.with_name(f".{FILE}.new")
    pq.write_table(table, new)
    new.replace(path)
    return path


def likeliest(store: ReferenceStore, dataset: TokenizedSet) -> str:
    """The pairs of the highest CHES score per token, for the screen."""
    scores = store.records["ches_per_token"]
    lines = [
        f"  {dataset.describe(int(i))}: CHES per token {scores[i]:.4g}, edit distance {_distance(dataset, int(i)):.2f}"
        for i in _highest_first(scores)[:SHOWN]
    ]
    return "\n".join(["pairs most likely to push their chosen answer down:", *lines])


def drop_highest(dataset: TokenizedSet, store: ReferenceStore, share: float) -> tuple[TokenizedSet, ReferenceStore]:
    """The data set and its cache without the share of pairs that have the highest CHES score per token.

    Raises:
        UserError: it has no pairs, or nothing would be left of a source.
    """
    if not dataset.has_rejected:
        raise UserError("data.drop_ches: data.train holds SFT rows, which have no CHES score; set it to 0")
    scores = store.records["ches_per_token"]
    order = _highest_first(scores)
    dropped, kept = np.split(order, [int(share * len(order))])
    reasons = {
        int(i): f"has the CHES score {scores[i]:.4g} per token, among the highest {share:.0%} (data.drop_ches)"
        for i in np.sort(dropped)
    }
    rest = dataset.without(reasons)
    if any(left == 0 < before for left, before in zip(rest.source_sizes, dataset.source_sizes, strict=True)):
        raise UserError(f"data.drop_ches = {share} leaves no pair of one source of data.train; lower it")
    return rest, ReferenceStore(store.records[np.sort(kept)], rest, store.folder)


def _distance(dataset: TokenizedSet, index: int) -> float:
    """Edit distance of a pair's answers as a share of the longer one."""
    pair = dataset.get(index)
    chosen, rejected = pair.chosen_ids[pair.shared :].tolist(), pair.rejected_ids[pair.shared :].tolist()
    longer = max(len(pair.chosen_ids), len(pair.rejected_ids)) - pair.prompt_length
    return edit_distance(chosen, rejected) / longer


def _highest_first(scores: NDArray[np.float32]) -> NDArray[np.int64]:
    return np.argsort(-scores, kind="stable")
