"""The listing ⟕ the last catalog -> immutable work units and deletions, sealed once and never computed again.

    plan/<range>-<attempt>-<n>.units.parquet       schema.UNITS, attempt-private
    plan/<range>-<attempt>-<n>.deletions.parquet   catalog rows of keys that are gone
    plan/range-<range>.json                        put_if_absent: names the winning attempt's chunks
    plan.json                                      put_if_absent: closes the plan

A module of its own because everything downstream rests on this: on a resumed run the same units with the same ids come
out, whatever the bucket looks like by then. One range covers the whole source for now; state and files are per range.
"""

import hashlib
import io
import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import schema, storage
from pipeline.errors import TRANSIENT, ConflictError, FailureKind, SourceError
from pipeline.listing import Scope
from pipeline.log import FileRef
from pipeline.storage import ObjectInfo, Store

MAX_UNIT_ROWS = 1024
MAX_UNIT_INPUT_BYTES = 160_000_000
"""Model input of a unit: what one task puts into the object store at once."""
MAX_UNIT_ENCODED_BYTES = 512 * 2**20
RAMP = ((16, 64), (16, 256))
"""(units, rows): the first units of a range are small, so that a small bucket fills every core. Never depends on the
cluster, or a resumed run would plan differently."""
UNITS_PER_CHUNK = 16

COUNTS = ("listed", "filtered", "unchanged", "planned", "known", "kept", "deleted")
"""listed = filtered + unchanged + planned. Of the last catalog's rows, `known` are listed and in scope, `deleted` are
gone, and `kept` are out of tonight's scope; there are no others."""

CatalogRow = Mapping[str, Any]
"""A row of schema.CATALOG."""


class Listed(NamedTuple):
    """An object of the listing, and whether the globs mean it."""

    info: ObjectInfo
    is_in_scope: bool


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """One Parquet file of the plan: its key below the run's folder, its units' ids in order, and their sums."""

    key: str
    unit_ids: list[str]
    num_objects: int
    encoded_bytes: int


@dataclass(frozen=True, kw_only=True)
class Range:
    """The plan of one key range."""

    range_id: str
    chunks: list[Chunk]
    deletions: list[str]
    """Keys of the Parquet files with the catalog rows of objects that are gone."""
    counts: dict[str, int]
    """Objects, by the names in COUNTS."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A sealed plan."""

    schema_version: int = schema.SCHEMA_VERSION
    run_id: str
    ranges: list[Range]
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def chunks(self) -> list[Chunk]:
        """Every chunk, in key order."""
        return [chunk for each in self.ranges for chunk in each.chunks]

    @property
    def num_units(self) -> int:
        """Units of work."""
        return sum(len(chunk.unit_ids) for chunk in self.chunks)

    @property
    def encoded_bytes(self) -> int:
        """Bytes to read from the source."""
        return sum(chunk.encoded_bytes for chunk in self.chunks)


def read(output: Store, run_id: str) -> Plan | None:
    """The sealed plan of a run, or None if its planning is not finished."""
    data = storage.get_or_none(output, _seal_key(run_id))
    if data is None:
        return None
    values = json.loads(data)
    return Plan(**{**values, "ranges": [_range(each) for each in values["ranges"]]})


def _range(values: Mapping[str, Any]) -> Range:
    return Range(**{**values, "chunks": [Chunk(**chunk) for chunk in values["chunks"]]})


def seal(output: Store, run_id: str, ranges: Sequence[Range]) -> Plan:
    """Close the plan; the first seal wins. Returns what is sealed."""
    counts = {name: sum(each.counts[name] for each in ranges) for name in ranges[0].counts}
    plan = Plan(run_id=run_id, ranges=list(ranges), counts=counts)
    output.put_if_absent(_seal_key(run_id), json.dumps(asdict(plan)).encode())
    sealed = read(output, run_id)
    assert sealed is not None
    return sealed


def plan_range(
    input_url: str,
    output_url: str,
    run_id: str,
    scope: Scope,
    catalog: Sequence[FileRef],
    *,
    range_id: str = "0000",
    max_unit_rows: int,
    limit: int | None,
    records_deletions: bool,
) -> Range:
    """Plan one key range: list, compare with the catalog, write the chunks, publish the range once.

    Runs as one Ray task. Memory is that of a page of the listing, a row group of the catalog and a chunk of units. With
    a `limit` the first so many objects in scope are looked at, changed or not.
    """
    output = storage.connect(output_url)
    range_key = f"_runs/{run_id}/plan/range-{range_id}.json"
    standing = storage.get_or_none(output, range_key)
    if standing is None:
        key_prefix = f"_runs/{run_id}/plan/{range_id}-{uuid.uuid4().hex[:8]}"
        chunks = _Chunks(output.put_if_absent, key_prefix, input_url, max_unit_rows)
        planned = _plan(input_url, output, scope, catalog, chunks, range_id, limit, records_deletions=records_deletions)
        standing = output.put_if_absent(range_key, json.dumps(asdict(planned)).encode())
    return _range(json.loads(standing))


