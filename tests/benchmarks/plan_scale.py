"""What a night costs besides fetching and labeling, for any number of keys, and what that means at 1e9.

A synthetic listing (`synthetic.Bucket`) is planned against a catalog of as many rows on disk, one Ray task per range as
`run` does it; every changed or new object gets a row in a real part, without embedding; then the real publishing reads
the parts back, writes labels, deletions, the new catalog and the log entry. All counts are compared with those known
from the arithmetic, and the new catalog with the listing it must describe.

    python tests/benchmarks/plan_scale.py --num-keys 1000000 --num-keys 10000000
"""

import argparse
import contextlib
import dataclasses
import json
import logging
import math
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import plan_scale  # by this name Ray's workers find it, too
import pyarrow as pa
import ray
import synthetic
from synthetic import Bucket

from pipeline import catalog, files, listing, log, parts, plan, publish, schema, storage, store_s3
from pipeline.catalog import KeyRange
from pipeline.diff import Rules
from pipeline.listing import Scope
from pipeline.log import Claim, Entry, FileRef
from pipeline.plan import Range, UnitSizes
from pipeline.storage import Store
from pipeline.tasks import in_order

BILLION = 1_000_000_000
SPACE = "synthetic-00000000"
NOW = "2026-11-25T00:00:00+00:00"
RULES = Rules(scope=Scope(), limit=None, records_deletions=True)
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
NUM_XML_PAGES = 100
LABEL_UNITS = 56
"""About one file of labels/."""
DIM = 384


@dataclass(frozen=True, kw_only=True)
class PlannedRange:
    """The plan of a range, and what it took in its worker."""

    summary: Range
    num_requests: int
    cpu_s: float
    before_mb: float
    peak_mb: float


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What one night took."""

    num_ranges: int
    num_rows_before: int
    counts: dict[str, int]
    num_requests: int
    plan_s: float
    plan_cpu_s: float
    plan_before_mb: float
    plan_peak_mb: float
    parts_s: float
    publish_s: float
    publish_peak_mb: float
    driver_before_mb: float
    driver_peak_mb: float
    file_bytes: dict[str, int]


def main() -> None:
    """Measure each number of keys in a driver of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-keys", type=int, action="append", help="may be repeated; 1e6 and 1e7")
    parser.add_argument("--churn", type=float, default=0.01, help="share that is changed (40 %%), new (40 %%), gone")
    parser.add_argument("--num-workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rows-per-file", type=int, default=catalog.MAX_FILE_ROWS)
    options = parser.parse_args()
    for num_keys in options.num_keys or [10**6, 10**7]:
        arguments = (num_keys, options.churn, options.num_workers, options.rows_per_file)
        _in_own_process(plan_scale.measure, *arguments)
    _in_own_process(plan_scale.cut_first_night, BILLION)
    _in_own_process(plan_scale.publish_labels, LABEL_UNITS)
    _in_own_process(plan_scale.parse_pages, Bucket(num_keys=max(options.num_keys or [10**7]), night=2))


def _in_own_process(function: object, *arguments: object) -> None:
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)  # type: ignore[arg-type]
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(process.exitcode)


def measure(num_keys: int, churn: float, num_workers: int, rows_per_file: int) -> None:
    """One night on a Ray of its own; prints what it took."""
    bucket = Bucket(
        num_keys=num_keys,
        night=2,
        changed=round(churn * 0.4 * synthetic.PERIOD),
        new=round(churn * 0.4 * synthetic.PERIOD),
        gone=round(churn * 0.2 * synthetic.PERIOD),
    )
    # Ray's workers find these modules by the names under which they are imported here.
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    with tempfile.TemporaryDirectory() as folder:
        ray.init(
            address="local",
            num_cpus=num_workers,
            logging_level=logging.ERROR,
            log_to_driver=False,
            include_dashboard=False,
        )
        figures = night(storage.connect(folder), bucket, rows_per_file, num_workers)
        ray.shutdown()
    for line in report(figures, num_workers, rows_per_file):
        print(line, flush=True)


# --- one night ----------------------------------------------------------------------------------------------------


