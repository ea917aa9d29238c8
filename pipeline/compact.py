"""compact_labels(options): the current view as a snapshot of right-sized files, then what it replaced is removed.

    catalog files ──> rows of the view, by partition (task) ──> shuffle by file group ──> files (task) ──> manifest, log

    snapshots/space=…/<snapshot id>/[run_date=…/ | label=… / first_key=…/]part-<group>-<n>.parquet
    _catalog/space=…/snapshot-<snapshot id>.json         the list of these files

Like `dataset` it imports ray.data, because regrouping rows is what Ray Data's shuffle is for; it has nothing else in
common with the wiring of units. Names follow from the log, so an attempt that died is simply run again. Nothing is
claimed while it works: a night that is published meanwhile is not in the snapshot, which says what it covers.
"""

import io
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Literal
from urllib.parse import quote

import pyarrow as pa
import pyarrow.compute as pc
import ray.data
from ray.data import DataContext, Dataset

from pipeline import catalog, engine, files, log, retention, schema, snapshot, storage, view
from pipeline.errors import ConfigError, ConflictError
from pipeline.faults import crash_point
from pipeline.log import Claim, FileRef, State
from pipeline.storage import MAX_PUT_BYTES, Store
from pipeline.view import View

PartitionBy = Literal["none", "run_date", "label", "first_key"]

TARGET_FILE_BYTES = 84 * 2**20
"""A group of rows is cut into equal files of at most this size, as estimated; no file gets larger than 96 MiB."""
MAX_PARTITIONS = 10_000
"""Every partition has at least one file: more would make a snapshot that is slower to read than what it replaces."""
_NO_VALUE = "__HIVE_DEFAULT_PARTITION__"
"""How a path says NULL to every reader of such partitions."""
_TASK: dict[str, Any] = {"num_cpus": 0.5, "memory": 1 << 30}
"""Up to 200,000 rows of the view and a file of labels; or a group of rows, its files' size and one of these more."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a compaction is asked for."""

    output: str
    space: str | None = None
    partition_by: PartitionBy = "none"
    keep_runs: int | None = None
    """Label files of runs older than the newest so many are removed where a snapshot holds their rows; None: none."""
    grace: timedelta = timedelta(hours=24)
    """How long readers may still use what a snapshot replaced."""
    dry_run: bool = False


def compact_labels(
    options: Options, *, start_engine: Callable[[], None], now: Callable[[], datetime] = lambda: datetime.now(UTC)
) -> str:
    """Write a snapshot of the view unless there is one of it already, and remove what is superseded; what was done.

    `start_engine` connects to Ray and is called if there are rows to write. Raises ConfigError, SourceError, or
    ConflictError for an open run or a damaged output; running the same again is always right.
    """
    output = storage.connect_output(options.output)
    state = log.read(output)
    if not options.dry_run:
        state = snapshot.settle(output, state, _text(now()))
    if state.open_claim is not None and "kind" not in state.open_claim.identity:
        raise ConflictError(
            f"{output.root}: expected no open run, found {state.open_claim.run_id} of {state.open_claim.created_at};"
            " finish it with its own command, or give it up with --abandon-run, then compact"
        )
    current = view.resolve(output, options.space, state)
    done = [_snapshot(output, current, state, options, start_engine, now)]
    if options.keep_runs is not None:
        done.append(_retire(output, current.space_id, options, options.keep_runs, now))
    return "; ".join(done)


# --- the snapshot -------------------------------------------------------------------------------------------------


