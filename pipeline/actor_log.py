"""What an actor says of itself with each unit that it returns: how long it waited and worked, and its warnings.

A module of its own because it knows neither of the engine nor of images.
"""

import logging
import platform
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass


@dataclass
class Timings:
    """What one call adds to the time of its actor: waiting without any call before it, and work that no other call has
    been given yet."""

    wait_s: float = 0
    busy_s: float = 0


class Clock:
    """The time of an actor, of which every second is in the timings of one call, though calls overlap."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_calls = 0
        self._counted_until_s = time.perf_counter()

    @contextmanager
    def call(self) -> Iterator[Timings]:
        """Around a call; complete after it."""
        timings = Timings()
        with self._lock:
            if self._num_calls == 0:
                timings.wait_s = self._lap_s()
            self._num_calls += 1
        try:
            yield timings
        finally:
            with self._lock:
                self._num_calls -= 1
                timings.busy_s = self._lap_s()

    def _lap_s(self) -> float:
        before_s, self._counted_until_s = self._counted_until_s, time.perf_counter()
        return self._counted_until_s - before_s


class Warnings(logging.Handler):
    """Warnings of this process, kept for the driver: what workers print stays on their nodes."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._texts = queue.SimpleQueue[str]()

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it, with the node's name."""
        self._texts.put(f"{platform.node()}: {record.getMessage()}")

    def take(self) -> list[str]:
        """Those since the last call."""
        texts = []
        with suppress(queue.Empty):
            while True:
                texts.append(self._texts.get_nowait())
        return texts
