"""A URL -> its store, with list, get, put and put_if_absent.

Stores behind one protocol: S3 and local folders can be inputs and outputs of nights, the clouds of Google and Azure and
anything else that fsspec can open are inputs, because `put_if_absent` (the one primitive every commit rests on) is
known to be safe on the first two.
This and the `store` modules are the only ones that know fsspec and s3fs, and the only ones that retry.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import fsspec

from pipeline import members
from pipeline.errors import AbsentError, ConfigError, ConflictError
from pipeline.store import MAX_PUT_BYTES, ObjectInfo, Source, Store, describe
from pipeline.store_cloud import AZ, GS, AzStore, GsStore
from pipeline.store_container import ContainerStore
from pipeline.store_fsspec import FsspecStore
from pipeline.store_local import LocalStore
from pipeline.store_manifest import SCHEME, ManifestStore
from pipeline.store_s3 import S3Store

__all__ = [
    "MAX_PUT_BYTES",
    "ObjectInfo",
    "Source",
    "Store",
    "connect",
    "connect_input",
    "connect_output",
    "describe",
    "get_or_none",
    "list_keys",
    "normalize",
    "parsing",
]


def connect(url: str) -> Store:
    """The store below `url`, which is an fsspec URL or a local path."""
    root = normalize(url)
    if root.startswith("s3://"):
        return S3Store(root)
    if root.startswith("file://"):
        return LocalStore(root)
    scheme = root.partition("://")[0]
    return GsStore(root) if scheme in GS else AzStore(root) if scheme in AZ else FsspecStore(root)


def connect_input(url: str, manifest_url: str | None = None) -> Source:
    """What a night reads: the objects below `url`, or of these only what the manifest names; also by a source's `url`.

    ConfigError for URLs that name no place.
    """
    if url.startswith(f"{SCHEME}::"):
        _, manifest_url, url = url.split("::")
    kind, plus, inner = url.partition("+")
    if plus and kind in members.SUFFIX:
        if manifest_url is not None:
            raise ConfigError(f"--manifest: expected an input of loose objects, found {url}")
        return ContainerStore(kind, connect(inner))
    if manifest_url is None:
        return connect(url)
    scheme, _, path = normalize(manifest_url).partition("://")
    folder, slash, name = path.rpartition("/")
    if not slash or not name:
        raise ConfigError(f"--manifest {manifest_url}: expected a file, or a folder of files, in a bucket or a folder")
    return ManifestStore(connect(url), connect(f"{scheme}://{folder or '/'}"), name)


def connect_output(url: str) -> Store:
    """The store below `url`, where results can be committed safely; ConfigError for others."""
    if not normalize(url).startswith(("s3://", "file://")):
        raise ConfigError(
            f"--output must be an s3:// URL or a local folder, found {url}: other stores are not known to create an"
            " object exactly once"
        )
    return connect(url)


def normalize(url: str) -> str:
    """`url` in its one spelling: `scheme://path`, absolute, no slash at the end.

    Local paths become `file:///absolute/path`; symbolic links stay, because a link that is moved every night is the
    same source every night. Raises ConfigError for chained URLs (`::`) and for protocols fsspec does not know.
    """
    if "::" in url:
        raise ConfigError(f"expected one plain URL, found a chained one: {url}")
    scheme, separator, path = url.partition("://")
    if not separator:
        return f"file://{os.path.normpath(Path(url).expanduser().absolute())}"
    if scheme in ("file", "local"):
        return f"file://{os.path.normpath(Path(path).absolute())}"
    if scheme in ("s3", "s3a"):
        if not path.partition("/")[0]:
            raise ConfigError(f"expected s3://bucket/prefix, found no bucket in {url}")
        return f"s3://{path.rstrip('/')}"
    if scheme in (*GS, *AZ) and not path.partition("/")[0]:
        raise ConfigError(f"expected {scheme}://bucket/prefix, found no bucket in {url}")
    if scheme not in fsspec.available_protocols():
        raise ConfigError(f"expected a local path, s3:// or another URL that fsspec can open, found {url}")
    return f"{scheme}://{path.rstrip('/')}"


def list_keys(store: Store, prefix: str) -> Iterator[str]:
    """Keys below `prefix`; nothing where the folder does not exist yet. A bucket must exist."""
    try:
        for page in store.list_pages(prefix):
            for info in page:
                yield info.key
    except AbsentError:
        if isinstance(store, S3Store):
            raise


def get_or_none(store: Store, key: str) -> bytes | None:
    """The object's bytes, or None if there is no such object."""
    try:
        return store.get(key)
    except AbsentError:
        return None


@contextlib.contextmanager
def parsing(store: Store, key: str, what: str) -> Iterator[None]:
    """For reading what this program wrote: damage becomes a ConflictError that names the object."""
    try:
        yield
    except (ValueError, KeyError, TypeError) as error:
        raise ConflictError(f"{store.root}/{key}: expected {what}, found {describe(error)}; restore it") from error