def preview(
    input_url: str,
    output_url: str,
    scope: Scope,
    catalog: Sequence[FileRef],
    *,
    max_unit_rows: int,
    limit: int | None,
    records_deletions: bool,
) -> Plan:
    """The plan that `plan_range` would make now, without writing anything: its chunks do not exist."""
    chunks = _Chunks(lambda _key, data: data, "", input_url, max_unit_rows)
    output = storage.connect(output_url)
    planned = _plan(input_url, output, scope, catalog, chunks, "0000", limit, records_deletions=records_deletions)
    return Plan(run_id="", ranges=[planned], counts=planned.counts)


def _plan(
    input_url: str,
    output: Store,
    scope: Scope,
    catalog: Sequence[FileRef],
    chunks: "_Chunks",
    range_id: str,
    limit: int | None,
    *,
    records_deletions: bool,
) -> Range:
    counts = dict.fromkeys(COUNTS, 0)
    is_meant = scope.predicate()
    joined = merge_join(_listing(input_url, scope), read_catalog(output, catalog))
    for found, row in joined:
        if found is None:
            assert row is not None
            # Out of tonight's scope is not gone: only a listing of everything that is meant shows that.
            if records_deletions and is_meant(row["key"]):
                counts["deleted"] += 1
                chunks.add_deletion(row)
            else:
                counts["kept"] += 1
            continue
        counts["listed"] += 1
        if not found.is_in_scope:
            counts["filtered"] += 1
            counts["kept"] += row is not None
            continue
        counts["known"] += row is not None
        if row is not None and is_final(row, found.info):
            counts["unchanged"] += 1
        else:
            counts["planned"] += 1
            chunks.add(found.info)
        if counts["unchanged"] + counts["planned"] == limit:
            break
    if limit is not None:
        # The rest of the catalog was not looked at.
        counts["kept"] = sum(file.num_rows for file in catalog) - counts["known"] - counts["deleted"]
    chunks.close()
    return Range(range_id=range_id, chunks=chunks.units, deletions=chunks.deletions, counts=counts)


def num_objects(output: Store, sealed: Plan, unit_ids: set[str]) -> int:
    """Objects in these units. Reads only the chunks of which some, but not all, units are meant."""
    total = 0
    for chunk in sealed.chunks:
        wanted = unit_ids.intersection(chunk.unit_ids)
        if len(wanted) == len(chunk.unit_ids):
            total += chunk.num_objects
        elif wanted:
            table = pq.read_table(io.BytesIO(output.get(chunk.key)), columns=["unit_id", "num_objects"])
            total += sum(row["num_objects"] for row in table.to_pylist() if row["unit_id"] in wanted)
    return total


