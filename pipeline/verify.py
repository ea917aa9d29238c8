"""An output -> is what its log says true: a check a line, what was expected, what was found.

    log      the log is whole, and every entry's counts add up
    files    every file that it names is the file that was written; no other file is where readers look
    rows     what the schema promises of every row, and no uri twice
    catalog  every key's last outcome has its row, no row is unknown to the catalog        (per space)
    listing  the source as it is now against the catalog                                   (per space)
    sample   some rows labeled again, and the canary images                                (per space)

A module of its own because it decides what is looked at and what a finding means; reading is done by the three modules
before it, a file or a key range at a time, wherever `Spread` runs them. Nothing is written. A damage is one check's
finding: what lies in a damaged file is not missed again by the checks after it.
"""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline import catalog, log, storage
from pipeline.engine import Spread
from pipeline.errors import ConfigError, ConflictError
from pipeline.listing import Scope
from pipeline.log import Entry, FileRef, State
from pipeline.storage import Store
from pipeline.verify_catalog import Candidate, Source, SpanFindings, check_span, count_listing, spans, within
from pipeline.verify_files import (
    FileFindings,
    Findings,
    Named,
    catalog_file,
    check_file,
    named_by,
    overlapping,
    shared_uris,
)
from pipeline.verify_sample import SPARE_CANDIDATES, SampleFindings, compare

_FOLDERS = ("labels", "failures", "deletions")


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What to look at."""

    output_url: str
    space_id: str | None = None
    """None: all spaces of the output."""
    num_sample_rows: int = 20
    """Rows to label again, per space."""
    is_sample_required: bool = False
    """Whether a model that is not to be had is a failure, and not a reason to skip."""
    seed: int = 0
    lists_source: bool = True
    reads_files: bool = True
    """Otherwise sizes are those of the listing, and rows are not looked at."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the summary."""

    name: str
    status: Literal["ok", "FAILED", "skipped"]
    text: str
    examples: tuple[str, ...] = ()
    """The first few findings, or warnings of a check that is ok."""
    num_findings: int = 0


def verify(audit: Audit, spread: Spread) -> list[Check]:
    """Every check of an output, in the order of the module's list.

    Raises ConfigError for an output or a space that is not there, and SourceError for what cannot be read at all.
    """
    output = storage.connect_output(audit.output_url)
    standing = dict(_standing(output))  # before the log, which then names all of it that is published
    try:
        state = log.read(output)
    except ConflictError as error:
        names = ("files", "rows", "catalog", "listing", "sample")
        skipped = [Check(name=name, status="skipped", text="the log is not whole") for name in names]
        return [Check(name="log", status="FAILED", text=str(error), num_findings=1), *skipped]
    spaces = sorted({each.space_id for each in state.runs})
    if not state.entries and state.open_claim is None:
        raise ConfigError(f"--output {output.root}: expected an output of label_bucket, found no log in it")
    if audit.space_id is not None and audit.space_id not in spaces:
        raise ConfigError(f"--space {audit.space_id}: expected one of {', '.join(spaces) or 'none yet'}")
    if audit.space_id is not None:
        spaces = [audit.space_id]
    checks = [_check_log(state)]
    named = _named(output, state, spaces)
    found = _look_at_files(audit, output, standing, named, spread)
    damaged = frozenset(key for key, each in found.items() if each.damage.num)
    checks += [
        _files_check(audit, output, state, standing, found),
        _rows_check(audit, output, state, spaces, found, spread),
    ]
    for space_id in spaces:
        checks += _check_space(audit, output, state, space_id, damaged, spread)
    return checks


