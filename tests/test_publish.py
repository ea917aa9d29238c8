"""What publish decides and writes, piece by piece; the pieces together, on Ray, are tested with whole runs."""

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_parts import DIM, RANGE, unit
from test_plan import Place, row

from pipeline import catalog, outcomes, parts, plan, publish, schema, storage
from pipeline.errors import TRANSIENT, ConflictError
from pipeline.log import Claim
from pipeline.outcomes import RangeTotals
from pipeline.parts import PartSummary
from pipeline.plan import Range, RangePlan
from pipeline.publish import FileGroup
from pipeline.storage import Store

CLAIM = Claim(
    run_id="00000007-0123abcd",
    run_seq=7,
    base_seq=6,
    identity={"input": "s3://photos", "space_id": "deit-01234567", "embedding_dim": DIM},
    run_date="2026-11-22",
    model_id="facebook/deit",
    model_revision="abc",
    metadata={"label_bucket.space_id": "deit-01234567", "label_bucket.model_id": "facebook/deit"},
    created_at="t",
)
COUNTS = {"listed": 1000, "filtered": 100, "unchanged": 300, "planned": 600, "known": 400, "kept": 3, "deleted": 7}


@pytest.fixture
def output(tmp_path: Path) -> Store:
    return storage.connect(str(tmp_path / "out"))


def here(task: Any, *arguments: Any) -> Any:
    """Run a Ray task in this process."""
    return task._function(*arguments)


def part(number: int, *, num_labeled: int = 64, num_failed: int = 0, size_bytes: int = 1000) -> PartSummary:
    failures = {"corrupt": num_failed} if num_failed else {}
    return PartSummary(
        unit_id=f"u{number:04d}",
        sha256=f"s{number:04d}",
        size_bytes=size_bytes,
        num_rows=num_labeled + num_failed,
        failures=failures,
    )


# --- layout -------------------------------------------------------------------------------------------------------


some_parts = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(1, 400)), max_size=40).map(
    lambda drawn: [
        part(number, num_labeled=labeled, num_failed=failed or (0 if labeled else 1), size_bytes=size_bytes)
        for number, (labeled, failed, size_bytes) in enumerate(drawn)
    ]
)


