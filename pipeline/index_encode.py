"""One file of a view's catalog -> its rows as files of the index, their vectors as the index holds them, and which of
them are nearest to the sampled rows.

In: the current view, an index without vectors. Out: an `Encoded` per slice of up to 65,536 rows, in order.

A module of its own because this is what a build does with every row, here or, through `index_cluster`, on many nodes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from pipeline import catalog, index_files, index_recall, storage, view
from pipeline.errors import ConflictError
from pipeline.index import as_vectors
from pipeline.index_log import FROM_LABELS, ROWS, RowsFile
from pipeline.index_recall import Truth
from pipeline.index_vectors import Codes, Floats, Found, Ordinals, Vectors
from pipeline.meter import metered
from pipeline.storage import Store
from pipeline.verify_files import is_no_unit_vector
from pipeline.view import View

SLICE_ROWS = 1 << 16
"""Rows in memory at a time: 100 MB of vectors of 384, about one file of labels."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What there is to know about every file."""

    nights_url: str
    index_url: str
    folder: str
    """Of the version that is being built, with a slash at the end."""
    current: View
    truth: Truth
    """The samples, of whose neighbours nothing is known."""


def first_ordinal(current: View, number: int) -> int:
    """Of a file of the catalog: no two files share an ordinal, and they ascend with the uris."""
    return sum(ref.num_rows for ref in current.catalog[:number])


class Encoded(NamedTuple):
    """What became of some neighbouring rows."""

    rows: RowsFile
    codes: Codes
    ordinals: Ordinals
    nearest: Found


EncodeFiles = Callable[[Job, Vectors], Iterator[Encoded]]


def in_this_process(job: Job, vectors: Vectors) -> Iterator[Encoded]:
    """Every file of the catalog, one after the other. Errors as `encode_file`."""
    for number in metered(range(len(job.current.catalog)), "encoding files of the catalog", len(job.current.catalog)):
        yield from encode_file(job, vectors, number)


def encode_file(job: Job, vectors: Vectors, number: int) -> Iterator[Encoded]:
    """One file of the catalog. Errors as `view.rows_of` and `check_vectors`; SourceError for storage."""
    nights, store = storage.connect(job.nights_url), storage.connect(job.index_url)
    current, first = job.current, first_ordinal(job.current, number)
    wanted = view.wanted_rows(catalog.read_table(nights, current.catalog[number]))
    fields = view.fields_of(current, [*FROM_LABELS, "embedding"])
    for piece, start in enumerate(range(0, len(wanted), SLICE_ROWS)):
        part = wanted.slice(start, SLICE_ROWS)
        table = view.rows_of(nights, current.labels, current.root, part, fields)
        vectors_ND = check_vectors(nights, current, table)
        ordinals_N = np.arange(first + start, first + start + len(table))
        yield Encoded(
            rows=write_rows(store, f"{job.folder}rows-{number:05d}-{piece:02d}.parquet", table, ordinals_N),
            codes=vectors.encode(vectors_ND),
            ordinals=ordinals_N,
            nearest=index_recall.nearest_others(job.truth, vectors_ND, ordinals_N),
        )


def check_vectors(nights: Store, current: View, table: pa.Table) -> Floats:
    """The vectors of rows (uri, run_seq, embedding) of a view; ConflictError, naming the file of the first that is not
    finite and of length 1: such would be ranked wrongly.
    """
    is_bad = is_no_unit_vector(table["embedding"].combine_chunks())
    if is_bad.any():
        uri, run_seq = (table[name][int(is_bad.argmax())].as_py() for name in ("uri", "run_seq"))
        file = view.file_of(nights, current.labels, current.root, uri, run_seq)
        raise ConflictError(
            f"{nights.root}/{file.key}: expected finite embeddings of length 1, found another of {uri}, the first of"
            f" {is_bad.sum():,} among {len(table):,} neighbouring rows; verify the output; no index was announced"
        )
    return as_vectors(table)


def write_rows(store: Store, key: str, table: pa.Table, ordinals_N: Ordinals) -> RowsFile:
    """Write rows (FROM_LABELS among their columns, sorted by uri, at least one) under these ascending ordinals."""
    rows = table.select(FROM_LABELS).add_column(0, ROWS.field("ordinal"), pa.array(ordinals_N))
    return write_rows_table(store, key, rows.cast(ROWS))


def write_rows_table(store: Store, key: str, rows: pa.Table) -> RowsFile:
    """Write a table of ROWS, sorted by ordinal, at least one."""
    uris = rows["uri"].combine_chunks().sort()
    ref = index_files.write_table(store, key, rows)
    return RowsFile(
        **ref.model_dump(),
        num_rows=len(rows),
        first_ordinal=rows["ordinal"][0].as_py(),
        last_ordinal=rows["ordinal"][-1].as_py(),
        first_uri=uris[0].as_py(),
        last_uri=uris[-1].as_py(),
    )
