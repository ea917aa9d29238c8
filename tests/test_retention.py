"""What a snapshot replaced goes, and nothing else: never a key that the log still names, never early."""

import functools
import itertools
import tempfile
import threading
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import nights
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nights import BEGIN, Nights

from pipeline import catalog, log, retention, snapshot, storage, view
from pipeline.compact import Options, compact_labels
from pipeline.errors import ConflictError
from pipeline.log import State
from pipeline.storage import Store

DEIT, VIT = "deit-01234567", "vit-89abcdef"
DAY, HOUR = timedelta(days=1), timedelta(hours=1)


@pytest.fixture
def several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Nights:
    monkeypatch.setattr(catalog, "MAX_FILE_ROWS", 7)
    return nights.several(storage.connect(str(tmp_path / "out")))


def no_engine() -> None:
    raise AssertionError("there is nothing to write")


def compacted(output: Store, now: datetime, **options: Any) -> str:
    """Compact where a snapshot of the newest run exists already, so that only retention is left to do."""
    wanted = Options(output=output.root, space=DEIT, **options)
    return compact_labels(wanted, start_engine=no_engine, now=lambda: now)


def rows(output: Store, space_id: str = DEIT) -> list[dict[str, Any]]:
    return list(pa.concat_tables(list(view.batches(output, space_id))).to_pylist())


def keys(output: Store, prefix: str = "") -> set[str]:
    return set(storage.list_keys(output, prefix))


def named(output: Store) -> set[str]:
    """Every key that the log's state names, collected by hand."""
    state = log.read(output)
    found: set[str] = set()
    for entry in state.entries:
        refs = [*entry.dead_letters, *entry.deletions, *([entry.canaries] if entry.canaries else [])]
        if entry.run_seq not in state.retired:
            refs += [*entry.labels, *([entry.catalog] if entry.catalog else [])]
        found |= {ref.key for ref in refs}
    for space_id in (DEIT, VIT):
        found |= {ref.key for ref in catalog.files_of(output, state.newest(space_id))}
    return found


# --- what is retired ----------------------------------------------------------------------------------------------


def superseded(state: State, now: datetime, keep_runs: int = 1) -> list[int]:
    return retention.superseded(state, DEIT, keep_runs=keep_runs, grace=DAY, now=now)


def test_runs_are_retired_once_a_snapshot_is_older_than_the_grace_period_and_never_by_a_clock_that_runs_backwards(
    several: Nights,
) -> None:
    assert superseded(log.read(several.output), BEGIN + 100 * DAY) == []
    several.snapshot(committed_at=BEGIN)
    state = log.read(several.output)
    assert [run.run_seq for run in state.runs if run.space_id == DEIT] == [1, 3, 5, 6, 7]
    assert superseded(state, BEGIN + DAY) == [1, 3, 5, 6]
    assert superseded(state, BEGIN + DAY, keep_runs=3) == [1, 3]
    for too_early in (BEGIN + DAY - timedelta(seconds=1), BEGIN, BEGIN - DAY, BEGIN - 1000 * DAY):
        assert superseded(state, too_early) == []


def test_a_young_snapshot_protects_what_it_replaced_and_an_old_one_retires_what_it_holds(several: Nights) -> None:
    first = several.snapshot(committed_at=BEGIN)
    several.publish(["late.jpg"])
    second = several.snapshot(committed_at=BEGIN + 2 * DAY)
    several.publish(["later.jpg"])
    state = log.read(several.output)
    assert superseded(state, BEGIN + 2 * DAY) == [1, 3, 5, 6, 7]
    assert superseded(state, BEGIN + 3 * DAY) == [1, 3, 5, 6, 7, first.run_seq, 9]
    assert state.snapshot(DEIT) == second
    assert retention.waits_until(state, DEIT, grace=DAY) == BEGIN + 3 * DAY
    assert retention.waits_until(state, VIT, grace=DAY) is None


def test_of_two_snapshots_the_one_that_covers_more_is_read_whichever_was_committed_last(several: Nights) -> None:
    state = log.read(several.output)
    early = several.snapshot()
    several.publish(["late.jpg"])
    most = several.snapshot()
    listed = snapshot.manifest_of(early)
    assert listed is not None
    again = snapshot.add_snapshot(  # a compaction that began before the last one, and took longer
        several.output,
        state.runs[4],
        listed,
        "label",
        BEGIN.isoformat,
    )
    assert again.run_seq > most.run_seq
    assert log.read(several.output).snapshot(DEIT) == most
    assert rows(several.output)[-1]["uri"] > ""
    assert {row["uri"]: row["run_seq"] for row in rows(several.output)} == several.current[DEIT]