@given(some_parts, st.integers(1, 1000))
@settings(deadline=None, max_examples=60, derandomize=True)
def test_every_labeled_row_is_in_one_file_of_labels_and_every_failure_in_one_of_failures(
    summaries: list[PartSummary], capacity: int
) -> None:
    found = [(f"{number // 3:05d}", each) for number, each in enumerate(summaries)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(publish, "MAX_FILE_BYTES", capacity)
        patch.setattr(publish, "MAX_FILE_FAILURES", 10)
        for kind in ("labels", "failures"):
            files = list(publish._cut(kind, found))
            meant = [
                (range_id, each)
                for range_id, each in found
                if (each.num_labeled if kind == "labels" else each.num_failed)
            ]
            assert [source for file in files for source in file] == [
                (range_id, each.unit_id, each.sha256) for range_id, each in meant
            ]
            assert all(files)


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=30))
@settings(deadline=None, max_examples=60, derandomize=True)
def test_every_range_with_rows_of_a_kind_is_in_one_group_of_that_kind_in_order(
    drawn: list[tuple[int, int, int]],
) -> None:
    totals = [
        RangeTotals(
            range_id=f"{number:05d}",
            sha256="",
            num_labeled=label_bytes,
            label_bytes=label_bytes,
            failures={"corrupt": failed} if failed else {},
        )
        for number, (label_bytes, failed, _) in enumerate(drawn)
    ]
    ranges = [
        Range(range_id=each.range_id, counts={**dict.fromkeys(COUNTS, 0), "deleted": deleted})
        for each, (_, _, deleted) in zip(totals, drawn, strict=True)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(publish, "TARGET_FILE_BYTES", 500)
        patch.setattr(publish, "MAX_FILE_FAILURES", 50)
        groups = list(publish._groups(plan.total("run", ranges), totals))
    for place, kind in enumerate(("labels", "failures", "deletions")):
        of_kind = [group for group in groups if group.kind == kind]
        assert [group.number for group in of_kind] == list(range(len(of_kind)))
        assert [range_id for group in of_kind for range_id in group.range_ids] == [
            each.range_id for each, weights in zip(totals, drawn, strict=True) if weights[place]
        ]
        enough = 500 if kind == "labels" else 50
        weight_of = {each.range_id: weights[place] for each, weights in zip(totals, drawn, strict=True)}
        for group in of_kind[:-1]:
            weights = [weight_of[range_id] for range_id in group.range_ids]
            assert sum(weights) >= enough > sum(weights[:-1])


@pytest.mark.parametrize("num_parts", [66, 100, 1000])
def test_files_of_a_large_range_are_between_64_and_96_mib(num_parts: int) -> None:
    size_bytes = 3 * 2**20  # 1024 rows of 768 floats
    found = [("00000", part(number, num_labeled=1024, size_bytes=size_bytes)) for number in range(num_parts)]
    sizes = [len(file) * size_bytes for file in publish._cut("labels", found)]
    assert sum(sizes) == num_parts * size_bytes
    assert all(64 * 2**20 <= size <= storage.MAX_PUT_BYTES for size in sizes)


def test_a_range_without_rows_has_no_files() -> None:
    assert list(publish._cut("labels", [])) == []


def _seal(output: Store, claim: Claim, *numbers: int) -> None:
    (planned,) = catalog.between([])
    ranges = [Range(range_id=planned.range_id, counts=COUNTS)]
    label_bytes = sum(numbers)
    totals = RangeTotals(
        range_id=planned.range_id, sha256="", num_labeled=label_bytes, label_bytes=label_bytes, failures={}
    )
    publish.seal(output, claim, plan.total(claim.run_id, ranges), [totals])


def test_a_run_is_either_sealed_or_abandoned_whichever_came_first(output: Store) -> None:
    sealed, given_up = replace(CLAIM, run_id="00000007-aaaaaaaa"), replace(CLAIM, run_id="00000007-bbbbbbbb")
    _seal(output, sealed, 1)
    with pytest.raises(ConflictError, match="00000007-aaaaaaaa has begun to publish and cannot be abandoned"):
        publish.abandon(output, sealed, "t")
    publish.abandon(output, given_up, "t")
    assert publish.fate(output, given_up.run_id) == "abandoned"
    with pytest.raises(ConflictError, match="00000007-bbbbbbbb was abandoned by another command"):
        _seal(output, given_up, 1)


def test_the_first_seal_stays(output: Store) -> None:
    assert publish.fate(output, CLAIM.run_id) == "open"
    _seal(output, CLAIM, 1, 2)
    assert publish.fate(output, CLAIM.run_id) == "sealed"
    first = publish._read_seal(output, CLAIM.run_id)
    _seal(output, CLAIM, 5)
    assert publish._read_seal(output, CLAIM.run_id) == first
    assert (first.num_labeled, [group.kind for group in first.groups]) == (3, ["labels", "deletions"])


def test_what_is_to_be_published_and_is_damaged_is_a_conflict_that_names_the_file(output: Store) -> None:
    _seal(output, CLAIM, 1)
    group = FileGroup(kind="labels", number=0, range_ids=["00000"])
    read: dict[str, Callable[[], object]] = {
        "publish.json": lambda: publish._read_seal(output, CLAIM.run_id),
        "publish/labels-00000.json": lambda: publish.lay_out(output, CLAIM.run_id, group, []),
        "publish/range-00000.json": lambda: outcomes.summarize_range(output, CLAIM.run_id, 7, "00000"),
    }
    for name, again in read.items():
        output.put(f"_runs/{CLAIM.run_id}/{name}", b"{")
        with pytest.raises(ConflictError, match=rf"_runs/{CLAIM.run_id}/{name}: expected .*, found .*; restore it"):
            again()


def test_the_first_layout_of_a_group_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(tmp_path)
    place.write({f"{number:02d}": 1 for number in range(50)})
    claim, planned = run_range(place, {"03": "corrupt"})
    totals = [outcomes.summarize_range(place.output, claim.run_id, 7, planned.range_id)]
    group = FileGroup(kind="labels", number=0, range_ids=[planned.range_id])
    first = publish.lay_out(place.output, claim.run_id, group, totals)
    monkeypatch.setattr(publish, "MAX_FILE_BYTES", 1)
    assert publish.lay_out(place.output, claim.run_id, group, []) == first
    assert [unit_id for _, unit_id, _ in first[0]] == planned.chunks[0].unit_ids


def run_range(
    place: Place, failure_of: dict[str, str], claim: Claim = CLAIM, **options: Any
) -> tuple[Claim, RangePlan]:
    """Plan what is new and commit a part for every unit, in which these keys fail."""
    claim = replace(claim, identity={**claim.identity, "input": storage.normalize(str(place.source))})
    planned = place.plan(claim.run_id, max_unit_rows=7, **options)
    for unit_id, objects in place.units(planned):
        kinds = [failure_of.get(key) for key in objects.column("key").to_pylist()]
        outcome = unit(len(objects), {number: kind for number, kind in enumerate(kinds) if kind})
        outcome = outcome.drop_columns(objects.column_names)
        table = pa.table([*objects.columns, *outcome.columns], schema=schema.labeled(DIM))
        parts.write_part(place.output, claim.run_id, planned.range_id, unit_id, table)
    return claim, planned


def test_the_night_after_a_run_finds_everything_unchanged_but_what_may_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "MAX_FILE_ROWS", 20)
    place = Place(tmp_path)
    listed = place.write({f"{number % 3}/{number:02d}": number for number in range(50)})
    place.remember([{**row("0/00"), "size_bytes": 99}, row("0/gone"), row("2/gone too")])
    claim, planned = run_range(place, {"0/03": "corrupt", "1/01": "unavailable", "2/47": "missing"})
    totals = outcomes.summarize_range(place.output, claim.run_id, claim.run_seq, planned.range_id)
    place.catalog = here(publish._renew_range, place.output.root, claim, place.whole, totals)
    assert sum(file.num_rows for file in place.catalog) == 50
    assert max(file.num_rows for file in place.catalog) <= 20
    rows = list(catalog.read_rows(place.output, place.catalog))
    assert [each["key"] for each in rows] == list(listed)
    assert {each["run_seq"] for each in rows} == {7}
    assert {each["key"]: each["failure_kind"] for each in rows if each["failure_kind"]} == {
        "0/03": "corrupt",
        "1/01": "unavailable",
        "2/47": "missing",
    }
    tomorrow = place.plan("00000008-0123abcd")
    assert tomorrow.counts == {
        "listed": 50,
        "filtered": 0,
        "unchanged": 48,
        "planned": 2,
        "known": 50,
        "kept": 0,
        "deleted": 0,
    }
    assert place.planned_keys(tomorrow) == ["1/01", "2/47"]