def summary(checks: Sequence[Check]) -> str:
    """The checks for people: one line each, findings below it, and the sum."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.status:<7}  {check.name:<{width}}  {check.text}")
        lines += [f"{'':<9}{each}" for each in check.examples]
        if check.num_findings > len(check.examples) > 0:
            lines.append(f"{'':<9}and {check.num_findings - len(check.examples):,} more")
    num = Counter(check.status for check in checks)
    return "\n".join([*lines, f"verified: {num['ok']} checks ok, {num['FAILED']} failed, {num['skipped']} skipped"])


def _check(name: str, text: str, findings: Findings, warnings: Sequence[str] = ()) -> Check:
    if findings.num:
        text = f"{findings.num:,} finding{'s' if findings.num > 1 else ''}; {text}"
    return Check(
        name=name,
        status="FAILED" if findings.num else "ok",
        text=text,
        examples=tuple(findings.examples or warnings),
        num_findings=findings.num,
    )


# --- log ----------------------------------------------------------------------------------------------------------


def _check_log(state: State) -> Check:
    findings = Findings()
    for entry in state.entries:
        for problem in _count_problems(entry) if entry.kind == "run" else ():
            findings.add([f"run {entry.run_id}: {problem}"])
    open_run = f", run {state.open_claim.run_id} is open" if state.open_claim else ""
    counts = Counter(entry.kind for entry in state.entries)
    kinds = ", ".join(f"{number:,} {kind}" for kind, number in sorted(counts.items()))
    text = (
        f"{len(state.entries):,} places ({kinds}), no hole{open_run}; listed = labeled + failed + unchanged + filtered"
    )
    last = state.runs[-1] if state.runs else None
    if last is not None and not findings.num:
        names = ("listed", "labeled", "failed", "unchanged", "filtered")
        listed, *parts = (f"{last.counts[name]:,}" for name in names)
        text += f": {listed} = {' + '.join(parts)} in the newest run"
    return _check("log", text, findings)


def _count_problems(entry: Entry) -> Iterator[str]:
    counts = entry.counts
    total = sum(counts.get(name, 0) for name in ("labeled", "failed", "unchanged", "filtered"))
    if counts.get("listed") != total:
        yield f"expected {counts.get('listed')} listed objects as the sum of their outcomes, found {total}"
    for kind, name, files in (
        ("labels", "labeled", entry.labels),
        ("failures", "failed", entry.dead_letters),
        ("deletions", "deleted", entry.deletions),
    ):
        num_rows = sum(file.num_rows for file in files)
        if num_rows != counts.get(name):
            yield f"expected {counts.get(name)} rows in its files of {kind}/, found {num_rows}"
    if sum(entry.failures.values()) != counts.get("failed"):
        yield f"expected {counts.get('failed')} failures by kind, found {sum(entry.failures.values())}"


# --- files and rows -----------------------------------------------------------------------------------------------


def _standing(output: Store) -> Iterator[tuple[str, int]]:
    """Keys below labels/, failures/ and deletions/ and their sizes: a record per file."""
    for folder in _FOLDERS:
        for page in output.list_pages(f"{folder}/"):
            yield from ((info.key, info.size_bytes) for info in page)


def _named(output: Store, state: State, spaces: Sequence[str]) -> list[Named]:
    """Every file that must stand, once: of the catalogs, only the newest of each space."""
    named: dict[str, Named] = {}
    for entry in state.entries:
        is_newest = entry.kind == "run" and entry is state.newest(entry.space_id)
        for each in named_by(entry) if entry.space_id in spaces else ():
            is_retired = each.kind == "labels" and entry.run_seq in state.retired
            if not is_retired and (each.kind != "manifest" or is_newest):
                named.setdefault(each.ref.key, each)
    for newest in filter(None, map(state.newest, spaces)):
        named |= {ref.key: catalog_file(newest, ref) for ref in _catalog_files(output, newest) or ()}
    return list(named.values())


def _catalog_files(output: Store, entry: Entry) -> list[FileRef] | None:
    """The files of a catalog; None if what lists them is damaged, which is a finding of the files check."""
    try:
        return catalog.files_of(output, entry)
    except (ConflictError, ValueError, KeyError, TypeError):
        return None


def _look_at_files(
    audit: Audit, output: Store, standing: dict[str, int], named: Sequence[Named], spread: Spread
) -> dict[str, FileFindings]:
    """What each file has to hear. Without reading files: those that the listing does not show are read all the same,
    which are the few of the catalog, and any that was published after it.
    """
    read = [each for each in named if audit.reads_files or each.ref.key not in standing]
    looked_at = spread(check_file, ((output.root, each) for each in read))
    found = {each.ref.key: one for each, one in zip(read, looked_at, strict=True)}
    for each in named:
        if each.ref.key not in found:
            damage = Findings()
            if standing[each.ref.key] != each.ref.size_bytes:
                damage.add([f"{each.ref.key}: expected {each.ref.size_bytes} bytes, found {standing[each.ref.key]}"])
            found[each.ref.key] = FileFindings(damage, Findings(), each.ref.num_rows)
    return found


def _files_check(
    audit: Audit, output: Store, state: State, standing: dict[str, int], found: dict[str, FileFindings]
) -> Check:
    findings = Findings()
    for each in found.values():
        findings.merge(each.damage)
    after = log.read(output)  # what was published while this went on is no orphan
    known = {file.key for entry in after.entries for each in _published(entry) for file in each}
    open_ids = {each.open_claim.run_id for each in (state, after) if each.open_claim is not None}
    in_progress = 0
    for key in sorted(standing.keys() - known):
        if audit.space_id is not None and f"/space={audit.space_id}/" not in key:
            continue
        if any(f"-{run_id}-" in key.rpartition("/")[2] for run_id in open_ids):
            in_progress += 1
        else:
            findings.add([f"{key}: no entry of the log names it"])
    num_ok = sum(not each.damage.num for each in found.values())
    what = "SHA-256, columns, footer, order, bounds" if audit.reads_files else "sizes only"
    text = f"{len(found):,} named, {num_ok:,} as they were written ({what}); {len(standing):,} stand where readers look"
    warnings = []
    if in_progress:
        warnings = [f"warning: {in_progress} files of the open run {', '.join(sorted(open_ids))}, which is publishing"]
    return _check("files", text, findings, warnings)


def _published(entry: Entry) -> tuple[list[FileRef], ...]:
    return entry.labels, entry.dead_letters, entry.deletions


def _rows_check(
    audit: Audit,
    output: Store,
    state: State,
    spaces: Sequence[str],
    found: dict[str, FileFindings],
    spread: Spread,
) -> Check:
    if not audit.reads_files:
        return Check(name="rows", status="skipped", text="the files were not read (--no-checksums)")
    findings = Findings()
    for each in found.values():
        findings.merge(each.rows)
    pairs = [
        pair
        for entry in state.entries
        if entry.space_id in spaces and entry.kind == "run"  # a snapshot's partitions share all bounds, see check_span
        for files in _published(entry)
        for pair in overlapping(file for file in files if file.key in found and not found[file.key].damage.num)
    ]
    for each in spread(shared_uris, ((output.root, *pair) for pair in pairs)):
        findings.merge(each)
    num_rows = sum(each.num_rows for each in found.values() if not each.damage.num)
    num_damaged = sum(bool(each.damage.num) for each in found.values())
    promised = "no uri twice in a run; spaces, ids, labels, scores, vectors as promised"
    text = f"{num_rows:,}, those of the catalog included: {promised}"
    return _check("rows", text + _not_looked_at(num_damaged, "damaged files"), findings)


def _not_looked_at(number: int, what: str) -> str:
    return f"; not looked at: {number:,} {what}" if number else ""


# --- a space ------------------------------------------------------------------------------------------------------


def _check_space(
    audit: Audit,
    output: Store,
    state: State,
    space_id: str,
    damaged: frozenset[str],
    spread: Spread,
) -> Iterator[Check]:
    entry = state.newest(space_id)
    assert entry is not None
    files = _catalog_files(output, entry)
    if files is None or any(file.key in damaged for file in files):
        for name in ("catalog", "listing", "sample"):
            yield Check(name=f"{name} {space_id}", status="skipped", text="the catalog's files are damaged, see above")
        return
    scope = Scope(include=tuple(entry.identity["include"]), exclude=tuple(entry.identity["exclude"]))
    sources = list(_sources(state, space_id, damaged))
    wanted = SPARE_CANDIDATES * audit.num_sample_rows
    found: list[SpanFindings] = list(
        spread(
            check_span,
            (
                (output.root, entry.identity["input"], span, within(span, sources), scope, wanted, audit.seed)
                for span in spans(files)
            ),
        )
    )
    yield _catalog_check(state, entry, files, found)
    yield _listing_check(audit, output, entry, files, scope, spread)
    candidates = sorted(candidate for each in found for candidate in each.candidates)[:wanted]
    yield _sample_check(audit, output, entry, candidates, spread)


def _sources(state: State, space_id: str, damaged: frozenset[str]) -> Iterator[Source]:
    """Where the rows of a space's keys are for readers of its view: for the runs that its snapshot covers in the
    snapshot's files, otherwise in those of the runs.
    """
    of_space = [entry for entry in state.runs if entry.space_id == space_id]
    snapshot = state.snapshot(space_id)
    covered = frozenset(each.run_seq for each in of_space if snapshot and each.run_seq <= snapshot.through_seq)
    for entry in of_space:
        labels = [] if entry.run_seq in covered else entry.labels
        yield from (Source("labels", entry.run_seq, ref, ref.key in damaged) for ref in labels)
        yield from (Source("failures", entry.run_seq, ref, ref.key in damaged) for ref in entry.dead_letters)
        yield from (Source("deletions", entry.run_seq, ref, ref.key in damaged) for ref in entry.deletions)
    if snapshot is not None:
        yield from (Source("labels", snapshot.run_seq, ref, ref.key in damaged, covered) for ref in snapshot.labels)


def _catalog_check(state: State, entry: Entry, files: Sequence[FileRef], found: Sequence[SpanFindings]) -> Check:
    findings = Findings()
    for before, after in itertools.pairwise(files):
        if before.last_key >= after.first_key:
            findings.add([f"{after.key}: expected keys after {before.last_key}, found {after.first_key}"])
    for each in found:
        findings.merge(each.findings)
    num_rows = sum(each.num_rows for each in found)
    if entry.catalog is not None and entry.catalog.num_rows != num_rows and not findings.num:
        findings.add([f"{entry.catalog.key}: expected {entry.catalog.num_rows} rows, found {num_rows}"])
    num_in_scope = sum(each.num_in_scope for each in found)
    expected = entry.counts["listed"] - entry.counts["filtered"]
    if _covers_its_scope(state, entry) and num_in_scope != expected:
        findings.add(
            [f"run {entry.run_id}: expected its {expected} objects in scope in the catalog, found {num_in_scope}"]
        )
    labeled, failed = sum(each.num_labeled for each in found), sum(each.num_failed for each in found)
    text = (
        f"{num_rows:,} keys in {len(files):,} file(s): {labeled:,} with their row in labels/, {failed:,} in failures/"
    )
    text += _not_looked_at(sum(each.num_unknown for each in found), "rows in damaged files")
    return _check(f"catalog {entry.space_id}", text, findings)


def _covers_its_scope(state: State, entry: Entry) -> bool:
    """Whether the catalog holds what this run listed in scope, and nothing else."""
    earlier = [each for each in state.runs if each.space_id == entry.space_id and each.run_seq < entry.run_seq]
    has_same = all(not earlier or earlier[-1].identity[name] == entry.identity[name] for name in ("include", "exclude"))
    return not _looked_at_some(entry) and has_same


def _looked_at_some(entry: Entry) -> bool:
    return entry.identity["limit"] is not None or entry.identity["manifest"] is not None


def _listing_check(
    audit: Audit, output: Store, entry: Entry, files: Sequence[FileRef], scope: Scope, spread: Spread
) -> Check:
    name = f"listing {entry.space_id}"
    if not audit.lists_source:
        return Check(name=name, status="skipped", text="the source was not listed (--no-listing)")
    source = storage.connect_input(entry.identity["input"])
    is_limited = _looked_at_some(entry)
    began = log.read_claim(output, entry.run_seq).created_at
    counts: Counter[str] = Counter()
    ranges = catalog.ranges(files, is_divisible=source.can_seek)
    for each in spread(
        count_listing, ((source.root, output.root, key_range, scope, is_limited, began) for key_range in ranges)
    ):
        counts += each
    in_scope = sum(counts[each] for each in ("accounted", "changed", "new", "not_looked_at"))
    text = (
        f"{source.root}: {in_scope + counts['filtered']:,} listed now = {counts['accounted']:,} accounted for"
        f" + {counts['filtered']:,} filtered + {counts['changed']:,} changed + {counts['new']:,} new since run"
        f" {entry.run_id}"
    )
    text += f" + {counts['not_looked_at']:,} not looked at (it had a limit or a manifest)" if is_limited else ""
    text += f"; {counts['gone']:,} gone"
    findings, warnings = Findings(), list[str]()
    if counts["older"]:
        told = f"{counts['older']:,} of the new ones are dated more than a day before that run began"
        if source.can_seek:  # an object store's own clock says so
            findings.add([f"{source.root}: {told}; did it not see them, or were they replicated with their date?"])
        else:
            warnings = [f"warning: {told}; copied with their date?"]
    return _check(name, text, findings, warnings)


def _sample_check(
    audit: Audit,
    output: Store,
    entry: Entry,
    candidates: Sequence[Candidate],
    spread: Spread,
) -> Check:
    name = f"sample {entry.space_id}"
    if not audit.num_sample_rows:
        return Check(name=name, status="skipped", text="not asked for (--sample 0)")
    if not candidates:
        return Check(name=name, status="skipped", text="the current view has no labels that could be looked at")
    arguments = (
        output.root,
        entry.identity["input"],
        entry.space_id,
        candidates,
        audit.num_sample_rows,
        entry.canaries,
    )
    found: SampleFindings = next(iter(spread(compare, [arguments])))
    if found.skipped and not found.findings.num:
        status: Literal["FAILED", "skipped"] = "FAILED" if audit.is_sample_required else "skipped"
        return Check(name=name, status=status, text=found.skipped)
    text = f"{found.num_compared:,} rows labeled again: scores within {found.greatest_difference:.1e}"
    if entry.identity["embedding_dim"] is not None:
        text += f", embeddings' cosine {found.least_cosine:.6f} or more"
    if found.least_canary_cosine is not None:
        text += f", the canaries' {found.least_canary_cosine:.6f} or more"
    if found.num_passed_by:
        text += f"; passed by, as they changed or cannot be read now: {found.num_passed_by:,}"
    return _check(name, text, found.findings)
