"""Claims and commits in order: what is open, what is published, who may publish next.

`_log/00000007.claim.json` says which run owns the seventh place, `_log/00000007.json` is its commit. Both are written
once by `put_if_absent`. A run claims before it works, so two different runs can never both publish. "Newest" everywhere
means `run_seq`, never a date.
"""

import json
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, TypeVar

from pipeline import schema, storage
from pipeline.errors import ConfigError, ConflictError
from pipeline.storage import Store

_NAME = re.compile(r"_log/(\d{8})(\.claim)?\.json")
_R = TypeVar("_R", bound="Claim | Entry")
EntryKind = Literal["run", "abandoned", "snapshot", "retired"]


@dataclass(frozen=True, kw_only=True)
class FileRef:
    """One published file: its key below the output, its rows, its size and the SHA-256 of its bytes in hex."""

    key: str
    num_rows: int
    size_bytes: int
    sha256: str
    first_key: str = ""
    """Least object key of its rows, relative to the input; rows are sorted by it. Empty for files without rows."""
    last_key: str = ""
    """Greatest object key of its rows."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A run's right to the next place in the order, and everything that makes it the same run after a crash."""

    schema_version: int = schema.SCHEMA_VERSION
    run_id: str
    run_seq: int
    base_seq: int
    """Place of the newest commit when this run began; 0 for the first."""
    identity: dict[str, Any]
    """Input, filters, limit, space and schema: what must be equal for a command to be this run. With a `kind` in it, it
    is no run: see `snapshot`."""
    run_date: str
    model_id: str
    model_revision: str
    metadata: dict[str, str]
    """Footer metadata of every published file: model, preprocessing, embedding, label set, library versions."""
    created_at: str


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A commit: what one run added, file by file."""

    schema_version: int = schema.SCHEMA_VERSION
    kind: EntryKind
    """run: labels were published. abandoned: a run was given up. snapshot: the current view was written anew. retired:
    files that a snapshot replaced are no longer named, and may be removed."""
    run_id: str
    run_seq: int
    identity: dict[str, Any]
    run_date: str
    model_id: str
    model_revision: str
    counts: dict[str, int] = field(default_factory=dict)
    """listed, filtered, unchanged, labeled, failed, deleted: objects."""
    failures: dict[str, int] = field(default_factory=dict)
    """Failed objects by kind."""
    labels: list[FileRef] = field(default_factory=list)
    dead_letters: list[FileRef] = field(default_factory=list)
    deletions: list[FileRef] = field(default_factory=list)
    catalog: FileRef | None = None
    """The space's catalog after this run: a file that lists its files, see `catalog`."""
    canaries: FileRef | None = None
    """The vectors by which the actors of this space check themselves, see `canary`."""
    through_seq: int = 0
    """Of a snapshot: its `labels` are the current view of its space after this place in the log."""
    retires: list[int] = field(default_factory=list)
    """Places of the runs and snapshots whose label files are no longer named, because a snapshot holds their rows."""
    committed_at: str

    @property
    def space_id(self) -> str:
        """The embedding space of this run's labels."""
        return str(self.identity["space_id"])


@dataclass(frozen=True, kw_only=True)
class State:
    """What the log says: every commit in order, and the claim that has no commit yet, if there is one."""

    entries: list[Entry]
    open_claim: Claim | None

    @property
    def newest_seq(self) -> int:
        """Place of the newest commit; 0 if there is none."""
        return self.entries[-1].run_seq if self.entries else 0

    @property
    def runs(self) -> list[Entry]:
        """The commits that published something, oldest first."""
        return [entry for entry in self.entries if entry.kind == "run"]

    @property
    def retired(self) -> frozenset[int]:
        """Places of the runs and snapshots whose label files are no longer named, and may be gone."""
        return frozenset(seq for entry in self.entries for seq in entry.retires)

    def snapshot(self, space_id: str) -> Entry | None:
        """The snapshot that covers most runs of a space, if there is one; the newer of two that cover the same."""
        named = [each for each in self.entries if each.kind == "snapshot" and each.run_seq not in self.retired]
        of_space = [each for each in named if each.space_id == space_id]
        return max(of_space, key=lambda each: (each.through_seq, each.run_seq), default=None)

    def newest(self, space_id: str) -> Entry | None:
        """The newest published run of a space."""
        return next((entry for entry in reversed(self.runs) if entry.space_id == space_id), None)

    def remembered_revision(self, model_id: str) -> str | None:
        """The revision this output uses for a model: that of the open run, else of the newest run with this model."""
        known: list[Claim | Entry] = [*self.runs, *([self.open_claim] if self.open_claim else [])]
        return next((each.model_revision for each in reversed(known) if each.model_id == model_id), None)