# --- files --------------------------------------------------------------------------------------------------------


def _two_parts(output: Store) -> tuple[pa.Table, dict[str, str]]:
    table = unit(60, {0: "corrupt", 31: "missing", 59: "not_an_image"})
    digests = {}
    for half in (table.slice(0, 30), table.slice(30)):
        unit_id = plan.unit_id(half)
        digests[unit_id] = parts.write_part(output, CLAIM.run_id, RANGE, unit_id, half).sha256
    return table, digests


def _publish(output: Store, kind: Any, digests: dict[str, str]) -> Any:
    """A file of these parts, whose layout is written as `lay_out` writes it."""
    group = FileGroup(kind=kind, number=0, range_ids=[RANGE])
    sources = [[RANGE, unit_id, digest] for unit_id, digest in digests.items()]
    output.put(f"_runs/{CLAIM.run_id}/publish/{kind}-00000.json", json.dumps([sources]).encode())
    return here(publish._publish_file, output.root, CLAIM, group, 0)[0]


def _read(output: Store, key: str) -> pa.Table:
    return pq.read_table(io.BytesIO(output.get(key)))


def test_a_file_of_labels_has_the_labeled_rows_in_order_and_every_column_of_the_contract(output: Store) -> None:
    table, digests = _two_parts(output)
    ref = _publish(output, "labels", digests)
    found = _read(output, ref.key)
    data = output.get(ref.key)
    assert (ref.num_rows, ref.size_bytes, ref.sha256) == (57, len(data), hashlib.sha256(data).hexdigest())
    assert found.schema.remove_metadata().equals(schema.labels(DIM))
    labeled = table.filter(pa.compute.is_null(table.column("failure_kind")))
    shared = [name for name in found.column_names if name in table.column_names]
    assert len(shared) == 12 + len(schema.STATS)
    for name in shared:
        assert found.column(name).to_pylist() == labeled.column(name).to_pylist(), name
    for each in found.to_pylist():
        assert each["image_id"] == schema.image_id(each["uri"]) > 0
        assert (each["model_id"], each["model_revision"]) == ("facebook/deit", "abc")
        assert (each["space_id"], each["run_id"], each["run_seq"]) == ("deit-01234567", CLAIM.run_id, 7)
    metadata = {name.decode(): value.decode() for name, value in found.schema.metadata.items()}
    assert CLAIM.metadata.items() <= metadata.items()
    features = json.loads(metadata["huggingface"])["info"]["features"]
    assert list(features) == found.column_names


