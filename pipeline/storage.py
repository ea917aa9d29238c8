"""A URL -> list, get, put, put_if_absent: the only module that knows fsspec and s3fs, and the only one that retries.

Three stores behind one protocol: S3 and local folders can be inputs and outputs, anything else that fsspec can open is
an input only, because `put_if_absent` (the one primitive every commit rests on) is known to be safe on the first two.

Keys are relative to the store's root and opaque: never decoded, normalized or split. Listings come in UTF-8 byte order.
Secrets never pass through here: every process builds its own client from the standard environment (for S3 the AWS
variables and profiles, and AWS_NO_SIGN_REQUEST=true for anonymous access).
"""

import contextlib
import functools
import hashlib
import os
import re
import threading
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import botocore.exceptions
import fsspec
import fsspec.asyn
import tenacity
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import (
    AbsentError,
    ChangedError,
    ConfigError,
    ForbiddenError,
    SourceError,
    UnavailableError,
    UnstableError,
)

DEADLINE_S = 30.0
"""Time one logical request may take, its retries included, before it is UnavailableError."""
MAX_PUT_BYTES = 96 * 2**20
"""A conditional PUT must be a single request; s3fs and S3 both take that up to this size and beyond."""
_PAGE_OBJECTS = 1000
"""Keys in a page; what one S3 LIST request returns."""
_MD5_ETAG = re.compile(r"[0-9a-f]{32}")
_ARCHIVED = frozenset({"GLACIER", "DEEP_ARCHIVE"})
_s3_lock = threading.Lock()
_T = TypeVar("_T")


class ObjectInfo(NamedTuple):
    """One listed object. `etag` stands for its content: another etag means another object."""

    key: str
    size_bytes: int
    etag: str | None
    last_modified: datetime | None
    storage_class: str | None = None
    version_id: str | None = None

    @property
    def is_archived(self) -> bool:
        """Whether a GET would be refused until somebody restores the object."""
        return self.storage_class in _ARCHIVED


class Store(Protocol):
    """Objects below a root URL. Every method raises `SourceError` or one of its kinds, and nothing else."""

    root: str

    def list_pages(self, prefix: str = "", start_after: str = "") -> Iterator[list[ObjectInfo]]:
        """Objects whose key starts with `prefix` and comes after `start_after`, in UTF-8 byte order, by the page."""
        ...

    def get(self, key: str, *, listed: ObjectInfo | None = None, deadline_s: float = DEADLINE_S) -> bytes:
        """The object's bytes; with `listed`, only if it still is that object and every byte of it arrived."""
        ...

    def put(self, key: str, data: bytes) -> None:
        """Write or overwrite an object, atomically for readers."""
        ...

    def put_if_absent(self, key: str, data: bytes) -> bytes:
        """Write an object unless it exists, and give what stands there now: `data` itself, or the earlier content."""
        ...


def connect(url: str) -> Store:
    """The store below `url`, which is an fsspec URL or a local path."""
    root = normalize(url)
    if root.startswith("s3://"):
        return S3Store(root)
    if root.startswith("file://"):
        return LocalStore(root)
    return FsspecStore(root)


def connect_output(url: str) -> Store:
    """The store below `url`, where results can be committed safely; ConfigError for others."""
    store = connect(url)
    if isinstance(store, FsspecStore):
        raise ConfigError(
            f"--output must be an s3:// URL or a local folder, found {url}: other stores are not known to create an"
            " object exactly once"
        )
    return store


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
    if scheme not in fsspec.available_protocols():
        raise ConfigError(f"expected a local path, s3:// or another URL that fsspec can open, found {url}")
    return f"{scheme}://{path.rstrip('/')}"


def describe(error: BaseException) -> str:
    """An exception as one line without the line breaks that some servers put into their messages."""
    return " ".join(f"{type(error).__name__}: {error}".split())


# --- S3 -----------------------------------------------------------------------------------------------------------


def _s3() -> Any:
    # The threads of a fetch ask for it at once, and functools.cache alone would build a client for each of them.
    with _s3_lock:
        return _build_s3()


@functools.cache
def _build_s3() -> Any:
    # Built here and never passed on: a pickled filesystem carries its secrets, and importing s3fs takes half a second
    # that local runs need not pay.
    import s3fs

    anonymous = os.environ.get("AWS_NO_SIGN_REQUEST", "").lower() in ("1", "true", "yes")
    filesystem = s3fs.S3FileSystem(
        anon=anonymous,
        use_listings_cache=False,
        skip_instance_cache=True,
        config_kwargs={
            # Retry layers multiply; the ones below s3fs retry within a second or two, `_until_deadline` does the rest.
            "retries": {"mode": "standard", "total_max_attempts": 2},
            "connect_timeout": 5,
            "read_timeout": 15,
            "max_pool_connections": 64,
            # Ceph and others do not know the newer checksum headers.
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        },
    )
    filesystem.retries = 1
    return filesystem


