"""Errors of ours that Ray wraps, as they were raised.

A module of its own because every command that works on a cluster ends with one line of ours, not with the engine's.
"""

import contextlib
from collections.abc import Iterator

import ray.exceptions

from pipeline.errors import LabelBucketError


@contextlib.contextmanager
def engine_errors() -> Iterator[None]:
    """Our own errors as they were raised, out of the engine's wrapping."""
    try:
        yield
    except ray.exceptions.RayError as error:
        ours = _find_ours(error)
        if ours is None:
            raise
        raise ours from None


def _find_ours(error: BaseException | None) -> LabelBucketError | None:
    while error is not None:
        if isinstance(error, LabelBucketError) and not isinstance(error, ray.exceptions.RayError):
            return error
        error = getattr(error, "cause", None) or error.__cause__
    return None
