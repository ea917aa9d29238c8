"""A real S3 server for the tests, and a small proxy in front of it that can spoil answers.

moto runs in its own process; the proxy runs in threads of this one, forwards everything unchanged, and applies the
faults that a test asked for. Clients of this process always talk through the proxy, so one endpoint is valid for a
session.
"""

import http.client
import math
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

import boto3

_CODES = {
    400: "InvalidRequest",
    403: "AccessDenied",
    404: "NoSuchKey",
    409: "ConditionalRequestConflict",
    500: "InternalError",
    503: "SlowDown",
}
_HOP_BY_HOP = frozenset({"connection", "expect", "keep-alive", "transfer-encoding"})


@dataclass
class Fault:
    """What happens to the first `times` requests of this method whose path, unquoted, ends with `key`.

    A number is answered instead of forwarding. `slow` forwards after 50 ms, `stall` after 3 s. `reset` closes the
    connection before forwarding, `answer_lost` after it. `cut` sends half of the body, `short` all but one byte of it
    with a matching length, `flip` all of it with one bit changed, `swapped` as many other bytes.
    `unconditional` forwards without conditions, as a store that ignores them.
    """

    kind: int | Literal["slow", "stall", "reset", "answer_lost", "cut", "short", "flip", "swapped", "unconditional"]
    method: str
    key: str
    times: float = 1
    num_hits: int = 0

    @classmethod
    def always(cls, kind: Any, method: str, key: str) -> "Fault":
        """The fault that does not go away."""
        return cls(kind, method, key, math.inf)


@dataclass
class S3Server:
    """A running server. Requests are kept as (method, unquoted path with its query)."""

    url: str
    """Through the proxy: the endpoint of clients in this process."""
    direct_url: str
    """moto itself: the endpoint for other processes that want no faults."""
    client: Any
    """A boto3 client of moto itself."""
    faults: list[Fault]
    requests: list[tuple[str, str]]
    agents: list[tuple[str, str]]
    """Of each request: its unquoted path with its query, and what the client calls itself."""
    max_in_flight: int = 0
    """The most requests that were in the proxy at once; a test may set it back."""

    def environment(self) -> dict[str, str]:
        """The standard variables that lead a client of another process to moto itself."""
        return {**credentials(), "AWS_ENDPOINT_URL": self.direct_url}

    def create_bucket(self) -> str:
        """The s3:// URL of a new bucket."""
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        self.client.create_bucket(Bucket=name)
        return f"s3://{name}"

    def num_requests(self, method: str, key: str) -> int:
        """Requests so far of this method whose path ends with `key`."""
        return sum(each == method and path.partition("?")[0].endswith(key) for each, path in self.requests)


def credentials() -> dict[str, str]:
    """Variables that make botocore use these keys and look nowhere else."""
    return {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@contextmanager
def serve_s3() -> Iterator[S3Server]:
    """moto behind the proxy, until the block ends."""
    with _moto() as direct_url:
        client = boto3.client(
            "s3",
            endpoint_url=direct_url,
            region_name="us-east-1",
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )
        with _proxy(S3Server("", direct_url, client, [], [], [])) as server:
            yield server
        client.close()


@contextmanager
def _moto() -> Iterator[str]:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(600):
            assert process.poll() is None, f"the S3 server ended with code {process.returncode}"
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


class _InFlight:
    """Counts the requests inside its `with`."""

    def __init__(self, s3: S3Server) -> None:
        self._s3, self._num, self._lock = s3, 0, threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            self._num += 1
            self._s3.max_in_flight = max(self._s3.max_in_flight, self._num)

    def __exit__(self, *args: object) -> None:
        with self._lock:
            self._num -= 1


@contextmanager
def _proxy(s3: S3Server) -> Iterator[S3Server]:
    lock = threading.Lock()
    in_flight = _InFlight(s3)
    upstream = urlsplit(s3.direct_url).netloc

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *args: Any) -> None:
            """Quiet."""

        def handle_any(self) -> None:
            self._answer()

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            kind = self._fault()
            if kind in ("slow", "stall"):
                with in_flight:  # until the answer begins: a quick client asks again before this thread has ended
                    time.sleep(0.05 if kind == "slow" else 3)
            if isinstance(kind, int):
                self._send(kind, {}, f"<Error><Code>{_CODES[kind]}</Code><Message>as asked</Message></Error>".encode())
                return
            if kind == "reset":
                self._reset()
                return
            if kind == "unconditional":
                del self.headers["If-None-Match"], self.headers["If-Match"]
            status, headers, data = self._forward(body)
            if kind == "answer_lost":
                self._reset()
            elif kind == "cut":
                self._send(status, headers, data, num_sent=len(data) // 2)
                self._reset()
            elif kind == "short":
                self._send(status, headers, data[:-1])
            elif kind == "flip":
                self._send(status, headers, bytes([data[0] ^ 1]) + data[1:])
            elif kind == "swapped":
                self._send(status, headers, bytes(len(data)))
            else:
                self._send(status, headers, data)

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_any  # noqa: N815

        def _fault(self) -> Any:
            path = unquote(self.path)
            with lock:
                s3.requests.append((self.command, path))
                s3.agents.append((path, self.headers.get("User-Agent", "")))
                for fault in s3.faults:
                    is_meant = fault.method == self.command and path.partition("?")[0].endswith(fault.key)
                    if is_meant and fault.num_hits < fault.times:
                        fault.num_hits += 1
                        return fault.kind
            return None

        def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
            connection = http.client.HTTPConnection(upstream, timeout=30)
            try:
                connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    if name.lower() not in _HOP_BY_HOP:
                        connection.putheader(name, value)
                connection.endheaders(body)
                response = connection.getresponse()
                return response.status, dict(response.getheaders()), response.read()
            finally:
                connection.close()

        def _send(self, status: int, headers: dict[str, str], data: bytes, num_sent: int | None = None) -> None:
            self.send_response_only(status)
            for name, value in headers.items():
                if name.lower() not in _HOP_BY_HOP and (name.lower() != "content-length" or self.command == "HEAD"):
                    self.send_header(name, value)
            if self.command != "HEAD":
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[:num_sent])

        def _reset(self) -> None:
            # A linger time of zero makes close() send RST.
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        s3.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield s3
        finally:
            server.shutdown()
            thread.join()
