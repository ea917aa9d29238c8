"""A labeled unit -> one staged part: the unit's commit.

The part's name is the unit's id, known before the work starts; the file is built in memory and written by one
`put_if_absent`; a part that exists is the truth. A module of its own because this is where exactly-once is decided.
"""

import hashlib
import io
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import plan, schema, storage
from pipeline.errors import ConflictError
from pipeline.storage import Store

_UNIT_ID = b"label_bucket.unit_id"


@dataclass(frozen=True, kw_only=True)
class PartSummary:
    """What a part holds: enough to add the run up and to lay out its files."""

    unit_id: str
    sha256: str
    size_bytes: int
    num_rows: int
    failures: dict[str, int]
    """Failed objects by kind."""

    @property
    def num_failed(self) -> int:
        """Objects without a label."""
        return sum(self.failures.values())

    @property
    def num_labeled(self) -> int:
        """Objects with a label."""
        return self.num_rows - self.num_failed

    @property
    def label_bytes(self) -> int:
        """About the share of the part that its labeled rows take."""
        return self.size_bytes * self.num_labeled // self.num_rows if self.num_rows else 0


def part_key(run_id: str, range_id: str, unit_id: str) -> str:
    """Where a unit's part is, below the output."""
    return f"{_prefix(run_id, range_id)}{unit_id}.parquet"


def _prefix(run_id: str, range_id: str) -> str:
    return f"_runs/{run_id}/parts/{range_id}/"


def finished_units(output: Store, run_id: str, range_id: str) -> set[str]:
    """Ids of the units of a range that have a part."""
    prefix = _prefix(run_id, range_id)
    return {key.removeprefix(prefix).removesuffix(".parquet") for key in storage.list_keys(output, prefix)}


def write_part(output: Store, run_id: str, range_id: str, unit_id: str, table: pa.Table) -> PartSummary:
    """Commit a unit's rows (schema.labeled) and summarize the part that then exists, whoever wrote it."""
    key = part_key(run_id, range_id, unit_id)
    data = schema.encode(table, {_UNIT_ID.decode(): unit_id, "label_bucket.run_id": run_id})
    standing = output.put_if_absent(key, data)
    if standing is not data:
        table = _open(standing, unit_id, f"{output.root}/{key}")
    return summarize(table, standing, unit_id)


def read_part(output: Store, run_id: str, range_id: str, unit_id: str) -> tuple[pa.Table, PartSummary]:
    """A part and its summary. ConflictError if there is none, or not the unit that its name says."""
    key = part_key(run_id, range_id, unit_id)
    data = storage.get_or_none(output, key)
    if data is None:
        raise ConflictError(f"{output.root}/{key}: expected the part of a unit that was done, found none; run again")
    table = _open(data, unit_id, f"{output.root}/{key}")
    found = plan.unit_id(table)
    if found != unit_id:
        raise ConflictError(f"{output.root}/{key}: its rows are those of unit {found}; delete it and run again")
    return table, summarize(table, data, unit_id)


def _open(data: bytes, unit_id: str, where: str) -> pa.Table:
    try:
        table = pq.read_table(io.BytesIO(data))
    except (pa.ArrowException, OSError) as error:  # OSError is what a damaged page gives
        raise ConflictError(
            f"{where}: expected a part, found {storage.describe(error)}; delete it and run again"
        ) from error
    found = (table.schema.metadata or {}).get(_UNIT_ID, b"").decode()
    if found != unit_id:
        raise ConflictError(f"{where}: expected unit {unit_id}, found {found or 'no unit id'}")
    return table


def summarize(table: pa.Table, data: bytes, unit_id: str) -> PartSummary:
    """The summary of a part with these rows and bytes."""
    counts = table.column("failure_kind").drop_null().value_counts().to_pylist()
    return PartSummary(
        unit_id=unit_id,
        sha256=hashlib.sha256(data).hexdigest(),
        size_bytes=len(data),
        num_rows=len(table),
        failures={each["values"]: each["counts"] for each in counts},
    )
