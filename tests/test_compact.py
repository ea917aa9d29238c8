"""Compaction on a real Ray: the view as few files, whichever way they are laid out, and nights that go on as before."""

import io
import itertools
import json
import signal
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import boto3
import checkpoints
import duckdb
import nights
import numpy as np
import published
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cluster import Head
from hypothesis import given, settings
from hypothesis import strategies as st
from nights import BEGIN, Nights
from servers import S3Server
from test_retention import DEIT, VIT, named, rows
from test_view import by_globs, same

from pipeline import catalog, compact, log, schema, storage, verify, view
from pipeline.compact import Options, PartitionBy, compact_labels
from pipeline.draw import draw_file
from pipeline.errors import ConfigError, ConflictError
from pipeline.storage import Store

KINDS: Sequence[PartitionBy] = ("none", "run_date", "label", "first_key")


@pytest.fixture
def several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Nights:
    monkeypatch.setattr(catalog, "MAX_FILE_ROWS", 7)
    return nights.several(storage.connect(str(tmp_path / "out")))


def compacted(output: Store, partition_by: PartitionBy = "none", **options: Any) -> str:
    wanted = Options(output=output.root, space=DEIT, partition_by=partition_by, **options)
    return compact_labels(wanted, start_engine=lambda: None, now=lambda: BEGIN)


def audit(url: str) -> None:
    """What verify_labels.py looks at, but for the sample."""
    checks = verify.verify(verify.Audit(output_url=url, num_sample_rows=0), itertools.starmap)
    assert {check.status for check in checks} <= {"ok", "skipped"}, verify.summary(checks)


def snapshot_files(output: Store) -> list[log.FileRef]:
    state = log.read(output)
    entry = state.snapshot(DEIT)
    assert entry is not None
    return entry.labels


# --- layouts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("partition_by", KINDS)
def test_a_snapshot_holds_the_view_in_files_that_are_read_like_labels(
    driver: Head, several: Nights, partition_by: PartitionBy
) -> None:
    output = several.output
    before, vit = rows(output), rows(output, VIT)
    text = compacted(output, partition_by)
    assert text.startswith("committed snapshot 00000008-")
    assert f"{len(before)} rows in" in text
    refs = snapshot_files(output)
    assert set(view.files(output, DEIT)) == set(refs)
    assert rows(output) == before
    assert rows(output, VIT) == vit
    with duckdb.connect() as connection:
        assert same(by_globs(connection, output), pa.Table.from_pylist(before, schema.labels(nights.DIM)))
    newest = log.read_claim(output, 7)
    for ref in refs:
        file = pq.ParquetFile(io.BytesIO(output.get(ref.key)))
        uris = file.read().column("uri").to_pylist()
        assert uris == sorted(uris)
        assert (len(uris), f"{nights.ROOT}/{ref.first_key}", f"{nights.ROOT}/{ref.last_key}") == (
            ref.num_rows,
            uris[0],
            uris[-1],
        )
        assert file.schema_arrow.remove_metadata().equals(schema.labels(nights.DIM))
        metadata = {name.decode(): value.decode() for name, value in file.schema_arrow.metadata.items()}
        assert newest.metadata.items() <= metadata.items()
        assert list(json.loads(metadata["huggingface"])["info"]["features"]) == file.schema_arrow.names
    if partition_by != "none":
        check_folders(several, partition_by)


def check_folders(several: Nights, partition_by: PartitionBy) -> None:
    """DuckDB reads the value of a row's partition from its folder."""
    glob = f"{several.output.root.removeprefix('file://')}/snapshots/space={DEIT}/*/**/*.parquet"
    found = duckdb.execute(
        f"SELECT uri, run_seq, label_names[1], CAST({partition_by} AS VARCHAR) FROM"
        f" read_parquet('{glob}', hive_partitioning = true)"
    ).fetchall()
    assert {uri: run_seq for uri, run_seq, *_ in found} == several.current[DEIT]
    assert len(found) == len(several.current[DEIT])
    dates = {run.run_seq: run.run_date for run in log.read(several.output).runs}
    for uri, run_seq, label, value in found:
        key = uri.removeprefix(f"{nights.ROOT}/")
        first = key.partition("/")[0] if "/" in key else None
        assert value == {"run_date": dates[run_seq], "label": label, "first_key": first}[partition_by]
    assert len({value for *_, value in found}) > 2


