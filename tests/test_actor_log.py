"""What an actor says of itself."""

import logging
import time

import pytest

from pipeline.actor_log import Clock, Warnings


def test_every_second_of_an_actor_is_waited_or_worked_once_though_calls_overlap(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_s = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now_s)
    clock = Clock()
    long, short, last = clock.call(), clock.call(), clock.call()
    now_s = 102.0
    of_long = long.__enter__()
    now_s = 105.0
    of_short = short.__enter__()
    now_s = 106.0
    short.__exit__(None, None, None)
    now_s = 110.0
    long.__exit__(None, None, None)
    now_s = 111.0
    of_last = last.__enter__()
    now_s = 114.0
    last.__exit__(None, None, None)
    assert [(each.wait_s, each.busy_s) for each in (of_long, of_short, of_last)] == [(2, 4), (0, 4), (1, 3)]


def test_a_call_that_fails_counts_as_work() -> None:
    clock = Clock()
    with pytest.raises(ValueError, match="broken"), clock.call() as failed:
        raise ValueError("broken")
    with clock.call() as following:
        pass
    assert failed.busy_s > 0
    assert following.wait_s > 0, "no call was under way"


def test_a_warning_is_told_once_with_the_node_that_said_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.node", lambda: "node-7")
    warnings = Warnings()
    logger = logging.getLogger("test_actor_log")
    logger.addHandler(warnings)
    try:
        logger.warning("going on with %d", 8)
        logger.info("not this")
    finally:
        logger.removeHandler(warnings)
    assert warnings.take() == ["node-7: going on with 8"]
    assert warnings.take() == []
