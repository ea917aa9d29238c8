"""A real S3 server for the tests, and a small proxy in front of it that can spoil answers.

It is moto in a process of its own, or the server that TEST_S3_URL names, with the AWS_* keys of the
environment: their secret is then the one that must be found nowhere. The proxy runs in threads of this process,
forwards everything unchanged, and applies the faults that a test asked for: chosen ones (`Fault`) or a storm of them
(`Storm`). Clients of this process and of the session's Ray head always talk through it, so one endpoint is valid for a
session. It changes no `Host`, so what clients sign holds behind it, too.
"""

import contextlib
import http.client
import math
import os
import random
import re
import secrets
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

import boto3
import effort
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.credentials import Credentials

_CODES = {
    400: "InvalidRequest",
    403: "AccessDenied",
    404: "NoSuchKey",
    409: "ConditionalRequestConflict",
    429: "TooManyRequests",
    500: "InternalError",
    501: "NotImplemented",
    503: "SlowDown",
}
S3_URL = "TEST_S3_URL"
"""The variable that names another server than moto."""
_HOP_BY_HOP = frozenset({"connection", "expect", "keep-alive", "transfer-encoding"})
_MAX_HANG_S = 60.0

Kind = (
    int
    | Literal["slow", "stall", "hang", "drip"]
    | Literal["reset", "answer_lost", "done_then_500", "twin"]
    | Literal["cut", "cut_fin", "short", "flip", "swapped", "exchanged"]
    | Literal["slow_down_html", "expired_token", "error_in_200"]
    | Literal["repeated_page", "dropped_token", "stale_page"]
    | Literal["unconditional"]
)
"""What a fault does. A number is answered instead of forwarding, and so are `slow_down_html` (503 from a load
balancer), `expired_token` (400) and `error_in_200`.

`slow` forwards after 50 ms, `stall` after 3 s, `hang` never answers, `drip` sends the body a byte every 100 ms.
`reset` closes the connection before forwarding; `answer_lost` after it; `done_then_500` forwards and says that it
failed; `twin` forwards twice and gives the second answer, as if another process had won a race.
`cut` sends half of the body and RST, `cut_fin` the same and FIN, `short` all but one byte of it with a matching length,
`flip` all of it with one bit changed, `swapped` as many other bytes, `exchanged` the body of the object read before.
Of a listing, `repeated_page` is the first page where another was asked for, `dropped_token` says that more follows but
not where, `stale_page` lacks its last object. `unconditional` forwards without conditions, which some stores ignore.
"""
LATENCY = frozenset({"slow", "stall"})
"""Kinds that no client has to notice."""


@dataclass
class Fault:
    """What happens to the first `times` requests of this method (or `any`) whose path, unquoted, ends with `key`."""

    kind: Kind
    method: str
    key: str
    times: float = 1
    num_hits: int = 0

    @classmethod
    def always(cls, kind: Any, method: str, key: str) -> "Fault":
        """The fault that does not go away."""
        return cls(kind, method, key, math.inf)


