"""The catalog of a space, the last outcome of every key: how it is read, cut into key ranges, and renewed.

    _catalog/space=…/<run_id>.json                    the catalog after that run: its files, in key order
    _catalog/space=…/<run_id>-<range>-<n>.parquet     schema.CATALOG, sorted by key

A module of its own because planning reads what publishing wrote the night before: both must agree on order, borders
and damage. A file's bounds stand beside its name, so that a night opens only what lies in the range it works on.
"""

import dataclasses
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import schema, storage
from pipeline.errors import ConflictError
from pipeline.log import Entry, FileRef
from pipeline.storage import Store

MAX_FILE_ROWS = 200_000
"""Rows of one file, and of the catalog rows one range compares with: 30 to 60 MB as Arrow, 200 LIST pages."""
MAX_FILE_KEY_BYTES = 40 * 2**20
"""One conditional PUT also where all keys have 1024 bytes."""

CatalogRow = Mapping[str, Any]
"""A row of schema.CATALOG."""


@dataclass(frozen=True, kw_only=True)
class KeyRange:
    """Keys greater than `after` and not greater than `through`, and the catalog's files between these two."""

    range_id: str
    after: str
    """Empty: from the first key."""
    through: str | None
    """None: to the last key."""
    files: tuple[FileRef, ...]

    @property
    def num_rows(self) -> int:
        """Rows of the catalog in this range."""
        return sum(file.num_rows for file in self.files)


def files_of(output: Store, entry: Entry | None) -> list[FileRef]:
    """The files of the catalog that `entry` names, in key order; none for no entry. Damage is ConflictError."""
    if entry is None or entry.catalog is None:
        return []
    return read_manifest(output, entry.catalog)


def read_manifest(output: Store, ref: FileRef) -> list[FileRef]:
    """The files that `write_manifest` was given. Damage is ConflictError."""
    return [FileRef(**each) for each in json.loads(read_file(output, ref))["files"]]


