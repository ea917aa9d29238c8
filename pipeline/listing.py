"""A source -> pages of its objects in byte order, each marked in or out of scope.

A module of its own because what counts as "every object of the bucket" is decided here and nowhere else: an object is
out of scope (`filtered`) if no include glob matches, an exclude glob does, or it is a folder marker.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fsspec.utils import glob_translate

from pipeline.storage import ObjectInfo, Store


@dataclass(frozen=True, kw_only=True)
class Scope:
    """Which objects below the input are meant.

    Globs match the key below the input; `*` stays within one folder, `**` does not, and a glob without a slash matches
    the last part of the key (`*.jpg` means jpg files in any folder). Empty `include` means everything.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def pages(self, store: Store) -> Iterator[list[tuple[ObjectInfo, bool]]]:
        """Every object below the root with whether it is in scope, in UTF-8 byte order of the key, by the page."""
        is_meant = self.predicate()
        for page in store.list_pages():
            yield [(info, not _is_folder_marker(info) and is_meant(info.key)) for info in page]

    def predicate(self) -> Callable[[str], bool]:
        """Whether the globs mean a key, listed or not."""
        include, exclude = _translate(self.include), _translate(self.exclude)

        def is_meant(key: str) -> bool:
            included = not include or any(pattern.fullmatch(key) for pattern in include)
            return included and not any(pattern.fullmatch(key) for pattern in exclude)

        return is_meant


def _is_folder_marker(info: ObjectInfo) -> bool:
    # What some tools write for a folder; that of the root itself has an empty key.
    return info.size_bytes == 0 and (info.key.endswith("/") or not info.key)


def _translate(globs: Sequence[str]) -> list[re.Pattern[str]]:
    return [re.compile(glob_translate(glob if "/" in glob else f"**/{glob}")) for glob in globs]
