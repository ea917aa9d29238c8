"""Objects below any other URL that fsspec can open: an input, or a place for one writer at a time.

A module of its own because these stores promise less: no conditional reads, etags only here and there, no safe create.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pipeline import store
from pipeline.errors import AbsentError, ChangedError, ConfigError, ForbiddenError, SourceError
from pipeline.store import AgainError, ObjectInfo, describe, reread_unstable, until_deadline

_T = TypeVar("_T")


class FsspecStore:
    """Objects below any other fsspec URL. What the listing calls etag, checksum or time is the etag."""

    can_seek = False
    _endpoint_settings = "the URL"

    def __init__(self, root: str) -> None:
        self.root = self.url = root
        try:
            self._filesystem, self._path = fsspec.core.url_to_fs(root)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"cannot open {root}: {describe(error)}") from error
        if isinstance(self._filesystem, LocalFileSystem):
            raise ConfigError(f"expected a local path or file:// URL, found {root}")
        if endpoint := self._endpoint():
            store.check_endpoint(endpoint, self._endpoint_settings)

    def _endpoint(self) -> str | None:
        """The URL of the server, where the client says."""
        return self.root if self.root.startswith(("http://", "https://")) else None

    def list_pages(self, prefix: str = "", start_after: str = "") -> Iterator[list[ObjectInfo]]:
        """See Store. Folder by folder, each sorted so that the whole is in byte order."""
        page: list[ObjectInfo] = []
        for info in self._objects(prefix, start_after):
            if info.key.startswith(prefix) and info.key.encode() > start_after.encode():
                page.append(info)
                if len(page) == store.PAGE_OBJECTS:
                    yield page
                    page = []
        if page:
            yield page

    def _objects(self, prefix: str, start_after: str) -> Iterator[ObjectInfo]:
        """Objects in byte order, at least those that `list_pages` asks for."""
        return self._walk(self._path, "", start_after)

    def _walk(self, folder: str, prefix: str, start_after: str) -> Iterator[ObjectInfo]:
        what = f"list {self.root}/{prefix}"
        entries = until_deadline(
            lambda: self._guard(what, self._filesystem.ls, folder, detail=True), what, store.DEADLINE_S
        )
        named = []
        for entry in entries:
            name = entry["name"].rstrip("/").rpartition("/")[2]
            named.append((f"{name}/" if entry["type"] == "directory" else name, entry))
        for name, entry in sorted(named, key=lambda item: item[0].encode()):
            if name.endswith("/"):
                if store.may_hold_keys_after(prefix + name, start_after):
                    yield from self._walk(entry["name"], prefix + name, start_after)
                continue
            if entry.get("size") is None:  # a web server's folder does not say
                ask = functools.partial(self._guard, what, self._filesystem.info, entry["name"])
                entry = until_deadline(ask, what, store.DEADLINE_S)
            yield self._info(prefix + name, entry)

    @staticmethod
    def _info(key: str, entry: dict[str, Any]) -> ObjectInfo:
        modified = entry.get("last_modified") or entry.get("LastModified") or entry.get("mtime") or entry.get("created")
        if isinstance(modified, int | float):
            modified = datetime.fromtimestamp(modified, UTC)
        if not isinstance(modified, datetime):
            modified = None
        known = (
            entry.get(name) for name in ("ETag", "etag", "md5Hash", "blob_id", "checksum", "sha256", "Last-Modified")
        )
        etag = next((str(value).strip('"') for value in known if value), None)
        size_bytes = entry.get("size") or 0
        return ObjectInfo(key, size_bytes, etag or f"{size_bytes}-{modified and modified.isoformat()}", modified)

    def _guard(self, what: str, call: Callable[..., _T], *arguments: Any, **options: Any) -> _T:
        try:
            return call(*arguments, **options)
        except Exception as error:  # every filesystem raises the errors of its own client library
            raise _translate(error, what) from error

    def stat(self, key: str) -> ObjectInfo:
        """See Store."""
        what = f"look at {self.root}/{key}"
        ask = functools.partial(self._guard, what, self._filesystem.info, f"{self._path}/{key}")
        entry = until_deadline(ask, what, store.DEADLINE_S)
        if entry["type"] == "directory":
            raise AbsentError(f"{what}: expected a file, found a folder")
        return self._info(key, entry)

    def get(self, key: str, *, listed: ObjectInfo | None = None, deadline_s: float = store.DEADLINE_S) -> bytes:
        """See Store. Where `_read` has no conditions only the length tells that an object changed."""
        what = f"get {self.root}/{key}"

        def attempt() -> bytes:
            data = self._read(what, deadline_s, key, listed and listed.etag)
            if listed is not None:
                store.check_size(data, listed, what)
            return data

        return reread_unstable(attempt, what, deadline_s)

    def get_range(self, listed: ObjectInfo, begin: int, end: int, *, deadline_s: float = store.DEADLINE_S) -> bytes:
        """See Store. Where `_read` has no conditions members of another version do not decode, or it ends early."""
        what = f"get {self.root}/{listed.key} from byte {begin:,}"

        def attempt() -> bytes:
            data = self._read(what, deadline_s, listed.key, listed.etag, begin, end)
            store.check_range(data, begin, end, what)
            return data

        return reread_unstable(attempt, what, deadline_s) if end > begin else b""

    def _read(
        self, what: str, deadline_s: float, key: str, etag: str | None, begin: int | None = None, end: int | None = None
    ) -> bytes:
        """The object's bytes, or those from `begin` up to `end`; there are no conditional reads here."""
        data = self._guard(what, self._filesystem.cat_file, f"{self._path}/{key}", start=begin, end=end)
        assert isinstance(data, bytes)
        return data

    def put(self, key: str, data: bytes) -> None:
        """See Store. Whether readers may see a part of it depends on the filesystem."""
        self._write(key, data, "overwrite")

    def put_if_absent(self, key: str, data: bytes) -> bytes:
        """See Store. Whether two writers at the same time may both succeed depends on the filesystem."""
        return data if self._write(key, data, "create") else self.get(key)

    def _write(self, key: str, data: bytes, mode: str) -> bool:
        """Whether this call wrote it: with mode `create` it may stand already."""
        what, path = f"put {self.root}/{key}", f"{self._path}/{key}"

        def attempt() -> bool:
            try:
                try:
                    self._filesystem.pipe_file(path, data, mode=mode)
                except FileNotFoundError:  # where folders exist by themselves
                    self._filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
                    self._filesystem.pipe_file(path, data, mode=mode)
            except FileExistsError:
                return False
            except Exception as error:  # every filesystem raises the errors of its own client library
                raise _translate(error, what) from error
            return True

        return until_deadline(attempt, what, store.DEADLINE_S)

    def delete(self, keys: Sequence[str]) -> None:
        """Not offered: nothing is removed where it cannot be known what else is there."""
        raise ConfigError(f"{self.root}: expected an s3:// URL or a local folder to remove objects from")