@dataclass
class Storm:
    """Faults at random. Whether a request meets one depends on `seed`, its operation, its path and how often that was
    asked for; which one, on which kinds fired least, so that all of them do.
    """

    seed: int
    kinds: Mapping[str, Sequence[Kind]]
    """Of each operation: GET, LIST, PUT, DELETE."""
    probability: Mapping[str, float]
    path: re.Pattern[str] = field(default_factory=lambda: re.compile(""))
    """Only requests whose unquoted path, without the query, has a match for this."""
    max_per_path: int = 2
    """Faults of one operation on one path: more in a row would rightly become a row of failures/, or end a run."""
    max_lists: int | None = None
    """The same of listings, whose path is that of the bucket."""
    num_hits: Counter[tuple[str, Kind]] = field(default_factory=Counter)
    """By operation and kind."""
    _asked: Counter[tuple[str, str]] = field(default_factory=Counter)
    _met: Counter[tuple[str, str]] = field(default_factory=Counter)

    def num_met(self, operation: str, prefix: str) -> int:
        """Faults of an operation on paths that begin with `prefix`."""
        return sum(
            number for (each, path), number in self._met.items() if each == operation and path.startswith(prefix)
        )

    def choose(self, operation: str, path: str, *, is_first_page: bool = False) -> Kind | None:
        """The fault of this request, if it meets one that changes its answer."""
        place = (operation, path)
        kinds = [each for each in self.kinds.get(operation, ()) if each != "repeated_page" or not is_first_page]
        most = self.max_per_path if self.max_lists is None or operation != "LIST" else self.max_lists
        if not kinds or not self.path.search(path) or self._met[place] >= most:
            return None
        self._asked[place] += 1
        within_bucket = path.removeprefix("/").partition("/")[2]  # buckets have random names
        rng = random.Random(f"{self.seed} {operation} {within_bucket} {self._asked[place]}")
        if rng.random() >= self.probability[operation]:
            return None
        self._met[place] += 1
        kind = min(kinds, key=lambda each: (self.num_hits[operation, each], rng.random()))
        self.num_hits[operation, kind] += 1
        return kind


@dataclass
class S3Server:
    """A running server. Requests are kept as (method, unquoted path with its query)."""

    url: str
    """Through the proxy: the endpoint of clients in this process."""
    direct_url: str
    """The server itself: the endpoint for other processes that want no faults."""
    client: Any
    """A boto3 client of the server itself."""
    faults: list[Fault]
    requests: list[tuple[str, str]]
    agents: list[tuple[str, str]]
    """Of each request: its unquoted path with its query, and what the client calls itself."""
    max_in_flight: int = 0
    """The most requests that were in the proxy at once; a test may set it back."""
    storm: Storm | None = None
    last_body: bytes = b""
    """What was answered last."""
    creating: threading.Lock = field(default_factory=threading.Lock)
    """Held while an object is created: moto looks and then writes, S3 does both in one step."""
    secrets: tuple[str, ...] = field(
        default_factory=lambda: (f"canary-{secrets.token_hex(16)}", f"canary-{secrets.token_hex(16)}")
    )
    """The secret key and the session token of the session's Ray head, if it has one: they must be found nowhere."""
    buckets: list[str] = field(default_factory=list)
    """Made here, with names that nobody else has; removed in the end."""

    def environment(self) -> dict[str, str]:
        """The standard variables that lead a client of another process to the server itself."""
        return {**credentials(), "AWS_ENDPOINT_URL": self.direct_url}

    def canary_environment(self) -> dict[str, str]:
        """The same through the proxy, with the secrets that must be found nowhere."""
        canaries = zip(("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"), self.secrets, strict=False)
        return {**credentials(), "AWS_ENDPOINT_URL": self.url, **dict(canaries)}

    def create_bucket(self, name: str = "bucket") -> str:
        """The s3:// URL of a new bucket whose name begins with this one."""
        name = f"{name}-{uuid.uuid4().hex[:12]}"
        self.client.create_bucket(Bucket=name)
        self.buckets.append(name)
        return f"s3://{name}"

    def remove_buckets(self) -> None:
        """Those that were made here, with what is in them."""
        for bucket in self.buckets:
            for page in self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
                for item in page.get("Contents", []):
                    self.client.delete_object(Bucket=bucket, Key=item["Key"])
            for upload in self.client.list_multipart_uploads(Bucket=bucket).get("Uploads", []):
                self.client.abort_multipart_upload(Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])
            self.client.delete_bucket(Bucket=bucket)

    def num_requests(self, method: str, key: str) -> int:
        """Requests so far of this method whose path ends with `key`."""
        return sum(each == method and path.partition("?")[0].endswith(key) for each, path in self.requests)


