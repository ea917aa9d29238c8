"""How far planning and publishing are: a log line per interval, none for work that is done before the first.

A module of its own because both phases say it in the same words, and neither knows of images.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

LOG_INTERVAL_S = 10.0
"""Between two lines of a job's log."""

_T = TypeVar("_T")
_log = logging.getLogger(__name__)


def metered(
    items: Iterable[_T], what: str, total: int, *, clock_s: Callable[[], float] = time.monotonic
) -> Iterator[_T]:
    """`items` as they come, with lines such as `planning ranges: 120 of 5,000, ETA 0:04:12`."""
    started_s = clock_s()
    next_line_s = started_s + LOG_INTERVAL_S
    for number, item in enumerate(items, start=1):
        yield item
        now_s = clock_s()
        if now_s >= next_line_s and number < total:
            next_line_s = now_s + LOG_INTERVAL_S
            left_s = (now_s - started_s) / number * (total - number)
            _log.info("%s: %s of %s, ETA %s", what, f"{number:,}", f"{total:,}", clock_text(left_s))


def clock_text(seconds: float) -> str:
    """`1:02:03`."""
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"