def test_a_file_of_failures_has_the_failed_rows_and_whether_they_may_pass(output: Store) -> None:
    _, digests = _two_parts(output)
    ref = _publish(output, "failures", digests)
    found = _read(output, ref.key)
    assert ref.num_rows == 3
    assert found.schema.remove_metadata().equals(schema.FAILURES)
    assert [(each["uri"], each["failure_kind"], each["is_transient"]) for each in found.to_pylist()] == [
        ("s3://photos/000", "corrupt", False),
        ("s3://photos/031", "missing", True),
        ("s3://photos/059", "not_an_image", False),
    ]
    assert all(each["failure_message"].startswith("why ") for each in found.to_pylist())
    assert {each["is_transient"] for each in found.to_pylist() if each["failure_kind"] in TRANSIENT} == {True}


def test_a_file_that_stands_already_is_kept_and_described_as_it_is(output: Store) -> None:
    _, digests = _two_parts(output)
    first = _publish(output, "labels", digests)
    path = Path(output.root.removeprefix("file://")) / first.key
    identity = (path.stat().st_ino, path.stat().st_mtime_ns)
    assert _publish(output, "labels", digests) == first
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == identity
    # Another version of the Parquet writer makes other bytes of the same parts.
    table = _read(output, first.key)
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="snappy")
    output.put(first.key, sink.getvalue())
    again = _publish(output, "labels", digests)
    assert (again.num_rows, again.sha256) == (57, hashlib.sha256(sink.getvalue()).hexdigest())


def test_a_file_made_from_other_parts_under_this_name_is_a_conflict(output: Store) -> None:
    _, digests = _two_parts(output)
    _publish(output, "labels", dict([*digests.items()][:1]))
    with pytest.raises(ConflictError, match="was not made from the parts of run 00000007"):
        _publish(output, "labels", digests)


def test_a_part_that_changed_after_it_was_sealed_is_a_conflict(output: Store) -> None:
    _, digests = _two_parts(output)
    first = next(iter(digests))
    with pytest.raises(ConflictError, match=f"part {first} of run .* changed after it was sealed"):
        _publish(output, "labels", {**digests, first: "0" * 64})


def test_parts_that_are_out_of_order_are_a_conflict(output: Store) -> None:
    _, digests = _two_parts(output)
    with pytest.raises(ConflictError, match="not in order of their uri"):
        _publish(output, "labels", dict(reversed(digests.items())))


def test_deletions_name_the_uri_and_the_last_etag(output: Store) -> None:
    gone = pa.Table.from_pylist([row("é/1"), row("é/2", etag=None)], schema.CATALOG)
    output.put("plan/gone.parquet", schema.encode(gone))
    planned = RangePlan(range_id=RANGE, chunks=[], deletions=["plan/gone.parquet"], counts={})
    output.put(f"_runs/{CLAIM.run_id}/plan/range-{RANGE}.json", json.dumps(asdict(planned)).encode())
    group = FileGroup(kind="deletions", number=0, range_ids=[RANGE])
    (ref,) = here(publish._publish_deletions, output.root, CLAIM, group)
    assert (ref.first_key, ref.last_key) == ("é/1", "é/2")
    found = _read(output, ref.key)
    assert found.schema.remove_metadata().equals(schema.DELETIONS)
    assert [(each["uri"], each["etag"]) for each in found.to_pylist()] == [
        ("s3://photos/é/1", "e1"),
        ("s3://photos/é/2", None),
    ]
    assert found.column("image_id").to_pylist() == [schema.image_id(f"s3://photos/é/{number}") for number in (1, 2)]
