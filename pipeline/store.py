"""What a store of objects is, and the rules that hold for all of them: the protocol, deadlines and repeated reads.

A module of its own because the stores for S3, for local folders and for everything else share it, and `storage` chooses
among them.

Keys are relative to the store's root and opaque: never decoded, normalized or split. Listings come in UTF-8 byte order.
"""

import contextlib
import functools
import hashlib
import ipaddress
import math
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import Literal, NamedTuple, Protocol, TypeVar, get_args
from urllib.parse import urlsplit

import tenacity

from pipeline.errors import SourceError, UnavailableError, UnstableError

DEADLINE_S = 30.0
"""Time one logical request may take, its retries included, before it is UnavailableError."""
NUM_READS = 3
"""Reads of an object whose content does not match its listing, before it is UnstableError."""
MAX_PUT_BYTES = 96 * 2**20
"""A conditional PUT must be a single request; s3fs and S3 both take that up to this size and beyond."""
MAX_REPEATS_PER_S = 1.5
"""Repeated requests a second of a process that gets no answers; each answer it gets allows one more."""
_MAX_SAVED_REPEATS = 5.0
PAGE_OBJECTS = 1000
"""Keys in a page; what one S3 LIST request returns."""
ABSENT = "label-bucket: absent"
"""The storage class of what a manifest names, or of a container, that storage does not show to this identity."""
BAD_URI = "label-bucket: bad uri"
"""The storage class of what a manifest says that can be no object below the input."""
UNREADABLE = "label-bucket: unreadable"
"""The storage class of a member of a container, or of what stands for all of it, that cannot be read there."""
_ARCHIVED = frozenset({"GLACIER", "DEEP_ARCHIVE", "Archive"})  # of S3, of Azure
_INSTANCE_METADATA = ipaddress.ip_network("fd00:ec2::/64")  # the IPv6 addresses of AWS's own link-local services
_MD5_ETAG = re.compile(r"[0-9a-f]{32}")
RepeatCause = Literal["throttled", "server", "timeout", "connection", "unstable", "other"]
"""Why a request is asked again: 429 or 503, another status from 500 on, no answer in time, no whole answer at all,
bytes that do not match the listing, anything else."""
REPEAT_CAUSES: tuple[RepeatCause, ...] = get_args(RepeatCause)
_T = TypeVar("_T")


class ObjectInfo(NamedTuple):
    """One listed object. `etag` stands for its content: another etag means another object."""

    key: str
    size_bytes: int
    etag: str | None
    last_modified: datetime | None
    storage_class: str | None = None
    version_id: str | None = None
    extra: str | None = None
    """What else a manifest says of it, as a JSON object."""

    @property
    def is_bad_uri(self) -> bool:
        """Whether a manifest named it that cannot mean it."""
        return self.storage_class == BAD_URI

    @property
    def is_absent(self) -> bool:
        """Whether storage did not show it when it was to be listed."""
        return self.storage_class == ABSENT

    @property
    def is_unreadable(self) -> bool:
        """Whether its container does not hold it as one run of bytes."""
        return self.storage_class == UNREADABLE

    @property
    def is_archived(self) -> bool:
        """Whether a GET would be refused until somebody restores the object."""
        return self.storage_class in _ARCHIVED


class Source(Protocol):
    """Objects below a root URL that can be read. Every method raises `SourceError` or one of its kinds."""

    root: str
    url: str
    """What `storage.connect_input` opens again: the root, unless the listing comes from elsewhere."""
    can_seek: bool
    """Whether a listing that starts after some key costs only the pages that follow."""

    def list_pages(self, prefix: str = "", start_after: str = "") -> Iterator[list[ObjectInfo]]:
        """Objects whose key starts with `prefix` and comes after `start_after`, in UTF-8 byte order, by the page."""
        ...

    def get(self, key: str, *, listed: ObjectInfo | None = None, deadline_s: float = DEADLINE_S) -> bytes:
        """The object's bytes; with `listed`, only if it still is that object and every byte of it arrived."""
        ...


class Store(Source, Protocol):
    """Objects below a root URL that can be read and written, and looked at by themselves."""

    def stat(self, key: str) -> ObjectInfo:
        """What a listing would say of one object. AbsentError if there is none."""
        ...

    def get_range(self, listed: ObjectInfo, begin: int, end: int, *, deadline_s: float = DEADLINE_S) -> bytes:
        """Bytes `begin` up to `end` of an object, both inside it, only if it still is the one that was listed."""
        ...

    def put(self, key: str, data: bytes) -> None:
        """Write or overwrite an object, atomically for readers."""
        ...

    def put_if_absent(self, key: str, data: bytes) -> bytes:
        """Write an object unless it exists, and give what stands there now: `data` itself, or the earlier content."""
        ...

    def delete(self, keys: Sequence[str]) -> None:
        """Remove objects; one that is not there is fine. The only right that nightly runs do not need."""
        ...


