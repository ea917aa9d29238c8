"""The order of runs: claims, commits, who resumes, who is refused."""

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from cluster import wait_until
from servers import Fault, S3Server

from pipeline import log, schema, storage
from pipeline.errors import ConflictError
from pipeline.log import Claim, Entry, FileRef
from pipeline.storage import Store

IDENTITY = {
    "input": "s3://photos",
    "include": ["*.jpg"],
    "exclude": [],
    "limit": None,
    "space_id": "deit-0",
    "top_k": 5,
}


@pytest.fixture(params=["s3", "local"])
def output(request: pytest.FixtureRequest) -> Store:
    return storage.connect(str(request.getfixturevalue({"s3": "bucket", "local": "tmp_path"}[request.param])))


@pytest.fixture
def folder(tmp_path: Path) -> Store:
    return storage.connect(str(tmp_path))


def claim(
    output: Store, *, run_date: str = "2026-11-22", revision: str = "r1", now: str = "t1", **changes: Any
) -> Claim:
    return log.claim(
        output,
        log.read(output),
        {**IDENTITY, **changes},
        run_date=run_date,
        model_id="deit",
        model_revision=revision,
        metadata={"label_bucket.space_id": "deit-0"},
        now=now,
    )


def entry_of(claimed: Claim, **values: Any) -> Entry:
    return Entry(
        kind="run",
        run_id=claimed.run_id,
        run_seq=claimed.run_seq,
        identity=claimed.identity,
        run_date=claimed.run_date,
        model_id=claimed.model_id,
        model_revision=claimed.model_revision,
        committed_at="t2",
        **values,
    )


def test_an_output_that_does_not_exist_has_an_empty_log(output: Store) -> None:
    assert log.read(output) == log.State(entries=[], open_claim=None)
    assert log.read(storage.connect(f"{output.root}/not there")).newest_seq == 0


def test_what_was_claimed_and_committed_is_read_back(output: Store) -> None:
    first = claim(output)
    assert (first.run_seq, first.base_seq) == (1, 0)
    assert log.read(output) == log.State(entries=[], open_claim=first)
    file = FileRef(key="labels/ä", num_rows=3, size_bytes=10, sha256="0" * 64)
    entry = entry_of(first, counts={"listed": 3}, failures={}, labels=[file], catalog=file)
    log.commit(output, entry)
    state = log.read(output)
    assert state == log.State(entries=[entry], open_claim=None)
    assert (state.newest_seq, state.newest("deit-0"), state.newest("other")) == (1, entry, None)
    second = claim(output)
    assert (second.run_seq, second.base_seq) == (2, 1)
    assert second.run_id != first.run_id
    assert (log.read_claim(output, 1), log.read_claim(output, 2)) == (first, second)


def test_the_same_command_resumes_its_run_after_midnight_and_keeps_its_date(output: Store) -> None:
    first = claim(output, run_date="2026-11-22", now="t1")
    again = claim(output, run_date="2026-11-23", now="t2")
    assert again == first
    assert again.run_date == "2026-11-22"


@pytest.mark.parametrize("changes", [{"input": "s3://other"}, {"limit": 7}, {"top_k": 3}, {"include": []}])
def test_another_command_is_told_what_differs_and_what_to_do(output: Store, changes: dict[str, Any]) -> None:
    first = claim(output)
    ((name, value),) = changes.items()
    with pytest.raises(ConflictError) as caught:
        claim(output, **changes)
    message = str(caught.value)
    assert first.run_id in message
    assert f"{name}: that run has {IDENTITY[name]}, this command {value}" in message
    assert "--abandon-run" in message
    assert message.count("that run has") == 1
    assert log.read(output).open_claim == first


def test_an_abandoned_run_uses_up_its_place(output: Store) -> None:
    first = claim(output)
    log.commit(output, log.abandoned(first, "t2"))
    state = log.read(output)
    assert state.open_claim is None
    assert (state.newest_seq, state.runs, state.newest("deit-0")) == (1, [], None)
    assert claim(output, limit=7).run_seq == 2


