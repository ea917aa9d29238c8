"""Planned objects, one after the other -> a sample of them, and how many lie in which folder; for a dry run.

A module of its own because a plan of 1e9 objects passes by once, range by range on many nodes, and neither a node nor
the driver may hold more of it than this: a hundred objects and some hundred folders, whatever the plan's size.
"""

import hashlib
import heapq
from collections.abc import Iterable
from typing import NamedTuple

from pipeline.storage import ObjectInfo

SAMPLE_OBJECTS = 100
MAX_FOLDERS = 20
"""Folders that are told by name, with the others in one line."""
_FOLDERS_HELD = 1000


class Folder(NamedTuple):
    """Planned objects whose key begins with `name`, up to and with its first slash; an empty name: keys without one."""

    name: str
    num_objects: int
    encoded_bytes: int


class Survey:
    """Sees every planned object of a range once, in key order; then surveys of neighbouring ranges are merged in order.

    The sample is the objects whose keys have the smallest digests: spread evenly over the plan, the same whenever the
    same objects are planned, and the same however they are cut into ranges.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything: the range is listed again."""
        self._sample: list[tuple[int, str, ObjectInfo]] = []  # a heap: the greatest digest, negated, comes first
        self._folders: dict[str, Folder] = {}
        self._others = Folder("", 0, 0)
        self._num_others = 0

    def add(self, info: ObjectInfo) -> None:
        """See an object."""
        digest = hashlib.blake2b(info.key.encode(), digest_size=8).digest()
        self._offer((-int.from_bytes(digest, "big"), info.key, info))
        folder, slash, _ = info.key.partition("/")
        self._count(Folder(folder + slash if slash else "", 1, info.size_bytes))

    def merge(self, after: "Survey") -> None:
        """Take over what a survey of the keys behind these has seen."""
        for each in after._sample:
            self._offer(each)
        for folder in after._folders.values():
            self._count(folder)
        self._leave_out(after._others, after._num_others)

    def sample(self) -> list[ObjectInfo]:
        """At most SAMPLE_OBJECTS, in an order that has nothing to do with their keys."""
        return [info for _, _, info in sorted(self._sample, reverse=True)]

    def folders(self) -> tuple[list[Folder], Folder | None]:
        """The MAX_FOLDERS with the most objects. If there are more: one less, and all others as one whose name says how
        many they are.
        """
        ordered = _by_size(self._folders.values())
        if not self._num_others and len(ordered) <= MAX_FOLDERS:
            return ordered, None
        shown, rest = ordered[: MAX_FOLDERS - 1], ordered[MAX_FOLDERS - 1 :]
        return shown, Folder(
            f"{len(rest) + self._num_others:,} others",
            self._others.num_objects + sum(each.num_objects for each in rest),
            self._others.encoded_bytes + sum(each.encoded_bytes for each in rest),
        )

    def _offer(self, candidate: tuple[int, str, ObjectInfo]) -> None:
        if len(self._sample) < SAMPLE_OBJECTS:
            heapq.heappush(self._sample, candidate)
        elif candidate > self._sample[0]:
            heapq.heapreplace(self._sample, candidate)

    def _count(self, seen: Folder) -> None:
        known = self._folders.get(seen.name, Folder(seen.name, 0, 0))
        self._folders[seen.name] = Folder(
            seen.name, known.num_objects + seen.num_objects, known.encoded_bytes + seen.encoded_bytes
        )
        if len(self._folders) > _FOLDERS_HELD:
            self._drop_small_folders()

    def _drop_small_folders(self) -> None:
        # A folder's keys are neighbours, so all but the first and the last are seen as a whole, and stay as small as
        # they are. Keys without a folder lie between those with one.
        names = list(self._folders)
        largest = [each.name for each in _by_size(self._folders.values())[:MAX_FOLDERS]]
        kept = {names[0], names[-1], "", *largest}
        for name in names:
            if name not in kept:
                self._leave_out(self._folders.pop(name), 1)

    def _leave_out(self, folder: Folder, number: int) -> None:
        self._num_others += number
        self._others = Folder(
            "", self._others.num_objects + folder.num_objects, self._others.encoded_bytes + folder.encoded_bytes
        )


def _by_size(folders: Iterable[Folder]) -> list[Folder]:
    return sorted(folders, key=lambda each: (-each.num_objects, each.name))
