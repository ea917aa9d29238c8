"""Objects of another store, as a manifest names them: a source whose listing is a file.

A module of its own because what it lists is what somebody wrote down, not what is there. Where the manifest does not
say an object's etag and size, storage is asked, one request each.
"""

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline import cache, manifest, schema, store
from pipeline.errors import AbsentError, ConfigError, SourceError, UnavailableError
from pipeline.manifest import Named, Row
from pipeline.store import ObjectInfo, Store
from pipeline.store_s3 import S3Store

SCHEME = "manifest"
_TABLE = "objects.sqlite"
_CONCURRENCY = 32
"""Requests at once for objects of which the manifest only says the uri."""
_READ_DEADLINE_S = 900.0
"""For one file of a manifest, which is held in memory: 1 GB at 1.2 MB/s."""


class ManifestStore:
    """The objects below `objects.root` that the manifest `name`, a file of `files` or a folder of them, names."""

    can_seek = True

    def __init__(self, objects: Store, files: Store, name: str) -> None:
        self.root = objects.root
        self.url = f"{SCHEME}::{files.root}/{name}::{objects.root}"
        self._objects, self._files, self._name = objects, files, name
        self._path: Path | None = None

    def list_pages(self, prefix: str = "", start_after: str = "") -> Iterator[list[ObjectInfo]]:
        """See Store. What cannot be an object, and what storage does not have, has a storage class that says so."""
        with ThreadPoolExecutor(_CONCURRENCY, thread_name_prefix="look") as pool:
            for page in manifest.pages(self._table(), prefix, start_after, store.PAGE_OBJECTS):
                yield list(pool.map(self._info, page))

    def borders(self, num_objects: int) -> list[str]:
        """Where to cut the listing into ranges of so many objects."""
        return manifest.every(self._table(), num_objects)

    def get(self, key: str, *, listed: ObjectInfo | None = None, deadline_s: float = store.DEADLINE_S) -> bytes:
        """See Store."""
        return self._objects.get(key, listed=listed, deadline_s=deadline_s)

    def _info(self, named: Named) -> ObjectInfo:
        if named.is_bad:
            return ObjectInfo(named.key, 0, None, None, store.BAD_URI, extra=named.extra)
        if named.etag is not None and named.size_bytes is not None:
            return ObjectInfo(named.key, named.size_bytes, named.etag, None, named.storage_class, extra=named.extra)
        try:
            return self._objects.stat(named.key)._replace(extra=named.extra)
        except UnavailableError:
            raise
        except SourceError:
            return ObjectInfo(named.key, 0, None, None, store.ABSENT, extra=named.extra)

    def _table(self) -> Path:
        """The sorted table on this node, made by the first process that asks; another manifest is another table."""
        if self._path is None:
            where = f"{self._files.root}/{self._name}"
            infos = self._manifest_files(where)
            content = schema.digest([where, self.root, [[info.key, info.etag, info.size_bytes] for info in infos]])
            is_inventory = self._name.endswith(manifest.INVENTORY)
            rows = self._inventory_rows(infos[0], where) if is_inventory else self._rows(infos)
            folder = cache.once(
                cache.default_dir() / "manifests" / content[:24],
                lambda folder: manifest.sort(rows, self.root, folder / _TABLE, where),
                f"--manifest {where}",
            )
            self._path = folder / _TABLE
        return self._path

    def _rows(self, infos: Sequence[ObjectInfo]) -> Iterator[Row]:
        for info in infos:
            data = self._files.get(info.key, listed=info, deadline_s=_READ_DEADLINE_S)
            yield from manifest.read(info.key, data, f"{self._files.root}/{info.key}")

    def _inventory_rows(self, info: ObjectInfo, where: str) -> Iterator[Row]:
        inventory = manifest.parse_inventory(self._files.get(info.key, listed=info), where)
        for file in inventory.files:
            bucket = S3Store(f"s3://{file.bucket}")
            data = bucket.get(file.key, deadline_s=_READ_DEADLINE_S)
            where = f"{bucket.root}/{file.key}"
            store.check_md5(data, file.md5, where)
            yield from manifest.read_inventory(inventory, data, self.root, where)

    def _manifest_files(self, where: str) -> list[ObjectInfo]:
        if manifest.is_manifest(self._name) or self._name.endswith(manifest.INVENTORY):
            with contextlib.suppress(AbsentError):
                return [self._files.stat(self._name)]
        # A folder, also one that is called as a file: so some programs write a table.
        listed = [info for page in self._files.list_pages(f"{self._name}/") for info in page]
        found = [info for info in listed if manifest.is_manifest(info.key) and info.size_bytes]
        if not found:
            raise ConfigError(
                f"--manifest {where}: expected a .parquet, .csv, .jsonl or .ndjson file (the last three also .gz, .bz2,"
                " .zst or .lz4), the manifest.json of an S3 Inventory, or a folder of such files, found"
                f" {[info.key for info in listed[:3]] or 'nothing of that kind'}"
            )
        return found
