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
_HEADER_BUFFER_BYTES = 8192
"""Read at once where a tar's header stands: with a sidecar or two before the next picture, and without most of it."""
_IMAGE_COLUMNS = ("image", "bytes", "content", "jpg", "png")
DAMAGED = (tarfile.TarError, pa.ArrowException, OSError, EOFError)
"""What a container raises that is not what its name says."""


class Member(NamedTuple):
    """One image in a container: its name there, where its bytes begin (a tar) or its row (Parquet), and its bytes.

    Of a Parquet file `size_bytes` is the mean over its rows: it does not say more without being read.
    """

    name: str
    place: int
    size_bytes: int


def list_members(kind: Kind, file: RangeFile, file_bytes: int) -> list[Member]:
    """All members, sorted by name in UTF-8 byte order; of two with one name the last, as when a tar is unpacked.

    Raises one of DAMAGED.
    """
    found = _tar_members(file) if kind == "webdataset" else _parquet_members(file, file_bytes)
    return sorted({member.name: member for member in found}.values(), key=lambda member: member.name.encode())


def _tar_members(file: RangeFile) -> Iterator[Member]:
    with tarfile.open(
        fileobj=io.BufferedReader(file, _HEADER_BUFFER_BYTES), mode="r:", errors="backslashreplace"
    ) as tar:
        for each in tar:
            if each.isfile() and not each.name.lower().endswith(SIDECARS):
                yield Member(each.name.removeprefix("./"), each.offset_data, each.size)


def _parquet_members(file: RangeFile, file_bytes: int) -> Iterator[Member]:
    num_rows = _open(file).metadata.num_rows
    for row in range(num_rows):
        yield Member(f"{row:010d}", row, file_bytes // num_rows)


def _open(file: RangeFile) -> pq.ParquetFile:
    parquet = pq.ParquetFile(pa.PythonFile(file, "r"), pre_buffer=True)
    image_column(parquet.schema_arrow)
    return parquet


def image_column(schema: pa.Schema) -> str:
    """The path of the column with the encoded images: the first one of {bytes, path}, as `datasets` writes it, else of
    bytes with a usual name. pa.ArrowInvalid if there is none.
    """
    for field in schema:
        if pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
            return f"{field.name}.bytes"
    for field in schema:
        is_binary = pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type)
        if is_binary and field.name.lower() in _IMAGE_COLUMNS:
            return str(field.name)
    raise pa.ArrowInvalid(f"expected a column of {{bytes, path}}, or of bytes called image, found {schema.names}")


class RowGroups:
    """The images of one Parquet file, a row group in memory at a time. For one thread at a time."""

    def __init__(self, file: RangeFile) -> None:
        self._file = _open(file)
        self._column = image_column(self._file.schema_arrow)
        self._first_row, self._images = 0, pa.array([], pa.binary())

    def read(self, row: int) -> bytes | None:
        """The bytes of one row; None for null. Raises IndexError for a row that is not there."""
        if not self._first_row <= row < self._first_row + len(self._images):
            self._load(row)
        image: bytes | None = self._images[row - self._first_row].as_py()
        return image

    def _load(self, row: int) -> None:
        first = 0
        for number in range(self._file.metadata.num_row_groups):
            num_rows = self._file.metadata.row_group(number).num_rows
            if row < first + num_rows:
                column = self._file.read_row_group(number, columns=[self._column]).column(0)
                is_struct = pa.types.is_struct(column.type)
                chunks = [chunk.field("bytes") if is_struct else chunk for chunk in column.chunks]
                self._first_row, self._images = first, pa.chunked_array(chunks)
                return
            first += num_rows
        raise IndexError(row)
