"""How drivers connect."""

import json
import os
import subprocess
import sys

import pytest
from cluster import ROOT

from pipeline import engine

TWICE_MORE_TASKS_THAN_CPUS = """
import json, os, time
import ray
from pipeline import engine

engine.start()

@ray.remote(num_cpus=0.1)
def process() -> int:
    time.sleep(1)
    return os.getpid()

rounds = [sorted(set(ray.get([process.remote() for _ in range(6)])))]
time.sleep(6)  # of idleness, which is what it is about
rounds.append([pid for pid in rounds[0] if os.path.exists(f"/proc/{pid}")])
print(json.dumps(rounds))
"""


@pytest.mark.parametrize("address", ["10.0.0.7:6379", "head.ray.svc:6379", "[2001:db8::1]:6379"])
def test_a_cluster_that_asks_for_no_token_is_warned_of(address: str) -> None:
    warning = engine._warning_of_an_open_cluster(address, {})
    assert warning is not None
    assert address in warning
    assert "RAY_AUTH_MODE=token" in warning
    assert len(warning.splitlines()) == 1
    assert engine._warning_of_an_open_cluster(address, {"RAY_AUTH_MODE": "disabled"}) == warning
    assert engine._warning_of_an_open_cluster(address, {"RAY_AUTH_MODE": "token"}) is None


@pytest.mark.parametrize("address", ["127.0.0.1:6379", "[::1]:6379", "localhost:6379"])
def test_a_cluster_on_this_machine_alone_is_not(address: str) -> None:
    assert engine._warning_of_an_open_cluster(address, {}) is None


@pytest.mark.slow
def test_worker_processes_live_on_between_two_units_though_there_are_more_than_cpus() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {"RAY_OVERRIDE_RESOURCES": json.dumps({"CPU": 1}), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", TWICE_MORE_TASKS_THAN_CPUS]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    before, after = json.loads(output.splitlines()[-1])
    assert len(before) > 1
    assert after == before
