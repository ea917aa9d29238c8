"""Staged parts -> what a run has to show, range by range: summaries, catalog rows, sums; and whether they add up.

    publish/range-<range>-<attempt>-<n>.catalog.parquet   schema.CATALOG rows of tonight's outcomes, attempt-private
    publish/range-<range>.json                            put_if_absent: every part with its digest, and those files

A module of its own because this is the last look at everything before readers see any of it: every part is read back
and must be the unit of the plan, the sums must be exact, and failures must stay within the budget.
"""

import hashlib
import io
import json
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import parts, plan, schema, storage
from pipeline.catalog import MAX_FILE_ROWS
from pipeline.errors import BudgetError, ConflictError, FailureKind
from pipeline.log import Claim
from pipeline.parts import PartSummary
from pipeline.plan import Range
from pipeline.storage import Store

BUDGET_FLOOR = 20
"""So many failures never stop a run, however small the bucket."""
_CONCURRENT_READS = 8


@dataclass(frozen=True, kw_only=True)
class RangeOutcome:
    """What the parts of one range hold, part by part."""

    range_id: str
    parts: list[PartSummary]
    """In key order."""
    fresh: list[str]
    """Keys of the Parquet files with tonight's catalog rows, in key order."""


@dataclass(frozen=True, kw_only=True)
class RangeTotals:
    """The sums of one range's outcome, and the SHA-256 of the file that holds it."""

    range_id: str
    sha256: str
    num_labeled: int
    label_bytes: int
    """Size of the labeled rows, staged."""
    failures: dict[str, int]
    """Failed objects by kind."""

    @property
    def num_failed(self) -> int:
        """Objects without a label."""
        return sum(self.failures.values())


def summarize_range(output: Store, run_id: str, run_seq: int, range_id: str) -> RangeTotals:
    """Read every part of a range, check that each is the unit of the plan, and write down what they hold, once.

    Runs as one Ray task, with a few parts and one file of catalog rows in memory. Raises ConflictError for a part that
    is not its unit, and AbsentError for one that is not there.
    """
    key = _outcome_key(run_id, range_id)
    standing = storage.get_or_none(output, key)
    if standing is None:
        summaries: list[PartSummary] = []
        fresh = _FreshRows(output, f"_runs/{run_id}/publish/range-{range_id}-{uuid.uuid4().hex[:8]}", run_seq)
        for table, summary in _read_parts(output, run_id, plan.read_range(output, run_id, range_id)):
            summaries.append(summary)
            fresh.add(table)
        outcome = RangeOutcome(range_id=range_id, parts=summaries, fresh=fresh.close())
        standing = output.put_if_absent(key, json.dumps(asdict(outcome)).encode())
    with storage.parsing(output, key, "the outcome of a range"):
        return _totals(_parse(standing), standing)


def read_outcome(output: Store, run_id: str, totals: RangeTotals) -> RangeOutcome:
    """What the parts of a range hold; ConflictError unless it is what was sealed."""
    key = _outcome_key(run_id, totals.range_id)
    data = storage.get_or_none(output, key)
    if data is None or hashlib.sha256(data).hexdigest() != totals.sha256:
        raise ConflictError(f"{output.root}/{key}: is not the file that run {run_id} was sealed with; restore it")
    return _parse(data)


def read_fresh(output: Store, outcome: RangeOutcome) -> Iterator[pa.Table]:
    """Tonight's catalog rows of a range (schema.CATALOG), in key order, a file at a time."""
    for key in outcome.fresh:
        yield pq.read_table(io.BytesIO(output.get(key))).cast(schema.CATALOG)


def nothing(range_id: str) -> RangeTotals:
    """The outcome of a range without units."""
    return RangeTotals(range_id=range_id, sha256="", num_labeled=0, label_bytes=0, failures={})


def _outcome_key(run_id: str, range_id: str) -> str:
    return f"_runs/{run_id}/publish/range-{range_id}.json"


def _parse(data: bytes) -> RangeOutcome:
    values = json.loads(data)
    return RangeOutcome(**{**values, "parts": [PartSummary(**part) for part in values["parts"]]})


