"""What a snapshot replaced -> retired in the log, then removed.

Two steps, in this order: a commit says that label files of some places are no longer named, and then they go. A crash
in between leaves files that nothing names, and the next `--keep-runs` removes them. What the log names is never
removed: everything here is a set of candidates without `named_keys`.

A module of its own because it is the only one that deletes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta

from pipeline import catalog
from pipeline.log import Entry, FileRef, State
from pipeline.snapshot import manifest_of
from pipeline.storage import Store

_KEPT_OF_A_RUN = frozenset({"report.json", "report.html"})


@dataclass(frozen=True, kw_only=True)
class Removal:
    """Objects that are there and that nothing names, in the order in which they have to go."""

    keys: list[str]
    num_bytes: int


def superseded(state: State, space_id: str, *, keep_runs: int, grace: timedelta, now: datetime) -> list[int]:
    """Places to retire: what a snapshot that readers have known for `grace` holds, without the newest runs.

    A snapshot that the clock calls younger than that, or of tomorrow, replaces nothing yet.
    """
    old = [each for each in _snapshots(state, space_id) if now - datetime.fromisoformat(each.committed_at) >= grace]
    if not old:
        return []
    holds = max(old, key=_rank)
    runs = [each.run_seq for each in state.runs if each.space_id == space_id]
    replaced = {seq for seq in runs[: max(0, len(runs) - keep_runs)] if seq <= holds.through_seq}
    replaced |= {each.run_seq for each in old if _rank(each) < _rank(holds)}
    return sorted(replaced - state.retired)


def waits_until(state: State, space_id: str, *, grace: timedelta) -> datetime | None:
    """When the newest snapshot of a space may replace what it holds; None without a snapshot."""
    newest = state.snapshot(space_id)
    return datetime.fromisoformat(newest.committed_at) + grace if newest else None


def named_keys(output: Store, state: State, retired: frozenset[int]) -> set[str]:
    """Every key that the log names, itself or through a list of files, where `retired` places name no label files."""
    refs: list[FileRef | None] = []
    catalogs: dict[str, FileRef] = {}
    for entry in state.entries:
        refs += [*entry.dead_letters, *entry.deletions, entry.canaries]
        if entry.run_seq not in retired:
            refs += [*entry.labels, manifest_of(entry)]
            catalogs |= {ref.key: ref for ref in (entry.catalog,) if ref is not None}
    if state.open_claim is not None:
        refs.append(manifest_of(state.open_claim))
    refs += [file for ref in catalogs.values() for file in catalog.read_manifest(output, ref)]
    return {*catalogs, *(ref.key for ref in refs if ref is not None)}


def removable(
    output: Store, state: State, space_id: str, retired: frozenset[int], *, grace: timedelta, now: datetime
) -> Removal:
    """What is left of `retired` places of a space, and of runs that were given up longer than `grace` ago.

    Of a run these are its label files, its plan, its staged parts and its catalog. Its report stays, as do its rows of
    failures/ and deletions/, which say that a label is no longer true.
    """
    of_space = [entry for entry in state.entries if entry.space_id == space_id]
    gone = [entry for entry in of_space if entry.run_seq in retired]
    given_up = [
        entry
        for entry in of_space
        if entry.kind == "abandoned" and now - datetime.fromisoformat(entry.committed_at) >= grace
    ]
    sizes = {
        key: size for folder in ("labels", "snapshots", "_catalog") for key, size in _list(output, folder, space_id)
    }
    labels = [ref.key for entry in gone for ref in entry.labels]
    manifests = [ref for entry in gone for ref in (entry.catalog, manifest_of(entry)) if ref and ref.key in sizes]
    named = named_keys(output, state, retired)
    lists = [ref.key for ref in manifests if ref.key not in named]
    catalogs = [
        each.key
        for entry in gone
        if entry.catalog is not None and entry.catalog.key in lists
        for each in catalog.read_manifest(output, entry.catalog)
    ]
    staged = dict(_staged(output, [*gone, *given_up]))
    # A list goes after the files that only it names, or they could not be found again after a crash.
    keys = dict.fromkeys(key for key in [*labels, *catalogs, *staged, *lists] if key not in named)
    sizes |= staged
    found = [key for key in keys if key in sizes]
    return Removal(keys=found, num_bytes=sum(sizes[key] for key in found))


def _snapshots(state: State, space_id: str) -> list[Entry]:
    named = [each for each in state.entries if each.kind == "snapshot" and each.run_seq not in state.retired]
    return [each for each in named if each.space_id == space_id]


def _rank(snapshot: Entry) -> tuple[int, int]:
    """Orders snapshots as `State.snapshot` does."""
    return snapshot.through_seq, snapshot.run_seq


def _list(output: Store, folder: str, space_id: str) -> Iterator[tuple[str, int]]:
    for page in output.list_pages(f"{folder}/space={space_id}/"):
        yield from ((info.key, info.size_bytes) for info in page)


def _staged(output: Store, entries: list[Entry]) -> Iterator[tuple[str, int]]:
    """What was staged for these runs; one listing for all of them."""
    kept_of = {entry.run_id: _KEPT_OF_A_RUN for entry in entries}
    # The seal of a run that was given up keeps a driver of it that still lives from publishing.
    kept_of |= {entry.run_id: _KEPT_OF_A_RUN | {"publish.json"} for entry in entries if entry.kind == "abandoned"}
    for page in output.list_pages("_runs/") if kept_of else ():
        for info in page:
            run_id, _, rest = info.key.removeprefix("_runs/").partition("/")
            if run_id in kept_of and rest not in kept_of[run_id]:
                yield info.key, info.size_bytes
