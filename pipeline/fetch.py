"""Listed objects -> their encoded bytes, or the reason why there are none.

A module of its own because it is the boundary between storage errors and outcomes: what a store raises becomes a kind
of failure here, and an outage (no object of a unit can be had) is the one thing that does not become rows.
"""

from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from pipeline.errors import (
    AbsentError,
    ChangedError,
    FailureKind,
    ForbiddenError,
    ImageError,
    SourceError,
    UnavailableError,
    UnstableError,
)
from pipeline.storage import ObjectInfo, Source

CONCURRENCY = 16
"""GETs in flight per task: hides ~20 ms of latency behind ~5 ms of decoding with room to spare."""
MAX_FORBIDDEN = 64
"""Refusals in a row that end the run: then the identity lost its permission, and the objects are not the reason."""
_READ_AHEAD_BYTES = 256 * 2**20
# The first that fits counts. A plain SourceError is an answer too: the object cannot be read as this identity asks.
_KINDS: tuple[tuple[type[SourceError], FailureKind], ...] = (
    (AbsentError, FailureKind.MISSING),
    (ChangedError, FailureKind.CHANGED),
    (UnstableError, FailureKind.UNSTABLE_BYTES),
    (UnavailableError, FailureKind.UNAVAILABLE),
    (SourceError, FailureKind.FORBIDDEN),
)
_NOT_ASKED_FOR = frozenset(
    {FailureKind.BAD_URI, FailureKind.CORRUPT, FailureKind.ARCHIVED, FailureKind.EMPTY, FailureKind.TOO_LARGE}
)


def fetch(
    store: Source, objects: Sequence[ObjectInfo], *, max_image_bytes: int, deadline_s: float
) -> Generator[bytes | ImageError, None, None]:
    """The bytes of each object in order, or its failure; at most CONCURRENCY requests and 256 MiB ahead of the reader.

    Raises what is no property of the objects: UnavailableError in an outage (storage answered for none of CONCURRENCY
    objects in a row, or for no object at all and does not list either), ForbiddenError if it refused MAX_FORBIDDEN in
    a row. Objects that it need not be asked for do not count.
    """
    window: deque[tuple[int, Future[bytes | ImageError]]] = deque()
    ahead_bytes = 0
    num_silent, num_forbidden, has_answered = 0, 0, False
    pool = ThreadPoolExecutor(CONCURRENCY, thread_name_prefix="fetch")
    try:
        upcoming = iter(objects)
        pending = next(upcoming, None)
        while pending is not None or window:
            while pending is not None and len(window) < 2 * CONCURRENCY:
                if window and ahead_bytes + pending.size_bytes > _READ_AHEAD_BYTES:
                    break
                window.append(
                    (pending.size_bytes, pool.submit(_fetch_one, store, pending, max_image_bytes, deadline_s))
                )
                ahead_bytes += pending.size_bytes
                pending = next(upcoming, None)
            size_bytes, future = window.popleft()
            outcome = future.result()
            ahead_bytes -= size_bytes
            if isinstance(outcome, bytes):
                num_silent, num_forbidden, has_answered = 0, 0, True
            elif outcome.kind not in _NOT_ASKED_FOR:
                num_silent = num_silent + 1 if outcome.kind is FailureKind.UNAVAILABLE else 0
                num_forbidden = num_forbidden + 1 if outcome.kind is FailureKind.FORBIDDEN else 0
                has_answered = has_answered or not num_silent
                if num_silent == CONCURRENCY:
                    raise UnavailableError(
                        f"{store.root}: none of {num_silent} objects in a row could be read; {outcome}"
                    )
                if num_forbidden == MAX_FORBIDDEN:
                    raise ForbiddenError(
                        f"{store.root}: {num_forbidden} objects in a row were refused; check the identity's policy, "
                        f"then run the same command again; last: {outcome}"
                    )
            yield outcome
    finally:
        pool.shutdown(cancel_futures=True)
    if num_silent and not has_answered:
        next(store.list_pages(), None)


def _fetch_one(store: Source, info: ObjectInfo, max_image_bytes: int, deadline_s: float) -> bytes | ImageError:
    if info.is_bad_uri:
        return _failure(
            FailureKind.BAD_URI,
            f"expected a uri below {store.root}, or a path relative to it, found {info.key[:200]!r} in the manifest",
        )
    if info.is_unreadable:
        return _failure(
            FailureKind.CORRUPT, "expected an image in a tar shard or a Parquet file, found none that can be read there"
        )
    if info.is_archived:
        return _failure(FailureKind.ARCHIVED, f"storage class {info.storage_class}: restore the object to label it")
    if not info.is_absent and (problem := _size_problem(info.size_bytes, max_image_bytes)):
        return problem
    try:
        if info.is_absent:  # which of the reasons it was
            store.get(info.key, deadline_s=deadline_s)
            return _failure(FailureKind.CHANGED, "it was not there when the run was planned")
        data = store.get(info.key, listed=info, deadline_s=deadline_s)
        return _size_problem(len(data), max_image_bytes) or data  # a row of a Parquet file is listed with a mean
    except SourceError as error:
        return _failure(next(kind for each, kind in _KINDS if isinstance(error, each)), str(error))


def _size_problem(size_bytes: int, max_image_bytes: int) -> ImageError | None:
    if size_bytes == 0:
        return _failure(FailureKind.EMPTY, "the object has no bytes")
    if size_bytes > max_image_bytes:
        return _failure(FailureKind.TOO_LARGE, f"{size_bytes} bytes, the limit is {max_image_bytes}")
    return None


def _failure(kind: FailureKind, message: str) -> ImageError:
    return ImageError(kind, message, stage="fetch")
