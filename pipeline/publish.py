"""Staged parts -> partitioned Parquet, catalog files, one log entry; rolls forward from any crash.

    parts read and checked  what every part holds, with its digest                           (Ray tasks)
    publish.json            which file is made of which units, put_if_absent: from here on anybody can finish the run
    labels/ failures/ deletions/ _catalog/   files with names and borders known beforehand   (Ray tasks)
    _log/<seq>.json         the commit

A module of its own because it is the only one that writes where readers look. It needs the claim, the plan and the
parts, and no model: a run of anything on this output can finish it.
"""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from pipeline import parts, plan, schema, storage
from pipeline.errors import TRANSIENT, BudgetError, ConflictError, FailureKind
from pipeline.faults import crash_point
from pipeline.log import Claim, Entry, FileRef, abandoned, commit
from pipeline.parts import PartSummary
from pipeline.plan import Plan
from pipeline.storage import Store

TARGET_FILE_BYTES = 80 * 2**20
"""Parts are packed up to this size, so that a file ends between 64 and 96 MiB where there is enough."""
MAX_FAILURES_PER_FILE = 200_000
MAX_CATALOG_ROWS = 200_000
MAX_CATALOG_KEY_BYTES = 40 * 2**20
"""Bounds of one catalog file: 400 MB of memory while it is written, and one PUT also where all keys are 1024 bytes."""
BUDGET_FLOOR = 20
"""So many failures never stop a run, however small the bucket."""
_TOMBSTONE = b'"abandoned"'
"""The seal of a run that was given up."""
_PARTS_DIGEST = b"label_bucket.parts_digest"
_TASK = {"num_cpus": 0.5, "memory": 1 << 29, "max_retries": 3}


@dataclass(frozen=True, kw_only=True)
class FilePlan:
    """One file to publish: its key, its kind and the parts it is made of, in key order."""

    kind: str
    key: str
    parts: dict[str, str]
    """Unit id -> SHA-256 of its part."""


@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """What all parts of a run hold."""

    parts: list[PartSummary]

    @property
    def failures(self) -> Counter[str]:
        """Failed objects by kind."""
        total: Counter[str] = Counter()
        for part in self.parts:
            total.update(part.failures)
        return total

    @property
    def num_labeled(self) -> int:
        """Objects with a label."""
        return sum(part.num_labeled for part in self.parts)


def read_outcomes(output: Store, claim: Claim, sealed_plan: Plan) -> Outcomes:
    """Read every part and check that it is the unit the plan says.

    Raises ConflictError naming the first units without a part, or a part that is not its unit.
    """
    tasks = [
        _summarize_chunk.options(**_TASK).remote(output.root, claim.run_id, chunk.key, chunk.unit_ids)
        for chunk in sealed_plan.chunks
    ]
    chunks: list[list[PartSummary]] = ray.get(tasks)
    return Outcomes(parts=[part for chunk in chunks for part in chunk])


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


def check_accounts(counts: Mapping[str, int], labeled: int, failed: int, claim: Claim, *, num_in_catalog: int) -> None:
    """Raise ConflictError unless every listed object has exactly one outcome, and every object of the last catalog is
    listed, deleted or out of tonight's scope.
    """
    accounted = labeled + failed + counts["unchanged"] + counts["filtered"]
    if accounted != counts["listed"] or labeled + failed != counts["planned"]:
        raise ConflictError(
            f"run {claim.run_id}: the sums do not add up, nothing was published: listed {counts['listed']}, but labeled"
            f" {labeled} + failed {failed} + unchanged {counts['unchanged']} + filtered {counts['filtered']} ="
            f" {accounted}; keep the output's _runs/{claim.run_id} and report this"
        )
    if counts["known"] + counts["kept"] + counts["deleted"] != num_in_catalog:
        raise ConflictError(
            f"run {claim.run_id}: the sums do not add up, nothing was published: the last catalog has {num_in_catalog}"
            f" objects, of which {counts['known']} are listed, {counts['kept']} out of scope and {counts['deleted']}"
            f" deleted; keep the output's _runs/{claim.run_id} and report this"
        )


