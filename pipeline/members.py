"""A container of images (a tar shard, a Parquet file) -> its members, and the bytes of one.

A module of its own because here, and nowhere else, it is known how images lie in other files. Nothing is read but what
says where they are: of a tar the headers, of a Parquet file the footer.
"""

import io
import tarfile
from collections.abc import Iterator
from typing import Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.range_file import RangeFile

Kind = Literal["webdataset", "parquet"]
SUFFIX: dict[Kind, str] = {"webdataset": ".tar", "parquet": ".parquet"}
SIDECARS = (".json", ".txt", ".cls", ".cls2", ".id", ".npy", ".npz", ".pth", ".pyd", ".pickle", ".csv")
"""Ends of a WebDataset's names that are no pictures by its own rules, https://github.com/webdataset/webdataset#readme:
they belong to the picture of the same name."""
UNREADABLE = "(cannot be read)"
"""The one member of a container that is not what its name says, or of what is left of it: it has an outcome, too."""
_HEADER_BUFFER_BYTES = 8192
"""Read at once where a tar's header stands: with a sidecar or two before the next picture, and without most of it."""
_IMAGE_COLUMNS = ("image", "bytes", "content", "jpg", "png")
DAMAGED = (
    tarfile.TarError,
    pa.ArrowException,
    OSError,
    EOFError,
    # Of headers that nobody wrote by accident: tarfile reads numbers, names and levels of any size.
    ValueError,
    OverflowError,
    RecursionError,
    MemoryError,
)
"""What a container raises that is not what its name says."""


class Member(NamedTuple):
    """One image in a container: its name there, where its bytes begin (a tar) or its row (Parquet), and its bytes.

    Of a Parquet file `size_bytes` is the mean over its rows, at least 1: it does not say more without being read.
    """

    name: str
    place: int
    size_bytes: int
    is_readable: bool = True
    """False: what the container says of it cannot be read as one run of bytes."""


def list_members(kind: Kind, file: RangeFile, file_bytes: int) -> list[Member]:
    """All members, sorted by name in UTF-8 byte order; of two with one name the last, as when a tar is unpacked.

    Of a tar that ends early the members before that, and one for the rest. Raises one of DAMAGED if there is none.
    """
    found = _tar_members(file, file_bytes) if kind == "webdataset" else _parquet_members(file)
    with_rest = _until_damaged(found)
    return sorted({member.name: member for member in with_rest}.values(), key=lambda member: member.name.encode())


def _until_damaged(found: Iterator[Member]) -> Iterator[Member]:
    num_found = 0
    try:
        for member in found:
            num_found += 1
            yield member
    except DAMAGED:
        if not num_found:
            raise
        yield Member(UNREADABLE, 0, 0, is_readable=False)


def _tar_members(file: RangeFile, file_bytes: int) -> Iterator[Member]:
    buffered = io.BufferedReader(file, _HEADER_BUFFER_BYTES)
    names: dict[str, tarfile.TarInfo] = {}
    with tarfile.open(fileobj=buffered, mode="r:", errors="backslashreplace") as tar:
        for each in tar:
            names[each.name] = each
            target = names.get(each.linkname) if each.islnk() else each  # the same file under another name
            if target is None or not target.isfile() or each.name.lower().endswith(SIDECARS):
                continue
            # Of a sparse file the bytes are not there as they would be unpacked; of a tar that was cut some are not.
            is_inside = target.size >= 0 and target.offset_data + target.size <= file_bytes
            is_readable = is_inside and not target.issparse()
            name = each.name.removeprefix("./")
            yield Member(name, target.offset_data, target.size if is_inside else 0, is_readable)


def _parquet_members(file: RangeFile) -> Iterator[Member]:
    parquet, column = _open(file)
    metadata = parquet.metadata
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    chunks = [group.column(number) for group in groups for number in range(group.num_columns)]
    image_bytes = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == column)
    for row in range(metadata.num_rows):
        yield Member(f"{row:010d}", row, max(1, image_bytes // metadata.num_rows))


def _open(file: RangeFile) -> tuple[pq.ParquetFile, str]:
    """The file, and the path of its column of images."""
    parquet = pq.ParquetFile(pa.PythonFile(file, "r"), pre_buffer=True)
    return parquet, image_column(parquet.schema_arrow)


def image_column(schema: pa.Schema) -> str:
    """The path of the column with the encoded images: one of {bytes, path}, as `datasets` writes it, else one of bytes;
    each time one with a usual name before others, of bytes only such. pa.ArrowInvalid if there is none.
    """
    usual_first = sorted(schema, key=lambda field: field.name.lower() not in _IMAGE_COLUMNS)
    for field in usual_first:
        place = field.type.get_field_index("bytes") if pa.types.is_struct(field.type) else -1
        if place >= 0 and _is_binary(field.type.field(place).type):
            return f"{field.name}.bytes"
    for field in usual_first:
        if _is_binary(field.type) and field.name.lower() in _IMAGE_COLUMNS:
            return str(field.name)
    raise pa.ArrowInvalid(f"expected a column of {{bytes, path}}, or of bytes called image, found {schema.names}")


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


class ParquetImages:
    """The images of one Parquet file, of which the footer is in memory. For one thread at a time."""

    def __init__(self, file: RangeFile) -> None:
        self._file, self._column = _open(file)

    def row_group_of(self, row: int) -> tuple[int, int]:
        """The row group that holds a row, and its first row. Raises IndexError for a row that is not there."""
        first = 0
        for number in range(self._file.metadata.num_row_groups):
            num_rows = self._file.metadata.row_group(number).num_rows
            if row < first + num_rows:
                return number, first
            first += num_rows
        raise IndexError(row)

    def read_row_group(self, number: int) -> pa.ChunkedArray:
        """The bytes of each of its images; null where there are none."""
        column = self._file.read_row_group(number, columns=[self._column]).column(0)
        is_struct = pa.types.is_struct(column.type)
        return pa.chunked_array([chunk.field("bytes") if is_struct else chunk for chunk in column.chunks])