def write_manifest(output: Store, space_id: str, run_id: str, files: Sequence[FileRef]) -> FileRef:
    """Write the list of a catalog's files (or a snapshot's), once, and give what a log entry names."""
    key = f"_catalog/space={space_id}/{run_id}.json"
    listed = {"schema_version": schema.SCHEMA_VERSION, "files": [asdict(file) for file in files]}
    data = output.put_if_absent(key, json.dumps(listed, ensure_ascii=False).encode())
    if json.loads(data) != listed:
        raise ConflictError(f"{output.root}/{key}: exists and lists other files than those of run {run_id}")
    num_rows = sum(file.num_rows for file in files)
    return FileRef(key=key, num_rows=num_rows, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def read_file(output: Store, ref: FileRef) -> bytes:
    """The bytes of a file that the log or a manifest names. ConflictError unless they are those that were written."""
    data = storage.get_or_none(output, ref.key)
    found = "nothing" if data is None else f"SHA-256 {hashlib.sha256(data).hexdigest()}"
    if data is None or found != f"SHA-256 {ref.sha256}":
        raise ConflictError(
            f"{output.root}/{ref.key}: expected the file of the log, SHA-256 {ref.sha256}, found {found}; restore it"
        )
    return data


def read_rows(output: Store, files: Iterable[FileRef]) -> Iterator[CatalogRow]:
    """Rows of these files, in order; the bytes of one file and a batch of rows are in memory."""
    for ref in files:
        for batch in _open(output, ref).iter_batches(batch_size=16_384):
            yield from _rows(batch)


def _rows(batch: pa.RecordBatch) -> Iterator[CatalogRow]:
    # As batch.to_pylist(), which takes 3.5 µs a row, most of it for the time zone of every timestamp; this takes 1.1.
    columns = {name: batch.column(name).to_numpy(zero_copy_only=False).tolist() for name in schema.CATALOG.names}
    columns["last_modified"] = [when and when.replace(tzinfo=UTC) for when in columns["last_modified"]]
    for key, etag, size_bytes, last_modified, failure_kind, run_seq in zip(*columns.values(), strict=True):
        yield {
            "key": key,
            "etag": etag,
            "size_bytes": size_bytes,
            "last_modified": last_modified,
            "failure_kind": failure_kind,
            "run_seq": run_seq,
        }


def read_table(output: Store, ref: FileRef) -> pa.Table:
    """One file as schema.CATALOG, without metadata."""
    return _open(output, ref).read().cast(schema.CATALOG)


def _open(output: Store, ref: FileRef) -> pq.ParquetFile:
    file = pq.ParquetFile(io.BytesIO(read_file(output, ref)))
    version = schema.version_of(file.schema_arrow)
    if version != schema.SCHEMA_VERSION:
        raise ConflictError(
            f"{output.root}/{ref.key}: expected schema version {schema.SCHEMA_VERSION}, found {version}; use the"
            " version of this program that wrote it"
        )
    return file


# --- ranges -------------------------------------------------------------------------------------------------------


def ranges(files: Sequence[FileRef], *, is_divisible: bool) -> list[KeyRange]:
    """The ranges of a night: neighbouring files up to MAX_FILE_ROWS each, which together cover every possible key.

    A source that cannot be listed from the middle (`is_divisible` is false) is one range.
    """
    spans = pack(files) if is_divisible else [list(files)]
    borders = [span[-1].last_key for span in spans[:-1]]
    return [dataclasses.replace(each, files=tuple(span)) for each, span in zip(between(borders), spans, strict=True)]


def between(borders: Sequence[str]) -> list[KeyRange]:
    """The ranges that these keys (in order) make, each the last key of one; without any catalog."""
    return [
        KeyRange(range_id=f"{number:05d}", after=after, through=through, files=())
        for number, (after, through) in enumerate(zip(["", *borders], [*borders, None], strict=True))
    ]


def pack(files: Sequence[FileRef]) -> list[list[FileRef]]:
    """Neighbouring files together, up to MAX_FILE_ROWS; at least one group, which may be empty."""
    groups: list[list[FileRef]] = [[]]
    for file in files:
        if groups[-1] and sum(each.num_rows for each in groups[-1]) + file.num_rows > MAX_FILE_ROWS:
            groups.append([])
        groups[-1].append(file)
    return groups


# --- renewal ------------------------------------------------------------------------------------------------------


def renew(
    output: Store,
    key_range: KeyRange,
    gone: Iterable[pa.Table],
    fresh: Iterable[pa.Table],
    write: Callable[[int, pa.Table], FileRef],
) -> list[FileRef]:
    """The files of a range after a night: without `gone`, with the rows of `fresh` replacing or joining the old ones.

    `gone` and `fresh` (schema.CATALOG) come sorted by key and never name the same one. Files in which nothing changed
    stay as they are. `write` gets a number, counting from 0, and the rows of a new file. In memory are the old rows of
    one group of files, and up to three files' worth of new ones.
    """
    gone_rows, fresh_rows = _Sorted(gone), _Sorted(fresh)
    spans = pack(key_range.files)
    renewed: list[FileRef] = []
    num_written = 0
    for number, span in enumerate(spans):
        through = span[-1].last_key if number < len(spans) - 1 else None
        gone_here = [table.column("key") for table in gone_rows.take(through)]
        fresh_here = fresh_rows.take(through)
        first = next(fresh_here, None)
        if first is None and not gone_here:
            renewed += span
            continue
        old = pa.concat_tables([schema.CATALOG.empty_table(), *(read_table(output, ref) for ref in span)])
        old = _without(old, gone_here)
        for piece in _merged(old, [first] if first is not None else [], fresh_here):
            renewed.append(write(num_written, piece))
            num_written += 1
    return renewed


def _merged(old: pa.Table, first: list[pa.Table], more: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Files' worth of the sorted union; a row of `first` and `more` wins over the old one of its key."""
    pending = schema.CATALOG.empty_table()
    for fresh in _pieces_of_enough_rows([*first], more):
        last = fresh.column("key")[-1].as_py()
        num_before = _count_through(old, last)
        unchanged = _without(old.slice(0, num_before), [fresh.column("key")])
        old = old.slice(num_before)
        pending = pa.concat_tables([pending, pa.concat_tables([unchanged, fresh]).sort_by("key")])
        while len(pending) >= 2 * MAX_FILE_ROWS:
            yield from _split(pending.slice(0, MAX_FILE_ROWS))
            pending = pending.slice(MAX_FILE_ROWS)
    yield from _split(pa.concat_tables([pending, old]))


def _pieces_of_enough_rows(first: list[pa.Table], more: Iterator[pa.Table]) -> Iterator[pa.Table]:
    waiting = first
    for table in more:
        if sum(map(len, waiting)) >= MAX_FILE_ROWS:
            yield pa.concat_tables(waiting)
            waiting = []
        waiting.append(table)
    if waiting:
        yield pa.concat_tables(waiting)


def _split(table: pa.Table) -> Iterator[pa.Table]:
    """Equal parts within the bounds of a file."""
    key_bytes = pc.sum(pc.binary_length(table.column("key"))).as_py() or 0
    num_parts = max(-(-len(table) // MAX_FILE_ROWS), -(-key_bytes // MAX_FILE_KEY_BYTES))
    for part in range(num_parts):
        begin, end = len(table) * part // num_parts, len(table) * (part + 1) // num_parts
        yield table.slice(begin, end - begin)


def _without(table: pa.Table, keys: Sequence[pa.ChunkedArray]) -> pa.Table:
    if not keys:
        return table
    values = pa.concat_arrays([chunk for each in keys for chunk in each.chunks])
    return table.filter(pc.invert(pc.is_in(table.column("key"), value_set=values)))


def _count_through(table: pa.Table, key: str) -> int:
    # Arrow compares strings by their UTF-8 bytes.
    return pc.sum(pc.less_equal(table.column("key"), key)).as_py() or 0


class _Sorted:
    """Tables sorted by key, taken up to one key after the other."""

    def __init__(self, tables: Iterable[pa.Table]) -> None:
        self._tables = iter(tables)
        self._head: pa.Table | None = None

    def take(self, through: str | None) -> Iterator[pa.Table]:
        """What is left of the rows up to and with this key; None: all."""
        while True:
            head = self._head if self._head is not None else next(self._tables, None)
            self._head = None
            if head is None:
                return
            num_taken = len(head) if through is None else _count_through(head, through)
            if num_taken < len(head):
                self._head = head.slice(num_taken)
            if num_taken:
                yield head.slice(0, num_taken)
            if self._head is not None:
                return
