"""A sign of life of a run's driver, so that a second one of the same run waits instead of doing the same work again.

    _runs/<run_id>/heartbeat.json    overwritten every few seconds while a driver works

Advisory: it decides nothing. Two drivers of one run that both believe to be alone end in the same result, at twice the
cost. Clocks are never compared, because those of two machines differ: alive means that the file changes.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from pipeline import storage
from pipeline.errors import SourceError
from pipeline.storage import Store

INTERVAL_S = 10.0
DEAD_AFTER_S = 30.0
"""A driver that left no sign for so long is taken for dead: three intervals, one slow PUT among them."""
_POLL_S = 1.0

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def beating(output: Store, run_id: str) -> Iterator[None]:
    """Leave signs of life until the block ends, and then one that says so, unless storage took none the last time: in
    an outage that would only make the end of the run later.
    """
    ended = threading.Event()
    is_left = _beat(output, run_id, 0)

    def beat_until_ended() -> None:
        nonlocal is_left
        number = 0
        while not ended.wait(INTERVAL_S):
            number += 1
            is_left = _beat(output, run_id, number)

    thread = threading.Thread(target=beat_until_ended, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(DEAD_AFTER_S)
        if is_left and not thread.is_alive():
            _beat(output, run_id, -1)


def wait_for_other(output: Store, run_id: str, is_over: Callable[[], bool]) -> bool:
    """Wait while another driver of this run is alive; whether the run was over when the waiting ended.

    Returns at once if no other driver left a sign, if the last one said that it ended, or if it was a process of this
    machine that is gone.
    """
    sign = _read(output, run_id)
    seen_at_s = next_line_s = time.monotonic()
    while sign is not None and not _is_gone(sign) and time.monotonic() < seen_at_s + DEAD_AFTER_S:
        if is_over():
            return True
        if time.monotonic() >= next_line_s:
            next_line_s = time.monotonic() + DEAD_AFTER_S
            _log.warning(
                "run %s: waiting for its other driver (%s on %s) to finish it, or to be silent for %d s",
                run_id,
                f"process {sign['pid']}",
                sign["host"],
                DEAD_AFTER_S,
            )
        time.sleep(_POLL_S)
        latest = _read(output, run_id)
        if latest != sign:
            sign, seen_at_s = latest, time.monotonic()
    return is_over()


def _is_gone(sign: dict[str, Any]) -> bool:
    if sign["number"] < 0:
        return True
    if sign["host"] != socket.gethostname():
        return False
    try:
        os.kill(sign["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def _read(output: Store, run_id: str) -> dict[str, Any] | None:
    try:
        sign = json.loads(storage.get_or_none(output, _key(run_id)) or b"null")
        return sign if isinstance(sign, dict) and {"host", "pid", "number"} <= sign.keys() else None
    except (SourceError, ValueError):  # unreadable is as good as none: it is advisory
        return None


def _beat(output: Store, run_id: str, number: int) -> bool:
    """Whether storage took it."""
    sign = {"host": socket.gethostname(), "pid": os.getpid(), "number": number}
    try:
        output.put(_key(run_id), json.dumps(sign).encode())
        return True
    except SourceError as error:
        _log.warning("no sign of life could be left: %s", error)
        return False


def _key(run_id: str) -> str:
    return f"_runs/{run_id}/heartbeat.json"
