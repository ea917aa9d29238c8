"""Bytes of any length -> objects of at most one PUT each, with size and digest, and back.

A module of its own because an index is larger than one conditional PUT, and all that is read of it, by search and by
the next update, must be what was written.
"""

import hashlib
import io
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from pipeline import schema, storage
from pipeline.errors import ConflictError
from pipeline.storage import Store

SLICE_BYTES = 64 * 2**20
"""One conditional PUT, and what is in memory of a file while it is written or read."""


class FileRef(BaseModel):
    """A file of an index: its key below the index's URL, its size and the SHA-256 of its bytes in hex."""

    model_config = ConfigDict(frozen=True)

    key: str
    size_bytes: int
    sha256: str


def write(store: Store, key: str, data: bytes) -> FileRef:
    """Write a file once."""
    standing = store.put_if_absent(key, data)
    if standing is not data and standing != data:
        raise ConflictError(f"{store.root}/{key}: exists with other content; run the command again")
    return FileRef(key=key, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def read(store: Store, ref: FileRef) -> bytes:
    """The bytes of a file; ConflictError unless they are those that were written."""
    data = storage.get_or_none(store, ref.key)
    if data is None or len(data) != ref.size_bytes:
        found = "nothing" if data is None else f"{len(data):,}"
        raise ConflictError(
            f"{store.root}/{ref.key}: expected the {ref.size_bytes:,} bytes of this index, found {found}; {_REMEDY}"
        )
    digest = hashlib.sha256(data).hexdigest()
    if digest != ref.sha256:
        raise ConflictError(f"{store.root}/{ref.key}: expected SHA-256 {ref.sha256}, found {digest}; {_REMEDY}")
    return data


_REMEDY = "restore the file, or build the index anew without --update"


def write_table(store: Store, key: str, table: pa.Table, *, row_group_rows: int = 16_384) -> FileRef:
    """Write a table as Parquet, once."""
    return write(store, key, schema.encode(table, row_group_rows=row_group_rows))


def read_table(store: Store, ref: FileRef, columns: Sequence[str] | None = None) -> pa.Table:
    """A table, or some columns of it; errors as `read`."""
    table = pq.read_table(io.BytesIO(read(store, ref)), columns=list(columns) if columns is not None else None)
    return table.replace_schema_metadata(None)


class SliceWriter:
    """Bytes as they come -> `<prefix>-00000.bin` and so on. `refs` are all of them once it is closed."""

    def __init__(self, store: Store, prefix: str) -> None:
        self._store = store
        self._prefix = prefix
        self._waiting = bytearray()
        self.refs: list[FileRef] = []

    def write(self, data: bytes | memoryview) -> int:
        """Take bytes; how many that were (as the callbacks of FAISS want it)."""
        view = memoryview(data).cast("B")
        taken = 0
        while taken < len(view):
            part = view[taken : taken + SLICE_BYTES - len(self._waiting)]
            self._waiting += part
            taken += len(part)
            if len(self._waiting) == SLICE_BYTES:
                self._flush()
        return len(view)

    def close(self) -> None:
        """Write what is left."""
        if self._waiting:
            self._flush()

    def _flush(self) -> None:
        self.refs.append(write(self._store, f"{self._prefix}-{len(self.refs):05d}.bin", bytes(self._waiting)))
        self._waiting.clear()


class SliceReader:
    """The bytes of these files one after the other; one of them is in memory. Errors as `read`."""

    def __init__(self, store: Store, refs: Sequence[FileRef]) -> None:
        self._slices: Iterator[bytes] = (read(store, ref) for ref in refs)
        self._left = memoryview(b"")

    def read(self, num_bytes: int) -> bytes:
        """The next bytes, fewer at the end of a file and none at the end of all."""
        if not self._left:
            self._left = memoryview(next(self._slices, b""))
        found = self._left[:num_bytes]
        self._left = self._left[num_bytes:]
        return bytes(found)

    def read_into(self, target: memoryview) -> int:
        """Fill `target` as far as there are bytes; how many there were."""
        filled = 0
        while filled < len(target):
            part = self.read(len(target) - filled)
            if not part:
                break
            target[filled : filled + len(part)] = part
            filled += len(part)
        return filled
