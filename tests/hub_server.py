"""A hub on 127.0.0.1: as much of the hub's HTTP interface as its own clients need for a model or a data set."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit


class Repository(NamedTuple):
    """One model or data set: the folder that each revision (branch or `refs/pr/N`) holds."""

    folders: dict[str, Path]
    conversion_author: str = "SFconvertbot"
    is_gated: bool = False
    """Its files are for those whom its owner has let in, and nobody is."""

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
    """A hub that holds `repositories` by id (of a data set `datasets/` and its id), until the block ends."""
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer()

        def do_HEAD(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self._body = self.rfile.read(int(self.headers["Content-Length"]))
            self._answer()

        def log_message(self, *args: Any) -> None:
            """Quiet."""

        def _answer(self) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            requests.append(f"{self.command} {path}")
            for name, repository in repositories.items():
                api = f"api/{name}" if name.startswith("datasets/") else f"api/models/{name}"
                for prefix in (f"{api}/", f"{name}/resolve/"):
                    if f"{path}/".startswith(prefix):
                        self._answer_for(
                            name, repository, path.removeprefix(prefix[:-1])[1:], is_api=prefix[:4] == "api/"
                        )
                        return
            self._send(404, b"", **{"X-Error-Code": "RepoNotFound"})

        def _answer_for(self, model_id: str, repository: Repository, path: str, *, is_api: bool) -> None:
            verb, _, rest = path.partition("/") if is_api else ("resolve", "", path)
            if verb == "discussions":
                numbers = [name.rpartition("/")[2] for name in repository.folders if name.startswith("refs/pr/")]
                found = [_pull_request(model_id, int(number), repository.conversion_author) for number in numbers]
                self._send_json({"discussions": found, "count": len(found), "start": 0})
                return
            revision, _, name = rest.rpartition("/") if verb == "resolve" else (rest or "main", "", "")
            commit = repository.commit(revision)
            if repository.is_gated and verb == "resolve":
                self._send(403, b"", **{"X-Error-Code": "GatedRepo"})
            elif commit is None:
                # Below a commit's root there are no folders.
                is_folder = verb == "tree" and repository.commit(rest.partition("/")[0]) is not None
                self._send(404, b"", **{"X-Error-Code": "EntryNotFound" if is_folder else "RevisionNotFound"})
            elif verb in ("revision", ""):
                names = [{"rfilename": file.name} for file in sorted(repository.folder(commit).iterdir())]
                self._send_json({"id": model_id.removeprefix("datasets/"), "sha": commit, "siblings": names})
            elif verb in ("tree", "paths-info"):
                files = sorted(repository.folder(commit).iterdir())
                if verb == "paths-info":
                    files = [file for file in files if file.name in json.loads(self._body)["paths"]]
                self._send_json(
                    [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": _oid(f)} for f in files]
                )
            else:
                self._send_file(repository.folder(commit) / name, commit)

        def _send_file(self, file: Path, commit: str) -> None:
            if not file.is_file():
                self._send(404, b"", **{"X-Error-Code": "EntryNotFound"})
                return
            headers = {"ETag": f'"{_oid(file)}"', "X-Repo-Commit": commit}
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if wanted is None:
                self._send(200, file.read_bytes(), **headers)
            else:
                self._send(206, file.read_bytes()[int(wanted[1]) : int(wanted[2]) + 1], **headers)

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
