"""Outcomes -> partitioned Parquet, catalog files, one log entry; rolls forward from any crash.

    publish.json            put_if_absent: the sums of every range, and which ranges make files together: from here on
                            anybody can finish the run
    publish/<kind>-<group>.json              put_if_absent: which file is made of which units            (Ray tasks)
    labels/ failures/ deletions/ _catalog/   files with names and borders known beforehand               (Ray tasks)
    _log/<seq>.json         the commit

A module of its own because it is the only one that writes where readers look. It needs the claim, the plan and the
parts, and no model: a run of anything on this output can finish it. The driver holds a record per range and per file.
"""

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import ray

from pipeline import canary, catalog, drift, files, outcomes, parts, plan, schema, storage
from pipeline.catalog import KeyRange
from pipeline.errors import ConflictError
from pipeline.faults import crash_point
from pipeline.log import Claim, Entry, FileRef, abandoned, commit, entry_of
from pipeline.meter import metered
from pipeline.outcomes import RangeTotals
from pipeline.parts import PartSummary
from pipeline.plan import Plan
from pipeline.storage import Store
from pipeline.tasks import FILE_TASK, in_order

TARGET_FILE_BYTES = 80 * 2**20
"""Ranges are joined up to this size, and cut into equal files of at most a little more, so that a file ends between 64
and 96 MiB where there is enough."""
MAX_FILE_BYTES = 84 * 2**20
"""Of staged rows; a published file is up to a unit larger, and must stay below 96 MiB."""
MAX_FILE_FAILURES = 200_000
_TOMBSTONE = b'"abandoned"'
"""The seal of a run that was given up."""


@dataclass(frozen=True, kw_only=True)
class FileGroup:
    """Neighbouring ranges whose rows of one kind go into the same files."""

    kind: Literal["labels", "failures", "deletions"]
    number: int
    range_ids: list[str]


@dataclass(frozen=True, kw_only=True)
class Seal:
    """What is published: the sums of every range with units, and who shares files."""

    totals: list[RangeTotals]
    groups: list[FileGroup]

    @property
    def num_labeled(self) -> int:
        """Objects with a label."""
        return sum(each.num_labeled for each in self.totals)


class Published(NamedTuple):
    """What a run committed, and what its labeled images look like as a whole."""

    entry: Entry
    profile: drift.Profile


def read_totals(output: Store, claim: Claim, sealed_plan: Plan) -> list[RangeTotals]:
    """Read every part back, check that it is the unit the plan says, and add up what they hold; a record per range.

    Raises ConflictError for a unit without a part, a part that is not its unit, and sums that do not add up.
    """
    with_units = [each.range_id for each in sealed_plan.ranges if each.num_units]
    summaries = in_order(
        lambda range_id: _summarize_range.options(**FILE_TASK).remote(output.root, claim, range_id), with_units
    )
    found_of = dict(zip(with_units, metered(summaries, "checking ranges", len(with_units)), strict=True))
    totals = [found_of.get(each.range_id) or outcomes.nothing(each.range_id) for each in sealed_plan.ranges]
    by_id = {each.range_id: each for each in read_ranges(output, claim.run_id)}
    for planned, found in zip(sealed_plan.ranges, totals, strict=True):
        outcomes.check_accounts(planned, found, claim, num_in_catalog=by_id[planned.range_id].num_rows)
    return totals


def read_ranges(output: Store, run_id: str) -> list[KeyRange]:
    """The key ranges of a planned run."""

    def refuse() -> list[KeyRange]:
        raise ConflictError(f"{output.root}: run {run_id} is planned, but its plan/ranges.json is gone; restore it")

    return plan.seal_ranges(output, run_id, refuse)


def fate(output: Store, run_id: str) -> Literal["open", "sealed", "abandoned"]:
    """What was decided of a claimed run. Sealed: anybody can, and must, finish it. Abandoned: it may never publish."""
    standing = storage.get_or_none(output, _seal_key(run_id))
    if standing is None:
        return "open"
    return "abandoned" if standing == _TOMBSTONE else "sealed"


def abandon(output: Store, claim: Claim, now: str) -> None:
    """Give an open run up, also against a driver of it that is still alive: whoever writes the seal first decides.

    Raises ConflictError if the run has begun to publish.
    """
    if output.put_if_absent(_seal_key(claim.run_id), _TOMBSTONE) != _TOMBSTONE:
        raise ConflictError(
            f"{output.root}: run {claim.run_id} has begun to publish and cannot be abandoned any more; any command on"
            " this output finishes it"
        )
    commit(output, abandoned(claim, now))


