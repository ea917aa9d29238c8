"""One catalog file against what was published, and one key range of it against the source as it is listed now.

The catalog says which row of which run is each key's last outcome. So every catalog row has its row in labels/ or
failures/, and no row there is newer than, or unknown to, the catalog, unless deletions/ says why. A module of its own
because this is a join of sorted files: a catalog file (up to 200,000 rows) and two columns of one published file are in
memory at a time, whatever the size of the table.
"""

import hashlib
import heapq
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import catalog, diff, schema, storage
from pipeline.catalog import KeyRange
from pipeline.errors import ConflictError
from pipeline.listing import Scope
from pipeline.log import FileRef
from pipeline.storage import Store
from pipeline.verify_files import MAX_EXAMPLES, Findings

Mask = npt.NDArray[np.bool_]


class Source(NamedTuple):
    """A published file that may hold the rows of catalog keys."""

    kind: Literal["labels", "failures", "deletions"]
    run_seq: int
    ref: FileRef
    is_damaged: bool
    """Found not to be the file that was written: nothing is concluded from it."""
    stands_for: frozenset[int] | None = None
    """Of a snapshot: the runs it covers, whose rows are looked for here, as readers of the view do."""


class Candidate(NamedTuple):
    """A row of the current view that may be labeled again; those with the least ranks are."""

    rank: int
    uri: str
    run_seq: int
    ref: FileRef


@dataclass(kw_only=True)
class SpanFindings:
    """What a catalog file has to hear, and what it holds."""

    findings: Findings = field(default_factory=Findings)
    num_rows: int = 0
    num_labeled: int = 0
    """Keys whose row was found in labels/."""
    num_failed: int = 0
    """Keys whose row was found in failures/."""
    num_in_scope: int = 0
    """Keys that the newest run's globs mean."""
    num_unknown: int = 0
    """Keys whose row should be in a damaged file."""
    candidates: list[Candidate] = field(default_factory=list)


def spans(files: Sequence[FileRef]) -> list[KeyRange]:
    """One range per catalog file, together every possible key; one for a catalog without files."""
    borders = [file.last_key for file in files[:-1]]
    return [
        KeyRange(
            range_id=each.range_id, after=each.after, through=each.through, files=tuple(files[number : number + 1])
        )
        for number, each in enumerate(catalog.between(borders))
    ]


def within(span: KeyRange, sources: Iterable[Source]) -> list[Source]:
    """The files that can hold a key of the span, by their bounds."""
    return [
        each
        for each in sources
        if (not span.after or each.ref.last_key > span.after)
        and (span.through is None or each.ref.first_key <= span.through)
    ]


def check_span(
    output_url: str,
    root: str,
    span: KeyRange,
    sources: Sequence[Source],
    scope: Scope,
    num_candidates: int,
    seed: int,
) -> SpanFindings:
    """Join a catalog file with the published files that can hold its keys; `root` is the URL the keys are below."""
    output = storage.connect(output_url)
    found = SpanFindings()
    try:
        rows = pa.concat_tables(
            [schema.CATALOG.empty_table(), *(catalog.read_table(output, ref) for ref in span.files)]
        )
        join = _Join(output, f"{root}/", span, rows)
        for source in sources:
            if source.kind == "deletions":
                join.add_deletions(source)
        for source in sources:
            if source.kind != "deletions":
                found.candidates += join.add_rows(source, found.findings, num_candidates, seed)
    except ConflictError as error:  # a file that is not what the log says
        found.findings.add([str(error)])
        return found
    join.add_missing(found.findings)
    is_meant = scope.predicate()
    found.num_in_scope = sum(map(is_meant, rows.column("key").to_pylist()))
    found.num_rows, found.num_unknown = len(rows), int(join.is_unknown.sum())
    found.num_labeled, found.num_failed = join.num_found()
    found.candidates = heapq.nsmallest(num_candidates, found.candidates)
    return found


