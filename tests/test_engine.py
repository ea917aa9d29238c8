"""How drivers connect."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from cluster import ROOT, Head

from pipeline import engine

# 192.0.2.0/24 is for documentation; here it is an address of the namespace.
ON_ANOTHER_ADDRESS = """
ip link set lo up
ip address add 192.0.2.1/32 dev lo
ray start --head --num-cpus=1 --node-ip-address=192.0.2.1 --port=6399 --include-dashboard=false --temp-dir="$TEMP_DIR" \
    --disable-usage-stats >"$TEMP_DIR/log" 2>&1 || { cat "$TEMP_DIR/log"; exit 1; }
export RAY_ADDRESS=192.0.2.1:6399
code='import logging; logging.basicConfig(format="%(message)s"); from pipeline import engine; engine.start()'
python -c "$code"
RAY_AUTH_MODE=token RAY_AUTH_TOKEN=0123456789abcdef0123456789abcdef python -c "$code"
"""
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
def test_a_cluster_elsewhere_is_not_on_this_machine_alone(address: str) -> None:
    assert not engine._is_on_this_machine_alone(address)


@pytest.mark.parametrize("address", ["127.0.0.1:6379", "127.0.0.2:6379", "[::1]:6379", "localhost:6379"])
def test_a_cluster_at_a_loopback_address_is(address: str) -> None:
    assert engine._is_on_this_machine_alone(address)


def test_a_cluster_with_a_token_lets_in_nobody_without_one(head: Head) -> None:
    assert not engine._lets_in_without_token(head.address, {})


def test_where_a_cluster_does_not_say_it_is_open_if_it_let_in_a_client_without_a_token() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    assert engine._lets_in_without_token(address, {})
    assert engine._lets_in_without_token(address, {"RAY_AUTH_MODE": "disabled"})
    assert not engine._lets_in_without_token(address, {"RAY_AUTH_MODE": "token"})


@pytest.mark.slow
def test_a_job_on_a_cluster_elsewhere_that_asks_for_no_token_says_so_in_one_line_though_it_has_one() -> None:
    if not (shutil.which("unshare") and shutil.which("ip")):
        pytest.skip("without unshare and ip there is no address that is not this machine's")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}", "PYTHONPATH": str(ROOT)}
    command = ["unshare", "-rnpf", "--mount-proc", "--kill-child", "sh", "-ec", ON_ANOTHER_ADDRESS]
    with tempfile.TemporaryDirectory(dir="/tmp") as short:  # the engine's sockets are below it
        # Where there is a token in the home, the head asks for it.
        environment |= {"TEMP_DIR": short, "HOME": short}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if "Operation not permitted" in done.stderr:
        pytest.skip("no network namespaces for this user")
    assert done.returncode == 0, done.stdout + done.stderr
    warnings = [line for line in done.stderr.splitlines() if "CVE-2023-48022" in line]  # Ray has more to say
    without, with_token = warnings
    assert without == with_token
    assert "192.0.2.1:6399 asks for no token" in without
    assert "RAY_AUTH_MODE=token" in without


@pytest.mark.slow
def test_worker_processes_live_on_between_two_units_though_there_are_more_than_cpus() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {"RAY_OVERRIDE_RESOURCES": json.dumps({"CPU": 1}), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", TWICE_MORE_TASKS_THAN_CPUS]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    before, after = json.loads(output.splitlines()[-1])
    assert len(before) > 1
    assert after == before
