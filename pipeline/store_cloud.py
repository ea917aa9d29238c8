"""Objects in Google Cloud Storage and Azure Blob Storage, through the clients that gcsfs and adlfs build: inputs.

A module of its own because these two tell versions of an object apart, and fsspec's own interface does not: it cannot
say which version to read, keeps what it listed, and cannot list keys that are no paths (`a//b`). Where to ask and as
whom is what the two packages find in their standard variables, in every process.
"""

import functools
from abc import abstractmethod
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import fsspec.asyn

from pipeline import store
from pipeline.errors import AbsentError, ChangedError
from pipeline.store import ObjectInfo, until_deadline
from pipeline.store_fsspec import FsspecStore

GS, AZ = ("gs", "gcs"), ("az", "abfs", "abfss")
"""The names of either in URLs."""
_GS_FIELDS = "name,size,generation,timeCreated"
_AZ_PAGE_OBJECTS = 5000


class _CloudStore(FsspecStore):
    """Objects below `scheme://bucket/prefix`."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        bucket, _, prefix = root.partition("://")[2].partition("/")
        self._bucket = bucket.partition("@")[0]  # abfs://container@account.dfs.core.windows.net
        self._prefix = f"{prefix}/" if prefix else ""

    def _ask(self, what: str, deadline_s: float, coroutine: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        # The clients repeat a request for minutes by themselves. Half of the deadline is left for a fresh attempt.
        return self._guard(
            what, fsspec.asyn.sync, self._filesystem.loop, coroutine, *arguments, timeout=deadline_s / 2, **options
        )

    def _until_deadline(self, what: str, coroutine: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        ask = functools.partial(self._ask, what, store.DEADLINE_S, coroutine, *arguments, **options)
        return until_deadline(ask, what, store.DEADLINE_S)

    def _read(
        self, what: str, deadline_s: float, key: str, etag: str | None, begin: int | None = None, end: int | None = None
    ) -> bytes:
        try:
            data = self._read_version(what, deadline_s, key, etag, begin, end)
        except (AbsentError, ChangedError):  # a version that is not there: both are the answer, whatever is there
            if etag is None:
                raise
            self.stat(key)
            raise ChangedError(f"{what}: it is no longer the object that was listed") from None
        assert isinstance(data, bytes)
        return data

    @abstractmethod
    def _read_version(
        self, what: str, deadline_s: float, key: str, etag: str | None, begin: int | None, end: int | None
    ) -> Any: ...


class GsStore(_CloudStore):
    """Objects in Google Cloud Storage. The etag is the generation, a new one for each content that is written."""

    can_seek = True
    _endpoint_settings = "STORAGE_EMULATOR_HOST"

    def _endpoint(self) -> str | None:
        return str(self._filesystem.base)

    def _objects(self, prefix: str, start_after: str) -> Iterator[ObjectInfo]:
        what = f"list {self.root}/{prefix}"
        options: dict[str, Any] = {
            "prefix": self._prefix + prefix,
            "startOffset": self._prefix + start_after if start_after else None,  # inclusive
            "maxResults": store.PAGE_OBJECTS,
            "fields": f"items({_GS_FIELDS}),nextPageToken",
        }
        while True:
            page = self._until_deadline(
                what, self._filesystem._call, "GET", "b/{}/o", self._bucket, json_out=True, **options
            )
            yield from map(self._gs_info, page.get("items", []))
            if not page.get("nextPageToken"):
                return
            options["pageToken"] = page["nextPageToken"]

    def _gs_info(self, item: dict[str, Any]) -> ObjectInfo:
        return ObjectInfo(
            key=item["name"][len(self._prefix) :],
            size_bytes=int(item["size"]),
            etag=str(item["generation"]),
            last_modified=datetime.fromisoformat(item["timeCreated"]),
        )

    def stat(self, key: str) -> ObjectInfo:
        """See Store. One request."""
        path = ("b/{}/o/{}", self._bucket, self._prefix + key)
        what = f"look at {self.root}/{key}"
        return self._gs_info(
            self._until_deadline(what, self._filesystem._call, "GET", *path, json_out=True, fields=_GS_FIELDS)
        )

    def _read_version(
        self, what: str, deadline_s: float, key: str, etag: str | None, begin: int | None, end: int | None
    ) -> Any:
        path = ("b/{}/o/{}", self._bucket, self._prefix + key)
        headers = {} if begin is None or end is None else {"Range": f"bytes={begin}-{end - 1}"}
        call = self._filesystem._call
        return self._ask(what, deadline_s, call, "GET", *path, headers=headers, alt="media", generation=etag)[1]


class AzStore(_CloudStore):
    """Blobs in Azure Blob Storage; the etag is Azure's, which changes with the content and with metadata.

    Folder by folder, each sorted, because accounts with a hierarchical namespace list in another order than bytes.
    """

    _endpoint_settings = "AZURE_STORAGE_CONNECTION_STRING"

    def _endpoint(self) -> str | None:
        return str(self._filesystem.service_client.url)

    def _objects(self, prefix: str, start_after: str) -> Iterator[ObjectInfo]:
        return self._below(self._prefix + prefix, self._prefix + start_after)

    def _below(self, starts_with: str, start_after: str) -> Iterator[ObjectInfo]:
        what = f"list {self.root}/{starts_with[len(self._prefix) :]}"
        found: list[Any] = []
        token: str | None = None
        while token != "":
            page, token = self._until_deadline(what, self._page, starts_with, token)
            found += page
        for blob in sorted(found, key=lambda blob: str(blob.name).encode()):
            if "size" not in blob:
                if store.may_hold_keys_after(blob.name, start_after):
                    yield from self._below(blob.name, start_after)
            elif not _is_folder(blob):
                yield self._az_info(blob)

    async def _page(self, starts_with: str, token: str | None) -> tuple[list[Any], str]:
        """Blobs, and folders with their slash; and what to ask the next page with, empty if there is none."""
        async with self._filesystem.service_client.get_container_client(self._bucket) as client:
            blobs = client.walk_blobs(starts_with, include=["metadata"], results_per_page=_AZ_PAGE_OBJECTS)
            pages = blobs.by_page(token)
            return [blob async for blob in await anext(pages)], pages.continuation_token or ""

    def _az_info(self, blob: Any) -> ObjectInfo:
        return ObjectInfo(
            key=blob.name[len(self._prefix) :],
            size_bytes=blob.size,
            etag=blob.etag.strip('"'),
            last_modified=blob.last_modified,
            storage_class=blob.blob_tier,
        )

    def stat(self, key: str) -> ObjectInfo:
        """See Store. One request."""
        what = f"look at {self.root}/{key}"
        blob = self._until_deadline(what, self._properties, self._prefix + key)
        if _is_folder(blob):
            raise AbsentError(f"{what}: expected a file, found a folder")
        return self._az_info(blob)

    async def _properties(self, name: str) -> Any:
        async with self._filesystem.service_client.get_blob_client(self._bucket, name) as client:
            return await client.get_blob_properties()

    def _read_version(
        self, what: str, deadline_s: float, key: str, etag: str | None, begin: int | None, end: int | None
    ) -> Any:
        length_bytes = None if begin is None or end is None else end - begin
        return self._ask(what, deadline_s, self._download, self._prefix + key, etag, begin, length_bytes)

    async def _download(self, name: str, etag: str | None, begin: int | None, length_bytes: int | None) -> Any:
        from azure.core import MatchConditions  # there if adlfs is

        condition = {} if etag is None else {"etag": f'"{etag}"', "match_condition": MatchConditions.IfNotModified}
        async with self._filesystem.service_client.get_blob_client(self._bucket, name) as client:
            stream = await client.download_blob(begin, length_bytes, **condition)
            return await stream.readall()


def _is_folder(blob: Any) -> bool:
    # Hierarchical namespaces list each folder as a blob, too.
    return any(name.lower() == "hdi_isfolder" and value == "true" for name, value in (blob.metadata or {}).items())
