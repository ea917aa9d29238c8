"""The part is the commit of its unit: exactly one, always the same bytes, never another unit's."""

from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import Fault
from test_plan import info

from pipeline import parts, plan, schema, storage
from pipeline.errors import ConflictError, FailureKind
from pipeline.storage import Store

RUN = "00000001-0123abcd"
RANGE = "00000"
DIM = 8


def unit(num_rows: int = 40, failed: dict[int, str] | None = None, dim: int | None = DIM, seed: int = 0) -> pa.Table:
    """A labeled unit of objects `000`, `001`, …: random labels, and failures of these kinds at these rows."""
    failed = failed or {}
    rng = np.random.default_rng(seed)
    infos = [info(f"{row:03d}", etag=f"e{row}", size_bytes=10 + row) for row in range(num_rows)]
    rows = plan.objects_table("s3://photos", infos).to_pylist()
    for number, row in enumerate(rows):
        kind = failed.get(number)
        vector = np.zeros(dim or 0) if kind else rng.normal(size=dim or 0)
        row |= {
            "width_px": None if kind else 640,
            "height_px": None if kind else 480,
            "failure_kind": kind,
            "failure_stage": kind and "decode",
            "failure_message": kind and f"why {number}",
            "label_ids": [] if kind else [3, 1],
            "label_names": [] if kind else ["three", "one"],
            "label_scores": [] if kind else [0.75, 0.25],
            "embedding": (vector / (np.linalg.norm(vector) or 1)).astype(np.float32).tolist(),
        }
    return pa.Table.from_pylist(rows, schema.labeled(dim))


@pytest.fixture(params=["s3", "local"])
def output(request: pytest.FixtureRequest) -> Store:
    return storage.connect(str(request.getfixturevalue({"s3": "bucket", "local": "tmp_path"}[request.param])))


@pytest.fixture
def folder(tmp_path: Path) -> Store:
    return storage.connect(str(tmp_path))


def without_metadata(table: pa.Table) -> pa.Table:
    return table.replace_schema_metadata(None)


@pytest.mark.parametrize("dim", [DIM, None])
def test_a_part_is_read_back_as_it_was_written(output: Store, dim: int | None) -> None:
    table = unit(failed={0: "corrupt", 7: "missing", 8: "corrupt"}, dim=dim)
    unit_id = plan.unit_id(table)
    written = parts.write_part(output, RUN, RANGE, unit_id, table)
    found, summary = parts.read_part(output, RUN, RANGE, unit_id)
    assert without_metadata(found).equals(table)
    assert summary == written
    assert (summary.num_rows, summary.num_failed, summary.num_labeled) == (40, 3, 37)
    assert summary.failures == {"corrupt": 2, "missing": 1}
    assert summary.size_bytes == len(output.get(parts.part_key(RUN, RANGE, unit_id)))
    assert found.schema.metadata[b"label_bucket.run_id"] == RUN.encode()
    assert found.schema.metadata[b"label_bucket.schema_version"] == str(schema.SCHEMA_VERSION).encode()


@given(st.dictionaries(st.integers(0, 19), st.sampled_from(sorted(FailureKind)), max_size=20))
@settings(deadline=None, max_examples=30, derandomize=True)
def test_a_summary_adds_up(failed: dict[int, str]) -> None:
    summary = parts.summarize(unit(20, failed), b"", "id")
    assert summary.num_failed == len(failed)
    assert summary.num_labeled + summary.num_failed == summary.num_rows == 20
    assert summary.failures == {kind: list(failed.values()).count(kind) for kind in failed.values()}


def test_finished_units_are_those_with_a_part_in_this_run(output: Store) -> None:
    assert parts.finished_units(output, RUN, RANGE) == set()
    units = [unit(3), unit(4)]
    for each in units:
        parts.write_part(output, RUN, RANGE, plan.unit_id(each), each)
    parts.write_part(output, "00000002-0123abcd", RANGE, plan.unit_id(unit(5)), unit(5))
    assert parts.finished_units(output, RUN, RANGE) == {plan.unit_id(each) for each in units}


def test_the_part_of_a_twin_is_the_truth_whatever_its_outcomes(output: Store) -> None:
    theirs, ours = unit(failed={1: "missing"}), unit(failed={2: "changed"})
    unit_id = plan.unit_id(theirs)
    assert plan.unit_id(ours) == unit_id
    first = parts.write_part(output, RUN, RANGE, unit_id, theirs)
    second = parts.write_part(output, RUN, RANGE, unit_id, ours)
    assert second == first
    assert second.failures == {"missing": 1}
    assert without_metadata(parts.read_part(output, RUN, RANGE, unit_id)[0]).equals(theirs)


def test_twins_that_race_end_with_one_part_and_the_same_summary(output: Store) -> None:
    tables = [unit(failed={row: "changed"}) for row in range(8)]
    unit_id = plan.unit_id(tables[0])
    with ThreadPoolExecutor(8) as pool:
        summaries = list(pool.map(lambda table: parts.write_part(output, RUN, RANGE, unit_id, table), tables))
    assert all(each == summaries[0] for each in summaries)
    assert parts.read_part(output, RUN, RANGE, unit_id)[1] == summaries[0]
    assert len(list(storage.list_keys(output, ""))) == 1


