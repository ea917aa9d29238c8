"""Files below a local folder as objects.

A module of its own because what S3 does with a header, a file system does with a link, and with an identity of its own.
"""

import contextlib
import os
import uuid
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from pipeline import store
from pipeline.errors import AbsentError, ChangedError, ForbiddenError, SourceError
from pipeline.store import ObjectInfo, describe


def _local_info(key: str, stat: os.stat_result) -> ObjectInfo:
    return ObjectInfo(
        key=key,
        size_bytes=stat.st_size,
        etag=f"{stat.st_size}-{stat.st_mtime_ns}-{stat.st_ino}",
        last_modified=datetime.fromtimestamp(stat.st_mtime_ns // 1000 / 1e6, UTC),
    )


@contextlib.contextmanager
def _local_errors(what: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise AbsentError(f"{what}: not found") from error
    except PermissionError as error:
        raise ForbiddenError(f"{what}: permission denied") from error
    except OSError as error:
        raise SourceError(f"{what}: {describe(error)}") from error


class LocalStore:
    """Files below a folder. Identity of a file is (size, mtime_ns, inode), compared again after it was read."""

    can_seek = False

    def __init__(self, root: str) -> None:
        self.root = self.url = root
        self._path = Path(root.removeprefix("file://"))

    def list_pages(self, prefix: str = "", start_after: str = "") -> Iterator[list[ObjectInfo]]:
        """See Store. Links to files are followed, links to folders are not (they can form circles)."""
        folder, _, _ = prefix.rpartition("/")
        with _local_errors(f"list {self.root}/{prefix}"):
            if not self._path.is_dir():
                raise AbsentError(f"list {self.root}: expected a folder, found {_what_is(self._path)}")
            start = self._path / folder
            if not start.is_dir():
                return
            page: list[ObjectInfo] = []
            for key, path in _walk(start, f"{folder}/" if folder else "", start_after):
                _check_utf8(self.root, key)
                if not key.startswith(prefix) or key <= start_after:
                    continue
                try:
                    page.append(_local_info(key, path.stat()))
                except FileNotFoundError:  # deleted since the folder was read
                    continue
                if len(page) == store.PAGE_OBJECTS:
                    yield page
                    page = []
            if page:
                yield page

    def stat(self, key: str) -> ObjectInfo:
        """See Store."""
        path = self._path / key
        with _local_errors(f"look at {path}"):
            if any(folder.is_symlink() for folder in list(path.parents)[: key.count("/")]):
                raise AbsentError(f"look at {path}: it is behind a link to a folder, which listings do not follow")
            if not path.is_file():
                raise AbsentError(f"look at {path}: expected a file, found {_what_is(path)}")
            return _local_info(key, path.stat())

    def get(self, key: str, *, listed: ObjectInfo | None = None, deadline_s: float = store.DEADLINE_S) -> bytes:
        """See Store."""
        what = f"read {self.root}/{key}"
        with _local_errors(what), (self._path / key).open("rb") as file:
            data = file.read()
            if listed is not None and _local_info(key, os.fstat(file.fileno())).etag != listed.etag:
                raise ChangedError(f"{what}: size, time or inode are no longer those listed ({listed.etag})")
        return data

    def get_range(self, listed: ObjectInfo, begin: int, end: int, *, deadline_s: float = store.DEADLINE_S) -> bytes:
        """See Store."""
        what = f"read {self.root}/{listed.key} from byte {begin:,}"
        with _local_errors(what), (self._path / listed.key).open("rb") as file:
            file.seek(begin)
            data = file.read(end - begin)
            if _local_info(listed.key, os.fstat(file.fileno())).etag != listed.etag:
                raise ChangedError(f"{what}: size, time or inode are no longer those listed ({listed.etag})")
        store.check_range(data, begin, end, what)
        return data

    def put(self, key: str, data: bytes) -> None:
        """See Store."""
        path = self._path / key
        with _local_errors(f"write {path}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
            try:
                _write_durably(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), data)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)

    def put_if_absent(self, key: str, data: bytes) -> bytes:
        """See Store. A file without a name, linked into place: nothing is ever left behind, readers see it whole."""
        path = self._path / key
        with _local_errors(f"create {path}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            folder_fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                _link_new_file(folder_fd, path.name, data)
            except FileExistsError:
                return path.read_bytes()
            finally:
                os.close(folder_fd)
            return data

    def delete(self, keys: Sequence[str]) -> None:
        """See Store. Folders stay: another writer may be about to put a file into one."""
        for key in keys:
            with _local_errors(f"delete {self._path / key}"), contextlib.suppress(FileNotFoundError):
                (self._path / key).unlink()


def _link_new_file(folder_fd: int, name: str, data: bytes) -> None:
    """Create `name` with `data` in the folder in one step; FileExistsError if it is there."""
    try:
        fd = os.open(".", os.O_TMPFILE | os.O_WRONLY, 0o644, dir_fd=folder_fd)
    except (OSError, AttributeError):  # not Linux, or a filesystem without nameless files
        temporary = f".{uuid.uuid4().hex}"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644, dir_fd=folder_fd)
        try:
            _write_durably(fd, data)
            os.link(temporary, name, src_dir_fd=folder_fd, dst_dir_fd=folder_fd)
        finally:
            os.unlink(temporary, dir_fd=folder_fd)
        return
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(fd)
        # dst_dir_fd makes Python call linkat with AT_SYMLINK_FOLLOW, which /proc/self/fd needs.
        os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=folder_fd, follow_symlinks=True)
    os.fsync(folder_fd)


def _write_durably(fd: int, data: bytes) -> None:
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _check_utf8(root: str, key: str) -> None:
    try:
        key.encode()
    except UnicodeEncodeError as error:
        found = os.fsencode(key)
        raise SourceError(f"list {root}: expected file names in UTF-8, found {found!r}; rename it") from error


def _what_is(path: Path) -> str:
    return "nothing" if not path.exists() else "a folder" if path.is_dir() else "a file"


def _walk(folder: Path, prefix: str, start_after: str) -> Iterator[tuple[str, Path]]:
    """Files below `folder` as (key, path), in byte order of the whole key: a folder sorts as its name plus a slash.
    Folders whose keys all come before `start_after` are not opened.
    """
    try:
        entries = os.scandir(folder)
    except FileNotFoundError:  # deleted since its parent was read
        return
    with entries:
        found = [(entry.name + "/" if entry.is_dir(follow_symlinks=False) else entry.name, entry) for entry in entries]
    for name, entry in sorted(found, key=lambda item: os.fsencode(item[0])):
        if name.endswith("/"):
            if store.may_hold_keys_after(prefix + name, start_after):
                yield from _walk(folder / entry.name, prefix + name, start_after)
        elif _is_file(entry):
            yield prefix + name, folder / entry.name


def _is_file(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_file()
    except OSError:  # links in a circle, or through a folder that this user may not enter: they lead nowhere
        return False
