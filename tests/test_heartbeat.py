"""A sign of life: who is waited for, and who is not."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from cluster import wait_until
from servers import Fault

from pipeline import heartbeat, storage
from pipeline.storage import Store

KEY = "_runs/run/heartbeat.json"


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(heartbeat, "INTERVAL_S", 0.2)
    monkeypatch.setattr(heartbeat, "DEAD_AFTER_S", 2.5)
    monkeypatch.setattr(heartbeat, "_POLL_S", 0.05)
    return storage.connect(str(tmp_path))


def sign(output: Store) -> dict[str, object]:
    found: dict[str, object] = json.loads(output.get(KEY))
    return found


def never() -> bool:
    return False


def waited_s(output: Store) -> float:
    started_s = time.monotonic()
    assert not heartbeat.wait_for_other(output, "run", never)
    return time.monotonic() - started_s


def leave_sign(output: Store, *, host: str = "elsewhere", pid: int = 1, number: int = 3) -> None:
    output.put(KEY, json.dumps({"host": host, "pid": pid, "number": number}).encode())


def test_signs_are_left_until_the_work_ends_and_the_last_one_says_so(output: Store) -> None:
    with heartbeat.beating(output, "run"):
        first = sign(output)
        wait_until(lambda: sign(output) != first, deadline_s=10)
    assert sign(output)["number"] == -1
    assert waited_s(output) < 0.5


def test_where_storage_took_no_sign_none_is_tried_at_the_end(bucket: str, faults: list[Fault]) -> None:
    faults.append(refused := Fault.always(403, "PUT", "/heartbeat.json"))
    with heartbeat.beating(storage.connect(f"{bucket}/out"), "run"):
        pass
    assert refused.num_hits == 1


@pytest.mark.parametrize("content", [None, b"", b"no json", b"[]", b'{"host": "a"}'])
def test_without_a_sign_that_can_be_read_nobody_is_waited_for(output: Store, content: bytes | None) -> None:
    if content is not None:
        output.put(KEY, content)
    assert waited_s(output) < 0.5


def test_a_process_of_this_machine_that_is_gone_is_not_waited_for(output: Store) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    leave_sign(output, host=os.uname().nodename, pid=ended.pid)
    assert waited_s(output) < 0.5


@pytest.mark.parametrize("host", ["elsewhere", os.uname().nodename])
def test_a_driver_that_stays_silent_is_taken_for_dead(output: Store, host: str) -> None:
    leave_sign(output, host=host, pid=os.getpid())
    assert 2.4 < waited_s(output) < 10


def test_a_driver_is_waited_for_as_long_as_its_signs_change_whatever_its_clock_says(output: Store) -> None:
    ended = threading.Event()

    def live() -> None:
        for number in range(14):  # longer than DEAD_AFTER_S, each sign within it
            leave_sign(output, number=number)
            time.sleep(0.25)
        ended.set()

    thread = threading.Thread(target=live)
    thread.start()
    wait_until(lambda: storage.get_or_none(output, KEY) is not None, deadline_s=10)
    assert heartbeat.wait_for_other(output, "run", ended.is_set)
    assert ended.is_set()
    thread.join()