def read(store: Store) -> State:
    """The state of an output. Raises ConflictError for a log with a hole, a damaged entry or a newer schema, and
    ConfigError for an index."""
    commits: dict[int, Entry] = {}
    claims: dict[int, Claim] = {}
    keys = [key for key in storage.list_keys(store, "_log/") if _NAME.fullmatch(key)]
    with ThreadPoolExecutor(16) as pool:  # two small files a night, and years of nights
        for key, data in zip(keys, pool.map(store.get, keys), strict=True):
            match = _NAME.fullmatch(key)
            assert match is not None
            if match[2]:
                claims[int(match[1])] = _parse(Claim, data, f"{store.root}/{key}")
            else:
                commits[int(match[1])] = _parse(Entry, data, f"{store.root}/{key}")
    newest = max(commits, default=0)
    missing = [seq for seq in range(1, newest + 1) if seq not in commits or seq not in claims]
    unexpected = [seq for seq in claims if seq > newest + 1]
    if missing or unexpected:
        raise ConflictError(
            f"{store.root}/_log: expected a claim and a commit for every place up to {newest}, found a hole at"
            f" {(missing or unexpected)[0]:08d}; restore that file before running anything on this output"
        )
    return State(entries=[commits[seq] for seq in sorted(commits)], open_claim=claims.get(newest + 1))


def read_claim(store: Store, run_seq: int) -> Claim:
    """The claim of a place in the order: what its run knew before it worked."""
    key = _claim_key(run_seq)
    return _parse(Claim, store.get(key), f"{store.root}/{key}")


def check_files(store: Store, entry: Entry) -> None:
    """Raise ConflictError, naming one, if files that this commit published are gone or have another size.

    One LIST per folder: a night must not build on a table that somebody has cut.
    """
    named = {file.key: file for files in (entry.labels, entry.dead_letters, entry.deletions) for file in files}
    sizes: dict[str, int] = {}
    for folder in sorted({key.rpartition("/")[0] for key in named}):
        for page in store.list_pages(f"{folder}/"):
            sizes |= {info.key: info.size_bytes for info in page}
    for key, file in named.items():
        if sizes.get(key) != file.size_bytes:
            found = f"{sizes[key]} bytes" if key in sizes else "nothing"
            raise ConflictError(
                f"{store.root}/{key}: expected the {file.size_bytes} bytes that run {entry.run_id} published, found"
                f" {found}; restore the file"
            )