def test_a_commit_by_a_twin_is_fine_and_after_giving_up_is_refused(output: Store) -> None:
    first = claim(output)
    log.commit(output, entry_of(first))
    log.commit(output, entry_of(first, counts={"listed": 0}))
    assert log.read(output).runs == [entry_of(first)]
    second = claim(output)
    log.commit(output, log.abandoned(second, "t2"))
    with pytest.raises(ConflictError, match=f"expected {second.run_id}, found abandoned {second.run_id}"):
        log.commit(output, entry_of(second))


def test_of_two_racing_commands_one_claims_and_the_other_hears_of_it(output: Store) -> None:
    barrier = threading.Barrier(6)
    state = log.read(output)

    def race(limit: int) -> Claim | str:
        identity = {**IDENTITY, "limit": limit}
        barrier.wait()
        try:
            return log.claim(
                output, state, identity, run_date="d", model_id="m", model_revision="r", metadata={}, now="t"
            )
        except ConflictError as error:
            return str(error)

    with ThreadPoolExecutor(6) as pool:
        outcomes = list(pool.map(race, [1, 2, 3, 1, 2, 3]))
    won = [each for each in outcomes if isinstance(each, Claim)]
    assert len({each.run_id for each in won}) == 1
    assert len(won) == 2  # the twin of the winner resumes the same run
    assert all(won[0].run_id in each for each in outcomes if isinstance(each, str))
    assert log.read(output).open_claim == won[0]


def test_a_claim_that_another_winner_of_the_race_replaced_is_not_believed(
    s3: S3Server, bucket: str, faults: list[Fault]
) -> None:
    output = storage.connect(bucket)
    theirs = log._dump(claim(storage.connect(f"{bucket}/elsewhere"), top_k=3))
    key = "_log/00000001.claim.json"
    faults.append(Fault("stall", "GET", f"{bucket[5:]}/{key}"))  # between our write and our look at it
    with ThreadPoolExecutor(1) as pool:
        ours = pool.submit(claim, output)
        wait_until(lambda: ours.done() or s3.num_requests("GET", f"{bucket[5:]}/{key}") > 0)
        s3.client.put_object(Bucket=bucket[5:], Key=key, Body=theirs)
        with pytest.raises(ConflictError, match="has an open run"):
            ours.result()
    assert output.get(key) == theirs


def test_the_newest_run_of_each_space_is_found_by_its_place_and_not_its_date(folder: Store) -> None:
    for space_id, run_date in (("a", "2026-12-01"), ("b", "2026-11-30"), ("a", "2026-11-01")):
        log.commit(folder, entry_of(claim(folder, space_id=space_id, run_date=run_date)))
    state = log.read(folder)
    assert [(entry.run_seq, entry.space_id) for entry in state.runs] == [(1, "a"), (2, "b"), (3, "a")]
    newest_a, newest_b = state.newest("a"), state.newest("b")
    assert newest_a is not None
    assert newest_b is not None
    assert (newest_a.run_seq, newest_b.run_seq) == (3, 2)


def test_the_revision_is_remembered_from_the_open_run_or_the_newest_but_not_from_an_abandoned_one(
    folder: Store,
) -> None:
    assert log.read(folder).remembered_revision("deit") is None
    log.commit(folder, entry_of(claim(folder, revision="r1")))
    assert log.read(folder).remembered_revision("deit") == "r1"
    assert log.read(folder).remembered_revision("other") is None
    opened = claim(folder, revision="r2")
    assert log.read(folder).remembered_revision("deit") == "r2"
    log.commit(folder, log.abandoned(opened, "t"))
    assert log.read(folder).remembered_revision("deit") == "r1"


# --- a log that something else has touched ------------------------------------------------------------------------


def _three_runs(folder: Store) -> None:
    for _ in range(3):
        log.commit(folder, entry_of(claim(folder)))


@pytest.mark.parametrize(
    ("lost", "place"),
    [
        ("00000001.claim.json", "00000001"),
        ("00000001.json", "00000001"),
        ("00000002.json", "00000002"),
        ("00000002.claim.json", "00000002"),
        ("00000003.claim.json", "00000003"),
    ],
)
def test_a_hole_in_the_log_is_refused(folder: Store, tmp_path: Path, lost: str, place: str) -> None:
    _three_runs(folder)
    (tmp_path / "_log" / lost).unlink()
    with pytest.raises(ConflictError, match=f"hole at {place}; restore"):
        log.read(folder)