def seal(output: Store, claim: Claim, sealed_plan: Plan, totals: Sequence[RangeTotals]) -> None:
    """Decide what is published; the first seal stands. ConflictError if the run was abandoned meanwhile."""
    wanted = Seal(totals=list(totals), groups=list(_groups(sealed_plan, totals)))
    standing = output.put_if_absent(_seal_key(claim.run_id), json.dumps(asdict(wanted)).encode())
    if standing == _TOMBSTONE:
        raise ConflictError(
            f"{output.root}: run {claim.run_id} was abandoned by another command; nothing was published"
        )
    crash_point("publish-sealed")


def finish(output: Store, claim: Claim, base: Entry | None, now: str) -> Published:
    """Write what is missing of a sealed run's files and its log entry. The same however often it is interrupted.

    `base` is the newest published run of the same space. Raises ConflictError if a file that exists is another one.
    """
    sealed_plan, sealed = plan.read(output, claim.run_id), _read_seal(output, claim.run_id)
    if sealed_plan is None:
        raise ConflictError(f"{output.root}: run {claim.run_id} was publishing, but its plan.json is gone; restore it")
    totals = {each.range_id: each for each in sealed.totals}
    written: dict[str, list[FileRef]] = {}
    profile = drift.Profile()
    for kind in ("labels", "failures", "deletions"):
        groups = [group for group in sealed.groups if group.kind == kind]
        found = list(_publish(output, claim, groups, totals))
        written[kind] = [ref for ref, _ in found]
        profile = functools.reduce(drift.merge, (each for _, each in found if each is not None), profile)
    crash_point("deletions-published")
    listed = _publish_catalog(output, claim, sealed_plan, totals)
    crash_point("catalog-published")
    failures = outcomes.failures_of(sealed.totals)
    counts = {name: sealed_plan.counts[name] for name in ("listed", "filtered", "unchanged", "deleted")}
    entry = entry_of(
        claim,
        "run",
        now,
        counts={**counts, "labeled": sealed.num_labeled, "failed": failures.total()},
        failures=dict(sorted(failures.items())),
        labels=written["labels"],
        dead_letters=written["failures"],
        deletions=written["deletions"],
        catalog=listed or (base.catalog if base else None),
        canaries=base.canaries if base else canary.find(output, claim.run_id),
    )
    for kind, name in (("labels", "labeled"), ("failures", "failed"), ("deletions", "deleted")):
        num_rows = sum(file.num_rows for file in written[kind])
        if num_rows != entry.counts[name]:
            raise ConflictError(
                f"run {claim.run_id}: expected {entry.counts[name]} rows below {kind}/, found {num_rows} in its files"
            )
    commit(output, entry)
    crash_point("committed")
    return Published(entry, profile)


# --- layout -------------------------------------------------------------------------------------------------------


def _seal_key(run_id: str) -> str:
    return f"_runs/{run_id}/publish.json"


def _read_seal(output: Store, run_id: str) -> Seal:
    data = output.get(_seal_key(run_id))
    with storage.parsing(output, _seal_key(run_id), "what is to be published"):
        values = json.loads(data)
        return Seal(
            totals=[RangeTotals(**each) for each in values["totals"]],
            groups=[FileGroup(**each) for each in values["groups"]],
        )


def _groups(sealed_plan: Plan, totals: Sequence[RangeTotals]) -> Iterator[FileGroup]:
    deleted = {each.range_id: each.counts["deleted"] for each in sealed_plan.ranges}
    weights: dict[str, tuple[Callable[[RangeTotals], int], int]] = {
        "labels": (lambda each: each.label_bytes, TARGET_FILE_BYTES),
        "failures": (lambda each: each.num_failed, MAX_FILE_FAILURES),
        "deletions": (lambda each: deleted[each.range_id], MAX_FILE_FAILURES),
    }
    kind: Any
    for kind, (weight_of, enough) in weights.items():
        number, range_ids, weight = 0, list[str](), 0
        for each in totals:
            if not weight_of(each):
                continue
            range_ids.append(each.range_id)
            weight += weight_of(each)
            if weight >= enough:
                yield FileGroup(kind=kind, number=number, range_ids=range_ids)
                number, range_ids, weight = number + 1, [], 0
        if range_ids:
            yield FileGroup(kind=kind, number=number, range_ids=range_ids)