def credentials() -> dict[str, str]:
    """Variables that make botocore use these keys and look nowhere else."""
    given = os.environ if S3_URL in os.environ else {}
    return {
        "AWS_ACCESS_KEY_ID": given.get("AWS_ACCESS_KEY_ID", "test"),
        "AWS_SECRET_ACCESS_KEY": given.get("AWS_SECRET_ACCESS_KEY", "test"),
        "AWS_DEFAULT_REGION": given.get("AWS_DEFAULT_REGION", "us-east-1"),
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def connect(endpoint_url: str) -> Any:
    """A boto3 client of an endpoint, with the keys of `credentials`."""
    keys = credentials()
    return boto3.client(
        "s3",
        endpoint_url=endpoint_url,
        region_name=keys["AWS_DEFAULT_REGION"],
        aws_access_key_id=keys["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=keys["AWS_SECRET_ACCESS_KEY"],
        config=Config(signature_version="s3v4", s3={"addressing_style": "path"}),
    )


def put_quickly(s3: S3Server, bucket: str, files: Mapping[str, bytes]) -> None:
    """Many objects at once, by URLs that are signed: boto3 takes longer for a request than the server."""

    def put(item: tuple[str, bytes]) -> None:
        url = s3.client.generate_presigned_url("put_object", Params={"Bucket": bucket, "Key": item[0]})
        headers = {"Content-Type": "application/octet-stream"}
        urllib.request.urlopen(urllib.request.Request(url, item[1], headers, method="PUT")).close()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(put, files.items()))


@contextmanager
def serve_s3() -> Iterator[S3Server]:
    """The server that TEST_S3_URL names, or moto, behind the proxy, until the block ends."""
    foreign_url = os.environ.get(S3_URL)
    with contextlib.nullcontext(foreign_url) if foreign_url else _moto() as direct_url:
        client = connect(direct_url)
        with _proxy(S3Server("", direct_url, client, [], [], [])) as server:
            if not foreign_url:
                yield server
            else:
                server.secrets = (credentials()["AWS_SECRET_ACCESS_KEY"],)
                try:
                    yield server
                finally:
                    server.remove_buckets()
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


def _error(status: int, code: str = "") -> bytes:
    return f"<Error><Code>{code or _CODES[status]}</Code><Message>as asked</Message></Error>".encode()


def _refusal(kind: Any) -> tuple[int, dict[str, str], bytes] | None:
    """Status, headers and body of an answer that needs no store."""
    if isinstance(kind, int):
        return kind, {}, _error(kind)
    if kind == "slow_down_html":
        return 503, {"Content-Type": "text/html"}, b"<html><body><h1>503 Service Unavailable</h1></body></html>"
    if kind == "expired_token":
        return 400, {}, _error(400, "ExpiredToken")
    if kind == "error_in_200":
        return 200, {"Content-Type": "application/xml"}, b'<?xml version="1.0" encoding="UTF-8"?>\n' + _error(500)
    return None


def _without(data: bytes, pattern: bytes) -> bytes:
    changed, number = re.subn(pattern, b"", data, count=1)
    assert number, f"the fault found nothing to take away with {pattern!r}"
    return changed


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def shutdown_request(self, request: Any) -> None:
        """Without a FIN before it, which would be all that a client sees of a reset."""
        self.close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a killed client is no news
            super().handle_error(request, client_address)


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
    upstream = urlsplit(s3.direct_url)
    connection_class = http.client.HTTPSConnection if upstream.scheme == "https" else http.client.HTTPConnection

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
            if kind in LATENCY:
                with in_flight:  # until the answer begins: a quick client asks again before this thread has ended
                    time.sleep(0.05 if kind == "slow" else 3)
            if kind == "reset":
                self._reset()
            elif kind == "hang":
                self._wait_for_the_client_to_give_up()
            elif refusal := _refusal(kind):
                self._send(*refusal)
            else:
                self._answer_with(kind, *self._forward(body, kind))

        def _answer_with(self, kind: Any, status: int, headers: dict[str, str], data: bytes) -> None:
            if kind == "answer_lost":
                self._reset()
            elif kind == "done_then_500":
                self._send(500, {}, _error(500))
            elif kind in ("cut", "cut_fin"):
                self._send(status, headers, data, num_sent=len(data) // 2)
                self.close_connection = True
                if kind == "cut":
                    self._reset()
            elif kind == "drip":
                self._drip(status, headers, data)
            elif kind == "short":
                self._send(status, headers, data[:-1])
            elif kind == "flip":
                self._send(status, headers, bytes([data[0] ^ 1]) + data[1:])
            elif kind == "swapped":
                self._send(status, headers, bytes(len(data)))
            elif kind == "exchanged":
                self._send(status, headers, s3.last_body or bytes(len(data)))
            elif kind == "dropped_token":
                self._send(status, headers, _without(data, rb"<NextContinuationToken>.*?</NextContinuationToken>"))
            elif kind == "stale_page":
                self._send(status, headers, _without(data, rb"(?s)<Contents>(?!.*<Contents>).*?</Contents>"))
            else:
                self._send(status, headers, data)
                s3.last_body = data

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_any  # noqa: N815

        def _fault(self) -> Any:
            path, _, query = unquote(self.path).partition("?")
            with lock:
                s3.requests.append((self.command, unquote(self.path)))
                s3.agents.append((unquote(self.path), self.headers.get("User-Agent", "")))
                kind = self._chosen_fault(path)
                if kind is None and s3.storm is not None:
                    operation = "LIST" if "list-type=2" in query else self.command
                    kind = s3.storm.choose(operation, path, is_first_page="continuation-token=" not in query)
                if kind is not None and kind not in LATENCY:
                    effort.COUNTS["faults injected"] += 1
            return kind

        def _chosen_fault(self, path: str) -> Any:
            for fault in s3.faults:
                is_meant = fault.method in (self.command, "any") and path.endswith(fault.key)
                if is_meant and fault.num_hits < fault.times:
                    fault.num_hits += 1
                    return fault.kind
            return None

        def _forward(self, body: bytes, kind: Any) -> tuple[int, dict[str, str], bytes]:
            path = self.path
            if kind == "unconditional":
                del self.headers["If-None-Match"], self.headers["If-Match"]
            elif kind == "repeated_page":
                path = re.sub(r"&?continuation-token=[^&]*", "", path)
            elif kind == "twin":
                self._forward(body, None)
            if kind in ("unconditional", "repeated_page") and "Authorization" in self.headers:
                self._sign_again(path, body)
            connection = connection_class(upstream.netloc, timeout=30)
            with s3.creating if "If-None-Match" in self.headers else contextlib.nullcontext():
                return self._exchange(connection, path, body)

        def _sign_again(self, path: str, body: bytes) -> None:
            keys = credentials()
            signed = Credentials(keys["AWS_ACCESS_KEY_ID"], keys["AWS_SECRET_ACCESS_KEY"])
            del self.headers["Authorization"], self.headers["X-Amz-Date"]
            headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_BY_HOP}
            request = AWSRequest(self.command, s3.direct_url + path, headers, body)
            S3SigV4Auth(signed, "s3", keys["AWS_DEFAULT_REGION"]).add_auth(request)
            for name in ("X-Amz-Date", "X-Amz-Content-SHA256", "Authorization"):
                del self.headers[name]
                self.headers[name] = request.headers[name]

        def _exchange(
            self, connection: http.client.HTTPConnection, path: str, body: bytes
        ) -> tuple[int, dict[str, str], bytes]:
            try:
                connection.putrequest(self.command, path, skip_host=True, skip_accept_encoding=True)
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

        def _drip(self, status: int, headers: dict[str, str], data: bytes) -> None:
            self.close_connection = True
            self._send(status, headers, data, num_sent=0)
            with suppress(OSError):  # the client gives up
                for number in range(len(data)):
                    self.wfile.write(data[number : number + 1])
                    self.wfile.flush()
                    time.sleep(0.1)

        def _wait_for_the_client_to_give_up(self) -> None:
            self.close_connection = True
            self.connection.settimeout(_MAX_HANG_S)
            with suppress(OSError):
                self.connection.recv(1)

        def _reset(self) -> None:
            # A linger time of zero makes close() send RST.
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True

    with _Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        s3.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield s3
        finally:
            server.shutdown()
            thread.join()
