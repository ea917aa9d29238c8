"""The listing ⟕ the last catalog -> immutable work units and deletions, sealed once and never computed again.

    plan/ranges.json                               put_if_absent: the key ranges, each planned by one task
    plan/<range>-<attempt>-<n>.units.parquet       schema.UNITS, attempt-private
    plan/<range>-<attempt>-<n>.deletions.parquet   catalog rows of keys that are gone
    plan/range-<range>.json                        put_if_absent: names the winning attempt's chunks
    plan.json                                      put_if_absent: closes the plan; a record per range

A module of its own because everything downstream rests on this: on a resumed run the same units with the same ids come
out, whatever the bucket looks like by then. Nothing here holds more than a page of the listing, a file of the catalog
and a chunk of units; what the driver holds is a record per range.
"""

import io
import json
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import catalog, diff, listing, schema, storage
from pipeline.catalog import CatalogRow, KeyRange
from pipeline.diff import COUNTS, Rules
from pipeline.errors import ConflictError, UnstableError
from pipeline.log import FileRef
from pipeline.storage import ObjectInfo, Source, Store
from pipeline.survey import Survey

MAX_UNIT_ROWS = 1024
MAX_UNIT_INPUT_BYTES = 160_000_000
"""Model input of a unit: what one task puts into the object store at once."""
MAX_UNIT_ENCODED_BYTES = 512 * 2**20
RAMP = ((16, 64), (16, 256))
"""(units, rows): the first units of a plan with one range are small, so that a small bucket fills every core; several
ranges are enough for that. Never depends on the cluster, or a resumed run would plan differently."""
UNITS_PER_CHUNK = 16
MAX_LISTINGS = 3
"""Attempts at a range whose listing contradicts itself."""


