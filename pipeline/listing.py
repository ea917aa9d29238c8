"""A source -> pages of its objects in byte order, each marked in or out of scope; and where a big one can be cut.

A module of its own because what counts as "every object of the bucket" is decided here and nowhere else: an object is
out of scope (`filtered`) if no include glob matches, an exclude glob does, or it is a folder marker.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from fsspec.utils import glob_translate

from pipeline import store as stores
from pipeline.storage import ObjectInfo, Source
from pipeline.store_container import ContainerStore
from pipeline.store_manifest import ManifestStore

SMALL_SOURCE_PAGES = 20
"""A source that ends within so many pages is one range."""
MAX_PROBES = 2000
"""LIST requests spent on finding where to cut a source that nobody has listed before: $0.01, and 80 ms of the driver's
CPU each. Groups that were begun are finished: 1e9 keys in folders of 250,000 took 5000."""
MIN_RANGE_OBJECTS = 200_000
"""Neighbouring groups of keys are joined up to this size where it is known: 200 LIST requests."""
_LAST = "\U0010ffff"
"""Sorts after every other character."""


@dataclass(frozen=True, kw_only=True)
class Scope:
    """Which objects below the input are meant.

    Globs match the key below the input; `*` stays within one folder, `**` does not, and a glob without a slash matches
    the last part of the key (`*.jpg` means jpg files in any folder). Empty `include` means everything.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def pages(
        self, store: Source, after: str = "", through: str | None = None
    ) -> Iterator[list[tuple[ObjectInfo, bool]]]:
        """Every object below the root with whether it is in scope, in UTF-8 byte order of the key, by the page; of the
        keys greater than `after` and not greater than `through`.
        """
        is_meant = self.predicate()
        for page in pages(store, after, through):
            yield [(info, not _is_folder_marker(info) and is_meant(info.key)) for info in page]

    def predicate(self) -> Callable[[str], bool]:
        """Whether the globs mean a key, listed or not."""
        include, exclude = _translate(self.include), _translate(self.exclude)

        def is_meant(key: str) -> bool:
            included = not include or any(pattern.fullmatch(key) for pattern in include)
            return included and not any(pattern.fullmatch(key) for pattern in exclude)

        return is_meant


def pages(store: Source, after: str = "", through: str | None = None) -> Iterator[list[ObjectInfo]]:
    """Every object with a key greater than `after` and not greater than `through`, by the page."""
    for page in store.list_pages(start_after=after):
        if through is not None and page[-1].key > through:
            inside = [info for info in page if info.key <= through]
            if inside:
                yield inside
            return
        yield page


def _is_folder_marker(info: ObjectInfo) -> bool:
    # What some tools write for a folder; that of the root itself has an empty key.
    is_there = not (info.is_bad_uri or info.is_absent)
    return is_there and info.size_bytes == 0 and (info.key.endswith("/") or not info.key)


def _translate(globs: Sequence[str]) -> list[re.Pattern[str]]:
    return [re.compile(glob_translate(glob if "/" in glob else f"**/{glob}")) for glob in globs]


# --- cutting a big source -----------------------------------------------------------------------------------------


class _Group(NamedTuple):
    """The keys that begin with `prefix`, or if `is_key` that key: how many were seen, and whether there may be more."""

    prefix: str
    is_key: bool
    num_seen: int
    is_open: bool

    @property
    def through(self) -> str:
        """No key of the group is greater, no key of the next one is not."""
        return self.prefix if self.is_key else self.prefix + _LAST


def borders(store: Source) -> list[str]:
    """Where to cut a source that nobody has listed before: in order, each the upper end of a range. A small one is not.

    Keys are grouped by their first characters, wherever folders end, since a bucket may have none. A group of more than
    a page is grouped by the next character, level by level, until all are small or MAX_PROBES requests are used up.
    A source that cannot be listed from the middle is not cut.
    """
    if isinstance(store, ManifestStore | ContainerStore):  # which need not be probed, or should not
        return store.borders(MIN_RANGE_OBJECTS)
    if not store.can_seek or len(list(islice(store.list_pages(), SMALL_SOURCE_PAGES))) < SMALL_SOURCE_PAGES:
        return []
    groups = [_Group("", False, 0, True)]
    num_probes = 0
    with ThreadPoolExecutor(16) as pool:
        while num_probes < MAX_PROBES and any(group.is_open for group in groups):
            affordable = MAX_PROBES - num_probes  # a group costs at least one
            chosen = [group for group in groups if group.is_open][:affordable]
            grouped = dict(zip(chosen, pool.map(lambda group: _children(store, group.prefix), chosen), strict=True))
            num_probes += sum(num for _, num in grouped.values())
            groups = [each for group in groups for each in (grouped[group][0] if group in grouped else [group])]
    return _joined(groups)


def _joined(groups: Sequence[_Group]) -> list[str]:
    """Borders after every open group, and between small ones whenever MIN_RANGE_OBJECTS have come together."""
    found: list[str] = []
    num_seen = 0
    for number, group in enumerate(groups[:-1]):
        num_seen += group.num_seen
        if group.is_open or groups[number + 1].is_open or num_seen >= MIN_RANGE_OBJECTS:
            found.append(group.through)
            num_seen = 0
    return found


def _children(store: Source, prefix: str) -> tuple[list[_Group], int]:
    """The groups that the next character makes of the keys below `prefix`, and the requests it took to see them."""
    groups: list[_Group] = []
    after, num_probes = "", 0
    while True:
        page = [info.key for info in next(store.list_pages(prefix, after), [])]
        num_probes += 1
        counts = Counter(key[: len(prefix) + 1] for key in page)
        is_full = len(page) == stores.PAGE_OBJECTS
        is_open = is_full and len(counts) == 1
        if is_full and not is_open:
            # The last one may go on: it is looked at from its own beginning.
            after = page[-counts.popitem()[1] - 1]
        groups += [_Group(child, child == prefix, number, is_open) for child, number in counts.items()]
        if not is_full:
            return groups, num_probes
        if is_open:
            if after >= groups[-1].through:  # names that begin with the very last character cannot be passed by
                return groups[:-1], num_probes
            after = groups[-1].through