class _AgainError(Exception):
    """This attempt failed in a way that the next one may not."""


class _PreconditionError(Exception):
    """The store refused a conditional request."""


def _until_deadline(attempt: Callable[[], _T], what: str, deadline_s: float) -> _T:
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(_AgainError),
        stop=tenacity.stop_after_delay(deadline_s),
        wait=tenacity.wait_random_exponential(multiplier=0.2, max=5),  # full jitter
    )
    try:
        return retrying(attempt)
    except tenacity.RetryError as error:
        cause = error.last_attempt.exception()
        raise UnavailableError(f"{what}: no usable answer within {deadline_s:g} s; last: {cause}") from cause


def _translate(error: BaseException, what: str) -> Exception:
    """The policy for an s3fs error: what it means for the caller, from status and code rather than from its class."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, botocore.exceptions.ClientError):
        cause = cause.__cause__
    if cause is None:
        if isinstance(error, botocore.exceptions.NoCredentialsError | botocore.exceptions.PartialCredentialsError):
            return ForbiddenError(f"{what}: no AWS credentials found; set them, or AWS_NO_SIGN_REQUEST=true")
        if isinstance(
            error, botocore.exceptions.ProfileNotFound | botocore.exceptions.ParamValidationError | ValueError
        ):
            return SourceError(f"{what}: {describe(error)}")
        return _AgainError(describe(error))  # connection errors, timeouts, cut-off bodies
    status = cause.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    code = str(cause.response.get("Error", {}).get("Code", ""))
    if status == 404 or code in ("NoSuchKey", "NoSuchBucket"):
        return AbsentError(f"{what}: {'no such bucket' if code == 'NoSuchBucket' else 'not found'} ({code or status})")
    if status in (304, 412):
        return _PreconditionError(code)
    if status in (401, 403):
        return ForbiddenError(f"{what}: access denied ({code or status}); check the identity's policy and the URL")
    if status in (0, 408, 409, 425, 429) or status >= 500 or code in ("RequestTimeout", "ExpiredToken", "SlowDown"):
        return _AgainError(f"{status} {code}")
    return SourceError(f"{what}: refused ({status} {code}): {describe(cause)}")


class S3Store:
    """Objects below `s3://bucket/prefix` through s3fs's client."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._bucket, _, prefix = root.removeprefix("s3://").partition("/")
        self._prefix = f"{prefix}/" if prefix else ""

    def _call(self, what: str, coroutine: Callable[..., Any], **arguments: Any) -> Any:
        filesystem = _s3()
        try:
            return fsspec.asyn.sync(filesystem.loop, coroutine, Bucket=self._bucket, **arguments)
        except Exception as error:
            raise _translate(error, what) from error

    def list_pages(self, prefix: str = "", start_after: str = "") -> Iterator[list[ObjectInfo]]:
        """See Store. One LIST request a page."""
        arguments: dict[str, Any] = {"Prefix": self._prefix + prefix, "MaxKeys": _PAGE_OBJECTS}
        if start_after:
            arguments["StartAfter"] = self._prefix + start_after
        what = f"list {self.root}/{prefix}"
        while True:
            request = functools.partial(self._call, what, _s3()._call_s3, method="list_objects_v2", **arguments)
            page = _until_deadline(request, what, DEADLINE_S)
            objects = [self._info(item) for item in page.get("Contents", [])]
            if objects:
                yield objects
            if not page.get("IsTruncated"):
                return
            if not page.get("NextContinuationToken"):
                raise SourceError(f"{what}: a page says that more follow, but not where; run the command again")
            arguments["ContinuationToken"] = page["NextContinuationToken"]
            arguments.pop("StartAfter", None)

    def _info(self, item: dict[str, Any]) -> ObjectInfo:
        etag = item.get("ETag")
        return ObjectInfo(
            key=item["Key"][len(self._prefix) :],
            size_bytes=item["Size"],
            etag=etag.strip('"') if etag else None,
            last_modified=item["LastModified"].astimezone(UTC),
            storage_class=item.get("StorageClass"),
        )

    def get(self, key: str, *, listed: ObjectInfo | None = None, deadline_s: float = DEADLINE_S) -> bytes:
        """See Store. One GET, with If-Match where the etag is known."""
        what = f"get {self.root}/{key}"
        arguments: dict[str, Any] = {"Key": self._prefix + key}
        if listed is not None and listed.etag is not None:
            arguments["IfMatch"] = f'"{listed.etag}"'

        def attempt() -> bytes:
            try:
                data, etag = self._call(what, _get_object, **arguments)
            except _PreconditionError as error:
                raise ChangedError(f"{what}: it is no longer the object that was listed") from error
            # No client notices a short, swapped or flipped body unless the server stored a checksum.
            if listed is not None and len(data) != listed.size_bytes:
                raise UnstableError(f"{what}: {len(data)} bytes arrived, {listed.size_bytes} are listed")
            if etag is not None:
                _check_md5(data, listed.etag if listed is not None and listed.etag else etag, what)
            return data  # type: ignore[no-any-return]

        return _reread_unstable(attempt, what, deadline_s)

    def put(self, key: str, data: bytes) -> None:
        """See Store."""
        what = f"put {self.root}/{key}"
        request = functools.partial(
            self._call, what, _s3()._call_s3, method="put_object", Key=self._prefix + key, Body=data
        )
        _until_deadline(request, what, DEADLINE_S)

    def put_if_absent(self, key: str, data: bytes) -> bytes:
        """See Store. One PUT with If-None-Match; whatever error it ends in, only a read-back says what happened."""
        what = f"create {self.root}/{key}"
        if len(data) > MAX_PUT_BYTES:
            raise ValueError(f"{what}: {len(data)} bytes are more than the {MAX_PUT_BYTES} of one conditional PUT")

        def attempt() -> bytes:
            try:
                self._call(
                    what, _s3()._call_s3, method="put_object", Key=self._prefix + key, Body=data, IfNoneMatch="*"
                )
            except (_AgainError, _PreconditionError) as error:
                # A lost answer, a 409 and a twin that won all look alike, and 412 is also the answer to our own
                # write when its first answer was lost.
                try:
                    return self.get(key)
                except AbsentError:
                    raise _AgainError(f"{error}, and the object is absent") from error
            return data

        return _until_deadline(attempt, what, DEADLINE_S)