def night(output: Store, bucket: Bucket, rows_per_file: int, num_workers: int) -> Figures:
    """Night 1's catalog, then all of night 2; AssertionError unless everything adds up to what `bucket` knows."""
    base = first_night(output, dataclasses.replace(bucket, night=1), rows_per_file, num_workers)
    _reset_peaks()
    driver_before_mb = _peak_mb("self")
    started_s = time.monotonic()
    claim = _claim(output)
    base_files = catalog.files_of(output, base)
    with mock.patch.object(catalog, "MAX_FILE_ROWS", rows_per_file):
        ranges = plan.seal_ranges(output, claim.run_id, lambda: plan.find_ranges(bucket, base_files))
    sizes = UnitSizes.of(224, len(ranges))
    planned = list(in_order(lambda each: _plan_range.remote(bucket, output.root, claim.run_id, each, sizes), ranges))
    sealed = plan.seal(output, claim.run_id, [each.summary for each in planned])
    planned_s = time.monotonic()
    assert sealed.counts == bucket.expected_counts(), (sealed.counts, bucket.expected_counts())
    list(in_order(lambda each: _write_parts.remote(output.root, claim.run_id, each.range_id), sealed.ranges))
    labeled_s = time.monotonic()
    _reset_peaks(worker_pids())
    totals = publish.read_totals(output, claim, sealed)
    publish.seal(output, claim, sealed, totals)
    entry, _ = publish.finish(output, claim, base, NOW)
    publish_s = time.monotonic() - labeled_s
    publish_peak_mb = max(map(_peak_mb, worker_pids()), default=0)
    driver_peak_mb = _peak_mb("self")
    assert entry.counts["labeled"] == sealed.counts["planned"]
    assert entry.catalog is not None
    renewed = catalog.files_of(output, entry)
    assert sum(file.num_rows for file in renewed) == sealed.counts["listed"]
    next_ranges = catalog.ranges(renewed, is_divisible=True)
    for some in {0, len(next_ranges) // 2, len(next_ranges) - 1}:
        found = ray.get(_plan_next_night.remote(bucket, output.root, next_ranges[some], sizes))
        assert found["unchanged"] == found["listed"] == next_ranges[some].num_rows, found
    run = f"_runs/{claim.run_id}"
    keys = {
        "plan.json": f"{run}/plan.json",
        "ranges.json": f"{run}/plan/ranges.json",
        "publish.json": f"{run}/publish.json",
        "log entry": f"_log/{claim.run_seq:08d}.json",
        "manifest": entry.catalog.key,
    }
    file_bytes = {name: len(output.get(key)) for name, key in keys.items()}
    file_bytes["catalog"] = sum(file.size_bytes for file in renewed)
    return Figures(
        num_ranges=len(ranges),
        num_rows_before=sum(file.num_rows for file in base_files),
        counts=dict(sealed.counts),
        num_requests=sum(each.num_requests for each in planned),
        plan_s=planned_s - started_s,
        plan_cpu_s=sum(each.cpu_s for each in planned),
        plan_before_mb=min(each.before_mb for each in planned),
        plan_peak_mb=max(each.peak_mb for each in planned),
        parts_s=labeled_s - planned_s,
        publish_s=publish_s,
        publish_peak_mb=publish_peak_mb,
        driver_before_mb=driver_before_mb,
        driver_peak_mb=driver_peak_mb,
        file_bytes=file_bytes,
    )


def first_night(output: Store, bucket: Bucket, rows_per_file: int, num_workers: int) -> Entry:
    """A committed run that labeled all of the first night, as far as the second one looks at it: its catalog.

    Its files are made outside of Ray, whose workers' memory is to be that of the second night.
    """
    claim = _claim(output)
    arguments = [
        (bucket, output.root, claim, start, rows_per_file) for start in range(0, bucket.num_keys, rows_per_file)
    ]
    with multiprocessing.get_context("spawn").Pool(num_workers) as pool:
        refs = pool.starmap(plan_scale.write_catalog, arguments)
    manifest = catalog.write_manifest(output, SPACE, claim.run_id, refs)
    entry = log.entry_of(claim, "run", NOW, catalog=manifest)
    log.commit(output, entry)
    return entry


def _claim(output: Store, embedding_dim: int | None = None) -> Claim:
    return log.claim(
        output,
        log.read(output),
        {"input": f"s3://{synthetic.BUCKET}/in", "space_id": SPACE, "embedding_dim": embedding_dim},
        run_date="2026-11-25",
        model_id="synthetic",
        model_revision="none",
        metadata={"label_bucket.space_id": SPACE},
        now=NOW,
    )


def write_catalog(bucket: Bucket, output_url: str, claim: Claim, start: int, num_rows: int) -> FileRef:
    """One file of the first night's catalog: so many numbers from `start` on."""
    rows = bucket.catalog_rows(start, min(start + num_rows, bucket.num_keys))
    key = f"_catalog/space={SPACE}/{claim.run_id}-{start // num_rows:05d}-00000.parquet"
    return files.put(storage.connect(output_url), key, rows, claim, "synthetic")


@ray.remote(num_cpus=1)
def _plan_range(bucket: Bucket, output_url: str, run_id: str, key_range: KeyRange, sizes: UnitSizes) -> PlannedRange:
    _reset_peaks()
    before_mb, started_s = _peak_mb("self"), time.process_time()
    planned = plan.plan_range(bucket, storage.connect(output_url), run_id, key_range, RULES, sizes)
    return PlannedRange(
        summary=planned.summary(),
        num_requests=bucket.num_requests,
        cpu_s=time.process_time() - started_s,
        before_mb=before_mb,
        peak_mb=_peak_mb("self"),
    )


@ray.remote(num_cpus=1)
def _plan_next_night(bucket: Bucket, output_url: str, key_range: KeyRange, sizes: UnitSizes) -> dict[str, int]:
    """The counts of another night, with nothing new."""
    return plan.preview_range(bucket, storage.connect(output_url), key_range, RULES, sizes).counts


@ray.remote(num_cpus=1)
def _write_parts(output_url: str, run_id: str, range_id: str) -> None:
    output = storage.connect(output_url)
    for chunk in plan.read_range(output, run_id, range_id).chunks:
        for unit_id in chunk.unit_ids:
            parts.write_part(output, run_id, range_id, unit_id, _labeled(plan.read_unit(output, chunk.key, unit_id)))


def _labeled(objects: pa.Table, vectors_ND: Any = None) -> pa.Table:
    """Every object with the same five labels, and these vectors."""
    same = {
        "width_px": 640,
        "height_px": 480,
        "label_ids": [1, 2, 3, 4, 5],
        "label_names": ["one", "two", "three", "four", "five"],
        "label_scores": [0.5, 0.2, 0.1, 0.1, 0.05],
    }
    wanted = schema.labeled(None)
    table = pa.table(
        [
            objects.column(field.name)
            if field.name in objects.column_names
            else pa.array([same.get(field.name)] * len(objects), field.type)
            for field in wanted
        ],
        schema=wanted,
    )
    if vectors_ND is None:
        return table
    flat = pa.array(vectors_ND.ravel())
    return pa.table(
        [*table.columns, pa.FixedSizeListArray.from_arrays(flat, type=schema.embedding_type(vectors_ND.shape[1]))],
        schema=schema.labeled(vectors_ND.shape[1]),
    )


# --- memory and time ------------------------------------------------------------------------------------------------


def worker_pids() -> list[str]:
    """Processes of Ray's workers: grandchildren of this one."""
    parent_of = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            parent_of[path.parent.name] = path.read_text().rpartition(")")[2].split()[1]
    return [pid for pid, parent in parent_of.items() if parent_of.get(parent) == str(os.getpid())]


def _reset_peaks(pids: Sequence[str] = ("self",)) -> None:
    for pid in pids:
        with contextlib.suppress(OSError):
            Path(f"/proc/{pid}/clear_refs").write_text("5")


def _peak_mb(pid: str) -> float:
    """Highest resident memory since it was reset; 0 for a process that has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return 0


# --- what else there is -------------------------------------------------------------------------------------------


def cut_first_night(num_keys: int) -> None:
    """Where a first run of so many keys is cut, what finding that takes, and what planning one range; prints it."""
    bucket = Bucket(num_keys=num_keys, night=1)
    started_s = time.monotonic()
    ranges = catalog.between(listing.borders(bucket))
    wall_s = time.monotonic() - started_s
    sizes = sorted(_num_numbers(bucket, each) for each in ranges)
    print(
        f"first night of {num_keys:,} keys: {len(ranges):,} ranges after {bucket.num_requests:,} LIST requests"
        f" ({wall_s:.1f} s here), the largest has {sizes[-1]:,} keys, the median {sizes[len(sizes) // 2]:,}",
        flush=True,
    )
    _reset_peaks()
    before_mb, started_s = _peak_mb("self"), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        output = storage.connect(folder)
        middle, unit_sizes = ranges[len(ranges) // 2], UnitSizes.of(224, len(ranges))
        planned = plan.plan_range(bucket, output, "run", middle, RULES, unit_sizes)
        cpu_s = time.process_time() - started_s
        num_bytes = sum(info.size_bytes for page in output.list_pages() for info in page)
    num_new = planned.counts["planned"]
    print(
        f"  a range of {num_new:,} new keys: {cpu_s / num_new * 1e6:.2f} µs of CPU per key, {num_bytes / num_new:.1f}"
        f" bytes of plan per key, peak RSS {_peak_mb('self'):.0f} MB ({before_mb:.0f} before)",
        flush=True,
    )


def _num_numbers(bucket: Bucket, key_range: KeyRange) -> int:
    end = bucket.num_keys if key_range.through is None else bucket.number_after(key_range.through)
    return end - (bucket.number_after(key_range.after) if key_range.after else 0)


def publish_labels(num_units: int) -> None:
    """One file of labels/ from full units with embeddings, as a first run publishes it; prints what that takes."""
    bucket = Bucket(num_keys=num_units * plan.MAX_UNIT_ROWS, night=1, new=0)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        output = storage.connect(folder)
        claim = _claim(output, embedding_dim=DIM)
        sources = []
        for start in range(0, bucket.num_keys, plan.MAX_UNIT_ROWS):
            infos = bucket.infos(bucket.existing(start, start + plan.MAX_UNIT_ROWS))
            vectors = rng.normal(size=(len(infos), DIM)).astype(np.float32)
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
            objects = plan.objects_table(bucket.root, infos)
            unit_id = plan.unit_id(objects)
            part = parts.write_part(output, claim.run_id, "00000", unit_id, _labeled(objects, vectors))
            sources.append(("00000", unit_id, part.sha256))
        group = publish.FileGroup(kind="labels", number=0, range_ids=["00000"])
        output.put(f"_runs/{claim.run_id}/publish/labels-00000.json", json.dumps([sources]).encode())
        _reset_peaks()
        started_s = time.process_time()
        for _, unit_id, _ in sources:
            parts.read_part(output, claim.run_id, "00000", unit_id)
        read_s = time.process_time() - started_s
        started_s = time.process_time()
        published, _ = publish._publish_file._function(output.root, claim, group, 0)  # type: ignore[attr-defined]
        publish_s = time.process_time() - started_s
    num_rows = published.num_rows
    print(
        f"labels with vectors of {DIM}: {published.size_bytes / num_rows:,.0f} bytes and"
        f" {(read_s + publish_s) / num_rows * 1e6:.1f} µs of CPU per image to check the parts and publish a file of"
        f" {published.size_bytes / 2**20:.0f} MiB, peak RSS {_peak_mb('self'):.0f} MB",
        flush=True,
    )


def parse_pages(bucket: Bucket) -> None:
    """Pages of `bucket` through an HTTP server and the real client: equal, and what that costs; prints it."""
    starts = [synthetic.key_of(number * bucket.num_keys // NUM_XML_PAGES) for number in range(NUM_XML_PAGES)]
    with synthetic.serve(bucket) as url:
        os.environ |= {**CREDENTIALS, "AWS_ENDPOINT_URL": url}
        source = store_s3.S3Store(bucket.root)
        next(source.list_pages())  # builds the client
        cpu_s, num_keys = 0.0, 0
        for start in starts:
            started_s = time.process_time()
            page = next(source.list_pages(start_after=start))
            cpu_s += time.process_time() - started_s
            num_keys += len(page)
            assert page == next(bucket.list_pages(start_after=start)), f"the page after {start} is another one"
    started_s = time.process_time()
    num_made = sum(len(next(bucket.list_pages(start_after=start))) for start in starts)
    made_s = time.process_time() - started_s
    print(
        f"{len(starts)} pages as XML through s3fs's client: equal, {cpu_s / num_keys * 1e6:.1f} µs of CPU per key;"
        f" the synthetic listing itself {made_s / num_made * 1e6:.1f}",
        flush=True,
    )


def report(figures: Figures, num_workers: int, rows_per_file: int) -> Iterator[str]:
    """Lines: what was measured, and what it means at 1e9, linear in ranges."""
    counts, sizes = figures.counts, figures.file_bytes
    listed = counts["listed"]
    yield (
        f"{listed:,} keys listed against {figures.num_rows_before:,} rows in {figures.num_ranges:,} range(s) by"
        f" {num_workers} worker(s): {counts['planned']:,} to label, {counts['deleted']:,} gone"
    )
    publish_cpu_s = figures.publish_s * num_workers
    yield (
        f"  planning: {figures.plan_s:.1f} s, {listed / figures.plan_s:,.0f} keys/s,"
        f" {figures.plan_cpu_s / listed * 1e6:.2f} µs of CPU per key"
    )
    yield (
        f"  publishing: {figures.publish_s:.1f} s, {listed / figures.publish_s:,.0f} keys/s, at most"
        f" {publish_cpu_s / listed * 1e6:.2f} µs of CPU per key"
    )
    yield f"  LIST requests: {figures.num_requests:,}, for {math.ceil(listed / 1000):,} pages"
    yield f"  peak RSS of the driver: {figures.driver_peak_mb:.0f} MB, {figures.driver_before_mb:.0f} before"
    yield f"  of a range task: {figures.plan_peak_mb:.0f} MB, {figures.plan_before_mb:.0f} before"
    yield f"  of a publishing task: {figures.publish_peak_mb:.0f} MB"
    yield "  bytes: " + ", ".join(f"{name} {number:,}" for name, number in sizes.items())
    times = math.ceil(BILLION / rows_per_file) / figures.num_ranges
    yield (
        f"  at 1e9 keys, {times:g} times the ranges: planning {figures.plan_cpu_s * times / 3600:.2f} CPU-hours besides"
        f" parsing, publishing at most {publish_cpu_s * times / 3600:.2f}, {figures.num_requests * times:,.0f} LIST"
        f" requests, {', '.join(f'{name} {number * times / 1e6:,.1f} MB' for name, number in sizes.items())}"
    )


if __name__ == "__main__":
    main()
