"""Fixtures that several test modules share: an S3 server, buckets in it, and the operator's photos."""

import logging
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import cloud_servers
import effort
import pytest
import servers
from cloud_servers import CloudServer
from cluster import Head, running_head
from servers import Fault, S3Server

from pipeline import store_s3


def pytest_configure() -> None:
    """Authenticate everything of Ray in these tests: read by its core when a test module imports it."""
    assert "ray" not in sys.modules, "what this file imports must not import Ray"
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How hard it was tried."""
    terminalreporter.write_line(", ".join(f"{number:,} {what}" for what, number in effort.COUNTS.items()))


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """An S3 server, and the standard variables that lead clients of this process to it."""
    with pytest.MonkeyPatch.context() as patch, servers.serve_s3() as server:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_NO_SIGN_REQUEST", "AWS_ENDPOINT_URL_S3"):
            patch.delenv(name, raising=False)
        for name, value in {**servers.credentials(), "AWS_ENDPOINT_URL": server.url}.items():
            patch.setenv(name, value)
        # A client that was built before has other variables.
        store_s3._build_s3.cache_clear()
        yield server
        store_s3._build_s3.cache_clear()


@pytest.fixture(scope="session")
def gs() -> Iterator[CloudServer]:
    """A server of Google Cloud Storage, and the standard variable that leads to it."""
    yield from _found_by_variables(cloud_servers.serve_gs())


@pytest.fixture(scope="session")
def az() -> Iterator[CloudServer]:
    """A server of Azure Blob Storage, and the standard variable that leads to it."""
    yield from _found_by_variables(cloud_servers.serve_az())


def _found_by_variables(serving: AbstractContextManager[CloudServer]) -> Iterator[CloudServer]:
    with pytest.MonkeyPatch.context() as patch, serving as server:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture(scope="session")
def head(s3: S3Server) -> Iterator[Head]:
    """A Ray head whose workers reach the S3 server through the proxy, with secrets that must be found nowhere."""
    with running_head({**os.environ, **s3.canary_environment()}) as running:
        yield running


@pytest.fixture(scope="module")
def driver(head: Head) -> Iterator[Head]:
    """This process as a driver of the head, which is imported only now: see pytest_configure."""
    import ray

    ray.init(address=head.address, log_to_driver=False, logging_level=logging.ERROR)
    yield head
    ray.shutdown()


@pytest.fixture
def bucket(s3: S3Server) -> str:
    """The s3:// URL of a fresh bucket."""
    return s3.create_bucket()


@pytest.fixture
def faults(s3: S3Server) -> Iterator[list[Fault]]:
    """Faults of the S3 server during a test; each must have fired when it ends."""
    yield s3.faults
    unfired = [fault for fault in s3.faults if not fault.num_hits]
    s3.faults.clear()
    assert not unfired


@pytest.fixture
def weather(s3: S3Server) -> Iterator[S3Server]:
    """The server, whose storm ends with the test."""
    yield s3
    s3.storm = None


@pytest.fixture
def photos_dir() -> Path:
    """The operator's folder of photographs; the test is skipped where there is none."""
    folder = os.environ.get("LABEL_BUCKET_PHOTOS")
    if not folder:
        pytest.skip("LABEL_BUCKET_PHOTOS names no folder of photographs")
    return Path(folder)
