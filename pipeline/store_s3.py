"""Objects in S3 and its relatives, through s3fs's client.

A module of its own because only here is it known what an answer of S3 means, and what can be believed of it. Secrets
never pass through: every process builds its own client from the standard AWS variables and profiles
(AWS_NO_SIGN_REQUEST=true for anonymous access).
"""

import asyncio
import contextlib
import functools
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import botocore.exceptions
import botocore.utils
import fsspec.asyn

from pipeline import store, store_s3_get
from pipeline.errors import AbsentError, ChangedError, ForbiddenError, SourceError
from pipeline.store import AgainError, ObjectInfo, RepeatCause, describe, reread_unstable, until_deadline

_CAUSES: dict[str, RepeatCause] = {"RequestTimeout": "timeout", "SlowDown": "throttled"}
"""Of codes whose status does not say it."""
_s3_lock = threading.Lock()


def _s3() -> Any:
    # The threads of a fetch ask for it at once, and functools.cache alone would build a client for each of them.
    with _s3_lock:
        return _build_s3()


@functools.cache
def _build_s3() -> Any:
    # Built here and never passed on: a pickled filesystem carries its secrets, and importing s3fs takes half a second
    # that local runs need not pay.
    import aiobotocore.session
    import s3fs

    session = aiobotocore.session.AioSession()
    session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_parse_time)
    anonymous = os.environ.get("AWS_NO_SIGN_REQUEST", "").lower() in ("1", "true", "yes")
    filesystem = s3fs.S3FileSystem(
        anon=anonymous,
        use_listings_cache=False,
        skip_instance_cache=True,
        session=session,
        config_kwargs={
            # Retry layers multiply: `until_deadline` is the only one.
            "retries": {"mode": "standard", "total_max_attempts": 1},
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


def _parse_time(value: Any) -> datetime:
    # botocore's own goes through dateutil, which is two thirds of the time that a page of a listing takes to parse.
    if isinstance(value, str) and value[4:5] == "-" and value.endswith("Z"):
        with contextlib.suppress(ValueError):
            return datetime.fromisoformat(value)
    parsed: datetime = botocore.utils.parse_timestamp(value)
    return parsed


class _PreconditionError(Exception):
    """The store refused a conditional request."""


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
        is_timeout = isinstance(error, botocore.exceptions.ConnectTimeoutError | botocore.exceptions.ReadTimeoutError)
        return AgainError(describe(error), "timeout" if is_timeout else "connection")  # that, or a cut-off body
    status = cause.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    code = str(cause.response.get("Error", {}).get("Code", ""))
    if status == 404 or code in ("NoSuchKey", "NoSuchBucket"):
        return AbsentError(f"{what}: {'no such bucket' if code == 'NoSuchBucket' else 'not found'} ({code or status})")
    if status in (304, 412):
        return _PreconditionError(code)
    if status in (401, 403):
        return ForbiddenError(f"{what}: access denied ({code or status}); check the identity's policy and the URL")
    if store.may_pass(status) or code in ("RequestTimeout", "ExpiredToken", "SlowDown"):
        return AgainError(f"{status} {code}", _CAUSES.get(code) or store.cause_of_status(status))
    return SourceError(f"{what}: refused ({status} {code}): {describe(cause)}")


class S3Store:
    """Objects below `s3://bucket/prefix` through s3fs's client."""

    can_seek = True

    def __init__(self, root: str) -> None:
        self.root = self.url = root
        self._bucket, _, prefix = root.removeprefix("s3://").partition("/")
        self._prefix = f"{prefix}/" if prefix else ""

    def _call(self, what: str, deadline_s: float, coroutine: Callable[..., Any], **arguments: Any) -> Any:
        # The client's own limits are per read: a server that sends a byte now and then never meets them. Half of the
        # deadline (of an upload, all but 15 s) is left for another attempt.
        attempt_s = deadline_s - min(deadline_s, store.DEADLINE_S) / 2

        async def attempt() -> Any:
            endpoint = str((await _s3().set_session()).meta.endpoint_url)
            store.check_endpoint(endpoint, store_s3_get.ENDPOINT_SETTINGS)
            return await asyncio.wait_for(coroutine(Bucket=self._bucket, **arguments), attempt_s)

        try:
            return fsspec.asyn.sync(_s3().loop, attempt)
        except SourceError:
            raise
        except TimeoutError as error:
            raise AgainError("no complete answer in time", "timeout") from error
        except Exception as error:
            raise _translate(error, what) from error

    def list_pages(self, prefix: str = "", start_after: str = "") -> Iterator[list[ObjectInfo]]:
        """See Store. One LIST request a page."""
        arguments: dict[str, Any] = {"Prefix": self._prefix + prefix, "MaxKeys": store.PAGE_OBJECTS}
        if start_after:
            arguments["StartAfter"] = self._prefix + start_after
        what = f"list {self.root}/{prefix}"
        while True:
            request = functools.partial(
                self._call, what, store.DEADLINE_S, _s3()._call_s3, method="list_objects_v2", **arguments
            )
            page = until_deadline(request, what, store.DEADLINE_S)
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

    def stat(self, key: str) -> ObjectInfo:
        """See Store. One HEAD request."""
        what = f"look at {self.root}/{key}"
        request = functools.partial(
            self._call, what, store.DEADLINE_S, _s3()._call_s3, method="head_object", Key=self._prefix + key
        )
        found = until_deadline(request, what, store.DEADLINE_S)
        return self._info({**found, "Key": self._prefix + key, "Size": found["ContentLength"]})

    def get(self, key: str, *, listed: ObjectInfo | None = None, deadline_s: float = store.DEADLINE_S) -> bytes:
        """See Store. One GET, with If-Match where the etag is known: then through the cheaper client."""
        if listed is None:
            return self._get(key, None, deadline_s)
        return self._cheaply(key, listed, deadline_s, functools.partial(self._get, key, listed))

    def get_range(self, listed: ObjectInfo, begin: int, end: int, *, deadline_s: float = store.DEADLINE_S) -> bytes:
        """See Store. As `get`, with a range."""
        if end <= begin:
            return b""
        ask = functools.partial(self._get_range, listed, begin, end)
        return self._cheaply(listed.key, listed, deadline_s, ask, (begin, end))

    def _cheaply(
        self,
        key: str,
        listed: ObjectInfo,
        deadline_s: float,
        ask: Callable[..., bytes],
        byte_range: tuple[int, int] | None = None,
    ) -> bytes:
        """One GET through the cheaper client, and if that does not bring it whole, `ask`, which types every error."""
        path = self._prefix + key
        if listed.etag is None or not store_s3_get.can_read(self._bucket, path):
            return ask(deadline_s)
        started_s = time.monotonic()
        data = store_s3_get.read(_s3(), self._bucket, path, listed, deadline_s, byte_range)
        if isinstance(data, str):
            because = data
            wait_s = store.repeats.take(deadline_s - (time.monotonic() - started_s))
            if math.isinf(wait_s):
                raise store.unavailable(f"get {self.root}/{key}", deadline_s, "too many requests had no answer")
            store.repeats.count(because)
            time.sleep(wait_s)
            left_s = deadline_s - (time.monotonic() - started_s)
            data = ask(left_s, num_reads=store.NUM_READS - 1)
            store_s3_get.lost(self._bucket)
        return data

    def _get(self, key: str, listed: ObjectInfo | None, deadline_s: float, num_reads: int = store.NUM_READS) -> bytes:
        what = f"get {self.root}/{key}"

        def attempt() -> bytes:
            data, etag = self._read(what, deadline_s, key, listed)
            if listed is not None:
                store.check_size(data, listed, what)
            if etag is not None:
                store.check_md5(data, listed.etag if listed is not None and listed.etag else etag, what)
            return data

        return reread_unstable(attempt, what, deadline_s, num_reads)

    def _get_range(
        self, listed: ObjectInfo, begin: int, end: int, deadline_s: float, num_reads: int = store.NUM_READS
    ) -> bytes:
        what = f"get {self.root}/{listed.key} from byte {begin:,}"

        def attempt() -> bytes:
            data, _ = self._read(what, deadline_s, listed.key, listed, Range=f"bytes={begin}-{end - 1}")
            store.check_range(data, begin, end, what)
            return data

        return reread_unstable(attempt, what, deadline_s, num_reads)

    def _read(
        self, what: str, deadline_s: float, key: str, listed: ObjectInfo | None, **arguments: str
    ) -> tuple[bytes, str | None]:
        """One GET, of the object that was listed if its etag is known; see `_get_object`."""
        if listed is not None and listed.etag is not None:
            arguments["IfMatch"] = f'"{listed.etag}"'
        try:
            found: tuple[bytes, str | None] = self._call(
                what, deadline_s, _get_object, Key=self._prefix + key, **arguments
            )
            return found
        except _PreconditionError as error:
            raise ChangedError(f"{what}: it is no longer the object that was listed") from error

    def put(self, key: str, data: bytes) -> None:
        """See Store."""
        what = f"put {self.root}/{key}"
        until_deadline(functools.partial(self._put, what, key, data), what, _upload_deadline_s(data))

    def _put(self, what: str, key: str, data: bytes, **conditions: str) -> None:
        self._call(
            what,
            _upload_deadline_s(data),
            _s3()._call_s3,
            method="put_object",
            Key=self._prefix + key,
            Body=data,
            **conditions,
        )

    def put_if_absent(self, key: str, data: bytes) -> bytes:
        """See Store. One PUT with If-None-Match; whatever error it ends in, only a read-back says what happened."""
        what = f"create {self.root}/{key}"
        if len(data) > store.MAX_PUT_BYTES:
            raise ValueError(
                f"{what}: {len(data)} bytes are more than the {store.MAX_PUT_BYTES} of one conditional PUT"
            )

        def attempt() -> bytes:
            try:
                self._put(what, key, data, IfNoneMatch="*")
            except (AgainError, _PreconditionError) as error:
                # A lost answer, a 409 and a twin that won all look alike, and 412 is also the answer to our own
                # write when its first answer was lost.
                try:
                    return self.get(key, deadline_s=store.DEADLINE_S)
                except AbsentError:
                    because: RepeatCause = error.because if isinstance(error, AgainError) else "other"
                    raise AgainError(f"{error}, and the object is absent", because) from error
            return data

        return until_deadline(attempt, what, _upload_deadline_s(data))

    def delete(self, keys: Sequence[str]) -> None:
        """See Store. One DeleteObjects request for up to 1000 keys; each key has an answer of its own in it."""
        for start in range(0, len(keys), store.PAGE_OBJECTS):
            some = keys[start : start + store.PAGE_OBJECTS]
            what = f"delete {self.root}/{some[0]}" + (f" and {len(some) - 1} more" if len(some) > 1 else "")
            until_deadline(functools.partial(self._delete, what, some), what, store.DEADLINE_S)

    def _delete(self, what: str, keys: Sequence[str]) -> None:
        listed = {"Objects": [{"Key": self._prefix + key} for key in keys], "Quiet": True}
        answer = self._call(what, store.DEADLINE_S, _s3()._call_s3, method="delete_objects", Delete=listed)
        for refused in answer.get("Errors", []):
            found = f"{refused.get('Code')}: {refused.get('Message')}"
            if refused.get("Code") == "AccessDenied":
                raise ForbiddenError(f"{what}: access denied for {refused.get('Key')}; removing needs s3:DeleteObject")
            raise AgainError(found, "throttled" if refused.get("Code") == "SlowDown" else "server")


def _upload_deadline_s(data: bytes) -> float:
    return store.DEADLINE_S + len(data) / 2**20  # an uplink of 1 MiB/s is enough


async def _get_object(**arguments: Any) -> tuple[bytes, str | None]:
    """The body, and its etag if that can be an MD5 (that of an object encrypted with a key is none)."""
    response = await _s3()._call_s3("get_object", **arguments)
    async with response["Body"] as body:
        data: bytes = await body.read()
    expected_bytes = response["ContentLength"]
    if len(data) != expected_bytes:
        raise OSError(f"body of {len(data)} bytes, {expected_bytes} announced")
    if not response.get("ETag"):  # an error that comes with status 200 has none
        raise OSError(f"body of {len(data)} bytes without an etag, beginning with {data[:60]!r}")
    has_own_etag = response.get("ServerSideEncryption", "").startswith("aws:kms") or "SSECustomerAlgorithm" in response
    return data, None if has_own_etag else response["ETag"].strip('"')