def _translate(error: Exception, what: str) -> Exception:
    """What a filesystem's error means for the caller: by its HTTP status where it has one, else by its class."""
    status = _status(error)
    if status in (404, 410) or (status is None and isinstance(error, FileNotFoundError | NotADirectoryError)):
        return AbsentError(f"{what}: not found")
    # gcsfs tells a 403 from other errors by its text alone.
    is_refused = isinstance(error, PermissionError) or str(error).startswith("Forbidden: ")
    if status in (401, 403) or (status is None and is_refused):
        return ForbiddenError(f"{what}: permission denied; check the identity's policy and the URL")
    if status in (412, 416):  # 416: it no longer has this range
        return ChangedError(f"{what}: it is no longer the object that was listed")
    if status is None and isinstance(error, TimeoutError):
        return AgainError("no complete answer in time", "timeout")
    # aiohttp says 400 of an answer that was cut off, too.
    if status is not None and status > 400 and not store.may_pass(status):
        return SourceError(f"{what}: refused ({status}): {describe(error)}")
    return AgainError(describe(error), store.cause_of_status(status or 0))


def _status(error: BaseException | None) -> int | None:
    """The HTTP status that the error or a cause of it names: fsspec's `info` says "not found" whatever the answer."""
    while error is not None:
        for name in ("status", "code", "status_code"):  # aiohttp, Google, Azure
            if isinstance(status := getattr(error, name, None), int) and status:
                return status
        error = error.__cause__
    return None