async def _get_object(**arguments: Any) -> tuple[bytes, str | None]:
    """The body, and its etag if that can be an MD5 (that of an object encrypted with a key is none)."""
    response = await _s3()._call_s3("get_object", **arguments)
    async with response["Body"] as body:
        data: bytes = await body.read()
    expected_bytes = response["ContentLength"]
    if len(data) != expected_bytes:
        raise OSError(f"body of {len(data)} bytes, {expected_bytes} announced")
    has_own_etag = response.get("ServerSideEncryption", "").startswith("aws:kms") or "SSECustomerAlgorithm" in response
    return data, None if has_own_etag else response.get("ETag", "").strip('"')


def _check_md5(data: bytes, etag: str, what: str) -> None:
    if _MD5_ETAG.fullmatch(etag):
        md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
        if md5 != etag:
            raise UnstableError(f"{what}: the bytes have MD5 {md5}, the etag is {etag}")


def _reread_unstable(attempt: Callable[[], bytes], what: str, deadline_s: float) -> bytes:
    """`attempt` until the deadline; content that does not match its listing is read at most three times."""
    for reads_left in (2, 1, 0):
        try:
            return _until_deadline(attempt, what, deadline_s)
        except UnstableError:
            if not reads_left:
                raise
    raise AssertionError("unreachable")


# --- local folders ------------------------------------------------------------------------------------------------


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

    def __init__(self, root: str) -> None:
        self.root = root
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
            for key, path in _walk(start, f"{folder}/" if folder else ""):
                _check_utf8(self.root, key)
                if not key.startswith(prefix) or key <= start_after:
                    continue
                try:
                    page.append(_local_info(key, path.stat()))
                except FileNotFoundError:  # deleted since the folder was read, or a link to nowhere
                    continue
                if len(page) == _PAGE_OBJECTS:
                    yield page
                    page = []
            if page:
                yield page

    def get(self, key: str, *, listed: ObjectInfo | None = None, deadline_s: float = DEADLINE_S) -> bytes:
        """See Store."""
        what = f"read {self.root}/{key}"
        with _local_errors(what), (self._path / key).open("rb") as file:
            data = file.read()
            if listed is not None and _local_info(key, os.fstat(file.fileno())).etag != listed.etag:
                raise ChangedError(f"{what}: size, time or inode are no longer those listed ({listed.etag})")
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
    return "a file" if path.exists() else "nothing"


def _walk(folder: Path, prefix: str) -> Iterator[tuple[str, Path]]:
    """Files below `folder` as (key, path), in byte order of the whole key: a folder sorts as its name plus a slash."""
    try:
        entries = os.scandir(folder)
    except FileNotFoundError:  # deleted since its parent was read
        return
    with entries:
        found = [(entry.name + "/" if entry.is_dir(follow_symlinks=False) else entry.name, entry) for entry in entries]
    for name, entry in sorted(found, key=lambda item: os.fsencode(item[0])):
        if name.endswith("/"):
            yield from _walk(folder / entry.name, prefix + name)
        elif entry.is_file():
            yield prefix + name, folder / entry.name


