"""What runs changed in the current view: the rows that came or became others, and the uris that are no longer in it.

In: the log, a space's newest catalog, label files and the deletions of the runs in question. Out: for each file of the
catalog its upserts and deletions, in key order. They are the same whether the runs are taken one by one or together,
and applying them twice does no harm.

A module of its own because `view` says what holds now, and whoever keeps a copy of it elsewhere needs the difference.
"""

import io
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import catalog, view
from pipeline.log import State
from pipeline.meter import metered
from pipeline.storage import Store
from pipeline.view import View


class Change(NamedTuple):
    """What changed among the keys of one file of the catalog."""

    rows: pa.Table
    """Rows of the view that are newer than the copy, sorted by uri."""
    gone: pa.Array
    """Sorted uris that are not in the view. The copy may have had them; it need not: an image that failed in every
    night is among them."""
    num_current: int
    """Rows of the view: what the copy has of these keys after this change."""


def since(
    output: Store, state: State, current: View, run_seq: int, columns: Sequence[str] | None = None
) -> Iterator[Change]:
    """What changed in `current` after the run at this place in the log; 0: the whole view, and nothing is gone.

    In memory are one change (up to 200,000 rows), what `view.rows_of` needs, and the uris of all objects deleted since.
    Errors as `view.rows_of`.
    """
    deleted = _deleted(output, state, current, run_seq)
    fields = view.fields_of(current, columns)
    num_done = 0
    for ref in metered(current.catalog, "reading files of the catalog", len(current.catalog)):
        table = catalog.read_table(output, ref)
        uris = view.uris_of(current.root, table.column("key"))
        labeled = view.wanted_rows(table)
        is_failed = pc.and_(pc.greater(table.column("run_seq"), run_seq), pc.is_valid(table.column("failure_kind")))
        end = bisect_right(deleted, uris[-1].as_py())
        newer = labeled.filter(pc.greater(labeled["run_seq"], run_seq))
        yield Change(
            rows=view.rows_of(output, current.labels, current.root, newer, fields),
            gone=_gone(uris, uris.filter(is_failed.combine_chunks()) if run_seq else uris[:0], deleted[num_done:end]),
            num_current=len(labeled),
        )
        num_done = end
    if num_done < len(deleted):  # behind the last key that there is
        yield Change(fields.empty_table(), pa.array(deleted[num_done:], pa.string()), 0)


def _gone(uris: pa.Array, failed: pa.Array, deleted: list[str]) -> pa.Array:
    """Uris that failed last, and those deleted that are not there again."""
    absent = pa.array(deleted, pa.string())
    absent = absent.filter(pc.invert(pc.is_in(absent, value_set=uris)))
    found = pa.concat_arrays([failed, absent])
    return found.take(pc.array_sort_indices(found))


def _deleted(output: Store, state: State, current: View, run_seq: int) -> list[str]:
    """Sorted uris of every object that a later run found gone; without any before the first run."""
    later = [run for run in state.runs if run.space_id == current.space_id and run.run_seq > run_seq > 0]
    files = (catalog.read_file(output, ref) for run in later for ref in run.deletions)
    # Python orders strings by code point, which is the order of their UTF-8 bytes.
    return sorted(
        {uri for data in files for uri in pq.read_table(io.BytesIO(data), columns=["uri"])["uri"].to_pylist()}
    )