def max_unit_rows(input_px: int) -> int:
    """Rows of the largest unit for a model that takes uint8 (input_px, input_px, 3)."""
    return max(1, min(MAX_UNIT_ROWS, MAX_UNIT_INPUT_BYTES // (input_px * input_px * 3)))


def unit_id(objects: pa.Table) -> str:
    """Identity of a unit: SHA-256 (first 32 hex digits) over its objects' keys, etags, sizes and places, in order."""
    names = ("key", "etag", "size_bytes", "container", "container_row")
    return schema.digest([objects.column(name).to_pylist() for name in names])[:32]


def read_unit(output: Store, chunk_key: str, wanted_unit_id: str) -> pa.Table:
    """The objects of one unit, as schema.OBJECTS."""
    chunk = pq.read_table(io.BytesIO(output.get(chunk_key)))
    ids = chunk.column("unit_id").to_pylist()
    if wanted_unit_id not in ids:
        raise ConflictError(f"{output.root}/{chunk_key}: expected unit {wanted_unit_id}, found {ids}")
    objects = chunk.column("objects").combine_chunks().slice(ids.index(wanted_unit_id), 1).flatten()
    return pa.Table.from_struct_array(objects).cast(schema.OBJECTS)


# --- the join -----------------------------------------------------------------------------------------------------


def merge_join(
    listing: Iterator[Listed], catalog: Iterator[CatalogRow]
) -> Iterator[tuple[Listed | None, CatalogRow | None]]:
    """Full outer join of two streams sorted by key. Raises SourceError if the listing is not sorted or repeats a key.

    Python compares strings by code point, which is the order of their UTF-8 bytes.
    """
    row = next(catalog, None)
    previous: str | None = None
    for found in listing:
        info = found.info
        if previous is not None and info.key <= previous:
            raise SourceError(
                f"the listing is not in order: {info.key!r} came after {previous!r}; run the command again"
            )
        previous = info.key
        while row is not None and row["key"] < info.key:
            yield None, row
            row = next(catalog, None)
        if row is not None and row["key"] == info.key:
            yield found, row
            row = next(catalog, None)
        else:
            yield found, None
    while row is not None:
        yield None, row
        row = next(catalog, None)


def is_final(row: CatalogRow, info: ObjectInfo) -> bool:
    """Whether the catalog's outcome still holds: the same object, and not a failure that may pass by itself."""
    same = (row["etag"], row["size_bytes"]) == (info.etag, info.size_bytes)
    if info.etag is None:
        same = same and row["last_modified"] == info.last_modified
    if row["failure_kind"] == FailureKind.ARCHIVED:
        return same and info.is_archived  # restored by a copy onto itself, it has the etag that it had
    return same and row["failure_kind"] not in TRANSIENT


def _listing(input_url: str, scope: Scope) -> Iterator[Listed]:
    for page in scope.pages(storage.connect(input_url)):
        for info, is_in_scope in page:
            yield Listed(info, is_in_scope)


def read_catalog(output: Store, files: Sequence[FileRef]) -> Iterator[CatalogRow]:
    """Rows of a space's catalog, sorted by key, a row group in memory. Damage is ConflictError."""
    for ref in files:
        data = storage.get_or_none(output, ref.key)
        found = "nothing" if data is None else hashlib.sha256(data).hexdigest()
        if data is None or found != ref.sha256:
            raise ConflictError(
                f"{output.root}/{ref.key}: expected the catalog file of the log, SHA-256 {ref.sha256}, found {found};"
                " restore it"
            )
        for batch in pq.ParquetFile(io.BytesIO(data)).iter_batches(batch_size=16_384):
            yield from batch.to_pylist()


# --- units --------------------------------------------------------------------------------------------------------


class _Chunks:
    """Collects objects into units and units into chunk files."""

    def __init__(
        self, write: Callable[[str, bytes], object], key_prefix: str, input_url: str, max_unit_rows: int
    ) -> None:
        self.units: list[Chunk] = []
        self.deletions: list[str] = []
        self._write, self._key_prefix, self._root = write, key_prefix, input_url
        self._row_limits = _row_limits(max_unit_rows)
        self._row_limit = next(self._row_limits)
        self._unit: list[ObjectInfo] = []
        self._unit_bytes = 0
        self._tables: list[pa.Table] = []
        self._deleted: list[CatalogRow] = []

    def add(self, info: ObjectInfo) -> None:
        if self._unit and (
            len(self._unit) == self._row_limit or self._unit_bytes + info.size_bytes > MAX_UNIT_ENCODED_BYTES
        ):
            self._close_unit()
        self._unit.append(info)
        self._unit_bytes += info.size_bytes

    def add_deletion(self, row: CatalogRow) -> None:
        self._deleted.append(row)
        if len(self._deleted) == 65_536:
            self._write_deletions()

    def close(self) -> None:
        if self._unit:
            self._close_unit()
        if self._tables:
            self._write_units()
        if self._deleted:
            self._write_deletions()

    def _close_unit(self) -> None:
        self._tables.append(objects_table(self._root, self._unit))
        self._unit, self._unit_bytes, self._row_limit = [], 0, next(self._row_limits)
        if len(self._tables) == UNITS_PER_CHUNK:
            self._write_units()

    def _write_units(self) -> None:
        ids = [unit_id(table) for table in self._tables]
        sizes = [sum(table.column("size_bytes").to_pylist()) for table in self._tables]
        offsets = [0]
        for table in self._tables:
            offsets.append(offsets[-1] + len(table))
        objects = pa.concat_tables(self._tables).combine_chunks().to_struct_array().combine_chunks()
        nested = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), objects)
        rows = [len(table) for table in self._tables]
        chunk = pa.table([ids, rows, sizes, nested], names=schema.UNITS.names).cast(schema.UNITS)
        key = f"{self._key_prefix}-{len(self.units):05d}.units.parquet"
        self._write(key, to_parquet(chunk))
        self.units.append(Chunk(key=key, unit_ids=ids, num_objects=sum(rows), encoded_bytes=sum(sizes)))
        self._tables = []

    def _write_deletions(self) -> None:
        key = f"{self._key_prefix}-{len(self.deletions):05d}.deletions.parquet"
        self._write(key, to_parquet(pa.Table.from_pylist(self._deleted, schema.CATALOG)))
        self.deletions.append(key)
        self._deleted = []


def objects_table(root: str, infos: Sequence[ObjectInfo]) -> pa.Table:
    """Listed objects below `root` as schema.OBJECTS."""
    return pa.table(
        {
            "key": [info.key for info in infos],
            "uri": [f"{root}/{info.key}" for info in infos],
            "etag": [info.etag for info in infos],
            "version_id": [info.version_id for info in infos],
            "size_bytes": [info.size_bytes for info in infos],
            "last_modified": [info.last_modified for info in infos],
            "storage_class": [info.storage_class for info in infos],
            "container": [None] * len(infos),
            "container_row": [None] * len(infos),
        },
        schema.OBJECTS,
    )


def to_parquet(table: pa.Table) -> bytes:
    """`table` as the bytes of a Parquet file for our own use."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", compression_level=1)
    return sink.getvalue()


def _row_limits(largest: int) -> Iterator[int]:
    for num_units, rows in RAMP:
        yield from (min(rows, largest) for _ in range(num_units))
    while True:
        yield largest


def _seal_key(run_id: str) -> str:
    return f"_runs/{run_id}/plan.json"