def fate(output: Store, run_id: str) -> Literal["open", "sealed", "abandoned"]:
    """What was decided of a claimed run. Sealed: anybody can, and must, finish it. Abandoned: it may never publish."""
    seal = storage.get_or_none(output, _seal_key(run_id))
    if seal is None:
        return "open"
    return "abandoned" if seal == _TOMBSTONE else "sealed"


def abandon(output: Store, claim: Claim, now: str) -> None:
    """Give an open run up, also against a driver of it that is still alive: whoever writes the seal first decides.

    Raises ConflictError if the run has begun to publish.
    """
    if output.put_if_absent(_seal_key(claim.run_id), _TOMBSTONE) != _TOMBSTONE:
        raise ConflictError(
            f"{output.root}: run {claim.run_id} has begun to publish and cannot be abandoned any more; any command on"
            " this output finishes it"
        )
    commit(output, abandoned(claim, now))


def publish(output: Store, claim: Claim, sealed_plan: Plan, base: Entry | None, outcomes: Outcomes, now: str) -> Entry:
    """Write what is missing of the run's files and its log entry. The same result however often it is interrupted.

    `base` is the newest published run of the same space. Raises ConflictError if a file that exists is another one.
    """
    labeled, failures = outcomes.num_labeled, outcomes.failures
    old_catalog = base.catalog if base else []
    num_in_catalog = sum(file.num_rows for file in old_catalog)
    check_accounts(sealed_plan.counts, labeled, failures.total(), claim, num_in_catalog=num_in_catalog)
    layout = _seal_layout(output, claim, outcomes)
    crash_point("publish-sealed")
    dim = claim.identity["embedding_dim"]
    written: dict[str, list[FileRef]] = {"labels": [], "failures": []}
    waiting = {_publish_file.options(**_TASK).remote(output.root, claim, dim, each): each.kind for each in layout}
    for task in list(waiting):
        written[waiting[task]].append(ray.get(task))
        crash_point("file-published")
    deletions: list[FileRef] = ray.get(
        [
            _publish_deletions.options(**_TASK).remote(output.root, claim, key, f"{number:05d}")
            for number, key in enumerate(key for each in sealed_plan.ranges for key in each.deletions)
        ]
    )
    crash_point("deletions-published")
    if sealed_plan.counts["planned"] or sealed_plan.counts["deleted"]:
        catalog: list[FileRef] = ray.get(
            _publish_catalog.options(**_TASK).remote(output.root, claim, sealed_plan, old_catalog)
        )
    else:
        catalog = old_catalog
    crash_point("catalog-published")
    counts = {name: sealed_plan.counts[name] for name in ("listed", "filtered", "unchanged", "deleted")}
    entry = Entry(
        kind="run",
        run_id=claim.run_id,
        run_seq=claim.run_seq,
        identity=claim.identity,
        run_date=claim.run_date,
        model_id=claim.model_id,
        model_revision=claim.model_revision,
        counts={**counts, "labeled": labeled, "failed": failures.total()},
        failures=dict(sorted(failures.items())),
        labels=written["labels"],
        dead_letters=written["failures"],
        deletions=deletions,
        catalog=catalog,
        committed_at=now,
    )
    if (
        sum(file.num_rows for file in entry.labels) != labeled
        or sum(file.num_rows for file in entry.dead_letters) != failures.total()
    ):
        raise ConflictError(f"run {claim.run_id}: the published files do not hold the {labeled} rows of its parts")
    commit(output, entry)
    crash_point("committed")
    return entry


# --- layout -------------------------------------------------------------------------------------------------------


def _seal_key(run_id: str) -> str:
    return f"_runs/{run_id}/publish.json"


def _seal_layout(output: Store, claim: Claim, outcomes: Outcomes) -> list[FilePlan]:
    wanted = [asdict(each) for each in _layout(claim, outcomes)]
    standing = output.put_if_absent(_seal_key(claim.run_id), json.dumps(wanted).encode())
    if standing == _TOMBSTONE:
        raise ConflictError(
            f"{output.root}: run {claim.run_id} was abandoned by another command; nothing was published"
        )
    return [FilePlan(**each) for each in json.loads(standing)]