def describe(error: BaseException) -> str:
    """An exception as one line without the line breaks that some servers put into their messages."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def may_hold_keys_after(folder: str, start_after: str) -> bool:
    """Whether a folder (with its slash) can hold a key greater than `start_after`."""
    return folder > start_after or start_after.startswith(folder)


def check_size(data: bytes, listed: ObjectInfo, what: str) -> None:
    """UnstableError unless as many bytes arrived as are listed. No client notices by itself."""
    if len(data) != listed.size_bytes:
        raise UnstableError(f"{what}: {len(data)} bytes arrived, {listed.size_bytes} are listed")


def check_range(data: bytes, begin: int, end: int, what: str) -> None:
    """UnstableError unless as many bytes arrived as were asked for."""
    if len(data) != end - begin:
        raise UnstableError(f"{what}: {len(data)} bytes arrived, {end - begin} were asked for")


def check_md5(data: bytes, etag: str, what: str) -> None:
    """UnstableError if the etag can be an MD5 and is another one. No client notices a flipped bit or a swapped body
    unless the server stored a checksum.
    """
    if _MD5_ETAG.fullmatch(etag):
        md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
        if md5 != etag:
            raise UnstableError(f"{what}: the bytes have MD5 {md5}, the etag is {etag}")


@functools.cache
def check_endpoint(url: str, settings: str) -> None:
    """SourceError for an endpoint at a link-local address: credentials of the machine are served there, never objects.

    A request that somebody's configuration sends there may leave with a signature, and its answer be read as a file.
    `settings` says where to look for the mistake.
    """
    host = urlsplit(url).hostname or ""
    with contextlib.suppress(OSError, UnicodeError):  # a name that does not resolve has an error of its own later
        for *_, (address, *_) in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM):
            found = ipaddress.ip_address(str(address).partition("%")[0])
            found = getattr(found, "ipv4_mapped", None) or found
            if found.is_link_local or found in _INSTANCE_METADATA:
                raise SourceError(
                    f"endpoint {url}: expected a store, found the link-local address {found}; check {settings}"
                )


class AgainError(Exception):
    """This attempt failed in a way that the next one may not."""

    def __init__(self, message: str, because: RepeatCause) -> None:
        super().__init__(message)
        self.because = because


def may_pass(status: int) -> bool:
    """Whether the same request may be answered otherwise in a minute; 0 stands for no answer. What a store has not
    (501; conditional creation is such a thing) will not be there then either.
    """
    return status in (0, 408, 409, 425, 429) or (status >= 500 and status != 501)


def cause_of_status(status: int) -> RepeatCause:
    """Why a request with this HTTP status is asked again; 0 stands for none."""
    if status in (429, 503):
        return "throttled"
    if status == 408:
        return "timeout"
    return "connection" if not status else "server" if status >= 500 else "other"


class Repeats:
    """How many requests of this process may be asked again, and when; and how many were.

    Backoff alone does not bound the rate: sixteen threads that each wait up to 5 s still ask a store that is down 16 to
    23 times a second. An answer earns one repetition; without answers there are MAX_REPEATS_PER_S.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left = _MAX_SAVED_REPEATS
        self._counted_at_s = time.monotonic()
        self._num_by_cause: Counter[RepeatCause] = Counter()

    def count(self, because: RepeatCause) -> None:
        """A request is asked again."""
        with self._lock:
            self._num_by_cause[because] += 1

    def counted(self) -> Counter[RepeatCause]:
        """Requests of this process that were asked again since it began, by cause. Of two of these, the difference is
        what happened in between."""
        with self._lock:
            return self._num_by_cause.copy()

    def earn(self) -> None:
        """An answer came."""
        with self._lock:
            self._left = min(_MAX_SAVED_REPEATS, self._left + 1)

    def take(self, within_s: float) -> float:
        """Seconds to wait before asking again; infinity, and nothing is taken, if that would be after `within_s`."""
        with self._lock:
            now_s = time.monotonic()
            self._left = min(_MAX_SAVED_REPEATS, self._left + (now_s - self._counted_at_s) * MAX_REPEATS_PER_S)
            self._counted_at_s = now_s
            wait_s = max(0.0, 1 - self._left) / MAX_REPEATS_PER_S
            if wait_s > within_s:
                return math.inf
            self._left -= 1
            return wait_s


repeats = Repeats()
_jitter = tenacity.wait_random_exponential(multiplier=0.2, max=5)  # full jitter


def until_deadline(attempt: Callable[[], _T], what: str, deadline_s: float) -> _T:
    """`attempt` until it does not raise AgainError; UnavailableError at the deadline. The only retry loop there is."""

    def wait_s(state: tenacity.RetryCallState) -> float:
        jitter_s = _jitter(state)
        return max(jitter_s, repeats.take(deadline_s - (state.seconds_since_start or 0) - jitter_s))

    def count(state: tenacity.RetryCallState) -> None:
        error = state.outcome and state.outcome.exception()
        assert isinstance(error, AgainError)
        repeats.count(error.because)

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(AgainError),
        stop=tenacity.stop_before_delay(deadline_s),
        wait=wait_s,
        before_sleep=count,
    )
    try:
        answer = retrying(attempt)
    except tenacity.RetryError as error:
        cause = error.last_attempt.exception()
        raise unavailable(what, deadline_s, str(cause)) from cause
    repeats.earn()
    return answer


def unavailable(what: str, deadline_s: float, last: str) -> UnavailableError:
    """What to raise at the deadline."""
    return UnavailableError(f"{what}: no usable answer within {deadline_s:.3g} s; last: {last}")


def reread_unstable(attempt: Callable[[], bytes], what: str, deadline_s: float, num_reads: int = NUM_READS) -> bytes:
    """`attempt` until the deadline; content that does not match its listing is read at most `num_reads` times."""
    for reads_left in reversed(range(num_reads)):
        try:
            return until_deadline(attempt, what, deadline_s)
        except UnstableError:
            if not reads_left:
                raise
            repeats.count("unstable")
    raise AssertionError("unreachable")