# --- what is removed ----------------------------------------------------------------------------------------------


def test_nothing_that_the_log_names_is_removed_and_the_view_stays(several: Nights) -> None:
    output = several.output
    opened = several.claim(limit=3)
    log.commit(output, log.abandoned(opened, BEGIN.isoformat()))
    for name in ("plan.json", "publish.json", "report.json", "parts/x.parquet"):
        output.put(f"_runs/{opened.run_id}/{name}", b"x")
    before, before_vit, all_before = rows(output), rows(output, VIT), keys(output)
    several.snapshot()
    assert rows(output) == before
    text = compacted(output, BEGIN + 2 * DAY, keep_runs=2)
    assert "retired 3 runs and snapshots" in text
    state = log.read(output)
    assert state.retired == {1, 3, 5}
    assert (state.entries[-1].kind, state.entries[-1].retires) == ("retired", [1, 3, 5])
    assert named(output) <= keys(output)
    assert rows(output) == before
    assert rows(output, VIT) == before_vit
    gone = all_before - keys(output)
    retired = [entry for entry in state.entries if entry.run_seq in state.retired]
    assert gone >= {ref.key for entry in retired for ref in entry.labels}
    assert {key.partition("/")[0] for key in gone} == {"labels", "_catalog", "_runs"}
    kept = {f"_runs/{entry.run_id}/report.json" for entry in retired}
    kept |= {f"_runs/{opened.run_id}/report.json", f"_runs/{opened.run_id}/publish.json"}
    staged = {key for entry in retired for key in keys(output, f"_runs/{entry.run_id}/")}
    assert staged | keys(output, f"_runs/{opened.run_id}/") == kept
    others = [entry for entry in state.runs if entry not in retired]
    assert all(len(keys(output, f"_runs/{entry.run_id}/")) == 6 for entry in others)


def test_it_is_done_once(several: Nights) -> None:
    several.snapshot()
    compacted(several.output, BEGIN + 2 * DAY, keep_runs=1)
    before = keys(several.output)
    assert "retired 0 runs and snapshots, removed 0 objects" in compacted(several.output, BEGIN + 3 * DAY, keep_runs=1)
    assert keys(several.output) == before