def test_a_claim_beyond_the_next_place_is_refused(folder: Store, tmp_path: Path) -> None:
    _three_runs(folder)
    claim(folder)
    (tmp_path / "_log" / "00000003.json").unlink()
    with pytest.raises(ConflictError, match="hole at 00000004"):
        log.read(folder)


def test_files_that_are_not_of_the_log_are_ignored(folder: Store) -> None:
    _three_runs(folder)
    for name in ("_log/readme.txt", "_log/1.json", "_log/00000009.json.bak", "_log/old/00000009.json"):
        folder.put(name, b"x")
    assert log.read(folder).newest_seq == 3


def _edit(**changes: Any) -> Callable[[bytes], bytes]:
    return lambda data: json.dumps({**json.loads(data), **changes}).encode()


def _without(name: str) -> Callable[[bytes], bytes]:
    return lambda data: json.dumps({key: value for key, value in json.loads(data).items() if key != name}).encode()


@pytest.mark.parametrize("name", ["00000001.json", "00000001.claim.json"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-20],
        lambda data: b"",
        lambda data: b"\xff\xfe",
        lambda data: b"[]",
        _without("run_id"),
        _without("schema_version"),
        _edit(schema_version="one"),
    ],
    ids=["cut", "empty", "binary", "list", "no run id", "no version", "odd version"],
)
def test_a_damaged_record_is_named(folder: Store, name: str, damage: Callable[[bytes], bytes]) -> None:
    log.commit(folder, entry_of(claim(folder)))
    folder.put(f"_log/{name}", damage(folder.get(f"_log/{name}")))
    with pytest.raises(ConflictError, match=f"_log/{name}: expected the log's (entry|claim)"):
        log.read(folder)


def test_a_damaged_file_of_an_entry_is_named(folder: Store) -> None:
    log.commit(folder, entry_of(claim(folder)))
    folder.put("_log/00000001.json", _edit(labels=[{"key": "x"}])(folder.get("_log/00000001.json")))
    with pytest.raises(ConflictError, match="expected the log's entry"):
        log.read(folder)


@pytest.mark.parametrize("name", ["00000001.json", "00000001.claim.json"])
def test_a_record_of_a_newer_program_is_refused_and_its_version_named(folder: Store, name: str) -> None:
    log.commit(folder, entry_of(claim(folder)))
    newer = _edit(schema_version=schema.SCHEMA_VERSION + 1, run_id=None, unheard_of=1)
    folder.put(f"_log/{name}", newer(folder.get(f"_log/{name}")))
    with pytest.raises(ConflictError, match=f"found {schema.SCHEMA_VERSION + 1}; use the version"):
        log.read(folder)


def test_a_record_of_the_first_schema_is_refused_too(folder: Store) -> None:
    log.commit(folder, entry_of(claim(folder)))
    folder.put("_log/00000001.json", _edit(schema_version=1, catalog=[])(folder.get("_log/00000001.json")))
    with pytest.raises(ConflictError, match="found 1; use the version"):
        log.read(folder)


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_commit_whose_files_are_gone_or_cut_is_a_conflict_and_names_one(output: Store, damage: str) -> None:
    output.put("labels/a/1", b"12345")
    output.put("labels/a/2", b"12345" if damage == "gone" else b"1234")
    names = ("labels/a/1", "labels/b/3") if damage == "gone" else ("labels/a/1", "labels/a/2")
    refs = [FileRef(key=name, num_rows=1, size_bytes=5, sha256="") for name in names]
    entry = entry_of(claim(output), labels=refs)
    log.check_files(output, replace(entry, labels=refs[:1]))
    found = "nothing" if damage == "gone" else "4 bytes"
    with pytest.raises(ConflictError, match=f"{names[1]}: expected the 5 bytes that run .* published, found {found}"):
        log.check_files(output, entry)


def test_fields_that_this_version_does_not_know_are_ignored(folder: Store) -> None:
    first = claim(folder)
    folder.put("_log/00000001.claim.json", json.dumps({**asdict(first), "unheard_of": 1}).encode())
    assert log.read(folder).open_claim == first
