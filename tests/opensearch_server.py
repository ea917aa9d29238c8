"""The part of OpenSearch that loading an export needs, over HTTP, as strict as its documentation is.

There is no OpenSearch where the tests run, and its client alone takes any bulk body. So this server refuses what
OpenSearch refuses: a body without a last newline, an action without its document, ids above 512 bytes, documents that
do not fit a strict mapping. It answers item by item, as `POST /<index>/_bulk` does.
"""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_RANGES = {"long": 2**63, "integer": 2**31}


@dataclass
class Index:
    """An index: its body as created, and its documents by id."""

    body: dict[str, Any]
    documents: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass
class OpenSearchServer:
    """A running server."""

    url: str
    indices: dict[str, Index]
    request_bytes: list[int]
    """Size of each bulk request."""


class MalformedError(Exception):
    """The whole request is refused."""


def bulk(index: Index, body: bytes) -> dict[str, Any]:
    """Apply a bulk body, and answer. Raises MalformedError for what is no bulk body."""
    if not body.endswith(b"\n"):
        raise MalformedError("The bulk request must be terminated by a newline [\\n]")
    lines = iter(body[:-1].split(b"\n"))
    items = []
    for line in lines:
        action = _object(line)
        if len(action) != 1:
            raise MalformedError(f"Malformed action/metadata line, expected one field, found {sorted(action)}")
        ((name, meta),) = action.items()
        if name not in ("index", "delete") or set(meta) != {"_id"} or not isinstance(meta["_id"], str):
            raise MalformedError(f"Malformed action/metadata line {line!r}")
        if name == "index":
            source = next(lines, None)
            if source is None:
                raise MalformedError("an action without its document")
            items.append({name: _put(index, meta["_id"], _object(source))})
        else:
            is_found = index.documents.pop(meta["_id"], None) is not None
            said = {"status": 200, "result": "deleted"} if is_found else {"status": 404, "result": "not_found"}
            items.append({name: {"_id": meta["_id"], **said}})
    return {"took": 1, "errors": any("error" in each for item in items for each in item.values()), "items": items}


def _object(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise MalformedError(f"{error}: {line[:80]!r}") from error
    if not isinstance(found, dict):
        raise MalformedError(f"expected an object, found {line[:80]!r}")
    return found


def _put(index: Index, id_: str, document: dict[str, Any]) -> dict[str, Any]:
    fields = index.body["mappings"]["properties"]
    wrong = [name for name, value in document.items() if name not in fields or not _fits(fields[name], value)]
    if len(id_.encode()) > 512 or not id_:
        wrong.append("_id")
    if wrong:
        return {"_id": id_, "status": 400, "error": {"type": "mapper_parsing_exception", "reason": f"fields {wrong}"}}
    is_new = id_ not in index.documents
    index.documents[id_] = document
    return {"_id": id_, "status": 201 if is_new else 200, "result": "created" if is_new else "updated"}


def _fits(wanted: dict[str, Any], value: Any) -> bool:
    kind = wanted["type"]
    if kind == "knn_vector":
        return len(value) == wanted["dimension"] and all(isinstance(each, int | float) for each in value)
    values = value if isinstance(value, list) else [value]
    if kind == "keyword":
        return all(isinstance(each, str) for each in values)
    if kind == "date":
        return all(datetime.fromisoformat(each).tzinfo is not None for each in values)
    if kind == "float":
        return all(isinstance(each, float) for each in values)
    return all(isinstance(each, int) and -_RANGES[kind] <= each < _RANGES[kind] for each in values)


@contextmanager
def serve_opensearch() -> Iterator[OpenSearchServer]:
    """A server without any index, until the block ends."""
    running = OpenSearchServer("", {}, [])

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            """Quiet."""

        def do_HEAD(self) -> None:
            self._send(200 if self.path.strip("/") in running.indices else 404)

        def do_PUT(self) -> None:
            running.indices[self.path.strip("/")] = Index(json.loads(self._body()))
            self._send(200, {"acknowledged": True})

        def do_POST(self) -> None:
            name, _, action = self.path.strip("/").partition("/")
            assert action == "_bulk", self.path
            body = self._body()
            running.request_bytes.append(len(body))
            try:
                self._send(200, bulk(running.indices[name], body))
            except MalformedError as error:
                self._send(400, {"error": {"type": "illegal_argument_exception", "reason": str(error)}, "status": 400})

        def _body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def _send(self, status: int, answer: Any = None) -> None:
            data = json.dumps(answer).encode() if answer is not None else b""
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        running.url = f"http://127.0.0.1:{server.server_port}"
        yield running
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