def test_a_second_snapshot_is_made_of_the_first_and_what_came_after_it(driver: Head, several: Nights) -> None:
    output = several.output
    compacted(output, "label")
    assert compacted(output, "label").endswith(
        "holds the view after run 00000007-" + log.read(output).runs[-1].run_id[9:] + " already"
    )
    first = snapshot_files(output)
    several.publish(["a/00.jpg", "zz.jpg"], {"a/01.jpg": "corrupt"}, ["b b/00.jpg"])
    assert {ref.key for ref in first} < {ref.key for ref in view.files(output, DEIT)}
    before = rows(output)
    assert {row["uri"]: row["run_seq"] for row in before} == several.current[DEIT]
    compacted(output)
    assert {ref.key for ref in first}.isdisjoint(ref.key for ref in view.files(output, DEIT))
    assert rows(output) == before


def test_a_snapshot_of_an_output_on_s3_in_which_all_images_are_gone_is_empty(driver: Head, bucket: str) -> None:
    output = storage.connect(f"{bucket}/out")
    several = Nights(output)
    several.publish(["a", "b"])
    several.publish([], {"a": "corrupt"}, ["b"])
    assert "0 rows in 0 files" in compacted(output)
    assert list(view.batches(output)) == []


def test_too_many_partitions_are_refused_and_nothing_is_committed(
    driver: Head, several: Nights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compact, "MAX_PARTITIONS", 2)
    with pytest.raises(ConfigError, match="--partition-by label: expected at most 2 different values, found 3"):
        compacted(several.output, "label")
    assert log.read(several.output).newest_seq == 7
    assert list(storage.list_keys(several.output, "snapshots/")) == []


def test_a_label_file_that_is_damaged_is_named_and_nothing_is_committed(driver: Head, several: Nights) -> None:
    ref = view.files(several.output, DEIT)[0]
    several.output.put(ref.key, b"x")
    with pytest.raises(ConflictError, match=f"{ref.key}: expected the file of the log"):
        compacted(several.output)
    assert log.read(several.output).newest_seq == 7


# --- sizes --------------------------------------------------------------------------------------------------------

some_counts = st.lists(
    st.dictionaries(st.sampled_from(["", "label=a/", "label=b/"]), st.integers(1, 50), max_size=3), max_size=20
)


@given(some_counts, st.integers(1, 120))
@settings(deadline=None, max_examples=100, derandomize=True)
def test_a_group_is_of_one_partition_and_of_neighbours_and_full(counts: list[dict[str, int]], max_rows: int) -> None:
    groups = compact.group_rows(counts, max_rows=max_rows)
    assert [each.keys() for each in groups] == [each.keys() for each in counts]
    filled: Counter[str] = Counter()
    for partition in {name for each in counts for name in each}:
        names = [each[partition] for each in groups if partition in each]
        assert names == sorted(names)
        assert all(name.startswith(f"{partition}part-") for name in names)
        for each, number in zip(groups, counts, strict=True):
            if partition in each:
                assert filled[each[partition]] < max_rows
                filled[each[partition]] += number[partition]
        assert all(filled[name] >= max_rows for name in set(names) - {names[-1]})


def _wide(num_rows: int, dim: int) -> pa.Table:
    vectors = np.random.default_rng(0).normal(size=(num_rows, dim)).astype(np.float32)
    uris = pa.array([f"s3://photos/{number:09d}" for number in range(num_rows)])
    vector = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), type=schema.embedding_type(dim))
    return pa.table({"uri": uris, "run_seq": pa.repeat(1, num_rows), "embedding": vector})


def test_files_are_right_sized_and_never_larger_than_one_put_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compact, "TARGET_FILE_BYTES", 84 * 2**13)
    monkeypatch.setattr(compact, "MAX_PUT_BYTES", 96 * 2**13 + 2**20)
    table = _wide(4000, 256)
    row_bytes = len(schema.encode(table)) / len(table)
    for estimate in (row_bytes, row_bytes / 3):  # right, and much too small
        pieces = list(compact._cut(table, estimate))
        assert pa.concat_tables(pieces).equals(table)
        sizes = [len(schema.encode(each)) for each in pieces]
        assert max(sizes) <= 96 * 2**13 + 2**20
    sizes = [len(schema.encode(each)) for each in compact._cut(table, row_bytes)]
    assert all(64 * 2**13 < size < 96 * 2**13 for size in sizes)


# --- nights go on -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(checkpoints.write_small(tmp_path_factory.mktemp("model")))


