"""Bytes of listed S3 objects by the cheapest client there is: obstore, once per object, and only for what it can say.

A GET of a 100 kB object costs 0.24 ms of CPU through it with our checks, 0.93 ms through s3fs without. It decides
nothing: what it does not bring whole and verified is asked for again through s3fs, which types every error and sees
every header. A module of its own because it is a second client, with its own limits; endpoint, region and credentials
are the first one's, so that both always talk to the same store.
"""

import functools
import re
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import fsspec.asyn

from pipeline.errors import UnstableError
from pipeline.store import (
    ObjectInfo,
    RepeatCause,
    cause_of_status,
    check_endpoint,
    check_md5,
    check_range,
    check_size,
    repeats,
)

if TYPE_CHECKING:
    from obstore.store import S3Credential

_MAX_LOST = 8
"""So many reads in a row that only s3fs could serve end its use for the bucket in this process: encryption with keys
(an etag that is no MD5), a bucket of another region. 5 % of faults do that once in 2.5e10 objects."""
_CONNECT_TIMEOUT_S = 5.0
_READ_TIMEOUT_S = 15.0
_CREDENTIALS_TTL = timedelta(minutes=10)
"""After which the first client is asked again; it renews its own more than ten minutes before they expire."""
ENDPOINT_SETTINGS = "AWS_ENDPOINT_URL and the endpoint_url of the profile"
"""Where an endpoint comes from."""
_STATUS = re.compile(r"status code: (\d{3})")
_num_lost: Counter[str] = Counter()


def can_read(bucket: str, key: str) -> bool:
    """Whether it is worth asking. obstore normalizes paths: it refuses empty parts, dots and control characters."""
    return _num_lost[bucket] < _MAX_LOST and key.isprintable() and not {"", ".", ".."} & set(key.split("/"))


def read(
    client: Any,
    bucket: str,
    key: str,
    listed: ObjectInfo,
    deadline_s: float,
    byte_range: tuple[int, int] | None = None,
) -> bytes | RepeatCause:
    """The bytes of the object that is listed with an etag, or a range of them (begin, end), by one GET; for anything
    else, why it has to be asked again.

    `client` is the s3fs filesystem whose endpoint, region and credentials are used.
    """
    import obstore
    import obstore.exceptions

    assert listed.etag is not None
    timeout_s = min(_READ_TIMEOUT_S, deadline_s / 2)  # what comes after it needs time, too
    try:
        condition: obstore.GetOptions = {"if_match": f'"{listed.etag}"'}
        if byte_range is not None:
            condition["range"] = byte_range
        data = bytes(obstore.get(_connect(client, bucket, timeout_s), key, options=condition).bytes())
        if byte_range is not None:
            check_range(data, *byte_range, key)
        else:
            check_size(data, listed, key)
            check_md5(data, listed.etag, key)
    except (obstore.exceptions.BaseError, OSError, UnstableError) as error:
        if isinstance(error, (UnstableError, *_answers())):
            repeats.earn()
        return _cause(error)
    _num_lost.pop(bucket, None)
    repeats.earn()
    return data


def _cause(error: Exception) -> RepeatCause:
    """Read from the message, which is all that obstore gives: only a count depends on it."""
    if isinstance(error, UnstableError):
        return "unstable"
    if isinstance(error, _answers()):
        return "other"
    if found := _STATUS.search(str(error)):
        return cause_of_status(int(found[1]))
    return "timeout" if "kind: Timeout" in str(error) else "connection"


@functools.cache
def _answers() -> tuple[type[Exception], ...]:
    """Errors of obstore that are what the store said, and no sign of an outage."""
    from obstore import exceptions

    return (
        exceptions.NotFoundError,
        exceptions.PermissionDeniedError,
        exceptions.UnauthenticatedError,
        exceptions.PreconditionError,
    )


def lost(bucket: str) -> None:
    """s3fs brought an object that `read` did not."""
    _num_lost[bucket] += 1


@functools.cache
def _connect(client: Any, bucket: str, timeout_s: float) -> Any:
    import obstore.store

    s3 = fsspec.asyn.sync(client.loop, client.set_session)
    endpoint = str(s3.meta.endpoint_url)
    check_endpoint(endpoint, ENDPOINT_SETTINGS)
    is_anonymous = bool(client.anon)
    return obstore.store.S3Store(
        bucket,
        endpoint=endpoint,
        region=s3.meta.region_name or "us-east-1",
        skip_signature=is_anonymous,
        credential_provider=None if is_anonymous else _credentials_of(client),
        client_options={
            "allow_http": endpoint.startswith("http://"),
            "connect_timeout": timedelta(seconds=min(_CONNECT_TIMEOUT_S, timeout_s)),
            "timeout": timedelta(seconds=timeout_s),
        },
        retry_config={"max_retries": 0},
    )


def _credentials_of(client: Any) -> "Callable[[], S3Credential]":
    async def frozen() -> Any:
        found = await client.session.get_credentials()
        return await found.get_frozen_credentials()

    def provide() -> "S3Credential":
        found = fsspec.asyn.sync(client.loop, frozen)
        return {
            "access_key_id": found.access_key,
            "secret_access_key": found.secret_key,
            "token": found.token,
            "expires_at": datetime.now(UTC) + _CREDENTIALS_TTL,
        }

    return provide
