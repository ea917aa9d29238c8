"""A model hub on 127.0.0.1: as much of the hub's HTTP interface as its own client needs to download a model."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit


class Repository(NamedTuple):
    """One model: the folder that each revision (branch or `refs/pr/N`) holds."""

    folders: dict[str, Path]
    conversion_author: str = "SFconvertbot"

    def commit(self, revision: str) -> str | None:
        """The commit of a branch, or `revision` itself if it is one of the commits."""
        commits = {name: hashlib.sha1(name.encode()).hexdigest() for name in self.folders}
        return revision if revision in commits.values() else commits.get(revision)

    def folder(self, commit: str) -> Path:
        """What a commit holds."""
        return next(folder for name, folder in self.folders.items() if self.commit(name) == commit)


class Hub(NamedTuple):
    """A running hub: its address, and every request so far as `METHOD path`."""

    url: str
    requests: list[str]


@contextmanager
def serve_hub(repositories: dict[str, Repository]) -> Iterator[Hub]:
    """A hub that holds `repositories` by id, until the block ends."""
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer()

        def do_HEAD(self) -> None:
            self._answer()

        def log_message(self, *args: Any) -> None:
            """Quiet."""

        def _answer(self) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            requests.append(f"{self.command} {path}")
            for model_id, repository in repositories.items():
                for prefix in (f"api/models/{model_id}/", f"{model_id}/resolve/"):
                    if path.startswith(prefix):
                        self._answer_for(model_id, repository, path.removeprefix(prefix), is_api=prefix[:4] == "api/")
                        return
            self._send(404, b"", **{"X-Error-Code": "RepoNotFound"})

        def _answer_for(self, model_id: str, repository: Repository, path: str, *, is_api: bool) -> None:
            verb, _, rest = path.partition("/") if is_api else ("resolve", "", path)
            if verb == "discussions":
                numbers = [name.rpartition("/")[2] for name in repository.folders if name.startswith("refs/pr/")]
                found = [_pull_request(model_id, int(number), repository.conversion_author) for number in numbers]
                self._send_json({"discussions": found, "count": len(found), "start": 0})
                return
            revision, _, name = rest.rpartition("/") if verb == "resolve" else (rest, "", "")
            commit = repository.commit(revision)
            if commit is None:
                self._send(404, b"", **{"X-Error-Code": "RevisionNotFound"})
            elif verb == "revision":
                self._send_json({"id": model_id, "sha": commit})
            elif verb == "tree":
                files = sorted(repository.folder(commit).iterdir())
                self._send_json(
                    [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": _oid(f)} for f in files]
                )
            else:
                file = repository.folder(commit) / name
                self._send(200, file.read_bytes(), **{"ETag": f'"{_oid(file)}"', "X-Repo-Commit": commit})

        def _send_json(self, content: Any) -> None:
            self._send(200, json.dumps(content).encode(), **{"Content-Type": "application/json"})

        def _send(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield Hub(f"http://127.0.0.1:{server.server_port}", requests)
        finally:
            server.shutdown()
            thread.join()


def _oid(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


def _pull_request(model_id: str, number: int, author: str) -> dict[str, Any]:
    return {
        "title": "Adding `safetensors` variant of this model",
        "num": number,
        "author": {"name": author},
        "createdAt": "2023-03-17T12:00:00.000Z",
        "status": "open",
        "repo": {"name": model_id, "type": "model"},
        "isPullRequest": True,
    }
