"""CPU time of reading a listed object of 100 kB from S3 by each client: whole process, 16 threads, server apart.

The server answers every GET with the same bytes and checks nothing, so that it costs the client's cores as little as
possible. `ours` is what fetching does, checks included; the others are called as their documentation shows it.

    python tests/benchmarks/client_cpu.py --num-objects 600 --rounds 3
"""

import argparse
import hashlib
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pipeline import storage
from pipeline.fetch import CONCURRENCY
from pipeline.storage import ObjectInfo

BODY = bytes(range(256)) * 400
ETAG = hashlib.md5(BODY, usedforsecurity=False).hexdigest()
WARM_UP_OBJECTS = 32


def main() -> None:
    """Every client in turn, `--rounds` times, after a round that does not count."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-objects", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serve", type=int, metavar="PORT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        _serve(options.serve)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    server = subprocess.Popen([sys.executable, __file__, "--serve", str(port)])
    try:
        time.sleep(2)
        _compare(f"http://127.0.0.1:{port}", options.num_objects, options.rounds)
    finally:
        server.terminate()
        server.wait()


def _compare(endpoint: str, num_objects: int, num_rounds: int) -> None:
    os.environ.update(
        AWS_ACCESS_KEY_ID="x", AWS_SECRET_ACCESS_KEY="x", AWS_DEFAULT_REGION="us-east-1", AWS_ENDPOINT_URL=endpoint
    )
    clients = {
        "ours": _ours(),
        "s3fs": _s3fs(),
        "botocore": _botocore(),
        "pyarrow": _pyarrow(endpoint),
        "obstore": _obstore(endpoint),
    }
    found: dict[str, list[float]] = {name: [] for name in clients}
    for number in range(num_rounds + 1):
        for name, get in clients.items():
            with ThreadPoolExecutor(CONCURRENCY) as pool:
                list(pool.map(get, [f"warm/{i}.jpg" for i in range(WARM_UP_OBJECTS)]))
                started_s = time.process_time()
                list(pool.map(get, [f"photos/{i:06d}.jpg" for i in range(num_objects)]))
                if number:
                    found[name].append((time.process_time() - started_s) / num_objects * 1e3)
    for name, values in found.items():
        print(f"{name:10} median {statistics.median(values):.2f} ms, {min(values):.2f} to {max(values):.2f}")


def _ours() -> Callable[[str], bytes]:
    store = storage.connect("s3://bucket")
    return lambda key: store.get(key, listed=ObjectInfo(key, len(BODY), ETAG, None))


def _s3fs() -> Callable[[str], Any]:
    import s3fs

    filesystem = s3fs.S3FileSystem()
    return lambda key: filesystem.cat_file(f"bucket/{key}", max_concurrency=1)


def _botocore() -> Callable[[str], Any]:
    import botocore.config
    import botocore.session

    client = botocore.session.get_session().create_client(
        "s3", config=botocore.config.Config(max_pool_connections=CONCURRENCY)
    )
    return lambda key: client.get_object(Bucket="bucket", Key=key)["Body"].read()


def _pyarrow(endpoint: str) -> Callable[[str], Any]:
    import pyarrow.fs

    filesystem = pyarrow.fs.S3FileSystem(endpoint_override=endpoint.removeprefix("http://"), scheme="http")

    def get(key: str) -> Any:
        with filesystem.open_input_stream(f"bucket/{key}") as stream:
            return stream.read()

    return get


def _obstore(endpoint: str) -> Callable[[str], Any]:
    import obstore
    import obstore.store

    store = obstore.store.S3Store("bucket", endpoint=endpoint, client_options={"allow_http": True})
    return lambda key: bytes(obstore.get(store, key).bytes())


def _serve(port: int) -> None:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *args: Any) -> None:
            """Quiet."""

        def do_HEAD(self) -> None:
            self.send_response_only(200)
            for name, value in (("Content-Length", str(len(BODY))), ("ETag", f'"{ETAG}"')):
                self.send_header(name, value)
            self.send_header("Last-Modified", "Tue, 24 Nov 2026 00:00:00 GMT")
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            self.wfile.write(BODY)

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

    Server(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    main()
