"""What publish decides and writes, piece by piece; the pieces together, on Ray, are tested with whole runs."""

import hashlib
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_parts import DIM, unit
from test_plan import Place, row, some_keys

from pipeline import parts, plan, publish, schema, storage
from pipeline.errors import TRANSIENT, BudgetError, ConflictError
from pipeline.log import Claim
from pipeline.parts import PartSummary
from pipeline.plan import Plan
from pipeline.publish import FilePlan, Outcomes
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


# --- budget and accounts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failures", "fraction", "is_allowed"),
    [
        ({}, 0.0, True),
        ({"corrupt": 20}, 0.0, True),  # the floor
        ({"corrupt": 21}, 0.0, False),
        ({"corrupt": 45}, 0.05, True),  # 5 % of the 900 in scope, also those that are not tonight's
        ({"corrupt": 40, "missing": 6}, 0.05, False),
        ({"not_an_image": 600}, 0.0, True),
        ({"not_an_image": 500, "truncated": 21}, 0.0, False),
        ({"corrupt": 600}, 1.0, True),
    ],
)
def test_the_budget_is_a_share_of_all_objects_in_scope(
    failures: dict[str, int], fraction: float, is_allowed: bool
) -> None:
    if is_allowed:
        publish.check_budget(failures, COUNTS, fraction)
        return
    with pytest.raises(BudgetError, match=r"of 900 objects failed, \d+ are allowed") as caught:
        publish.check_budget(failures, COUNTS, fraction)
    assert all(f"{number} {kind}" in str(caught.value) for kind, number in failures.items())


@pytest.mark.parametrize(("labeled", "failed"), [(600, 0), (0, 600), (590, 10)])
def test_accounts_that_add_up_pass(labeled: int, failed: int) -> None:
    publish.check_accounts(COUNTS, labeled, failed, CLAIM, num_in_catalog=410)


@pytest.mark.parametrize(
    ("changes", "labeled", "failed"),
    [
        ({}, 599, 0),
        ({}, 600, 1),
        ({"listed": 1001}, 600, 0),
        ({"unchanged": 299}, 600, 0),
        ({"unchanged": 299}, 601, 0),  # adds up to what was listed, but is not what was planned
        ({"filtered": 101}, 599, 0),
    ],
)
def test_one_object_too_many_or_too_few_is_a_conflict(changes: dict[str, int], labeled: int, failed: int) -> None:
    with pytest.raises(ConflictError, match="do not add up, nothing was published: listed"):
        publish.check_accounts({**COUNTS, **changes}, labeled, failed, CLAIM, num_in_catalog=410)


def test_an_object_of_the_last_catalog_that_is_neither_listed_nor_deleted_is_a_conflict() -> None:
    with pytest.raises(
        ConflictError, match="the last catalog has 411 objects, of which 400 are listed, 3 out of scope and 7"
    ):
        publish.check_accounts(COUNTS, 600, 0, CLAIM, num_in_catalog=411)


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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(publish, "TARGET_FILE_BYTES", capacity)
        patch.setattr(publish, "MAX_FAILURES_PER_FILE", 10)
        files = list(publish._layout(CLAIM, Outcomes(parts=summaries)))
    for kind, wanted in (
        ("labels", [each for each in summaries if each.num_labeled]),
        ("failures", [each for each in summaries if each.num_failed]),
    ):
        of_kind = [file for file in files if file.kind == kind]
        assert [pair for file in of_kind for pair in file.parts.items()] == [
            (each.unit_id, each.sha256) for each in wanted
        ]
        assert all(file.parts for file in of_kind)
        assert [file.key for file in of_kind] == [
            f"{kind}/space=deit-01234567/run_date=2026-11-22/part-00000007-0123abcd-{number:05d}.parquet"
            for number in range(len(of_kind))
        ]
    by_id = {each.unit_id: each for each in summaries}
    for file in files:
        if file.kind == "failures" and len(file.parts) > 1:
            assert sum(by_id[unit_id].num_failed for unit_id in file.parts) <= 10


def test_files_of_a_large_run_are_between_64_and_96_mib() -> None:
    size_bytes = 3 * 2**20  # 1024 rows of 768 floats
    summaries = [part(number, num_labeled=1024, size_bytes=size_bytes) for number in range(100)]
    files = list(publish._layout(CLAIM, Outcomes(parts=summaries)))
    sizes = [len(file.parts) * size_bytes for file in files]
    assert sum(sizes) == 100 * size_bytes
    assert all(64 * 2**20 <= size <= storage.MAX_PUT_BYTES for size in sizes[:-1])


def test_a_run_without_rows_has_no_files() -> None:
    assert list(publish._layout(CLAIM, Outcomes(parts=[]))) == []


