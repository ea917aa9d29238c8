"""Files that name objects -> one table of their keys on this node's disk, sorted and each once.

A module of its own because a manifest comes as it comes: in any order, with rows twice, with rows that name nothing.
Every row has an outcome: rows that cannot be read or name no place below the input are kept, and marked.
"""

import csv
import io
import json
import logging
import math
import re
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote_plus

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import ConfigError
from pipeline.store import describe

_log = logging.getLogger(__name__)

_MAX_KEY_CHARS = 1024
"""What is kept of a row that names no object; also S3's limit of a key, in bytes."""
_CODECS = {"gz": "gzip", "bz2": "bz2", "zst": "zstd", "lz4": "lz4"}
_KNOWN = ("uri", "etag", "size_bytes", "storage_class")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*::)*[A-Za-z][A-Za-z0-9+.-]*://")  # also a chain such as filecache::s3://
_MAX_DIGITS = 18
"""Of a size: what fits into 64 bits."""
_CACHE_KIB = 128 * 1024
_COLUMNS = "is_bad INTEGER, etag TEXT, size_bytes INTEGER, storage_class TEXT, extra TEXT"


class Row(NamedTuple):
    """What a manifest says of one object; `uri` is None where it says none."""

    uri: str | None
    etag: str | None
    size_bytes: int | None
    storage_class: str | None = None
    extra: str | None = None
    """Its other columns, as a JSON object; None where there are none."""
    is_bad: bool = False
    """It says nothing of an object."""
    is_key: bool = False
    """`uri` is what storage itself calls the object: an inventory's."""


class Named(NamedTuple):
    """One object that a manifest names. `is_bad`: no place below the input; then `key` is what the row says."""

    key: str
    is_bad: bool
    etag: str | None = None
    size_bytes: int | None = None
    storage_class: str | None = None
    extra: str | None = None


# --- rows ---------------------------------------------------------------------------------------------------------


def is_manifest(name: str) -> bool:
    """Whether the name ends as one of the kinds that can be read."""
    return _reader(name) is not None


def read(name: str, data: bytes, where: str) -> Iterator[Row]:
    """The rows of one file. ConfigError if it is not what its name says, or has no column `uri`."""
    reader = _reader(name)
    assert reader is not None
    try:
        stream: Any = pa.BufferReader(data)
        if codec := _CODECS.get(name.lower().rpartition(".")[2]):
            stream = pa.CompressedInputStream(stream, codec)
        yield from reader(stream, where)
    except (pa.ArrowException, OSError, csv.Error, ValueError, KeyError, OverflowError, RecursionError) as error:
        raise ConfigError(f"--manifest {where}: cannot be read as its name says: {describe(error)}") from error


def _reader(name: str) -> Callable[[Any, str], Iterator[Row]] | None:
    stem, _, last = name.lower().rpartition(".")
    plain = stem if last in _CODECS else name.lower()
    return next((reader for suffix, reader in _READERS.items() if plain.endswith(suffix)), None)


def _parquet_rows(stream: Any, where: str) -> Iterator[Row]:
    file = pq.ParquetFile(stream)
    _check_columns(file.schema_arrow.names, where)
    for batch in file.iter_batches(batch_size=16_384):
        uris = batch.column("uri")
        if pa.types.is_dictionary(uris.type):
            uris = uris.dictionary_decode()
        # As bytes, because text that is no UTF-8 is a row of its own, and nothing that ends the reading of a file.
        texts = uris.cast(pa.large_binary()).to_pylist()
        others = batch.drop_columns(["uri"]).to_pylist()
        for uri, values in zip(texts, others, strict=True):
            yield _row({"uri": uri, **values})


def _csv_rows(stream: Any, where: str) -> Iterator[Row]:
    reader = csv.DictReader(io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline=""))
    _check_columns(list(reader.fieldnames or []), where)
    yield from map(_row, reader)


def _json_rows(stream: Any, where: str) -> Iterator[Row]:
    has_uri = False
    for number, line in enumerate(io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="\n"), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            values = None
        if isinstance(values, dict) and "uri" in values:
            has_uri = True
            yield _row(values)
        else:
            yield Row(f"line {number}: {line.strip()}", None, None, is_bad=True)
    if not has_uri:
        raise ConfigError(f"--manifest {where}: expected lines such as {{'uri': …}}, found none")


_READERS: Mapping[str, Callable[[Any, str], Iterator[Row]]] = {
    ".parquet": _parquet_rows,
    ".csv": _csv_rows,
    ".jsonl": _json_rows,
    ".ndjson": _json_rows,
}