def _snapshot(
    output: Store,
    current: View,
    state: State,
    options: Options,
    start_engine: Callable[[], None],
    now: Callable[[], datetime],
) -> str:
    standing, through_seq = current.snapshot, current.newest.run_seq
    if (
        standing is not None
        and standing.through_seq == through_seq
        and standing.identity["partition_by"] == options.partition_by
    ):
        return f"snapshot {standing.run_id} holds the view after run {current.newest.run_id} already"
    num_rows = sum(each.ref.num_rows for each in current.labels)
    num_bytes = sum(each.ref.size_bytes for each in current.labels)
    size = f"{len(current.labels):,} label files with {num_rows:,} rows, superseded ones among them, {_gb(num_bytes)}"
    if options.dry_run:
        return f"dry run: would write the view after run {current.newest.run_id} anew, from {size}"
    _log.info("writing the view after run %s anew, from %s", current.newest.run_id, size)
    replaces_seq = standing.run_seq if standing else 0
    job = Job(
        output_url=output.root,
        current=current,
        partition_by=options.partition_by,
        snapshot_id=f"{through_seq:08d}-{_identity(current, options.partition_by, replaces_seq)}",
        run_dates={run.run_seq: run.run_date for run in state.runs},
        claim=log.read_claim(output, through_seq),
        row_bytes=num_bytes / max(1, num_rows),
    )
    written: list[FileRef] = []
    if num_rows:
        start_engine()
        with engine.errors():
            written = write_files(job)
    crash_point("snapshot-written")
    manifest = catalog.write_manifest(output, current.space_id, f"snapshot-{job.snapshot_id}", written)
    entry = snapshot.add_snapshot(output, current.newest, manifest, options.partition_by, lambda: _text(now()))
    return (
        f"committed snapshot {entry.run_id} of the view after run {current.newest.run_id}: {manifest.num_rows:,} rows"
        f" in {len(written):,} files, {_gb(sum(ref.size_bytes for ref in written))}"
    )