def test_twins_leave_one_whole_part_on_a_store_where_every_writer_wins(bucket: str, faults: list[Fault]) -> None:
    faults.append(Fault.always("unconditional", "PUT", ".parquet"))
    table, output = unit(), storage.connect(bucket)
    unit_id = plan.unit_id(table)
    with ThreadPoolExecutor(8) as pool:
        summaries = list(pool.map(lambda _: parts.write_part(output, RUN, RANGE, unit_id, table), range(8)))
    assert all(each == summaries[0] for each in summaries)
    assert parts.read_part(output, RUN, RANGE, unit_id)[1] == summaries[0]
    assert len(list(storage.list_keys(output, ""))) == 1
    assert faults[0].num_hits == 8


def test_a_part_whose_answer_was_lost_is_our_own(bucket: str, faults: list[Fault]) -> None:
    table = unit()
    faults.append(Fault("answer_lost", "PUT", ".parquet"))
    written = parts.write_part(storage.connect(bucket), RUN, RANGE, plan.unit_id(table), table)
    assert parts.read_part(storage.connect(bucket), RUN, RANGE, plan.unit_id(table))[1] == written


def test_a_part_of_another_unit_under_this_name_is_refused_when_writing_and_reading(output: Store) -> None:
    table, other = unit(), unit(30)
    unit_id, other_id = plan.unit_id(table), plan.unit_id(other)
    parts.write_part(output, RUN, RANGE, other_id, other)
    output.put(parts.part_key(RUN, RANGE, unit_id), output.get(parts.part_key(RUN, RANGE, other_id)))
    for attempt in (
        lambda: parts.write_part(output, RUN, RANGE, unit_id, table),
        lambda: parts.read_part(output, RUN, RANGE, unit_id),
    ):
        with pytest.raises(ConflictError, match=f"expected unit {unit_id}, found {other_id}"):
            attempt()


@pytest.mark.parametrize("wrong", ["swapped", "missing", "doubled", "another etag"])
def test_rows_that_are_not_those_of_the_unit_are_refused(folder: Store, wrong: str) -> None:
    table = unit()
    unit_id = plan.unit_id(table)
    rows = {"swapped": [1, 0, *range(2, 40)], "missing": range(39), "doubled": [0, *range(40)]}
    if wrong in rows:
        table = table.take(list(rows[wrong]))
    else:
        etags = pa.array(["e!", *table.column("etag").to_pylist()[1:]])
        table = table.set_column(table.schema.get_field_index("etag"), "etag", etags)
    parts.write_part(folder, RUN, RANGE, unit_id, table)
    with pytest.raises(ConflictError, match=f"{unit_id}.parquet: its rows are those of unit {plan.unit_id(table)}"):
        parts.read_part(folder, RUN, RANGE, unit_id)


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "zeros inside", "without id"])
def test_a_damaged_part_is_named_with_what_to_do(folder: Store, damage: str) -> None:
    table = unit(1000)
    unit_id = plan.unit_id(table)
    parts.write_part(folder, RUN, RANGE, unit_id, table)
    key = parts.part_key(RUN, RANGE, unit_id)
    data = folder.get(key)
    sink = BytesIO()
    pq.write_table(table, sink)
    broken = {
        "empty": b"",
        "cut": data[:-50],
        "text": b"hello " * 100,
        "zeros inside": data[:100] + bytes(4000) + data[4100:],
        "without id": sink.getvalue(),
    }
    folder.put(key, broken[damage])
    for attempt in (
        lambda: parts.write_part(folder, RUN, RANGE, unit_id, table),
        lambda: parts.read_part(folder, RUN, RANGE, unit_id),
    ):
        with pytest.raises(ConflictError, match=f"{unit_id}.parquet: expected .*, found"):
            attempt()


# --- the bytes ----------------------------------------------------------------------------------------------------


def test_the_same_rows_are_the_same_bytes_however_they_are_chunked() -> None:
    table = unit(3000)
    chunked = pa.concat_tables([table.slice(0, 1), table.slice(1, 1500), table.slice(1501)])
    assert (
        schema.encode(chunked, {"a": "1"}) == schema.encode(table, {"a": "1"}) == schema.encode(unit(3000), {"a": "1"})
    )
    assert schema.encode(table, {"a": "2"}) != schema.encode(table, {"a": "1"})


@pytest.mark.parametrize("dim", [DIM, None])
def test_only_embeddings_are_byte_stream_split_and_without_statistics(dim: int | None) -> None:
    file = pq.ParquetFile(BytesIO(schema.encode(unit(500, {3: "corrupt"}, dim), {}, row_group_rows=200)))
    assert file.metadata.num_row_groups == 3
    columns = [
        file.metadata.row_group(group).column(number)
        for group in range(3)
        for number in range(file.metadata.num_columns)
    ]
    embeddings = [each for each in columns if each.path_in_schema == "embedding.list.element"]
    assert len(embeddings) == (3 if dim else 0)
    for each in embeddings:
        assert "BYTE_STREAM_SPLIT" in each.encodings
        assert not {"RLE_DICTIONARY", "PLAIN_DICTIONARY"} & set(each.encodings)
        assert not each.is_stats_set
    assert not any("BYTE_STREAM_SPLIT" in each.encodings for each in columns if each not in embeddings)
    assert {each.compression for each in columns} == {"ZSTD"}
    (first, *_) = [each for each in columns if each.path_in_schema == "uri"]
    assert (first.statistics.min, first.statistics.max) == ("s3://photos/000", "s3://photos/199")


def test_byte_stream_split_makes_real_embeddings_smaller_than_pyarrows_defaults() -> None:
    table = unit(2000, dim=64).select(["key", "embedding"])
    sink = BytesIO()
    pq.write_table(table, sink)
    assert len(schema.encode(table, {})) < 0.9 * len(sink.getvalue())
