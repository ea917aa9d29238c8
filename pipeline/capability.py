"""An output's store -> what it keeps of what a store should keep, tried out once per output, before the first claim.

A module of its own because nothing else asks: every commit rests on `put_if_absent` creating an object exactly once,
and some stores that speak S3 ignore the condition. What was found stands in `_runs/store.json`, outside everything that
readers glob; the object that was tried with stays beside it, because nightly runs have no right to delete.
"""

import hashlib
import json
import logging
import os
import uuid
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from pipeline import storage
from pipeline.errors import AbsentError, ChangedError, ConfigError, ForbiddenError, UnstableError
from pipeline.storage import ObjectInfo, Store

KEY = "_runs/store.json"
_log = logging.getLogger("label_bucket")


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a store was found to do, once."""

    creates_once: bool
    """A second creation of an object is refused and the first one's bytes stay: If-None-Match on PUT."""
    notices_changes: bool
    """A read of another version than the one listed is refused: If-Match on GET."""
    lists_what_it_wrote: bool
    """An object is in the listing as soon as it is written."""
    etag_is_md5: bool
    """So that flipped and swapped bytes are noticed. Never for local files."""


def recorded(output: Store) -> Capabilities | None:
    """What an earlier command found this output's store to do; None if none tried it out, or if the record is damaged
    or of another version: then it costs ten requests to know it again."""
    data = storage.get_or_none(output, KEY)
    if data is None:
        return None
    try:
        values = json.loads(data)
        return Capabilities(**{each.name: values[each.name] for each in fields(Capabilities)})
    except (ValueError, KeyError, TypeError):
        return None


def check(output: Store, *, is_single_writer: bool, anew: bool = False) -> Capabilities:
    """What this output's store does, from its record or by trying it out (about ten requests); `anew`: the latter.

    Raises ConfigError where two writers could both believe that they created an object, unless `is_single_writer`
    says that there are no two.
    """
    known = recorded(output)
    found = _try_out(output) if known is None or anew else known
    if known is None and (found.creates_once or is_single_writer):
        output.put(KEY, json.dumps(asdict(found), indent=1).encode())
    if not found.creates_once and not is_single_writer:
        raise ConfigError(
            f"--output {output.root}: expected a store that creates an object only if it is absent (If-None-Match),"
            " found one that overwrites: two runs at once could both publish. Use another store, or say with"
            " --single-writer that no other run ever works on this output"
        )
    for is_kept, warning in (
        (found.creates_once, "does not create objects only once: two runs at once would spoil this output"),
        (found.notices_changes or found.etag_is_md5, "does not notice objects that change while they are read"),
        (found.lists_what_it_wrote, "lists objects late: a resumed run may do finished work again"),
    ):
        if not is_kept:
            _log.warning("%s: this store %s", output.root, warning)
    return found


def check_folder(output: Store) -> None:
    """Raise ForbiddenError for a local folder that this user may not write into. Writes nothing; S3 always passes."""
    if not output.root.startswith("file://"):
        return
    folder = Path(output.root.removeprefix("file://"))
    while not folder.exists():
        folder = folder.parent
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        raise ForbiddenError(f"--output {output.root}: expected a folder to write into, found that {folder} is none")


def _try_out(output: Store) -> Capabilities:
    key = f"_runs/store-{uuid.uuid4().hex[:8]}.txt"
    first, second = b"the first of two writers of one object\n", b"the second\n"
    output.put_if_absent(key, first)
    creates_once = output.put_if_absent(key, second) == first and output.get(key) == first
    standing = first if creates_once else second
    listed = {info.key: info for page in output.list_pages(key) for info in page}.get(key)
    return Capabilities(
        creates_once=creates_once,
        notices_changes=_refuses_another_version(output, key, len(standing)),
        lists_what_it_wrote=listed is not None and listed.size_bytes == len(standing),
        etag_is_md5=listed is not None and listed.etag == _md5(standing),
    )


def _refuses_another_version(output: Store, key: str, size_bytes: int) -> bool:
    try:
        output.get(key, listed=ObjectInfo(key, size_bytes, _md5(b"another version"), None))
    except ChangedError:
        return True
    except (UnstableError, AbsentError):
        return False
    return False


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()