def _identity(current: View, partition_by: PartitionBy, replaces_seq: int) -> str:
    """What makes it this snapshot; with the one before, so that files that are gone are never written again."""
    return schema.digest([current.space_id, partition_by, replaces_seq])[:8]


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything a task has to know."""

    output_url: str
    current: View
    partition_by: PartitionBy
    snapshot_id: str
    run_dates: Mapping[int, str]
    claim: Claim
    """Of the newest run that is covered: what the footers say."""
    row_bytes: float
    """Size of a row in the files that are read."""


def write_files(job: Job) -> list[FileRef]:
    """Write the files of a snapshot and give them in order of their names, having counted that every row is in one.

    Raises ConfigError for more than MAX_PARTITIONS, ConflictError for damage.
    """
    _quieten()
    numbers = range(len(job.current.catalog))
    counts: list[dict[str, int]] = [{} for _ in numbers]
    for row in (
        _tasks([{"number": number} for number in numbers])
        .map_batches(partial(_count, job), batch_size=1, batch_format="pyarrow", **_TASK)
        .iter_rows()
    ):
        counts[row["number"]][row["partition"]] = row["num_rows"]
    num_partitions = len({partition for each in counts for partition in each})
    if num_partitions > MAX_PARTITIONS:
        raise ConfigError(
            f"--partition-by {job.partition_by}: expected at most {MAX_PARTITIONS:,} different values, found"
            f" {num_partitions:,}; choose another one"
        )
    groups = group_rows(counts, max_rows=max(1, int(TARGET_FILE_BYTES / max(1.0, job.row_bytes))))
    if not any(groups):
        return []
    rows = _merged(job, groups) if job.partition_by == "none" else _regrouped(job, groups)
    written = sorted((FileRef(**row) for row in rows.iter_rows()), key=lambda ref: ref.key)
    expected, found = sum(sum(each.values()) for each in counts), sum(ref.num_rows for ref in written)
    if found != expected:
        raise ConflictError(
            f"{job.output_url}: expected {expected:,} rows in snapshot {job.snapshot_id}, found {found:,}; nothing was"
            " committed"
        )
    return written


def group_rows(counts: Sequence[Mapping[str, int]], *, max_rows: int) -> list[dict[str, str]]:
    """For every file of the catalog, in key order: its partitions -> the group of rows that they go into.

    A group is of one partition and of neighbouring catalog files, and has at most the rows of one of these more than
    `max_rows`. `counts` are the rows of each partition in each catalog file.
    """
    groups: list[dict[str, str]] = []
    numbers: Counter[str] = Counter()
    filled: Counter[str] = Counter()
    for each in counts:
        groups.append({})
        for partition, num_rows in sorted(each.items()):
            if filled[partition] >= max_rows:
                filled[partition], numbers[partition] = 0, numbers[partition] + 1
            filled[partition] += num_rows
            groups[-1][partition] = f"{partition}part-{numbers[partition]:05d}"
    return groups


def _merged(job: Job, groups: Sequence[Mapping[str, str]]) -> Dataset:
    """Files of neighbours in key order: they are together already, so nothing has to be shuffled."""
    numbers: dict[str, list[int]] = {}
    for number, each in enumerate(groups):
        for group in each.values():
            numbers.setdefault(group, []).append(number)
    items = [{"group": group, "numbers": each} for group, each in numbers.items()]
    return _tasks(items).map_batches(partial(_merge, job), batch_size=1, batch_format="pyarrow", **_TASK)


def _regrouped(job: Job, groups: Sequence[Mapping[str, str]]) -> Dataset:
    """Files of partitions, whose rows come from everywhere."""
    items: list[dict[str, Any]] = [
        {"number": number, "partitions": list(each), "groups": list(each.values())}
        for number, each in enumerate(groups)
        if each
    ]
    return (
        _tasks(items)
        .map_batches(partial(_split, job), batch_size=1, batch_format="pyarrow", **_TASK)
        .groupby("group", num_partitions=len({group for each in items for group in each["groups"]}))
        .map_groups(partial(_write, job), batch_format="pyarrow", **_TASK)
    )


def _tasks(items: list[dict[str, Any]]) -> Dataset:
    return ray.data.from_items(items, override_num_blocks=len(items))


def _quieten() -> None:
    context = DataContext.get_current()
    context.target_max_block_size = None
    context.enable_progress_bars = False
    context.execution_options.verbose_progress = False
    context.raise_original_map_exception = True


# --- tasks --------------------------------------------------------------------------------------------------------


def _count(job: Job, item: pa.Table) -> pa.Table:
    """Rows of each partition in one file of the catalog; for `label` that takes reading the labels."""
    output, (number,) = storage.connect(job.output_url), item.column("number").to_pylist()
    ref = job.current.catalog[number]
    if job.partition_by == "label":
        rows = view.rows(output, job.current, ref, ["uri", "run_seq", "label_names"])
    else:
        wanted = view.wanted_rows(catalog.read_table(output, ref))
        uris = view.uris_of(job.current.root, wanted.column("key"))
        rows = pa.table({"uri": uris, "run_seq": wanted.column("run_seq")})
    counts = Counter(partitions_of(job, rows))
    return pa.table(
        {
            "number": pa.repeat(pa.scalar(number), len(counts)),
            "partition": pa.array(counts.keys(), pa.string()),
            "num_rows": pa.array(counts.values(), pa.int64()),
        }
    )


def _split(job: Job, item: pa.Table) -> pa.Table:
    """The view's rows of one file of the catalog, one row per partition: its group, and its rows as an Arrow stream.

    The shuffle moves few large rows, and what is in them keeps its types.
    """
    (work,) = item.to_pylist()
    rows = view.rows(storage.connect(job.output_url), job.current, job.current.catalog[work["number"]])
    partitions = pa.array(partitions_of(job, rows), pa.string())
    pieces = [_packed(rows.filter(pc.equal(partitions, partition))) for partition in work["partitions"]]
    return pa.table({"group": work["groups"], "rows": pa.array(pieces, pa.large_binary())})


def _merge(job: Job, item: pa.Table) -> pa.Table:
    """The files of a group that is some neighbouring files of the catalog."""
    output, (work,) = storage.connect(job.output_url), item.to_pylist()
    refs = [job.current.catalog[number] for number in work["numbers"]]
    return _put(job, work["group"], pa.concat_tables(view.rows(output, job.current, ref) for ref in refs))


def _write(job: Job, group: pa.Table) -> pa.Table:
    """The files of a group that was shuffled together."""
    rows = pa.concat_tables(_unpacked(data) for data in group.column("rows")).sort_by("uri")
    return _put(job, group.column("group")[0].as_py(), rows)


def _put(job: Job, name: str, rows: pa.Table) -> pa.Table:
    """Write the files of a group; what the log says of them."""
    output = storage.connect(job.output_url)
    folder = f"snapshots/space={job.current.space_id}/{job.snapshot_id}"
    claim = replace(job.claim, run_id=job.snapshot_id)
    refs = [
        files.put(output, f"{folder}/{name}-{number:03d}.parquet", each, claim, _digest(each))
        for number, each in enumerate(_cut(rows, job.row_bytes))
    ]
    return pa.Table.from_pylist([asdict(ref) for ref in refs])


def partitions_of(job: Job, rows: pa.Table) -> list[str]:
    """The folder of each row, `name=value/` with the value as in a URL, or empty; needs uri, run_seq, label_names."""
    if job.partition_by == "none":
        return [""] * len(rows)
    values: Iterator[str | None]
    if job.partition_by == "run_date":
        values = (job.run_dates[run_seq] for run_seq in rows.column("run_seq").to_pylist())
    elif job.partition_by == "label":
        values = (names[0] for names in rows.column("label_names").to_pylist())
    else:
        keys = (uri.removeprefix(f"{job.current.root}/") for uri in rows.column("uri").to_pylist())
        values = (key.partition("/")[0] if "/" in key else None for key in keys)
    # An empty value is NULL as well: no reader tells them apart.
    return [f"{job.partition_by}={quote(value, safe='') if value else _NO_VALUE}/" for value in values]


def _cut(rows: pa.Table, row_bytes: float) -> Iterator[pa.Table]:
    """Equal files of at most TARGET_FILE_BYTES, as estimated, and of MAX_PUT_BYTES for sure."""
    num_files = max(1, -(-int(len(rows) * row_bytes) // TARGET_FILE_BYTES))
    # Encoded twice only where it may not fit: what Parquet makes of a table is no larger than the table.
    is_sure = rows.nbytes / num_files <= 0.9 * MAX_PUT_BYTES
    pieces = [rows.slice(*_span(len(rows), part, num_files)) for part in range(num_files)]
    if not is_sure:
        sizes = [len(schema.encode(each)) for each in pieces]
        num_files = max(num_files, -(-num_files * max(sizes) // (MAX_PUT_BYTES - 2**20)))
        pieces = [rows.slice(*_span(len(rows), part, num_files)) for part in range(num_files)]
    yield from (each for each in pieces if len(each))


def _span(num_rows: int, part: int, num_parts: int) -> tuple[int, int]:
    begin, end = num_rows * part // num_parts, num_rows * (part + 1) // num_parts
    return begin, end - begin


def _digest(rows: pa.Table) -> str:
    """Which rows these are."""
    return schema.digest([rows.column("uri").to_pylist(), rows.column("run_seq").to_pylist()])


def _packed(rows: pa.Table) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, rows.schema) as stream:
        stream.write_table(rows)
    return sink.getvalue()


def _unpacked(data: pa.LargeBinaryScalar) -> pa.Table:
    with pa.ipc.open_stream(data.as_buffer()) as stream:
        return stream.read_all()


# --- what the snapshot replaced -----------------------------------------------------------------------------------


def _retire(output: Store, space_id: str, options: Options, keep_runs: int, now: Callable[[], datetime]) -> str:
    state = log.read(output)
    retires = retention.superseded(state, space_id, keep_runs=keep_runs, grace=options.grace, now=now())
    if retires and not options.dry_run:
        newest = state.newest(space_id)
        assert newest is not None
        snapshot.add_retirement(output, newest, retires, lambda: _text(now()))
        state = log.read(output)
    found = retention.removable(output, state, space_id, state.retired | {*retires}, grace=options.grace, now=now())
    if options.dry_run:
        prefix, verb = "would retire", "would remove"
    else:
        output.delete(found.keys)
        prefix, verb = "retired", "removed"
    text = f"{prefix} {len(retires):,} runs and snapshots, {verb} {len(found.keys):,} objects, {_gb(found.num_bytes)}"
    until = retention.waits_until(state, space_id, grace=options.grace)
    if until is not None and until > now():
        text += f"; what the newest snapshot replaces may go after {_text(until)}"
    return text


def _text(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds")


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3f} GB"
