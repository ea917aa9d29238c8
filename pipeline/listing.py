"""A source -> pages of its objects in byte order, each marked in or out of scope.

A module of its own because what counts as "every object of the bucket" is decided here and nowhere else: an object is
out of scope (`filtered`) if no include glob matches, an exclude glob does, or it is a folder marker.
"""

import re
from collections.abc import Iterator, Sequence
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
        include, exclude = _translate(self.include), _translate(self.exclude)
        for page in store.list_pages():
            yield [(info, _is_in_scope(info, include, exclude)) for info in page]


def _is_in_scope(info: ObjectInfo, include: Sequence[re.Pattern[str]], exclude: Sequence[re.Pattern[str]]) -> bool:
    # The marker that some tools write for a folder; that of the root itself has an empty key.
    if info.size_bytes == 0 and (info.key.endswith("/") or not info.key):
        return False
    included = not include or any(pattern.fullmatch(info.key) for pattern in include)
    return included and not any(pattern.fullmatch(info.key) for pattern in exclude)


def _translate(globs: Sequence[str]) -> list[re.Pattern[str]]:
    return [re.compile(glob_translate(glob if "/" in glob else f"**/{glob}")) for glob in globs]