class UnitSizes(NamedTuple):
    """How many objects make a unit."""

    max_unit_rows: int
    has_ramp: bool

    @classmethod
    def of(cls, input_px: int, num_ranges: int) -> "UnitSizes":
        """For a model that takes uint8 (input_px, input_px, 3), and a plan of so many ranges."""
        most = max(1, min(MAX_UNIT_ROWS, MAX_UNIT_INPUT_BYTES // (input_px * input_px * 3)))
        return cls(most, num_ranges == 1)


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """One Parquet file of the plan: its key below the output, its units' ids and rows in order, and its bytes."""

    key: str
    unit_ids: list[str]
    unit_rows: list[int]
    encoded_bytes: int


@dataclass(frozen=True, kw_only=True)
class RangePlan:
    """The plan of one key range, unit by unit."""

    range_id: str
    chunks: list[Chunk]
    deletions: list[str]
    """Keys of the Parquet files with the catalog rows of objects that are gone."""
    counts: dict[str, int]
    """Objects, by the names in COUNTS."""

    def summary(self) -> "Range":
        """What the sealed plan says of this range."""
        return Range(
            range_id=self.range_id,
            counts=self.counts,
            num_units=sum(len(chunk.unit_ids) for chunk in self.chunks),
            encoded_bytes=sum(chunk.encoded_bytes for chunk in self.chunks),
        )


@dataclass(frozen=True, kw_only=True)
class Range:
    """The sums of one key range's plan."""

    range_id: str
    counts: dict[str, int]
    """Objects, by the names in COUNTS."""
    num_units: int = 0
    encoded_bytes: int = 0

    @property
    def changes_catalog(self) -> bool:
        """Whether the catalog of this range is another one after the night."""
        return bool(self.counts["planned"] or self.counts["deleted"])


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A sealed plan: a record per range, whatever the number of units."""

    schema_version: int = schema.SCHEMA_VERSION
    run_id: str
    ranges: list[Range]
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def num_units(self) -> int:
        """Units of work."""
        return sum(each.num_units for each in self.ranges)

    @property
    def encoded_bytes(self) -> int:
        """Bytes to read from the source."""
        return sum(each.encoded_bytes for each in self.ranges)


def seal_ranges(output: Store, run_id: str, find: Callable[[], Sequence[KeyRange]]) -> list[KeyRange]:
    """The key ranges of a run: those that stand, else those that `find` gives now. The first to write them wins."""
    key = f"_runs/{run_id}/plan/ranges.json"
    standing = storage.get_or_none(output, key)
    if standing is None:
        found = [asdict(each) for each in find()]
        standing = output.put_if_absent(key, json.dumps(found, ensure_ascii=False).encode())
    with storage.parsing(output, key, "key ranges"):
        return [
            KeyRange(**{**each, "files": tuple(FileRef(**file) for file in each["files"])})
            for each in json.loads(standing)
        ]


def find_ranges(source: Source, base: Sequence[FileRef]) -> list[KeyRange]:
    """The ranges that the last catalog's files make; on a first night those that the source's keys suggest."""
    if base:
        return catalog.ranges(base, is_divisible=source.can_seek)
    return catalog.between(listing.borders(source))


def plan_range(
    source: Source, output: Store, run_id: str, key_range: KeyRange, rules: Rules, sizes: UnitSizes
) -> RangePlan:
    """Plan one key range: list, compare with the catalog, write the chunks, publish the range once.

    Runs as one Ray task. Raises UnstableError if the source's listing contradicts itself MAX_LISTINGS times.
    """
    key = _range_key(run_id, key_range.range_id)
    standing = storage.get_or_none(output, key)
    if standing is None:
        planned = _plan(source, output, key_range, rules, sizes, output.put_if_absent, f"_runs/{run_id}/plan")
        standing = output.put_if_absent(key, json.dumps(asdict(planned)).encode())
    return _parse_range(output, key, standing)


def preview_range(
    source: Source,
    output: Store,
    key_range: KeyRange,
    rules: Rules,
    sizes: UnitSizes,
    survey: Survey | None = None,
) -> RangePlan:
    """The plan that `plan_range` would make now, without writing anything: its chunks do not exist, and of its objects
    there is what `survey` has seen.
    """
    return _plan(source, output, key_range, rules, sizes, lambda _key, data: data, "", survey)


def not_looked_at(key_range: KeyRange) -> Range:
    """A range behind the last object that a limited night looks at: everything the catalog knows of it is kept."""
    return Range(range_id=key_range.range_id, counts={**dict.fromkeys(COUNTS, 0), "kept": key_range.num_rows})


def read_range(output: Store, run_id: str, range_id: str) -> RangePlan:
    """The plan of a range that has one."""
    key = _range_key(run_id, range_id)
    return _parse_range(output, key, output.get(key))


def _range_key(run_id: str, range_id: str) -> str:
    return f"_runs/{run_id}/plan/range-{range_id}.json"


def _parse_range(output: Store, key: str, data: bytes) -> RangePlan:
    with storage.parsing(output, key, "the plan of a range"):
        values = json.loads(data)
        return RangePlan(**{**values, "chunks": [Chunk(**chunk) for chunk in values["chunks"]]})


def read(output: Store, run_id: str) -> Plan | None:
    """The sealed plan of a run, or None if its planning is not finished."""
    data = storage.get_or_none(output, _seal_key(run_id))
    if data is None:
        return None
    with storage.parsing(output, _seal_key(run_id), "a sealed plan"):
        values = json.loads(data)
        return Plan(**{**values, "ranges": [Range(**each) for each in values["ranges"]]})


def seal(output: Store, run_id: str, ranges: Sequence[Range]) -> Plan:
    """Close the plan; the first seal wins. Returns what is sealed."""
    output.put_if_absent(_seal_key(run_id), json.dumps(asdict(total(run_id, ranges))).encode())
    sealed = read(output, run_id)
    assert sealed is not None
    return sealed


def total(run_id: str, ranges: Sequence[Range]) -> Plan:
    """These ranges as one plan."""
    counts = {name: sum(each.counts[name] for each in ranges) for name in COUNTS}
    return Plan(run_id=run_id, ranges=list(ranges), counts=counts)


def read_deletions(output: Store, planned: RangePlan) -> Iterator[pa.Table]:
    """The catalog rows (schema.CATALOG) of a range's keys that are gone, in order."""
    for key in planned.deletions:
        yield pq.read_table(io.BytesIO(output.get(key))).cast(schema.CATALOG)


def unit_id(objects: pa.Table) -> str:
    """Identity of a unit: SHA-256 (first 32 hex digits) over its objects' keys, etags and sizes, in order."""
    names = ("key", "etag", "size_bytes")
    return schema.digest([objects.column(name).to_pylist() for name in names])[:32]


def read_unit(output: Store, chunk_key: str, wanted_unit_id: str) -> pa.Table:
    """The objects of one unit, as schema.OBJECTS."""
    with storage.parsing(output, chunk_key, "units"):
        chunk = pq.read_table(io.BytesIO(output.get(chunk_key)))
        ids = chunk.column("unit_id").to_pylist()
        if wanted_unit_id not in ids:
            raise ConflictError(f"{output.root}/{chunk_key}: expected unit {wanted_unit_id}, found {ids}")
        objects = chunk.column("objects").combine_chunks().slice(ids.index(wanted_unit_id), 1).flatten()
        return pa.Table.from_struct_array(objects).cast(schema.OBJECTS)


# --- one range ----------------------------------------------------------------------------------------------------


def _plan(
    source: Source,
    output: Store,
    key_range: KeyRange,
    rules: Rules,
    sizes: UnitSizes,
    write: Callable[[str, bytes], object],
    folder: str,
    survey: Survey | None = None,
) -> RangePlan:
    """Compare until the listing does not contradict itself; what a given-up attempt wrote belongs to nobody."""
    for attempts_left in range(MAX_LISTINGS - 1, -1, -1):
        prefix = f"{folder}/{key_range.range_id}-{uuid.uuid4().hex[:8]}"
        chunks = _Chunks(write, prefix, source.root, sizes.max_unit_rows, has_ramp=sizes.has_ramp)
        if survey is not None:
            survey.clear()
        try:
            counts: dict[str, int] = {}
            for each in diff.compare(source, output, key_range, rules, counts):
                if isinstance(each, diff.Deletion):
                    chunks.add_deletion(each.row)
                    continue
                chunks.add(each)
                if survey is not None:
                    survey.add(each)
            chunks.close()
        except UnstableError:
            if not attempts_left:
                raise
            continue
        return RangePlan(range_id=key_range.range_id, chunks=chunks.units, deletions=chunks.deletions, counts=counts)
    raise AssertionError("unreachable")


# --- units --------------------------------------------------------------------------------------------------------


class _Chunks:
    """Collects objects into units and units into chunk files."""

    def __init__(
        self,
        write: Callable[[str, bytes], object],
        key_prefix: str,
        input_url: str,
        max_unit_rows: int,
        *,
        has_ramp: bool,
    ) -> None:
        self.units: list[Chunk] = []
        self.deletions: list[str] = []
        self._write, self._key_prefix, self._root = write, key_prefix, input_url
        self._row_limits = _row_limits(max_unit_rows, has_ramp=has_ramp)
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
        self._write(key, schema.encode(chunk))
        self.units.append(Chunk(key=key, unit_ids=ids, unit_rows=rows, encoded_bytes=sum(sizes)))
        self._tables = []

    def _write_deletions(self) -> None:
        key = f"{self._key_prefix}-{len(self.deletions):05d}.deletions.parquet"
        self._write(key, schema.encode(pa.Table.from_pylist(self._deleted, schema.CATALOG)))
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
            "extra": [info.extra for info in infos],
        },
        schema.OBJECTS,
    )


def _row_limits(largest: int, *, has_ramp: bool) -> Iterator[int]:
    for num_units, rows in RAMP if has_ramp else ():
        yield from (min(rows, largest) for _ in range(num_units))
    while True:
        yield largest


def _seal_key(run_id: str) -> str:
    return f"_runs/{run_id}/plan.json"