# --- anything else fsspec opens -----------------------------------------------------------------------------------


class FsspecStore:
    """Objects below any other fsspec URL: an input only. What the listing calls etag, checksum or time is the etag."""

    def __init__(self, root: str) -> None:
        self.root = root
        try:
            self._filesystem, self._path = fsspec.core.url_to_fs(root)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"cannot open {root}: {describe(error)}") from error
        if isinstance(self._filesystem, LocalFileSystem):
            raise ConfigError(f"expected a local path or file:// URL, found {root}")

    def list_pages(self, prefix: str = "", start_after: str = "") -> Iterator[list[ObjectInfo]]:
        """See Store. Folder by folder, each sorted so that the whole is in byte order."""
        page: list[ObjectInfo] = []
        for info in self._walk(self._path, ""):
            if info.key.startswith(prefix) and info.key.encode() > start_after.encode():
                page.append(info)
                if len(page) == _PAGE_OBJECTS:
                    yield page
                    page = []
        if page:
            yield page

    def _walk(self, folder: str, prefix: str) -> Iterator[ObjectInfo]:
        what = f"list {self.root}/{prefix}"
        entries = _until_deadline(lambda: self._guard(what, self._filesystem.ls, folder, detail=True), what, DEADLINE_S)
        named = []
        for entry in entries:
            name = entry["name"].rstrip("/").rpartition("/")[2]
            named.append((f"{name}/" if entry["type"] == "directory" else name, entry))
        for name, entry in sorted(named, key=lambda item: item[0].encode()):
            if name.endswith("/"):
                yield from self._walk(entry["name"], prefix + name)
                continue
            if entry.get("size") is None:  # a web server's folder does not say
                ask = functools.partial(self._guard, what, self._filesystem.info, entry["name"])
                entry = _until_deadline(ask, what, DEADLINE_S)
            yield self._info(prefix + name, entry)

    @staticmethod
    def _info(key: str, entry: dict[str, Any]) -> ObjectInfo:
        modified = entry.get("last_modified") or entry.get("LastModified") or entry.get("mtime") or entry.get("created")
        if isinstance(modified, int | float):
            modified = datetime.fromtimestamp(modified, UTC)
        if not isinstance(modified, datetime):
            modified = None
        known = (entry.get(name) for name in ("ETag", "etag", "md5Hash", "checksum", "sha256", "Last-Modified"))
        etag = next((str(value).strip('"') for value in known if value), None)
        size_bytes = entry.get("size") or 0
        return ObjectInfo(key, size_bytes, etag or f"{size_bytes}-{modified and modified.isoformat()}", modified)

    def _guard(self, what: str, call: Callable[..., _T], *arguments: Any, **options: Any) -> _T:
        try:
            return call(*arguments, **options)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise AbsentError(f"{what}: not found") from error
        except PermissionError as error:
            raise ForbiddenError(f"{what}: permission denied") from error
        except OSError as error:
            raise _AgainError(describe(error)) from error

    def get(self, key: str, *, listed: ObjectInfo | None = None, deadline_s: float = DEADLINE_S) -> bytes:
        """See Store. These stores offer no conditional read: only the length tells that an object changed."""
        what = f"get {self.root}/{key}"

        def attempt() -> bytes:
            data = self._guard(what, self._filesystem.cat_file, f"{self._path}/{key}")
            assert isinstance(data, bytes)
            if listed is not None and len(data) != listed.size_bytes:
                raise UnstableError(f"{what}: {len(data)} bytes arrived, {listed.size_bytes} are listed")
            return data

        return _reread_unstable(attempt, what, deadline_s)

    def put(self, key: str, data: bytes) -> None:
        """Not offered: see the module docstring."""
        raise ConfigError(f"{self.root} is an input only")

    def put_if_absent(self, key: str, data: bytes) -> bytes:
        """Not offered: see the module docstring."""
        raise ConfigError(f"{self.root} is an input only")


# --- small things every user of a store needs ---------------------------------------------------------------------


def list_keys(store: Store, prefix: str) -> Iterator[str]:
    """Keys below `prefix`; nothing for a local output that does not exist yet. A bucket must exist."""
    try:
        for page in store.list_pages(prefix):
            for info in page:
                yield info.key
    except AbsentError:
        if not isinstance(store, LocalStore):
            raise


def get_or_none(store: Store, key: str) -> bytes | None:
    """The object's bytes, or None if there is no such object."""
    try:
        return store.get(key)
    except AbsentError:
        return None