# --- S3 Inventory -------------------------------------------------------------------------------------------------

INVENTORY = "manifest.json"
"""The file in which S3 names the files of one inventory.
https://docs.aws.amazon.com/AmazonS3/latest/userguide/storage-inventory-location.html"""


class InventoryFile(NamedTuple):
    """One file of an inventory."""

    bucket: str
    key: str
    md5: str


class Inventory(NamedTuple):
    """What `manifest.json` says: the files, and what is in them."""

    files: list[InventoryFile]
    is_csv: bool
    columns: list[str]


def parse_inventory(data: bytes, where: str) -> Inventory:
    """ConfigError unless `data` is the manifest.json of an inventory in CSV or Parquet."""
    try:
        said = json.loads(data)
        bucket = said["destinationBucket"].rpartition(":::")[2]  # arn:aws:s3:::bucket, also aws-cn and aws-us-gov
        files = [InventoryFile(bucket, each["key"], each["MD5checksum"]) for each in said["files"]]
        kind, columns = said["fileFormat"].upper(), [name.strip() for name in said["fileSchema"].split(",")]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"--manifest {where}: expected the manifest.json of an S3 Inventory: {error!r}") from error
    if kind not in ("CSV", "PARQUET") or (kind == "CSV" and not {"Bucket", "Key"} <= set(columns)):
        raise ConfigError(f"--manifest {where}: expected CSV or Parquet with Bucket and Key, found {kind} of {columns}")
    return Inventory(files, kind == "CSV", columns)


def read_inventory(inventory: Inventory, data: bytes, root: str, where: str) -> Iterator[Row]:
    """The current objects below `root` in one file of an inventory, which is of a whole bucket or a part of it."""
    try:
        if inventory.is_csv:
            stream = pa.CompressedInputStream(pa.BufferReader(data), "gzip")
            reader = csv.reader(io.TextIOWrapper(stream, "utf-8", newline=""))
            rows: Iterator[dict[str, Any]] = (dict(zip(inventory.columns, row, strict=False)) for row in reader)
        else:
            batches = pq.ParquetFile(pa.BufferReader(data)).iter_batches(batch_size=16_384)
            rows = (row for batch in batches for row in batch.to_pylist())
        for row in rows:
            # `e_tag` in Parquet, `ETag` in CSV; there keys are encoded as in URLs, and all values are texts.
            values = {name.replace("_", "").lower(): value for name, value in row.items()}
            key = unquote_plus(values["key"]) if inventory.is_csv else values["key"]
            is_current = str(values.get("islatest", True)).lower() != "false"
            is_marker = str(values.get("isdeletemarker", False)).lower() == "true"
            uri = f"s3://{values['bucket']}/{key}"
            if is_current and not is_marker and uri.startswith(f"{root}/"):
                named = {
                    "uri": uri,
                    "etag": values.get("etag"),
                    "size_bytes": values.get("size"),
                    "storage_class": values.get("storageclass"),
                }
                yield _row(named)._replace(is_key=True)
    except (pa.ArrowException, OSError, csv.Error, UnicodeDecodeError, KeyError) as error:
        raise ConfigError(f"--manifest {where}: expected a file of an S3 Inventory: {describe(error)}") from error


def _check_columns(names: list[str], where: str) -> None:
    if "uri" not in names:
        raise ConfigError(f"--manifest {where}: expected a column uri, found {names}")


def _row(values: Mapping[str, Any]) -> Row:
    uri, etag, size = values.get("uri"), values.get("etag"), values.get("size_bytes")
    storage_class = values.get("storage_class")
    if isinstance(uri, bytes):
        uri = uri.decode("utf-8", "surrogateescape")
    is_size = isinstance(size, int) or (isinstance(size, str) and size.isdecimal() and len(size) <= _MAX_DIGITS)
    size_bytes = int(size) if is_size and size is not None else -1
    extra = {name: _in_json(value) for name, value in values.items() if name not in _KNOWN}
    return Row(
        uri=None if uri is None else str(uri),
        etag=_utf8(etag).strip('"') or None if isinstance(etag, str) else None,
        size_bytes=size_bytes if 0 <= size_bytes < 10**_MAX_DIGITS else None,
        storage_class=_utf8(storage_class) or None if isinstance(storage_class, str) else None,
        extra=_utf8(json.dumps(extra, ensure_ascii=False, default=str)) if extra else None,
    )


