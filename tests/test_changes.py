"""What runs changed in the view: a copy that follows it night by night, or catches up at once, is the view."""

from pathlib import Path

import nights
import pyarrow as pa
import pytest
from nights import Nights

from pipeline import catalog, changes, log, schema, storage, view
from pipeline.changes import Change
from pipeline.log import State
from pipeline.storage import Store

DEIT, VIT = "deit-01234567", "vit-89abcdef"


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(catalog, "MAX_FILE_ROWS", 7)
    return storage.connect(str(tmp_path / "out"))


@pytest.fixture
def several(output: Store) -> Nights:
    return nights.several(output)


def state_at(output: Store, run_seq: int) -> State:
    """The log as it was after this place."""
    return State(entries=[each for each in log.read(output).entries if each.run_seq <= run_seq], open_claim=None)


def since(output: Store, run_seq: int, space_id: str = DEIT, *, until: int = 99) -> list[Change]:
    state = state_at(output, until)
    return list(changes.since(output, state, view.resolve(output, space_id, state), run_seq))


def view_at(output: Store, run_seq: int, space_id: str = DEIT) -> dict[str, int]:
    """Uri -> run of its label, in the view after this place."""
    return applied({}, since(output, 0, space_id, until=run_seq))


def applied(copy: dict[str, int], found: list[Change]) -> dict[str, int]:
    """A copy after these changes."""
    copy = dict(copy)
    for change in found:
        copy.update(zip(change.rows["uri"].to_pylist(), change.rows["run_seq"].to_pylist(), strict=True))
        for uri in change.gone.to_pylist():
            copy.pop(uri, None)
    return copy


def test_everything_since_no_run_is_the_view_and_nothing_is_gone(several: Nights) -> None:
    for space_id in (DEIT, VIT):
        found = since(several.output, 0, space_id)
        assert applied({}, found) == several.current[space_id]
        assert sum(len(change.gone) for change in found) == 0
        assert pa.concat_tables([change.rows for change in found]).schema.equals(schema.labels(nights.DIM))


@pytest.mark.parametrize("has_snapshot", [False, True])
def test_copy_of_any_night_becomes_the_view_of_any_later_one(several: Nights, has_snapshot: bool) -> None:
    output = several.output
    if has_snapshot:
        several.snapshot()
        several.publish(["z last"], {"a/06.jpg": "corrupt"}, ["top.jpg"])
    for space_id in (DEIT, VIT):
        seqs = [run.run_seq for run in log.read(output).runs if run.space_id == space_id]
        for place, earlier in enumerate(seqs):
            copy = view_at(output, earlier, space_id)
            for later in seqs[place:]:
                found = since(output, earlier, space_id, until=later)
                wanted = view_at(output, later, space_id)
                assert applied(copy, found) == wanted, (earlier, later)
                assert applied(applied(copy, found), found) == wanted
                assert sum(change.num_current for change in found) == len(wanted)
                # Nothing is brought that the copy has already.
                brought = {uri for change in found for uri in change.rows["uri"].to_pylist()}
                assert brought == {uri for uri in wanted if copy.get(uri) != wanted[uri]}


def test_changes_come_in_the_order_of_keys_with_the_columns_asked_for(several: Nights) -> None:
    state = log.read(several.output)
    current = view.resolve(several.output, DEIT, state)
    found = list(changes.since(several.output, state, current, 1, ["run_seq", "uri"]))
    assert {tuple(change.rows.column_names) for change in found} == {("run_seq", "uri")}
    for uris in (
        [uri for change in found for uri in change.rows["uri"].to_pylist()],
        [uri for change in found for uri in change.gone.to_pylist()],
    ):
        assert len(uris) > 2
        assert uris == sorted(set(uris))


def test_everything_may_be_gone_and_the_last_key_too(output: Store) -> None:
    several = Nights(output)
    several.publish(["a", "b", "c"])
    several.publish([], deleted=["c"])
    assert applied(view_at(output, 1), since(output, 1)) == several.current[DEIT]
    several.publish([], deleted=["a", "b"])
    assert log.read(output).runs[-1].catalog is not None
    assert [change.gone.to_pylist() for change in since(output, 1)] == [[f"{nights.ROOT}/{key}" for key in "abc"]]
    assert [change.rows.column_names for change in since(output, 1)] == [schema.labels(nights.DIM).names]


def test_nothing_changed_since_the_newest_run(several: Nights) -> None:
    found = since(several.output, log.read(several.output).newest_seq)
    assert found
    assert sum(len(change.rows) + len(change.gone) for change in found) == 0