Sources = list[tuple[str, str, str]]
"""What one file of labels/ or failures/ is made of, in key order: range id, unit id, SHA-256 of the part."""


def lay_out(output: Store, run_id: str, group: FileGroup, totals: Sequence[RangeTotals]) -> list[Sources]:
    """The files of a group of labels or failures; the first layout stands."""
    key = f"_runs/{run_id}/publish/{group.kind}-{group.number:05d}.json"
    standing = storage.get_or_none(output, key)
    if standing is None:
        found = [(each.range_id, part) for each in totals for part in outcomes.read_outcome(output, run_id, each).parts]
        standing = output.put_if_absent(key, json.dumps(list(_cut(group.kind, found))).encode())
    with storage.parsing(output, key, "the layout of files"):
        return [[(range_id, unit_id, digest) for range_id, unit_id, digest in each] for each in json.loads(standing)]


def _cut(kind: str, found: Sequence[tuple[str, PartSummary]]) -> Iterator[Sources]:
    """Equal files within the bounds."""
    weighted = [
        (part.label_bytes if kind == "labels" else part.num_failed, (range_id, part.unit_id, part.sha256))
        for range_id, part in found
        if (part.num_labeled if kind == "labels" else part.num_failed)
    ]
    total = sum(weight for weight, _ in weighted)
    num_files = max(1, -(-total // (MAX_FILE_BYTES if kind == "labels" else MAX_FILE_FAILURES)))
    sources: Sources = []
    done = num_cut = 0
    for weight, source in weighted:
        sources.append(source)
        done += weight
        if done * num_files >= total * (num_cut + 1):
            yield sources
            sources, num_cut = [], num_cut + 1
    if sources:
        yield sources


def _file_key(kind: str, claim: Claim, group: int, number: int) -> str:
    space = claim.identity["space_id"]
    return f"{kind}/space={space}/run_date={claim.run_date}/part-{claim.run_id}-{group:05d}-{number:03d}.parquet"


def _publish(
    output: Store, claim: Claim, groups: Sequence[FileGroup], totals: Mapping[str, RangeTotals]
) -> Iterator[tuple[FileRef, drift.Profile | None]]:
    """The files of all groups of one kind, in key order, those of labels with their profile."""
    if groups and groups[0].kind == "deletions":
        for refs in in_order(
            lambda each: _publish_deletions.options(**FILE_TASK).remote(output.root, claim, each), groups
        ):
            yield from ((ref, None) for ref in refs)
        return

    def start_layout(group: FileGroup) -> "ray.ObjectRef[int]":
        of_group = [totals[name] for name in group.range_ids]
        return _lay_out.options(**FILE_TASK).remote(output.root, claim.run_id, group, of_group)

    def start_file(place: tuple[FileGroup, int]) -> "ray.ObjectRef[tuple[FileRef, drift.Profile | None]]":
        return _publish_file.options(**FILE_TASK).remote(output.root, claim, *place)

    num_files_of = zip(groups, in_order(start_layout, groups), strict=True)
    places = [(group, number) for group, num_files in num_files_of for number in range(num_files)]
    crash_point("laid-out")
    for published in metered(in_order(start_file, places), "publishing files", len(places)):
        yield published
        crash_point("file-published")


def _publish_catalog(
    output: Store, claim: Claim, sealed_plan: Plan, totals: Mapping[str, RangeTotals]
) -> FileRef | None:
    """Renew the catalog of every range that changed; None if none did."""
    changed = {each.range_id: each for each in sealed_plan.ranges if each.changes_catalog}
    if not changed:
        return None
    ranges = read_ranges(output, claim.run_id)
    to_renew = [each for each in ranges if each.range_id in changed]
    files_of = in_order(
        lambda each: _renew_range.options(**FILE_TASK).remote(output.root, claim, each, totals[each.range_id]),
        to_renew,
    )
    names = [each.range_id for each in to_renew]
    renewed = dict(zip(names, metered(files_of, "renewing ranges", len(names)), strict=True))
    listed: list[FileRef] = []
    for each in ranges:
        refs = renewed.get(each.range_id, list(each.files))
        if each.range_id in changed:
            counts = changed[each.range_id].counts
            expected = counts["kept"] + counts["unchanged"] + counts["planned"]
            found = sum(ref.num_rows for ref in refs)
            if found != expected:
                raise ConflictError(
                    f"run {claim.run_id}, range {each.range_id}: expected {expected} rows in the new catalog, found"
                    f" {found}"
                )
        listed += refs
    crash_point("ranges-renewed")
    return catalog.write_manifest(output, claim.identity["space_id"], claim.run_id, listed)


# --- Ray tasks ----------------------------------------------------------------------------------------------------


@ray.remote
def _summarize_range(output_url: str, claim: Claim, range_id: str) -> RangeTotals:
    return outcomes.summarize_range(storage.connect(output_url), claim.run_id, claim.run_seq, range_id)


@ray.remote
def _lay_out(output_url: str, run_id: str, group: FileGroup, totals: Sequence[RangeTotals]) -> int:
    return len(lay_out(storage.connect(output_url), run_id, group, totals))


@ray.remote
def _publish_file(output_url: str, claim: Claim, group: FileGroup, number: int) -> tuple[FileRef, drift.Profile | None]:
    """Write one file of labels/ or failures/ from its parts, which must be those that were sealed."""
    output = storage.connect(output_url)
    sources = lay_out(output, claim.run_id, group, [])[number]
    tables = []
    for range_id, unit_id, digest in sources:
        table, summary = parts.read_part(output, claim.run_id, range_id, unit_id)
        if summary.sha256 != digest:
            raise ConflictError(f"{output_url}: part {unit_id} of run {claim.run_id} changed after it was sealed")
        is_labeled = pc.is_null(table.column("failure_kind"))
        tables.append(table.filter(is_labeled if group.kind == "labels" else pc.invert(is_labeled)))
    table = pa.concat_tables(tables)
    key = _file_key(group.kind, claim, group.number, number)
    uris = table.column("uri")
    if len(uris) > 1 and not pc.all(pc.less(uris[:-1], uris[1:])).as_py():
        raise ConflictError(f"{output_url}/{key}: the rows of run {claim.run_id} are not in order of their uri")
    digest = schema.digest(sources)
    if group.kind == "failures":
        return files.put(output, key, files.failures(table, claim), claim, digest), None
    rows = files.labels(table, claim, claim.identity["embedding_dim"])
    return files.put(output, key, rows, claim, digest), drift.profile_of(rows)


@ray.remote
def _publish_deletions(output_url: str, claim: Claim, group: FileGroup) -> list[FileRef]:
    """Write a group's files of deletions/, from the plans of its ranges."""
    output = storage.connect(output_url)
    refs: list[FileRef] = []
    waiting: list[pa.Table] = []

    def write() -> None:
        gone = pa.concat_tables(waiting)
        key = _file_key("deletions", claim, group.number, len(refs))
        digest = schema.digest([group.range_ids, gone.column("key")[0].as_py(), len(gone)])
        refs.append(files.put(output, key, files.deletions(gone, claim), claim, digest))
        waiting.clear()

    for range_id in group.range_ids:
        for table in plan.read_deletions(output, plan.read_range(output, claim.run_id, range_id)):
            waiting.append(table)
            if sum(map(len, waiting)) >= MAX_FILE_FAILURES:
                write()
    if waiting:
        write()
    return refs


@ray.remote
def _renew_range(output_url: str, claim: Claim, key_range: KeyRange, totals: RangeTotals) -> list[FileRef]:
    """Write what changed of a range's catalog; give all its files."""
    output = storage.connect(output_url)
    planned = plan.read_range(output, claim.run_id, key_range.range_id)
    fresh = outcomes.read_fresh(output, outcomes.read_outcome(output, claim.run_id, totals)) if totals.sha256 else ()

    def write(number: int, rows: pa.Table) -> FileRef:
        key = f"_catalog/space={claim.identity['space_id']}/{claim.run_id}-{key_range.range_id}-{number:05d}.parquet"
        origin = [[file.sha256 for file in key_range.files], totals.sha256]
        bounds = [rows.column("key")[0].as_py(), rows.column("key")[-1].as_py(), len(rows)]
        return files.put(output, key, rows, claim, schema.digest([origin, bounds]))

    return catalog.renew(output, key_range, plan.read_deletions(output, planned), fresh, write)
