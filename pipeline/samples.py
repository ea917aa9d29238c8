"""A published run -> a few of its rows to look at: images of the frequent labels, the least sure ones, dead letters.

A module of its own because it says how little of a run of any size is read for that: whole files, because that is how
stores read, but few of them and of each a few row groups without the vectors. The same run gives the same rows.
"""

import io
import itertools
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import charts
from pipeline.log import Entry, FileRef
from pipeline.storage import Store

MAX_FILES = 4
"""Read of each kind, spread over all of them."""
MAX_FILES_BYTES = 192 * 2**20
MAX_ROW_GROUPS = 2
"""Read of each file, of up to 16,384 rows."""
NUM_LABELS = 8
NUM_PER_LABEL = 6
NUM_LEAST_CONFIDENT = 12
NUM_PER_KIND = 5
NUM_FAILURES = 40
_LABEL_COLUMNS = ("image_id", "uri", "etag", "size_bytes", "label_names", "label_scores")
_FAILURE_COLUMNS = (
    *("image_id", "uri", "etag", "size_bytes"),
    *("failure_kind", "failure_stage", "failure_message", "is_transient"),
)

Row = Mapping[str, Any]


class Samples(NamedTuple):
    """Rows of schema.labels (without vectors) and schema.FAILURES."""

    num_seen: int = 0
    """Labeled images among which these were chosen."""
    by_label: Mapping[str, Sequence[Row]] = {}
    """Of each of the most frequent first labels, most frequent first: images in the order of a hash of their uri."""
    least_confident: Sequence[Row] = ()
    """By the score of the first label, ascending."""
    failures: Sequence[Row] = ()
    """Some of each kind, kinds by name."""

    @property
    def labeled(self) -> list[Row]:
        """All rows of labeled images, in order."""
        return [*itertools.chain.from_iterable(self.by_label.values()), *self.least_confident]


def read(output: Store, entry: Entry, label_counts: Mapping[str, int], *, max_s: float = math.inf) -> Samples:
    """Choose from the published files of a run; `label_counts` are those of all its images, or empty if not known.

    Reads no further file after `max_s`. Raises SourceError, and pyarrow's errors for a file that is damaged.
    """
    until_s = time.monotonic() + max_s
    rows = _some_rows(output, entry.labels, _LABEL_COLUMNS, until_s)
    failures = _some_rows(output, entry.dead_letters, _FAILURE_COLUMNS, until_s)
    if rows is None:
        return Samples(failures=_of_each_kind(failures))
    rows = rows.append_column("label", pc.list_element(rows.column("label_names"), 0))
    rows = rows.append_column("confidence", pc.list_element(rows.column("label_scores"), 0)).sort_by("image_id")
    seen = {each["values"]: each["counts"] for each in rows["label"].value_counts().to_pylist()}
    counts = label_counts or seen
    of_label = {
        label: rows.filter(pc.equal(rows["label"], label)).slice(0, NUM_PER_LABEL).to_pylist()
        for label, _ in charts.by_number(counts)[:NUM_LABELS]
    }
    return Samples(
        num_seen=len(rows),
        by_label={label: found for label, found in of_label.items() if found},
        least_confident=rows.sort_by([("confidence", "ascending"), ("uri", "ascending")])
        .slice(0, NUM_LEAST_CONFIDENT)
        .to_pylist(),
        failures=_of_each_kind(failures),
    )


def _some_rows(output: Store, refs: Sequence[FileRef], columns: Sequence[str], until_s: float) -> pa.Table | None:
    """Columns of some row groups of some files, in order; None if there are none or no time is left."""
    tables: list[pa.Table] = []
    num_bytes = 0
    for ref in _spread(refs, MAX_FILES):
        left_s = until_s - time.monotonic()
        num_bytes += ref.size_bytes
        if left_s <= 0 or (tables and num_bytes > MAX_FILES_BYTES):
            break
        with pq.ParquetFile(io.BytesIO(output.get(ref.key, deadline_s=min(left_s, 30.0)))) as file:
            groups = _spread(range(file.num_row_groups), MAX_ROW_GROUPS)
            tables.append(file.read_row_groups(groups, columns=list(columns)))
    found = pa.concat_tables(tables) if tables else None
    return found if found is not None and len(found) else None


def _spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of `items`, from the first to the last at equal distances."""
    if len(items) <= most:
        return list(items)
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]


def _of_each_kind(failures: pa.Table | None) -> list[Row]:
    """Some rows of each kind: all of them where there is room, else as many of each as of the others."""
    if failures is None:
        return []
    rows = failures.sort_by("image_id")
    kinds = sorted(rows["failure_kind"].unique().to_pylist())
    of_kind = [rows.filter(pc.equal(rows["failure_kind"], kind)).slice(0, NUM_PER_KIND).to_pylist() for kind in kinds]
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*of_kind))
    chosen = list(itertools.islice((row for row in in_turn if row is not None), NUM_FAILURES))
    return sorted(chosen, key=lambda row: (row["failure_kind"], row["uri"]))
