"""A Ray task per item, a bounded number at once, results in order.

A module of its own because planning and publishing both have a task per key range, and the driver must not hold one for
each of 5,000 ranges: what Ray keeps of a task, arguments and lineage, is 12 kB until its result is dropped.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import ray

FILE_TASK: dict[str, Any] = {"num_cpus": 0.5, "memory": 3 << 28, "max_retries": 3}
"""What a task that writes or checks one file reserves; 532 to 549 MB were its peak with vectors of 384."""

MAX_IN_FLIGHT = 1024
"""Two tasks for each of 512 cores: 12 MB in the driver."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def in_order(start: "Callable[[_Item], ray.ObjectRef[_Result]]", items: Iterable[_Item]) -> Iterator[_Result]:
    """What the tasks give that `start` begins for every item, in order of the items. Raises what a task raised."""
    waiting: deque[ray.ObjectRef[_Result]] = deque()
    for item in items:
        waiting.append(start(item))
        if len(waiting) == MAX_IN_FLIGHT:
            yield ray.get(waiting.popleft())
    while waiting:
        yield ray.get(waiting.popleft())