@pytest.mark.slow
def test_nights_and_compactions_on_s3_take_turns_and_a_night_commits_what_a_compaction_left(
    head: Head, s3: S3Server, model: str
) -> None:
    client, root = boto3.client("s3"), s3.create_bucket("compacted")
    bucket = root.removeprefix("s3://")
    for index in range(300):
        file = draw_file(11, index, broken_fraction=0.04)
        client.put_object(Bucket=bucket, Key=f"in/{file.path}", Body=file.data)
    url = f"{root}/out"
    options = ("--input", f"{root}/in", "--output", url, "--model", model, "--gpu-actors=1")
    assert head.label_bucket(*options).returncode == 0
    output = storage.connect(url)
    before = pa.concat_tables(list(view.batches(output)))
    assert 250 < len(before) < 300

    dry = published.keys(url)
    done = head.compact_labels("--output", url, "--dry-run", "--keep-runs=1")
    assert done.returncode == 0, done.stderr
    assert "dry run: would write the view after run 00000001-" in done.stderr
    assert published.keys(url) == dry

    killed = head.compact_labels("--output", url, "--partition-by=label", crash_at="snapshot-claimed")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(published.entries(url)) == 1
    left = published.keys(url)

    gone = sorted(key for key in published.keys(f"{root}/in") if not key.startswith("broken/"))[:2]
    client.delete_object(Bucket=bucket, Key=f"in/{gone[0]}")
    client.put_object(Bucket=bucket, Key=f"in/{gone[1]}", Body=b"no image any more")
    night = head.label_bucket(*options)
    assert night.returncode == 0, night.stderr
    assert [entry["kind"] for entry in published.entries(url)] == ["run", "snapshot", "run"]
    assert published.entries(url)[1]["through_seq"] == 1
    assert {key for key in published.keys(url) if key.startswith("snapshots/")} == {
        key for key in left if key.startswith("snapshots/")
    }
    after = pa.concat_tables(list(view.batches(output)))
    assert set(before["uri"].to_pylist()) - set(after["uri"].to_pylist()) == {f"{root}/in/{key}" for key in gone}
    assert all("/snapshots/" in f"/{ref.key}" for ref in view.files(output) if ref.num_rows)

    audit(url)

    kept = head.compact_labels("--output", url, "--keep-runs=1", "--grace-hours=0")
    assert kept.returncode == 0, kept.stderr
    assert f"{len(after)} rows in 1 files" in kept.stderr
    assert "retired 2 runs and snapshots" in kept.stderr
    assert pa.concat_tables(list(view.batches(output))).to_pylist() == after.to_pylist()
    assert named(output) <= set(published.keys(url))
    labels = [key for key in published.keys(url) if key.startswith(("labels/", "snapshots/"))]
    assert labels == [ref.key for ref in view.files(output)]
    (first, last) = (entry["run_id"] for entry in published.entries(url) if entry["kind"] == "run")
    assert {key.partition(f"{first}/")[2] for key in published.keys(url) if key.startswith(f"_runs/{first}/")} == {
        "report.json",
        "report.html",
        "canaries.parquet",
    }
    assert any(key.startswith(f"_runs/{last}/parts/") or last in key for key in published.keys(url))

    audit(url)

    night = head.label_bucket(*options)
    assert night.returncode == 0, night.stderr
    assert "0 to label" in night.stderr
    again = head.compact_labels("--output", url, "--keep-runs=1", "--grace-hours=0", "--space=none-such")
    assert again.returncode == 2
    assert f"compact_labels: exit code 2: {url}: expected one of its spaces" in again.stderr


def test_a_compaction_that_died_is_run_again_under_the_same_names(
    head: Head, several: Nights, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = several.output.root.removeprefix("file://")
    options = ("--output", url, "--space", DEIT, "--partition-by=first_key")
    before = rows(several.output)
    killed = head.compact_labels(*options, crash_at="snapshot-written")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = {key: value for key, value in published.keys(url).items() if key.startswith("snapshots/")}
    assert len(left) > 3
    done = head.compact_labels(*options)
    assert done.returncode == 0, done.stderr
    assert {key: value for key, value in published.keys(url).items() if key.startswith("snapshots/")} == left
    assert {ref.key for ref in snapshot_files(several.output)} == left.keys()
    assert rows(several.output) == before


def test_a_run_is_not_disturbed_by_a_snapshot_that_is_committed_while_it_starts(several: Nights) -> None:
    from pipeline.run import _with_snapshots

    read_at_the_start = log.read(several.output)
    several.snapshot()
    assert _with_snapshots(several.output, read_at_the_start) == log.read(several.output)
    several.publish(["x.jpg"])
    assert _with_snapshots(several.output, read_at_the_start) == read_at_the_start