class _Join:
    """The rows of a catalog file, and which of them were found so far."""

    def __init__(self, output: Store, prefix: str, span: KeyRange, rows: pa.Table) -> None:
        self._output, self._prefix, self._span = output, prefix, span
        self._keys = rows.column("key").combine_chunks()
        self._seqs = rows.column("run_seq").to_numpy()
        self._kinds = rows.column("failure_kind").combine_chunks()
        self._is_failed = np.asarray(self._kinds.is_valid(), dtype=bool)
        self._has_row = np.zeros(len(rows), dtype=bool)
        self.is_unknown = np.zeros(len(rows), dtype=bool)
        self._deleted: dict[str, int] = {}
        self._knows_deletions = True

    def add_deletions(self, source: Source) -> None:
        """Keys of the span that went away, and in which run last."""
        if source.is_damaged:
            self._knows_deletions = False
            return
        table = self._read(source, ["uri"])
        for key in self._keys_of(table).to_pylist():
            self._deleted[key] = max(source.run_seq, self._deleted.get(key, 0))

    def add_rows(self, source: Source, findings: Findings, num_candidates: int, seed: int) -> list[Candidate]:
        """Mark the catalog rows that this file of labels or failures explains, and find rows that none explains."""
        if source.is_damaged:
            self._mark_unknown(source)
            return []
        is_labels = source.kind == "labels"
        table = self._read(source, ["uri", "run_seq", "image_id" if is_labels else "failure_kind"])
        keys, seqs = self._keys_of(table), table.column("run_seq").to_numpy()
        place = pc.index_in(keys, value_set=self._keys).fill_null(-1).to_numpy()
        is_known = place >= 0
        last_seqs = np.full(len(table), -1, dtype=np.int64)
        last_seqs[is_known] = self._seqs[place[is_known]]
        is_match = is_known & (seqs == last_seqs)
        self._add_contradictions(source, table, place, is_match, findings)
        rows = _examples(keys, seqs, is_known & (seqs > last_seqs))
        findings.add(
            (f"{key}: {source.ref.key} has it of run {seq}, the catalog of an earlier one" for key, seq in rows),
            int((is_known & (seqs > last_seqs)).sum()),
        )
        if self._knows_deletions:
            self._add_strays(source, keys, seqs, ~is_known, findings)
        if source.stands_for is not None:
            is_again = is_match.copy()
            is_again[is_match] = self._has_row[place[is_match]]
            rows = _examples(keys, seqs, is_again)
            findings.add(
                (f"{key}: twice in one snapshot, again in {source.ref.key}" for key, _ in rows), is_again.sum()
            )
        self._has_row[place[is_match]] = True
        if not is_labels:
            return []
        ranks = _ranks(table.column("image_id").to_numpy()[is_match], seed)
        chosen = np.flatnonzero(is_match)[np.argsort(ranks)[:num_candidates]]
        uris = table.column("uri").take(pa.array(chosen)).to_pylist()
        ordered = np.sort(ranks)[:num_candidates]
        return [
            Candidate(int(rank), uri, int(seqs[row]), source.ref)
            for rank, uri, row in zip(ordered, uris, chosen, strict=True)
        ]

    def add_missing(self, findings: Findings) -> None:
        """Catalog rows that no published row explains."""
        is_missing = ~self._has_row & ~self.is_unknown
        kinds = self._kinds.filter(pa.array(is_missing))[:MAX_EXAMPLES].to_pylist()
        told = [
            f"{key}: expected its row of run {seq} in {f'failures/ ({kind})' if kind else 'labels/'}, found none"
            for (key, seq), kind in zip(_examples(self._keys, self._seqs, is_missing), kinds, strict=True)
        ]
        findings.add(told, int(is_missing.sum()))

    def num_found(self) -> tuple[int, int]:
        """Catalog rows that labels/ explains, and those that failures/ explains."""
        return int((self._has_row & ~self._is_failed).sum()), int((self._has_row & self._is_failed).sum())

    def _add_contradictions(
        self, source: Source, table: pa.Table, place: npt.NDArray[np.int64], is_match: Mask, findings: Findings
    ) -> None:
        """Take from `is_match` the rows that say another outcome than the catalog does of the same run."""
        is_other = np.zeros(len(table), dtype=bool)
        at = place[is_match]
        if source.kind == "labels":
            is_other[is_match] = self._is_failed[at]
        else:
            kinds = table.column("failure_kind").filter(pa.array(is_match))
            expected = self._kinds.take(pa.array(at))
            is_other[is_match] = ~np.asarray(pc.equal(kinds, expected).fill_null(False), dtype=bool)
        rows = _examples(self._keys_of(table), table.column("run_seq").to_numpy(), is_other)
        findings.add(
            (f"{key}: {source.ref.key} has another outcome of run {seq} than the catalog" for key, seq in rows),
            int(is_other.sum()),
        )
        is_match &= ~is_other

    def _add_strays(
        self, source: Source, keys: pa.Array, seqs: npt.NDArray[np.int64], is_unknown: Mask, findings: Findings
    ) -> None:
        """Rows of keys that the catalog lacks and no later deletion explains."""
        for row in np.flatnonzero(is_unknown):
            key = keys[int(row)].as_py()
            if self._deleted.get(key, 0) <= seqs[row]:
                findings.add([f"{key}: {source.ref.key} has it, neither the catalog nor deletions/ do"])

    def _mark_unknown(self, source: Source) -> None:
        in_bounds = pc.and_(
            pc.greater_equal(self._keys, source.ref.first_key), pc.less_equal(self._keys, source.ref.last_key)
        )
        of_run = np.isin(self._seqs, sorted(source.stands_for or {source.run_seq}))
        of_kind = self._is_failed == (source.kind == "failures")
        self.is_unknown |= np.asarray(in_bounds, dtype=bool) & of_run & of_kind

    def _read(self, source: Source, columns: list[str]) -> pa.Table:
        """Rows of the span, and of a snapshot those that it stands for."""
        table = pq.read_table(io.BytesIO(catalog.read_file(self._output, source.ref)), columns=columns)
        keys = self._keys_of(table)
        is_here = pc.greater_equal(keys, "") if not self._span.after else pc.greater(keys, self._span.after)
        if self._span.through is not None:
            is_here = pc.and_(is_here, pc.less_equal(keys, self._span.through))
        if source.stands_for is not None:
            is_here = pc.and_(
                is_here, pc.is_in(table.column("run_seq"), pa.array(sorted(source.stands_for), pa.int64()))
            )
        return table.filter(is_here)

    def _keys_of(self, table: pa.Table) -> pa.Array:
        return pc.utf8_slice_codeunits(table.column("uri"), start=len(self._prefix)).combine_chunks()