def _in_json(value: Any) -> Any:
    """The value; None for NaN and infinities, for which JSON has no word."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _utf8(text: str) -> str:
    """`text` as it can be stored: what is no UTF-8 as the escapes that JSON and Python have for it."""
    return text.encode("utf-8", "backslashreplace").decode()


# --- keys ---------------------------------------------------------------------------------------------------------


def name_of(row: Row, root: str) -> Named:
    """The object below `root` that a row means: a uri below it, or a key relative to it."""
    uri = row.uri or ""
    key = uri
    for start in (f"{root}/", f"{root.removeprefix('file://')}/", f"s3a://{root.removeprefix('s3://')}/"):
        if uri.startswith(start):
            key = uri[len(start) :]
            break
    if (row.is_key and key != uri) or (not row.is_bad and _is_key(key, root)):
        return Named(key, False, row.etag, row.size_bytes, row.storage_class, row.extra)
    shown = _utf8(uri)[:_MAX_KEY_CHARS]
    return Named(shown.replace("\0", "\\0") or "(no uri)", True, extra=row.extra)


def _is_key(key: str, root: str) -> bool:
    try:
        size_bytes = len(key.encode())
    except UnicodeEncodeError:
        return False
    if not 0 < size_bytes <= _MAX_KEY_CHARS or "\0" in key or key.startswith("/") or _SCHEME.match(key):
        return False
    # Elsewhere these are other places: an object store takes a key as it is.
    return root.startswith("s3://") or not {"", ".", ".."} & set(key.split("/"))


# --- the sorted table ---------------------------------------------------------------------------------------------


def sort(rows: Iterator[Row], root: str, path: Path, where: str) -> None:
    """Write the objects that `rows` name to an SQLite file, sorted by key. Of rows for one key, the first holds.

    On disk beyond 128 MiB: the library sorts in files of its own. ConfigError if there are no rows.
    """
    unsorted = path.with_suffix(".unsorted")
    try:
        with closing(sqlite3.connect(path, isolation_level=None)) as table:
            table.execute("ATTACH ? AS unsorted", (str(unsorted),))  # beside it: other temporary places may be small
            for setting in (
                "journal_mode = OFF",
                "synchronous = OFF",
                "temp_store = FILE",
                f"cache_size = -{_CACHE_KIB}",
            ):
                table.execute(f"PRAGMA {setting}")
            table.execute(f"CREATE TABLE unsorted.named (key TEXT, {_COLUMNS})")
            table.execute(f"CREATE TABLE objects (key TEXT PRIMARY KEY, {_COLUMNS}) WITHOUT ROWID")
            table.execute("BEGIN")
            table.executemany("INSERT INTO named VALUES (?, ?, ?, ?, ?, ?)", (name_of(row, root) for row in rows))
            table.execute("INSERT OR IGNORE INTO objects SELECT * FROM named ORDER BY key, rowid")
            table.execute("COMMIT")
            ((num_rows,),) = table.execute("SELECT count(*) FROM named")
            ((num_objects, num_bad),) = table.execute("SELECT count(*), total(is_bad) FROM objects")
    except sqlite3.Error as error:
        raise OSError(describe(error)) from error
    unsorted.unlink()
    if not num_rows:
        raise ConfigError(f"--manifest {where}: expected rows, found none")
    _log.info(
        "manifest: %s rows name %s objects below %s (%s of them cannot be), %s rows were there before",
        *(f"{number:,}" for number in (num_rows, num_objects)),
        root,
        f"{int(num_bad):,}",
        f"{num_rows - num_objects:,}",
    )


def pages(path: Path, prefix: str, start_after: str, page_rows: int) -> Iterator[list[Named]]:
    """The objects whose key starts with `prefix` and comes after `start_after`, in UTF-8 byte order."""
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as table:
        after, condition = start_after, ">"
        if prefix > start_after:
            after, condition = prefix, ">="
        while True:
            query = f"SELECT * FROM objects WHERE key {condition} ? ORDER BY key LIMIT ?"
            found = [Named(key, bool(is_bad), *rest) for key, is_bad, *rest in table.execute(query, (after, page_rows))]
            inside = [each for each in found if each.key.startswith(prefix)]
            if inside:
                yield inside
            if len(found) < page_rows or len(inside) < len(found):
                return
            after, condition = found[-1].key, ">"


def every(path: Path, num_objects: int) -> list[str]:
    """The key of each so many-th object."""
    numbered = "SELECT key, row_number() OVER (ORDER BY key) AS number FROM objects"
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as table:
        return [key for (key,) in table.execute(f"SELECT key FROM ({numbered}) WHERE number % ? = 0", (num_objects,))]
