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
    items: Iterable[_T],
    what: str,
    total: int | None,
    *,
    size: Callable[[_T], int] = lambda _: 1,
    clock_s: Callable[[], float] = time.monotonic,
) -> Iterator[_T]:
    """`items` as they come, with lines such as `planning ranges: 120 of 5,000, ETA 0:04:12`.

    `size` says how many of what is counted an item stands for; without a `total` a line says only how many there were.
    """
    started_s = clock_s()
    next_line_s = started_s + LOG_INTERVAL_S
    number = 0
    for item in items:
        yield item
        number += size(item)
        now_s = clock_s()
        if now_s < next_line_s or (total is not None and number >= total):
            continue
        next_line_s = now_s + LOG_INTERVAL_S
        if total is None:
            _log.info("%s: %s so far", what, f"{number:,}")
        elif number:
            left_s = (now_s - started_s) / number * (total - number)
            _log.info("%s: %s of %s, ETA %s", what, f"{number:,}", f"{total:,}", clock_text(left_s))


def clock_text(seconds: float) -> str:
    """`1:02:03`."""
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"