def test_a_run_is_either_sealed_or_abandoned_whichever_came_first(output: Store) -> None:
    sealed, given_up = replace(CLAIM, run_id="00000007-aaaaaaaa"), replace(CLAIM, run_id="00000007-bbbbbbbb")
    publish._seal_layout(output, sealed, Outcomes(parts=[part(0)]))
    with pytest.raises(ConflictError, match="00000007-aaaaaaaa has begun to publish and cannot be abandoned"):
        publish.abandon(output, sealed, "t")
    publish.abandon(output, given_up, "t")
    assert publish.fate(output, given_up.run_id) == "abandoned"
    with pytest.raises(ConflictError, match="00000007-bbbbbbbb was abandoned by another command"):
        publish._seal_layout(output, given_up, Outcomes(parts=[part(0)]))


def test_the_first_layout_that_is_sealed_stays(output: Store) -> None:
    assert publish.fate(output, CLAIM.run_id) == "open"
    first = publish._seal_layout(output, CLAIM, Outcomes(parts=[part(0), part(1, num_failed=2)]))
    assert publish.fate(output, CLAIM.run_id) == "sealed"
    assert publish._seal_layout(output, CLAIM, Outcomes(parts=[part(5)])) == first
    assert [(file.kind, file.parts) for file in first] == [
        ("labels", {"u0000": "s0000", "u0001": "s0001"}),
        ("failures", {"u0001": "s0001"}),
    ]


# --- catalog ------------------------------------------------------------------------------------------------------


@given(some_keys, some_keys, st.sets(st.integers(0, 24)))
@settings(deadline=None, max_examples=100, derandomize=True)
def test_the_new_catalog_is_the_old_one_without_what_is_gone_and_with_what_is_fresh(
    old: list[str], fresh: list[str], gone_places: set[int]
) -> None:
    gone = [key for place, key in enumerate(old) if place in gone_places and key not in fresh]
    old_rows, fresh_rows = [row(key) for key in old], [row(key, etag="fresh") for key in fresh]
    merged = list(publish.merge_catalog(iter(old_rows), iter(gone), iter(fresh_rows)))
    expected = {each["key"]: each for each in [*old_rows, *fresh_rows] if each["key"] not in gone}
    assert merged == [expected[key] for key in sorted(expected, key=str.encode)]


def _run(place: Place, failure_of: dict[str, str]) -> tuple[Claim, Plan]:
    """Plan what is new and commit a part for every unit, in which these keys fail."""
    claim = replace(CLAIM, identity={**CLAIM.identity, "input": storage.normalize(str(place.source))})
    planned = place.plan(claim.run_id, max_unit_rows=7)
    for unit_id, objects in place.units(planned):
        kinds = [failure_of.get(key) for key in objects.column("key").to_pylist()]
        outcomes = unit(len(objects), {number: kind for number, kind in enumerate(kinds) if kind})
        outcomes = outcomes.drop_columns(objects.column_names)
        table = pa.table([*objects.columns, *outcomes.columns], schema=schema.labeled(DIM))
        parts.write_part(place.output, claim.run_id, unit_id, table)
    return claim, plan.seal(place.output, claim.run_id, [planned])


def test_the_night_after_a_run_finds_everything_unchanged_but_what_may_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "MAX_CATALOG_ROWS", 20)
    place = Place(tmp_path)
    listed = place.write({f"{number % 3}/{number:02d}": number for number in range(50)})
    place.remember([{**row("0/00"), "size_bytes": 99}, row("0/gone"), row("2/gone too")])
    claim, sealed = _run(place, {"0/03": "corrupt", "1/01": "unavailable", "2/47": "missing"})
    place.catalog = here(publish._publish_catalog, place.output.root, claim, sealed, place.catalog)
    assert [file.num_rows for file in place.catalog] == [20, 20, 10]
    rows = list(plan.read_catalog(place.output, place.catalog))
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
        digests[unit_id] = parts.write_part(output, CLAIM.run_id, unit_id, half).sha256
    return table, digests


def _publish(output: Store, kind: str, digests: dict[str, str], number: int = 0) -> Any:
    file_plan = FilePlan(kind=kind, key=publish._file_key(kind, CLAIM, f"{number:05d}"), parts=digests)
    return here(publish._publish_file, output.root, CLAIM, DIM, file_plan)


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
    assert len(shared) == 11
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
    output.put("plan/gone.parquet", plan.to_parquet(gone))
    ref = here(publish._publish_deletions, output.root, CLAIM, "plan/gone.parquet", "00000")
    found = _read(output, ref.key)
    assert found.schema.remove_metadata().equals(schema.DELETIONS)
    assert [(each["uri"], each["etag"]) for each in found.to_pylist()] == [
        ("s3://photos/é/1", "e1"),
        ("s3://photos/é/2", None),
    ]
    assert found.column("image_id").to_pylist() == [schema.image_id(f"s3://photos/é/{number}") for number in (1, 2)]