def test_a_removal_that_was_interrupted_is_finished_by_the_next(
    several: Nights, monkeypatch: pytest.MonkeyPatch
) -> None:
    several.snapshot()
    state, output = log.read(several.output), several.output
    retires = superseded(state, BEGIN + DAY)
    expected = retention.removable(output, state, DEIT, frozenset(retires), grace=DAY, now=BEGIN + DAY).keys
    lists = [key for key in expected if key.endswith(".json") and key.startswith("_catalog/")]
    assert 0 < len(lists) < expected.index(lists[0])
    before = rows(output)
    with monkeypatch.context() as patch:
        patch.setattr(type(output), "delete", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            compacted(output, BEGIN + 2 * DAY, keep_runs=1)
    assert log.read(output).retired == set(retires)
    assert rows(output) == before
    output.delete(expected[: len(expected) // 2])
    compacted(output, BEGIN + 2 * DAY, keep_runs=1)
    assert keys(output).isdisjoint(expected)
    assert rows(output) == before


def _same(moment: datetime) -> datetime:
    return moment


night = st.fixed_dictionaries(
    {
        "labeled": st.sets(st.sampled_from("abcdefgh"), max_size=5),
        "failed": st.sets(st.sampled_from("abcdefgh"), max_size=2),
        "deleted": st.sets(st.sampled_from("abcdefgh"), max_size=2),
        "space_id": st.sampled_from([DEIT, DEIT, VIT]),
        "then": st.sampled_from(["nothing", "snapshot", "compact 1", "compact 2"]),
    }
)


@given(st.lists(night, min_size=2, max_size=7), st.integers(0, 10_000))
@settings(deadline=None, max_examples=40, derandomize=True)
def test_after_any_nights_and_compactions_every_named_key_exists_and_the_view_is_right(
    drawn: list[dict[str, Any]], number: int
) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalog, "MAX_FILE_ROWS", 3)
        several = Nights(storage.connect(folder), rows_per_file=2)
        several.publish("abc")
        several.publish("ab", space_id=VIT)
        clock = itertools.count()
        for each in drawn:
            known = {key.rpartition("/")[2] for key in several.current[each["space_id"]]}
            failed = dict.fromkeys(each["failed"] - each["labeled"], "corrupt")
            gone = (each["deleted"] & known) - each["labeled"] - failed.keys()
            several.publish(each["labeled"], failed, gone, each["space_id"])
            now = BEGIN + next(clock) * HOUR
            if each["then"] != "nothing":
                several.snapshot(each["space_id"], committed_at=now)
            if each["then"].startswith("compact"):
                keep = int(each["then"][-1])
                wanted = Options(output=folder, space=DEIT, keep_runs=keep, grace=timedelta(hours=number % 3))
                if each["space_id"] == DEIT:  # otherwise its newest run may have no snapshot yet
                    compact_labels(wanted, start_engine=no_engine, now=functools.partial(_same, now))
            assert named(several.output) <= keys(several.output)
            for space_id in (DEIT, VIT):
                tables = list(view.batches(several.output, space_id))
                found = {row["uri"]: row["run_seq"] for table in tables for row in table.to_pylist()}
                assert found == several.current[space_id]


def test_a_dry_run_says_what_would_go_and_writes_and_removes_nothing(several: Nights) -> None:
    several.snapshot()
    before = keys(several.output)
    text = compacted(several.output, BEGIN + 2 * DAY, keep_runs=1, dry_run=True)
    assert "would retire 4 runs and snapshots, would remove " in text
    text = compacted(several.output, BEGIN, keep_runs=1, dry_run=True)
    assert "would retire 0 runs" in text
    assert "what the newest snapshot replaces may go after 2026-11-23T03:00:00+00:00" in text
    several.publish(["more.jpg"])
    assert "dry run: would write the view after run 00000009-" in compacted(several.output, BEGIN, dry_run=True)
    assert keys(several.output) >= before
    assert [entry.kind for entry in log.read(several.output).entries][-2:] == ["snapshot", "run"]


# --- places in the log --------------------------------------------------------------------------------------------


def test_an_open_run_is_named_and_nothing_is_done(several: Nights) -> None:
    several.snapshot()
    opened, before = several.claim(), keys(several.output)
    with pytest.raises(ConflictError, match=f"expected no open run, found {opened.run_id} of .*--abandon-run"):
        compacted(several.output, BEGIN + 9 * DAY, keep_runs=1)
    assert keys(several.output) == before | {f"_log/{opened.run_seq:08d}.claim.json"}


def test_a_snapshot_waits_for_a_night_that_began_meanwhile(several: Nights, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "POLL_S", 0.02)
    output = several.output
    opened = several.claim(VIT)
    found: list[Any] = []
    waiting = threading.Thread(target=lambda: found.append(several.snapshot()))
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    log.commit(output, log.abandoned(opened, "t"))
    waiting.join(20)
    assert [entry.kind for entry in log.read(output).entries][-2:] == ["abandoned", "snapshot"]
    assert found[0].through_seq == 7
    monkeypatch.setattr(snapshot, "MAX_WAIT_S", 0.1)
    several.publish(["x.jpg"])
    stuck = several.claim(VIT)
    with pytest.raises(ConflictError, match=f"the snapshot is ready, but run {stuck.run_id} of .* stays open"):
        several.snapshot()


@pytest.mark.parametrize("kind", ["snapshot", "retired"])
def test_a_place_that_was_claimed_and_not_committed_is_committed_by_whoever_comes_next(
    several: Nights, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    output = several.output
    if kind == "retired":
        several.snapshot()
    before = rows(output)

    def die(_name: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(snapshot, "crash_point", die)
        with pytest.raises(KeyboardInterrupt):
            several.snapshot() if kind == "snapshot" else compacted(output, BEGIN + 2 * DAY, keep_runs=1)
    held = log.read(output).open_claim
    assert held is not None
    assert rows(output) == before
    with pytest.raises(
        ConflictError, match=f"a {kind} is being committed in place {held.run_seq:08d}; run the command"
    ):
        several.claim()
    state = snapshot.settle(output, log.read(output), BEGIN.isoformat())
    assert (state.open_claim, state.entries[-1].kind, state.entries[-1].run_seq) == (None, kind, held.run_seq)
    assert rows(output) == before
    assert snapshot.settle(output, state, BEGIN.isoformat()) is state
    assert [run.run_seq for run in state.runs] == [1, 2, 3, 4, 5, 6, 7]
    assert state.newest(DEIT) == state.runs[-1]
    again = compacted(output, BEGIN + 2 * DAY, keep_runs=1)
    assert again.startswith("snapshot 00000008-")
    assert rows(output) == before
    assert named(output) <= keys(output)


def test_a_claim_for_something_unknown_is_refused(several: Nights) -> None:
    several.claim(kind="miracle")
    with pytest.raises(ConflictError, match="place 00000008 is claimed for a miracle"):
        compacted(several.output, BEGIN)
