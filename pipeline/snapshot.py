"""Places in the log that are no runs: a snapshot of the current view, and the retirement of what it replaced.

Such a place is claimed when its work is done, so it never keeps a night waiting, and its claim says everything that its
commit needs: whoever finds one without a commit, a night or the next compaction, commits it (`settle`).

A module of its own because nights must be able to do that, without Ray and without knowing how a snapshot is made.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from pipeline import catalog, log
from pipeline.errors import ConflictError
from pipeline.faults import crash_point
from pipeline.log import Claim, Entry, FileRef, State
from pipeline.storage import Store

POLL_S = 10.0
MAX_WAIT_S = 6 * 3600.0
"""For a night that is open when a snapshot is ready. What was written is then in vain: a later attempt covers more."""

_log = logging.getLogger(__name__)


def settle(output: Store, state: State, now: str) -> State:
    """Commit a snapshot or retirement whose command died between claim and commit; the state after that."""
    if state.open_claim is None or "kind" not in state.open_claim.identity:
        return state
    log.commit(output, _entry(output, state.open_claim, now))
    return log.read(output)


def add_snapshot(output: Store, newest: Entry, manifest: FileRef, partition_by: str, now: Callable[[], str]) -> Entry:
    """Commit the snapshot of the view after the run `newest`, whose files `manifest` lists."""
    details = {"through_seq": newest.run_seq, "partition_by": partition_by, "manifest": asdict(manifest)}
    return _add(output, newest, {"kind": "snapshot", **details}, now)


def add_retirement(output: Store, newest: Entry, retires: list[int], now: Callable[[], str]) -> Entry:
    """Commit that label files of these places are no longer named."""
    return _add(output, newest, {"kind": "retired", "retires": retires}, now)


def manifest_of(entry: Entry | Claim) -> FileRef | None:
    """The file that lists a snapshot's files; None for other places of the log."""
    listed = entry.identity.get("manifest")
    return FileRef(**listed) if listed else None


def _add(output: Store, newest: Entry, details: Mapping[str, Any], now: Callable[[], str]) -> Entry:
    """Take the next place in the log that no night holds, and commit.

    Raises ConflictError if a night stays open for longer than MAX_WAIT_S.
    """
    shared = {name: newest.identity[name] for name in ("input", "space_id", "top_k", "embedding_dim")}
    identity = {**shared, **details}
    deadline_s = time.monotonic() + MAX_WAIT_S
    has_told = False
    while True:
        state = settle(output, log.read(output), now())
        # A night may have committed it already, from the claim of an attempt that died.
        done = [each for each in state.entries if each.identity == identity]
        if done:
            return done[-1]
        held = state.open_claim
        if held is None:
            try:
                claim = log.claim(
                    output,
                    state,
                    identity,
                    run_date=newest.run_date,
                    model_id=newest.model_id,
                    model_revision=newest.model_revision,
                    metadata={},
                    now=now(),
                )
            except ConflictError:  # a night was faster, by milliseconds
                continue
            crash_point(f"{details['kind']}-claimed")
            entry = _entry(output, claim, now())
            log.commit(output, entry)
            return entry
        if time.monotonic() > deadline_s:
            raise ConflictError(
                f"{output.root}: the {details['kind']} is ready, but run {held.run_id} of {held.created_at} stays open;"
                " finish it with its own command, or give it up with --abandon-run, then run this again"
            )
        if not has_told:
            _log.info("waiting for run %s, which began meanwhile, to publish", held.run_id)
            has_told = True
        time.sleep(POLL_S)


def _entry(output: Store, claim: Claim, now: str) -> Entry:
    manifest = manifest_of(claim)
    kind = claim.identity["kind"]
    if kind not in ("snapshot", "retired"):
        raise ConflictError(
            f"{output.root}/_log: place {claim.run_seq:08d} is claimed for a {kind}, which this version does not know;"
            " use the version of this program that wrote it"
        )
    return log.entry_of(
        claim,
        kind,
        now,
        labels=catalog.read_manifest(output, manifest) if manifest else [],
        through_seq=claim.identity.get("through_seq", 0),
        retires=claim.identity.get("retires", []),
    )
