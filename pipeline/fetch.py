"""Listed objects -> their encoded bytes, or the reason why there are none.

A module of its own because it is the boundary between storage errors and outcomes: what a store raises becomes a kind
of failure here, and an outage (no object of a unit can be had) is the one thing that does not become rows.
"""

from collections import deque
from collections.abc import Iterator, Sequence
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
from pipeline.storage import ObjectInfo, Store

CONCURRENCY = 16
"""GETs in flight per task: hides ~20 ms of latency behind ~5 ms of decoding with room to spare."""
_READ_AHEAD_BYTES = 256 * 2**20
_KINDS: tuple[tuple[type[SourceError], FailureKind], ...] = (
    (AbsentError, FailureKind.MISSING),
    (ChangedError, FailureKind.CHANGED),
    (ForbiddenError, FailureKind.FORBIDDEN),
    (UnstableError, FailureKind.UNSTABLE_BYTES),
)
_ANSWERS = frozenset(kind for _, kind in _KINDS)
"""Also a refusal shows that there is no outage."""


def fetch(
    store: Store, objects: Sequence[ObjectInfo], *, max_image_bytes: int, deadline_s: float
) -> Iterator[bytes | ImageError]:
    """The bytes of each object in order, or its failure; at most CONCURRENCY requests and 256 MiB ahead of the reader.

    Raises UnavailableError in an outage, which is not a property of the objects: storage answered for none of the first
    CONCURRENCY that it was asked for, or for none of fewer and does not list either.
    """
    window: deque[tuple[int, Future[bytes | ImageError]]] = deque()
    ahead_bytes = 0
    num_unavailable, has_answered = 0, False
    with ThreadPoolExecutor(CONCURRENCY, thread_name_prefix="fetch") as pool:
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
            if isinstance(outcome, bytes) or outcome.kind in _ANSWERS:
                has_answered = True
            elif outcome.kind is FailureKind.UNAVAILABLE:
                num_unavailable += 1
                if num_unavailable == CONCURRENCY and not has_answered:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise UnavailableError(f"{store.root}: none of {num_unavailable} objects could be read; {outcome}")
            yield outcome
    if num_unavailable and not has_answered:
        next(store.list_pages(), None)


def _fetch_one(store: Store, info: ObjectInfo, max_image_bytes: int, deadline_s: float) -> bytes | ImageError:
    if info.is_archived:
        return _failure(FailureKind.ARCHIVED, f"storage class {info.storage_class}: restore the object to label it")
    if info.size_bytes == 0:
        return _failure(FailureKind.EMPTY, "the object has no bytes")
    if info.size_bytes > max_image_bytes:
        return _failure(FailureKind.TOO_LARGE, f"{info.size_bytes} bytes, the limit is {max_image_bytes}")
    try:
        return store.get(info.key, listed=info, deadline_s=deadline_s)
    except UnavailableError as error:
        return _failure(FailureKind.UNAVAILABLE, str(error))
    except SourceError as error:
        kind = next((kind for each, kind in _KINDS if isinstance(error, each)), FailureKind.UNAVAILABLE)
        return _failure(kind, str(error))


def _failure(kind: FailureKind, message: str) -> ImageError:
    return ImageError(kind, message, stage="fetch")
