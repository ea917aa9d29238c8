"""Images inside tar shards or Parquet files below another store: a source whose objects are members of containers.

    webdataset+s3://bucket/shards      keys  <shard>.tar/<member>
    parquet+s3://bucket/rows           keys  <file>.parquet/<row, ten digits>

A member's etag is its container's and its place there: with another version of the file every member is another one.
A module of its own because a container is opened to be listed, which costs requests.
"""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

from pipeline import members, store
from pipeline.errors import AbsentError, ChangedError, SourceError, UnavailableError, UnstableError
from pipeline.members import Kind, Member, ParquetImages
from pipeline.range_file import RangeFile
from pipeline.store import ObjectInfo, Store

_CONCURRENCY = 16
"""Containers that are opened at once by one listing."""
_KEPT_FILES = 64
"""Footers of Parquet files in memory."""
_KEPT_ROWS = 64
"""Rows in memory, in at least two row groups: twice as many as `fetch` asks for at once, in no strict order."""
_OBJECT_BYTES = 10_000
"""What a member is taken to have where a listing is cut: small, because opening containers takes more time."""
_LAST = "\U0010ffff"


class ContainerStore:
    """The members of all containers of one kind below `objects.root`. Other files are passed by."""

    can_seek = True

    def __init__(self, kind: Kind, objects: Store) -> None:
        self.root = self.url = f"{kind}+{objects.root}"
        self._kind, self._objects = kind, objects
        self._lock = threading.Lock()
        self._files: dict[ObjectInfo, ParquetImages] = {}
        self._row_groups: dict[tuple[ObjectInfo, int], pa.ChunkedArray] = {}

    def list_pages(self, prefix: str = "", start_after: str = "") -> Iterator[list[ObjectInfo]]:
        """See Store. Containers are listed as a whole, and only those opened that can hold what is asked for."""
        wanted = [each for each in self.containers() if _may_hold(each, prefix) and not _is_before(each, start_after)]
        with ThreadPoolExecutor(_CONCURRENCY, thread_name_prefix="open") as pool:
            for first in range(0, len(wanted), _CONCURRENCY):
                for found in pool.map(self._members, wanted[first : first + _CONCURRENCY]):
                    inside = [each for each in found if each.key.startswith(prefix) and each.key > start_after]
                    for start in range(0, len(inside), store.PAGE_OBJECTS):
                        yield inside[start : start + store.PAGE_OBJECTS]

    def borders(self, num_objects: int) -> list[str]:
        """Where to cut the listing into ranges of about so many objects, by the containers' sizes."""
        found, size_bytes = list[str](), 0
        for container in self.containers():
            size_bytes += container.size_bytes
            if size_bytes >= num_objects * _OBJECT_BYTES:
                found.append(f"{container.key}/{_LAST}")
                size_bytes = 0
        return found

    def containers(self) -> list[ObjectInfo]:
        """All containers, in the order of their members' keys."""
        listed = [info for page in self._objects.list_pages() for info in page]
        found = [info for info in listed if info.key.endswith(members.SUFFIX[self._kind])]
        return sorted(found, key=lambda info: f"{info.key}/".encode())

    def get(self, key: str, *, listed: ObjectInfo | None = None, deadline_s: float = store.DEADLINE_S) -> bytes:
        """See Store. Of a Parquet file the whole row group is read, and kept for the next row."""
        if listed is None or listed.etag is None:  # why a container could not be opened
            container = ObjectInfo(key.removesuffix(f"/{members.UNREADABLE}"), 1, None, None)
            return self._objects.get_range(container, 0, 1, deadline_s=deadline_s)
        etag, _, numbers = listed.etag.rpartition("@")
        key_chars, place, file_bytes = map(int, numbers.split("."))
        file = ObjectInfo(key[:key_chars], file_bytes, etag, None)
        if self._kind == "webdataset":
            return self._objects.get_range(file, place, place + listed.size_bytes, deadline_s=deadline_s)
        try:
            with self._lock:
                image = self._image(file, place, deadline_s)
        except members.DAMAGED as error:
            raise UnstableError(f"get {self.root}/{key}: {store.describe(error)}") from error
        if image is None:
            raise AbsentError(f"get {self.root}/{key}: expected bytes, found null")
        return image

    def _image(self, file: ObjectInfo, row: int, deadline_s: float) -> bytes | None:
        if file not in self._files:
            if len(self._files) == _KEPT_FILES:
                self._files.pop(next(iter(self._files)))
            self._files[file] = ParquetImages(RangeFile(self._objects, file, deadline_s))
        number, first_row = self._files[file].row_group_of(row)
        if (file, number) not in self._row_groups:
            while len(self._row_groups) > 1 and sum(map(len, self._row_groups.values())) > _KEPT_ROWS:
                self._row_groups.pop(next(iter(self._row_groups)))
            self._row_groups[file, number] = self._files[file].read_row_group(number)
        image: bytes | None = self._row_groups[file, number][row - first_row].as_py()
        return image

    def _members(self, container: ObjectInfo) -> list[ObjectInfo]:
        whole = self._info(container, Member(members.UNREADABLE, 0, container.size_bytes))
        if container.is_archived:
            return [whole]
        file = RangeFile(self._objects, container, store.DEADLINE_S)
        try:
            found = members.list_members(self._kind, file, container.size_bytes)
        except (ChangedError, AbsentError):  # since it was listed: the next night sees what it is then
            return []
        except UnavailableError:
            raise
        except SourceError:
            return [whole._replace(size_bytes=0, etag=None, storage_class=store.ABSENT)]
        except members.DAMAGED:
            return [whole._replace(storage_class=store.UNREADABLE)]
        return [self._info(container, member) for member in found]

    @staticmethod
    def _info(container: ObjectInfo, member: Member) -> ObjectInfo:
        return ObjectInfo(
            key=f"{container.key}/{member.name}",
            size_bytes=member.size_bytes,
            etag=f"{container.etag}@{len(container.key)}.{member.place}.{container.size_bytes}",
            last_modified=container.last_modified,
            storage_class=container.storage_class if member.is_readable else store.UNREADABLE,
        )


def _may_hold(container: ObjectInfo, prefix: str) -> bool:
    folder = f"{container.key}/"
    return folder.startswith(prefix) or prefix.startswith(folder)


def _is_before(container: ObjectInfo, key: str) -> bool:
    """Whether none of its members comes after `key`."""
    return f"{container.key}/{_LAST}" <= key
