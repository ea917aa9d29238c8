"""Servers that speak Google's and Azure's protocols, where they are installed: `fake-gcs-server` and `azurite-blob`.

A test that asks for one that is not on the PATH, or whose client (gcsfs, adlfs) is missing, is skipped and says so.
"""

import base64
import importlib.util
import os
import secrets
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

_START_DEADLINE_S = 60


@dataclass(frozen=True)
class CloudServer:
    """A running server, and how to write to it without the code under test."""

    scheme: str
    environment: dict[str, str]
    """The standard variables that lead clients to it."""
    create_bucket: Callable[[str], None]
    write: Callable[[str, str, bytes], None]
    """Bucket, key, content."""
    delete: Callable[[str, str], None]


@contextmanager
def serve_gs() -> Iterator[CloudServer]:
    """A server of Google Cloud Storage's JSON API, in memory, until the block ends."""
    program = _program("fake-gcs-server", "gcsfs")
    port = _free_port()
    url = f"http://127.0.0.1:{port}"

    def ask(method: str, path: str, data: bytes | None = None) -> None:
        headers = {"Content-Type": "application/octet-stream"}
        urllib.request.urlopen(urllib.request.Request(url + path, data, headers, method=method)).close()

    def quoted(key: str) -> str:
        return urllib.parse.quote(key, safe="")

    command = [program, "-backend", "memory", "-scheme", "http", "-host", "127.0.0.1", "-port", str(port)]
    with _running([*command, "-public-host", f"127.0.0.1:{port}", "-log-level", "error"], port, {}):
        yield CloudServer(
            "gs",
            {"STORAGE_EMULATOR_HOST": url, "NO_GCE_CHECK": "true"},  # else each client looks for a machine's identity
            lambda bucket: ask("POST", "/storage/v1/b?project=test", b'{"name": "%s"}' % bucket.encode()),
            lambda bucket, key, data: ask(
                "POST", f"/upload/storage/v1/b/{bucket}/o?uploadType=media&name={quoted(key)}", data
            ),
            lambda bucket, key: ask("DELETE", f"/storage/v1/b/{bucket}/o/{quoted(key)}"),
        )


@contextmanager
def serve_az() -> Iterator[CloudServer]:
    """A server of Azure Blob Storage's protocol, in memory, until the block ends."""
    program = _program("azurite-blob", "adlfs")
    from azure.storage.blob import BlobServiceClient

    port, key = _free_port(), base64.b64encode(secrets.token_bytes(32)).decode()
    url = f"http://127.0.0.1:{port}/test"
    connection = f"DefaultEndpointsProtocol=http;AccountName=test;AccountKey={key};BlobEndpoint={url};"

    def write(bucket: str, name: str, data: bytes) -> None:
        client.get_blob_client(bucket, name).upload_blob(data, overwrite=True)

    command = [program, "--inMemoryPersistence", "--skipApiVersionCheck", "--silent", "--disableTelemetry"]
    with (
        _running(
            [*command, "--blobHost", "127.0.0.1", "--blobPort", str(port)], port, {"AZURITE_ACCOUNTS": f"test:{key}"}
        ),
        BlobServiceClient.from_connection_string(connection) as client,
    ):
        yield CloudServer(
            "az",
            {"AZURE_STORAGE_CONNECTION_STRING": connection},
            lambda bucket: client.create_container(bucket).close(),
            write,
            lambda bucket, name: client.get_blob_client(bucket, name).delete_blob(),
        )


def _program(name: str, package: str) -> str:
    program = shutil.which(name)
    if program is None or importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {name} on the PATH, and the package {package}")
    return program


def _free_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return int(unused.getsockname()[1])


@contextmanager
def _running(command: list[str], port: int, environment: dict[str, str]) -> Iterator[None]:
    process = subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + _START_DEADLINE_S
        while True:
            assert process.poll() is None, f"{command[0]} ended with code {process.returncode}"
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert time.monotonic() < deadline, f"{command[0]} did not answer within {_START_DEADLINE_S} s"
                time.sleep(0.1)
        yield
    finally:
        process.terminate()
        process.wait()