def _totals(outcome: RangeOutcome, data: bytes) -> RangeTotals:
    failures: Counter[str] = Counter()
    for part in outcome.parts:
        failures.update(part.failures)
    return RangeTotals(
        range_id=outcome.range_id,
        sha256=hashlib.sha256(data).hexdigest(),
        num_labeled=sum(part.num_labeled for part in outcome.parts),
        label_bytes=sum(part.label_bytes for part in outcome.parts),
        failures=dict(sorted(failures.items())),
    )


def _read_parts(output: Store, run_id: str, planned: plan.RangePlan) -> Iterator[tuple[pa.Table, PartSummary]]:
    with ThreadPoolExecutor(_CONCURRENT_READS) as pool:
        for chunk in planned.chunks:
            yield from pool.map(
                lambda unit_id: parts.read_part(output, run_id, planned.range_id, unit_id), chunk.unit_ids
            )


class _FreshRows:
    """Collects catalog rows into files of at most MAX_FILE_ROWS and a unit."""

    def __init__(self, output: Store, key_prefix: str, run_seq: int) -> None:
        self._output, self._key_prefix, self._run_seq = output, key_prefix, run_seq
        self._keys: list[str] = []
        self._tables: list[pa.Table] = []

    def add(self, part: pa.Table) -> None:
        known = part.select(["key", "etag", "size_bytes", "last_modified", "failure_kind"])
        run_seqs = pa.repeat(pa.scalar(self._run_seq, pa.int64()), len(part))
        self._tables.append(pa.table([*known.columns, run_seqs], schema=schema.CATALOG))
        if sum(map(len, self._tables)) >= MAX_FILE_ROWS:
            self._write()

    def close(self) -> list[str]:
        if self._tables:
            self._write()
        return self._keys

    def _write(self) -> None:
        key = f"{self._key_prefix}-{len(self._keys):05d}.catalog.parquet"
        self._output.put_if_absent(key, schema.encode(pa.concat_tables(self._tables)))
        self._keys.append(key)
        self._tables = []


# --- do they add up? ----------------------------------------------------------------------------------------------


def failures_of(totals: Sequence[RangeTotals]) -> Counter[str]:
    """Failed objects by kind."""
    found: Counter[str] = Counter()
    for each in totals:
        found.update(each.failures)
    return found


def check_budget(failures: Mapping[str, int], counts: Mapping[str, int], max_failed_fraction: float) -> None:
    """Raise BudgetError if more objects failed than the budget allows.

    The budget is a fraction of all objects in scope, at least BUDGET_FLOOR; objects that are no images do not count.
    """
    counted = sum(number for kind, number in failures.items() if kind != FailureKind.NOT_AN_IMAGE)
    in_scope = counts["listed"] - counts["filtered"]
    allowed = max(BUDGET_FLOOR, int(max_failed_fraction * in_scope))
    if counted > allowed:
        kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(failures.items(), key=lambda each: -each[1]))
        raise BudgetError(
            f"{counted} of {in_scope} objects failed, {allowed} are allowed ({kinds}); nothing was published. Raise"
            " --max-failed-fraction and run again to publish what there is, or --abandon-run to start anew"
        )


def check_accounts(planned: Range, totals: RangeTotals, claim: Claim, *, num_in_catalog: int) -> None:
    """Raise ConflictError unless every listed object of a range has exactly one outcome, and every object that the last
    catalog knows of it is listed, deleted or out of tonight's scope.
    """
    counts, labeled, failed = planned.counts, totals.num_labeled, totals.num_failed
    accounted = labeled + failed + counts["unchanged"] + counts["filtered"]
    where = f"run {claim.run_id}, range {planned.range_id}: the sums do not add up, nothing was published"
    if accounted != counts["listed"] or labeled + failed != counts["planned"]:
        raise ConflictError(
            f"{where}: listed {counts['listed']}, but labeled {labeled} + failed {failed} + unchanged"
            f" {counts['unchanged']} + filtered {counts['filtered']} = {accounted}; keep the output's"
            f" _runs/{claim.run_id} and report this"
        )
    if counts["known"] + counts["kept"] + counts["deleted"] != num_in_catalog:
        raise ConflictError(
            f"{where}: the last catalog has {num_in_catalog} objects, of which {counts['known']} are listed,"
            f" {counts['kept']} out of scope and {counts['deleted']} deleted; keep the output's _runs/{claim.run_id}"
            " and report this"
        )