def claim(
    store: Store,
    state: State,
    identity: Mapping[str, Any],
    *,
    run_date: str,
    model_id: str,
    model_revision: str,
    metadata: Mapping[str, str],
    now: str,
) -> Claim:
    """Take the next place in the order, or find it taken by an earlier attempt of the same run.

    Raises ConflictError, naming the run and how to finish or give it up, if another run holds it.
    """
    run_seq = state.newest_seq + 1
    wanted = Claim(
        run_id=f"{run_seq:08d}-{schema.digest([state.newest_seq, dict(identity)])[:8]}",
        run_seq=run_seq,
        base_seq=state.newest_seq,
        identity=dict(identity),
        run_date=run_date,
        model_id=model_id,
        model_revision=model_revision,
        metadata=dict(metadata),
        created_at=now,
    )
    held = state.open_claim
    if held is None:
        key = _claim_key(run_seq)
        store.put_if_absent(key, _dump(wanted))
        # Read back before it is believed: some stores let several writers win one race, but keep only one of them.
        held = _parse(Claim, store.get(key), f"{store.root}/{key}")
    if held.run_id != wanted.run_id and "kind" in held.identity:
        raise ConflictError(
            f"{store.root}: a {held.identity['kind']} is being committed in place {held.run_seq:08d}; run the command"
            " again, it finishes that first"
        )
    if held.run_id != wanted.run_id:
        raise ConflictError(
            f"{store.root} has an open run {held.run_id} of {held.created_at} ({_difference(held.identity, identity)}):"
            " run its command again to finish it, or add --abandon-run to give it up"
        )
    return held


def read_entry(store: Store, run_seq: int) -> Entry | None:
    """The commit at this place, or None if there is none yet."""
    key = f"_log/{run_seq:08d}.json"
    data = storage.get_or_none(store, key)
    return None if data is None else _parse(Entry, data, f"{store.root}/{key}")


def commit(store: Store, entry: Entry) -> None:
    """Publish `entry` in its place. Done already by a twin of the same run is fine; anything else is ConflictError."""
    key = f"_log/{entry.run_seq:08d}.json"
    winner = _parse(Entry, store.put_if_absent(key, _dump(entry)), f"{store.root}/{key}")
    if (winner.run_id, winner.kind) != (entry.run_id, entry.kind):
        raise ConflictError(
            f"{store.root}/{key}: expected {entry.run_id}, found {winner.kind} {winner.run_id} committed"
        )


def abandoned(open_claim: Claim, now: str) -> Entry:
    """The commit that gives an open run up: its place is used, nothing of it is published."""
    return entry_of(open_claim, "abandoned", now)


def entry_of(claim: Claim, kind: EntryKind, now: str, **values: Any) -> Entry:
    """The commit of a claimed place, with `values` for the other fields of Entry."""
    return Entry(
        kind=kind,
        run_id=claim.run_id,
        run_seq=claim.run_seq,
        identity=claim.identity,
        run_date=claim.run_date,
        model_id=claim.model_id,
        model_revision=claim.model_revision,
        committed_at=now,
        **values,
    )


def _claim_key(run_seq: int) -> str:
    return f"_log/{run_seq:08d}.claim.json"


def _dump(record: Claim | Entry) -> bytes:
    return json.dumps(asdict(record), indent=1, ensure_ascii=False).encode()


def _parse(kind: type[_R], data: bytes, where: str) -> _R:
    try:
        values = json.loads(data)
        if "index_version" in values:
            raise ConfigError(
                f"{where}: expected the log of a labeling output, found that of an index, which is --output of"
                " build_index and --index of search_images"
            )
        version = values["schema_version"]
        if not isinstance(version, int):
            raise TypeError(f"schema_version {version!r}")
        if version == schema.SCHEMA_VERSION:
            for name in ("labels", "dead_letters", "deletions"):
                if name in values:
                    values[name] = [FileRef(**each) for each in values[name]]
            for name in ("catalog", "canaries"):
                if values.get(name) is not None:
                    values[name] = FileRef(**values[name])
            return kind(**{each.name: values[each.name] for each in fields(kind) if each.name in values})
    except (ValueError, KeyError, TypeError) as error:
        raise ConflictError(
            f"{where}: expected the log's {kind.__name__.lower()}, found {storage.describe(error)}"
        ) from error
    raise ConflictError(
        f"{where}: expected schema version {schema.SCHEMA_VERSION}, found {version}; use the version of this program"
        " that wrote it, or another --output"
    )


def _difference(held: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    names = [name for name in sorted({*held, *wanted}) if held.get(name) != wanted.get(name)]
    if not names:
        return "the same command, begun on another base"
    return "; ".join(f"{name}: that run has {held.get(name)}, this command {wanted.get(name)}" for name in names)