def _examples(keys: pa.Array, seqs: npt.NDArray[np.int64], where: Mask) -> list[tuple[str, int]]:
    rows = np.flatnonzero(where)[:MAX_EXAMPLES]
    return [(keys[int(row)].as_py(), int(seqs[row])) for row in rows]


def _ranks(image_ids: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.uint64]:
    """A number for each image that looks random and depends on it and the seed only (splitmix64's finalizer)."""
    offset = np.frombuffer(hashlib.sha256(str(seed).encode()).digest()[:8], np.uint64)
    mixed = image_ids.astype(np.uint64) ^ offset
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return np.asarray(mixed ^ (mixed >> np.uint64(31)))


# --- the source now -----------------------------------------------------------------------------------------------


def count_listing(
    input_url: str, output_url: str, key_range: KeyRange, scope: Scope, is_limited: bool, run_began: str
) -> Counter[str]:
    """List a range of the source and compare it with its catalog: objects by what the catalog knows of them.

    `accounted` as they are, `changed` and `new` (of which `older` are dated more than a day before the run began),
    `not_looked_at` beyond a run's limit, `filtered`, and of the catalog `gone` and `out_of_scope`. Raises UnstableError
    if the listing is not in order.
    """
    source, output = storage.connect_input(input_url), storage.connect(output_url)
    listed = (
        diff.Listed(info, is_in_scope)
        for page in scope.pages(source, key_range.after, key_range.through)
        for info, is_in_scope in page
    )
    # A day, because the date of a large upload is that of its begin.
    is_meant, long_ago = scope.predicate(), datetime.fromisoformat(run_began) - timedelta(days=1)
    counts: Counter[str] = Counter()
    for found, row in diff.merge_join(listed, catalog.read_rows(output, key_range.files)):
        if found is None:
            assert row is not None
            counts["gone" if is_meant(row["key"]) else "out_of_scope"] += 1
        elif not (found.is_in_scope or (row is not None and is_meant(row["key"]))):
            counts["filtered"] += 1
        elif row is not None:
            is_same = (row["etag"], row["size_bytes"]) == (found.info.etag, found.info.size_bytes)
            counts["accounted" if is_same else "changed"] += 1
        elif is_limited:
            counts["not_looked_at"] += 1
        else:
            counts["new"] += 1
            dated = found.info.last_modified
            counts["older"] += dated is not None and dated < long_ago
    return counts
