"""A task per item: all of them, in order, so many at once."""

import logging
from collections.abc import Iterator

import pytest
import ray
from cluster import Head

from pipeline import tasks


@pytest.fixture
def _driver(head: Head) -> Iterator[None]:
    ray.init(address=head.address, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()


@pytest.mark.usefixtures("_driver")
@pytest.mark.parametrize("num_items", [0, 1, 3, 10])
def test_results_come_in_order_and_no_more_tasks_are_begun_than_wait(
    num_items: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "MAX_IN_FLIGHT", 3)
    begun: list[int] = []

    def start(number: int) -> "ray.ObjectRef[int]":
        begun.append(number)
        return ray.put(number * number)

    for place, found in enumerate(tasks.in_order(start, range(num_items))):
        assert found == place * place
        assert len(begun) <= place + 3
    assert begun == list(range(num_items))