def _layout(claim: Claim, outcomes: Outcomes) -> Iterator[FilePlan]:
    labeled = [part for part in outcomes.parts if part.num_labeled]
    failed = [part for part in outcomes.parts if part.num_failed]
    packed = {
        "labels": _pack(
            labeled, [part.size_bytes * part.num_labeled // part.num_rows for part in labeled], TARGET_FILE_BYTES
        ),
        "failures": _pack(failed, [part.num_failed for part in failed], MAX_FAILURES_PER_FILE),
    }
    for kind, groups in packed.items():
        for number, group in enumerate(groups):
            yield FilePlan(
                kind=kind,
                key=_file_key(kind, claim, f"{number:05d}"),
                parts={part.unit_id: part.sha256 for part in group},
            )


def _pack(items: Sequence[PartSummary], weights: Sequence[int], capacity: int) -> Iterator[list[PartSummary]]:
    group: list[PartSummary] = []
    total = 0
    for item, weight in zip(items, weights, strict=True):
        if group and total + weight > capacity:
            yield group
            group, total = [], 0
        group.append(item)
        total += weight
    if group:
        yield group


def _file_key(kind: str, claim: Claim, number: str) -> str:
    space = claim.identity["space_id"]
    return f"{kind}/space={space}/run_date={claim.run_date}/part-{claim.run_id}-{number}.parquet"


# --- Ray tasks ----------------------------------------------------------------------------------------------------


@ray.remote
def _summarize_chunk(output_url: str, run_id: str, chunk_key: str, unit_ids: Sequence[str]) -> list[PartSummary]:
    output = storage.connect(output_url)
    return [parts.read_part(output, run_id, unit_id)[1] for unit_id in unit_ids]


@ray.remote
def _publish_file(output_url: str, claim: Claim, embedding_dim: int | None, file_plan: FilePlan) -> FileRef:
    """Write one file of labels/ or failures/ from its parts, which must be those that were sealed."""
    output = storage.connect(output_url)
    tables = []
    for unit_id, digest in file_plan.parts.items():
        table, summary = parts.read_part(output, claim.run_id, unit_id)
        if summary.sha256 != digest:
            raise ConflictError(f"{output_url}: part {unit_id} of run {claim.run_id} changed after it was sealed")
        failed = pc.is_valid(table.column("failure_kind"))
        tables.append(table.filter(failed if file_plan.kind == "failures" else pc.invert(failed)))
    table = pa.concat_tables(tables)
    uris = table.column("uri")
    if len(uris) > 1 and not pc.all(pc.less(uris[:-1], uris[1:])).as_py():
        raise ConflictError(
            f"{output_url}/{file_plan.key}: the rows of run {claim.run_id} are not in order of their uri"
        )
    rows = _failure_rows(table, claim) if file_plan.kind == "failures" else _label_rows(table, claim, embedding_dim)
    return _put_file(output, file_plan.key, rows, claim, schema.digest(file_plan.parts))


@ray.remote
def _publish_deletions(output_url: str, claim: Claim, source_key: str, number: str) -> FileRef:
    output = storage.connect(output_url)
    data = output.get(source_key)
    gone = pq.read_table(io.BytesIO(data))
    uris = [f"{claim.identity['input']}/{key}" for key in gone.column("key").to_pylist()]
    table = _with_run(pa.table({"uri": uris, "etag": gone.column("etag")}), claim, schema.DELETIONS)
    return _put_file(output, _file_key("deletions", claim, number), table, claim, hashlib.sha256(data).hexdigest())


@ray.remote
def _publish_catalog(output_url: str, claim: Claim, sealed_plan: Plan, base: Sequence[FileRef]) -> list[FileRef]:
    """The old catalog without what is gone or was planned, merged with tonight's outcomes; sorted by key."""
    output = storage.connect(output_url)
    gone = (row["key"] for each in sealed_plan.ranges for key in each.deletions for row in _rows(output.get(key)))
    fresh = _fresh_rows(output, claim, sealed_plan)
    files: list[FileRef] = []
    rows: list[plan.CatalogRow] = []

    def write() -> None:
        key = f"_catalog/space={claim.identity['space_id']}/{claim.run_id}-{len(files):05d}.parquet"
        table = pa.Table.from_pylist(rows, schema.CATALOG)
        files.append(
            _put_file(output, key, table, claim, schema.digest([list(map(str, row.values())) for row in rows]))
        )
        rows.clear()

    key_bytes = 0
    for row in merge_catalog(plan.read_catalog(output, base), gone, fresh):
        rows.append(row)
        key_bytes += len(row["key"].encode())
        if len(rows) == MAX_CATALOG_ROWS or key_bytes >= MAX_CATALOG_KEY_BYTES:
            write()
            key_bytes = 0
    if rows or not files:
        write()
    return files


def merge_catalog(
    old: Iterator[plan.CatalogRow], gone: Iterator[str], fresh: Iterator[plan.CatalogRow]
) -> Iterator[plan.CatalogRow]:
    """`old` without the keys in `gone`, with the rows in `fresh` replacing or joining it. All are sorted by key."""
    next_gone, next_fresh = next(gone, None), next(fresh, None)
    for row in old:
        while next_fresh is not None and next_fresh["key"] < row["key"]:
            yield next_fresh
            next_fresh = next(fresh, None)
        if next_gone == row["key"]:
            next_gone = next(gone, None)
        elif next_fresh is not None and next_fresh["key"] == row["key"]:
            yield next_fresh
            next_fresh = next(fresh, None)
        else:
            yield row
    while next_fresh is not None:
        yield next_fresh
        next_fresh = next(fresh, None)


def _fresh_rows(output: Store, claim: Claim, sealed_plan: Plan) -> Iterator[plan.CatalogRow]:
    columns = ["key", "etag", "size_bytes", "last_modified", "failure_kind"]
    for chunk in sealed_plan.chunks:
        for unit_id in chunk.unit_ids:
            table, _ = parts.read_part(output, claim.run_id, unit_id)
            for row in table.select(columns).to_pylist():
                yield {**row, "run_seq": claim.run_seq}


def _rows(data: bytes) -> list[plan.CatalogRow]:
    return list(pq.read_table(io.BytesIO(data)).to_pylist())


# --- rows and files -----------------------------------------------------------------------------------------------


def _label_rows(table: pa.Table, claim: Claim, embedding_dim: int | None) -> pa.Table:
    return _with_run(table, claim, schema.labels(embedding_dim))


def _failure_rows(table: pa.Table, claim: Claim) -> pa.Table:
    is_transient = pc.is_in(table.column("failure_kind"), pa.array([str(kind) for kind in TRANSIENT]))
    return _with_run(table.append_column("is_transient", is_transient), claim, schema.FAILURES)


def _with_run(table: pa.Table, claim: Claim, wanted: pa.Schema) -> pa.Table:
    """`table` with the run's own columns, as `wanted`."""
    constants = {
        "model_id": claim.model_id,
        "model_revision": claim.model_revision,
        "space_id": claim.identity["space_id"],
        "run_id": claim.run_id,
        "run_seq": claim.run_seq,
    }
    columns = []
    for field in wanted:
        if field.name == "image_id":
            columns.append(pa.array([schema.image_id(uri) for uri in table.column("uri").to_pylist()], field.type))
        elif field.name in constants:
            columns.append(pa.repeat(pa.scalar(constants[field.name], field.type), len(table)))
        else:
            columns.append(table.column(field.name))
    return pa.table(columns, schema=wanted)


def _put_file(output: Store, key: str, table: pa.Table, claim: Claim, parts_digest: str) -> FileRef:
    """Write a published file once. One that exists must come from the same parts; it may differ in its bytes when
    another version of the Parquet writer made it.
    """
    metadata = {**claim.metadata, "label_bucket.run_id": claim.run_id, _PARTS_DIGEST.decode(): parts_digest}
    if key.startswith("labels/"):
        metadata["huggingface"] = _huggingface_features(table.schema)
    data = parts.encode(table, metadata)
    standing = output.put_if_absent(key, data)
    if standing is not data:
        found = (pq.read_schema(io.BytesIO(standing)).metadata or {}).get(_PARTS_DIGEST, b"").decode()
        if found != parts_digest:
            raise ConflictError(f"{output.root}/{key}: exists and was not made from the parts of run {claim.run_id}")
    return FileRef(key=key, num_rows=len(table), size_bytes=len(standing), sha256=hashlib.sha256(standing).hexdigest())


def _huggingface_features(table_schema: pa.Schema) -> str:
    """The footer value that tells `datasets` the types of the columns."""
    from datasets import Features

    return json.dumps({"info": {"features": Features.from_arrow_schema(table_schema).to_dict()}})
