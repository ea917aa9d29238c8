"""The listing ⟕ the last catalog of one key range -> what to label and what is gone, with every object counted once.

A module of its own because the sums that publishing checks are made here, and because what counts as unchanged or gone
is decided here and nowhere else. Two sorted streams in, O(page) memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from pipeline import catalog, listing
from pipeline import store as stores
from pipeline.catalog import CatalogRow, KeyRange
from pipeline.errors import TRANSIENT, FailureKind, UnstableError
from pipeline.listing import Scope
from pipeline.storage import ObjectInfo, Source, Store

COUNTS = ("listed", "filtered", "unchanged", "planned", "known", "kept", "deleted")
"""listed = filtered + unchanged + planned. Of the last catalog's rows, `known` are listed and in scope, `deleted` are
gone, and `kept` are out of tonight's scope; there are no others."""


Relabel = Literal["changed", "failed", "all"]
"""`changed`: new and changed objects, and those whose failure may pass by itself; `failed`: all failures, too; `all`:
every object."""


class Listed(NamedTuple):
    """An object of the listing, and whether the globs mean it."""

    info: ObjectInfo
    is_in_scope: bool


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What decides which objects a night labels, besides the listing and the catalog."""

    scope: Scope
    limit: int | None
    """The first so many objects in scope are looked at, changed or not."""
    records_deletions: bool
    relabel: Relabel = "changed"


class Deletion(NamedTuple):
    """An object that is gone, by what the catalog knows of it."""

    row: CatalogRow


def compare(
    source: Source, output: Store, key_range: KeyRange, rules: Rules, counts: dict[str, int]
) -> Iterator[ObjectInfo | Deletion]:
    """What to do in a range: objects to label, and deletions, each kind in key order; `counts` (by the names in COUNTS)
    is right when the iterator ends.

    Raises UnstableError if the listing contradicts itself; then nothing that was given counts.
    """
    counts |= dict.fromkeys(COUNTS, 0)
    is_meant = rules.scope.predicate()
    gone = _Gone(source, key_range.after)
    listed = (
        Listed(info, is_in_scope)
        for page in rules.scope.pages(source, key_range.after, key_range.through)
        for info, is_in_scope in page
    )
    for found, row in merge_join(listed, catalog.read_rows(output, key_range.files)):
        if found is None:
            assert row is not None
            # Out of tonight's scope is not gone: only a listing of everything that is meant shows that.
            if rules.records_deletions and is_meant(row["key"]):
                gone.add(row)
                yield from gone.confirmed()
            else:
                counts["kept"] += 1
            continue
        gone.pass_by(found.info.key)
        counts["listed"] += 1
        # A folder marker in place of what was an object is that object, changed.
        if not (found.is_in_scope or (row is not None and is_meant(found.info.key))):
            counts["filtered"] += 1
            counts["kept"] += row is not None
            continue
        counts["known"] += row is not None
        if row is not None and is_final(row, found.info, rules.relabel):
            counts["unchanged"] += 1
        else:
            counts["planned"] += 1
            yield found.info
        yield from gone.confirmed()
        if counts["unchanged"] + counts["planned"] == rules.limit:
            break
    yield from gone.confirmed(is_last=True)
    counts["deleted"] = gone.num_confirmed
    if rules.limit is not None:
        # The rest of the catalog was not looked at.
        counts["kept"] = key_range.num_rows - counts["known"] - counts["deleted"]


class _Gone:
    """Rows of the catalog that the listing lacks, looked for once more: a listing that lost a page must not become
    deletions of living objects.

    One second look covers about a page of the listing, so that it costs at most as many requests as the first. Where a
    source cannot be listed from the middle there is one for all, and its rows are in memory.
    """

    def __init__(self, source: Source, after: str) -> None:
        self.num_confirmed = 0
        self._source = source
        self._rows: list[CatalogRow] = []
        self._last_listed = self._after = after
        self._num_passed = 0

    def add(self, row: CatalogRow) -> None:
        if not self._rows:
            self._after, self._num_passed = self._last_listed, 0
        self._rows.append(row)

    def pass_by(self, listed_key: str) -> None:
        self._last_listed = listed_key
        self._num_passed += 1

    def confirmed(self, *, is_last: bool = False) -> list[Deletion]:
        """The rows that a second look does not find either, once there are enough for one."""
        # A folder is read as a whole for every look: one at the end.
        enough = is_last or (self._source.can_seek and max(self._num_passed, len(self._rows)) >= stores.PAGE_OBJECTS)
        if not self._rows or not enough:
            return []
        rows, self._rows = self._rows, []
        missing = {row["key"] for row in rows}
        for page in listing.pages(self._source, self._after, rows[-1]["key"]):
            for info in page:
                if info.key in missing:
                    raise UnstableError(
                        f"list {self._source.root}: {info.key!r} was not in the listing and is there on a second look;"
                        " the store's listings cannot be trusted now, run the same command again later"
                    )
        self.num_confirmed += len(rows)
        return [Deletion(row) for row in rows]


def merge_join(
    listing: Iterator[Listed], catalog: Iterator[CatalogRow]
) -> Iterator[tuple[Listed | None, CatalogRow | None]]:
    """Full outer join of two streams sorted by key. Raises UnstableError if the listing is not sorted or repeats a key.

    Python compares strings by code point, which is the order of their UTF-8 bytes.
    """
    row = next(catalog, None)
    previous: str | None = None
    for found in listing:
        info = found.info
        if previous is not None and info.key <= previous:
            raise UnstableError(
                f"the listing is not in order: {info.key!r} came after {previous!r}; run the command again"
            )
        previous = info.key
        while row is not None and row["key"] < info.key:
            yield None, row
            row = next(catalog, None)
        if row is not None and row["key"] == info.key:
            yield found, row
            row = next(catalog, None)
        else:
            yield found, None
    while row is not None:
        yield None, row
        row = next(catalog, None)


def is_final(row: CatalogRow, info: ObjectInfo, relabel: Relabel = "changed") -> bool:
    """Whether the catalog's outcome still holds: the same object, and neither a failure that may pass by itself nor
    one that `relabel` asks to try again.
    """
    if relabel == "all" or (relabel == "failed" and row["failure_kind"] is not None):
        return False
    same = (row["etag"], row["size_bytes"]) == (info.etag, info.size_bytes)
    if info.etag is None:
        same = same and row["last_modified"] == info.last_modified
    if row["failure_kind"] == FailureKind.ARCHIVED:
        return same and info.is_archived  # restored by a copy onto itself, it has the etag that it had
    return same and row["failure_kind"] not in TRANSIENT
