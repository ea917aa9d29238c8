"""One behaviour suite over every kind of store, then what only some of them can get wrong."""

import itertools
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import StreamRequestHandler, TCPServer, ThreadingTCPServer
from typing import Any

import fsspec
import pytest
from cloud_servers import CloudServer

from pipeline import storage, store
from pipeline.errors import (
    AbsentError,
    ChangedError,
    ConfigError,
    ForbiddenError,
    SourceError,
    UnavailableError,
    UnstableError,
)
from pipeline.storage import ObjectInfo, Store


@dataclass(frozen=True)
class Place:
    """A root URL, and a way to write below it that does not go through the code under test."""

    kind: str
    url: str
    write: Callable[[str, bytes], Any]

    @property
    def store(self) -> Store:
        return storage.connect(self.url)


def _local_write(folder: Path, key: str, data: bytes) -> None:
    path = folder / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _place(kind: str, request: pytest.FixtureRequest) -> Place:
    if kind == "s3":
        url = request.getfixturevalue("bucket")
        client = request.getfixturevalue("s3").client
        name = url.removeprefix("s3://")
        return Place(
            kind, f"{url}/in/put", lambda key, data: client.put_object(Bucket=name, Key=f"in/put/{key}", Body=data)
        )
    if kind in ("gs", "az"):
        server: CloudServer = request.getfixturevalue(kind)
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        server.create_bucket(name)
        return Place(kind, f"{kind}://{name}/in/put", lambda key, data: server.write(name, f"in/put/{key}", data))
    folder: Path = request.getfixturevalue("tmp_path") / "in put"
    if kind == "local":
        folder.mkdir()
        return Place(kind, str(folder), partial(_local_write, folder))
    memory = fsspec.filesystem("memory")
    root = f"/{folder.parent.name}/in put"
    memory.makedirs(root)
    return Place(kind, f"memory:/{root}", lambda key, data: memory.pipe_file(f"{root}/{key}", data))


@pytest.fixture(params=["s3", "local", "memory", "gs", "az"])
def place(request: pytest.FixtureRequest) -> Place:
    return _place(request.param, request)


@pytest.fixture(params=["s3", "local", "gs", "az"])
def versioned(request: pytest.FixtureRequest) -> Place:
    """Where another version of an object is noticed, whatever it is."""
    return _place(request.param, request)


@pytest.fixture(params=["s3", "local"])
def output(request: pytest.FixtureRequest) -> Place:
    return _place(request.param, request)


def listed(store: Store, prefix: str = "", start_after: str = "") -> list[ObjectInfo]:
    return [info for page in store.list_pages(prefix, start_after) for info in page]


def keys(store: Store, prefix: str = "", start_after: str = "") -> list[str]:
    return [info.key for info in listed(store, prefix, start_after)]


ODD_KEYS = [
    "plain.jpg",
    "a b.jpg",
    " leading and trailing .jpg ",
    "a#1.jpg",
    "a%20b.jpg",
    "a%2Fb.jpg",
    "a+b.jpg",
    "a&b=c?d=e.jpg",
    "[a]*{b}.jpg",
    "quote'\"<&amp;>.jpg",
    "back\\slash.jpg",
    "line\nbreak.jpg",
    "ä composed.jpg",
    "a\u0308 decomposed.jpg",
    "日本/写真.jpg",
    "\ue000 sorts before the next in UTF-8 and after it in UTF-16.jpg",
    "😀.jpg",
    "a/b.jpg",
    "a/b/c.jpg",
    "a-b.jpg",
    "a0b.jpg",
    "a.jpg",
    "A.jpg",
    "$a;b,c:d@e!f(g)~h.jpg",
    "/".join(["x" * 200] * 4 + ["y" * 96]),
]
assert max(len(key.encode()) for key in ODD_KEYS) == 900


# --- every store: listing and reading -----------------------------------------------------------------------------


def test_keys_of_any_characters_are_listed_in_utf8_order_and_read_back(place: Place) -> None:
    # moto, not S3, answers 404 to a key with a line break; of a backslash Azurite makes a slash.
    without = {"s3": "\n", "az": "\\"}.get(place.kind)
    expected = sorted((key for key in ODD_KEYS if without is None or without not in key), key=str.encode)
    for key in expected:
        place.write(key, key.encode())
    found = listed(place.store)
    assert [info.key for info in found] == expected
    for info in found:
        assert info.size_bytes == len(info.key.encode())
        assert place.store.get(info.key, listed=info) == info.key.encode()


def test_a_listing_begins_with_its_prefix_and_after_its_start(place: Place) -> None:
    for key in ("a-b", "a/b", "a/c/d", "a/c/e", "a/d", "ab", "b"):
        place.write(key, b"x")
    assert keys(place.store, "a/") == ["a/b", "a/c/d", "a/c/e", "a/d"]
    assert keys(place.store, "a/c") == ["a/c/d", "a/c/e"]
    assert keys(place.store, start_after="a/c/d") == ["a/c/e", "a/d", "ab", "b"]
    assert keys(place.store, "a", "a-b") == ["a/b", "a/c/d", "a/c/e", "a/d", "ab"]
    assert keys(place.store, "none") == keys(place.store, "none/") == []


def test_pages_join_without_gap_or_repetition(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "PAGE_OBJECTS", 4)
    names = sorted((f"{number // 3}/é +{number:02d}" for number in range(21)), key=str.encode)
    for name in names:
        place.write(name, b"x")
    pages = list(place.store.list_pages())
    assert [info.key for page in pages for info in page] == names
    assert [len(page) for page in pages] == [4, 4, 4, 4, 4, 1]
    assert [keys(place.store, start_after=name) for name in names] == [names[number:] for number in range(1, 22)]


def test_an_object_looked_at_by_itself_is_what_the_listing_says(place: Place) -> None:
    for key in ("a/b c.jpg", "ä", "empty"):
        place.write(key, key.encode() if key != "empty" else b"")
    for info in listed(place.store):
        alone = place.store.stat(info.key)
        assert (alone.key, alone.size_bytes, alone.etag) == (info.key, info.size_bytes, info.etag)
        assert alone.last_modified is not None
        assert info.last_modified is not None
        assert alone.last_modified.replace(microsecond=0) == info.last_modified.replace(microsecond=0)
    for absent in ("a", "nothing"):
        with pytest.raises(AbsentError, match=absent):
            place.store.stat(absent)


def test_a_range_of_an_object_is_read_and_another_version_of_it_is_not(versioned: Place) -> None:
    versioned.write("a/b", bytes(range(200)))
    (info,) = listed(versioned.store)
    assert versioned.store.get_range(info, 0, 200) == bytes(range(200))
    assert versioned.store.get_range(info, 7, 9) == b"\x07\x08"
    assert versioned.store.get_range(info, 9, 9) == b""
    with pytest.raises(UnstableError, match="1 bytes arrived, 2 were asked for"):
        versioned.store.get_range(info, 199, 201)
    time.sleep(0.01)
    versioned.write("a/b", bytes(200))
    with pytest.raises(ChangedError):
        versioned.store.get_range(info, 7, 9)


def test_an_absent_object_is_absent(place: Place) -> None:
    place.write("there", b"x")
    with pytest.raises(AbsentError, match="not there"):
        place.store.get("not there")
    assert storage.get_or_none(place.store, "not there") is None
    assert storage.get_or_none(place.store, "there") == b"x"


def test_a_listed_object_that_is_gone_is_absent(place: Place) -> None:
    place.write("there", b"x")
    gone = listed(place.store)[0]._replace(key="gone")
    with pytest.raises(AbsentError):
        place.store.get("gone", listed=gone)


def test_an_object_overwritten_with_the_same_size_is_changed(versioned: Place) -> None:
    versioned.write("key", b"old")
    (old,) = listed(versioned.store)
    time.sleep(0.01)
    versioned.write("key", b"new")
    with pytest.raises(ChangedError, match="key"):
        versioned.store.get("key", listed=old)
    assert versioned.store.get("key") == b"new"
    (new,) = listed(versioned.store)
    assert new.etag != old.etag


def test_a_store_without_conditional_reads_notices_another_length(request: pytest.FixtureRequest) -> None:
    place = _place("memory", request)
    place.write("key", b"old")
    (old,) = listed(place.store)
    place.write("key", b"longer")
    with pytest.raises(UnstableError, match="6 bytes arrived, 3 are listed"):
        place.store.get("key", listed=old)
    assert listed(place.store)[0].etag != old.etag


def test_an_empty_place_lists_nothing(place: Place) -> None:
    assert listed(place.store) == []


def test_times_are_utc(place: Place) -> None:
    before_s = time.time()
    place.write("key", b"x")
    (info,) = listed(place.store)
    assert info.last_modified is not None
    assert info.last_modified.utcoffset() is not None
    assert abs(info.last_modified.timestamp() - before_s) < 5


# --- outputs: writing ---------------------------------------------------------------------------------------------


def test_the_first_of_two_writers_wins_and_both_see_its_bytes(output: Place) -> None:
    first = b"first"
    assert output.store.put_if_absent("_log/1.json", first) is first
    assert output.store.put_if_absent("_log/1.json", b"second") == b"first"
    assert output.store.get("_log/1.json") == b"first"


def test_of_concurrent_writers_exactly_one_wins_and_all_see_its_bytes(output: Place) -> None:
    store = output.store
    for round_number in range(5):
        barrier = threading.Barrier(8)

        def write(number: int, key: str = f"race/{round_number}", barrier: threading.Barrier = barrier) -> bytes:
            barrier.wait()
            return store.put_if_absent(key, f"content of {number}".encode() * 1000)

        with ThreadPoolExecutor(8) as pool:
            seen = set(pool.map(write, range(8)))
        assert seen == {store.get(f"race/{round_number}")}
    assert len(keys(store)) == 5


def test_put_overwrites(output: Place) -> None:
    output.store.put("a/report.json", b"one")
    output.store.put("a/report.json", b"two")
    assert output.store.get("a/report.json") == b"two"
    assert keys(output.store) == ["a/report.json"]


def test_deleted_objects_are_gone_and_others_stay_and_absent_ones_are_fine(output: Place) -> None:
    for key in ("a/1", "a/2", "a/1 b+c%2F", "label=Ä%C3/x"):
        output.write(key, b"x")
    output.store.delete(["a/1", "a/1 b+c%2F", "label=Ä%C3/x", "not/there"])
    output.store.delete([])
    assert keys(output.store) == ["a/2"]
    assert output.store.put_if_absent("a/1", b"new") == b"new"


def test_more_objects_than_one_request_takes_are_deleted(output: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "PAGE_OBJECTS", 4)
    names = [f"{number:02d}" for number in range(11)]
    for name in names:
        output.write(name, b"x")
    output.store.delete(names[:10])
    assert keys(output.store) == names[10:]


def test_list_keys_of_a_prefix_that_does_not_exist_yet_is_empty(output: Place) -> None:
    assert list(storage.list_keys(output.store, "_log/")) == []
    output.store.put("_log/1", b"x")
    assert list(storage.list_keys(output.store, "_log/")) == ["_log/1"]


# --- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/", "s3://bucket"),
        ("s3://bucket/a b/%20/", "s3://bucket/a b/%20"),
        ("s3a://bucket/x", "s3://bucket/x"),
        ("/data/", "file:///data"),
        ("/data//x/../y/.", "file:///data/y"),
        ("file:///data/x/", "file:///data/x"),
        ("local:///data/x", "file:///data/x"),
        ("/a b#%20", "file:///a b#%20"),
        ("memory://x/", "memory://x"),
        ("memory://", "memory://"),
    ],
)
def test_a_url_has_one_spelling(url: str, expected: str) -> None:
    assert storage.normalize(url) == expected
    assert storage.normalize(expected) == expected


def test_relative_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert storage.normalize("photos") == f"file://{tmp_path}/photos"
    assert storage.normalize("./a/../photos/") == f"file://{tmp_path}/photos"
    assert storage.normalize("~/photos") == "file:///home/somebody/photos"


@pytest.mark.parametrize("url", ["s3://", "s3:///prefix", "simplecache::s3://bucket/x", "nosuch://bucket/x"])
def test_a_url_that_names_no_place_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="expected"):
        storage.normalize(url)


def test_an_output_on_another_store_is_refused() -> None:
    with pytest.raises(ConfigError, match="--output must be an s3:// URL or a local folder, found memory://x"):
        storage.connect_output("memory://x")
    with pytest.raises(ConfigError, match="memory://x: expected an s3:// URL or a local folder to remove objects from"):
        storage.connect("memory://x").delete(["key"])


def test_another_store_takes_what_one_writer_writes() -> None:
    store = storage.connect("memory://written/there")
    assert store.put_if_absent("a/b/1", b"x") == b"x"
    assert store.put_if_absent("a/b/1", b"y") == b"x"
    store.put("a/2", b"x")
    store.put("a/2", b"z")
    assert {key: store.get(key) for key in keys(store)} == {"a/2": b"z", "a/b/1": b"x"}


def test_the_root_of_another_store_can_be_read() -> None:
    fsspec.filesystem("memory").pipe_file("/at root.txt", b"x")
    store = storage.connect("memory://")
    assert "at root.txt" in keys(store)
    assert store.get("at root.txt") == b"x"


# --- local folders ------------------------------------------------------------------------------------------------


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_nothing_but_the_objects_is_left_in_a_folder(tmp_path: Path) -> None:
    store = storage.connect(str(tmp_path))
    store.put_if_absent("a/1", b"x")
    store.put_if_absent("a/1", b"y")
    store.put("a/2", b"x")
    store.put("a/2", b"y")
    assert names(tmp_path / "a") == ["1", "2"]


def test_a_write_that_fails_leaves_nothing_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a" / "folder" / "file").mkdir(parents=True)
    store = storage.connect(str(tmp_path))
    for write in (store.put, store.put_if_absent):
        with pytest.raises(SourceError):
            write("a/folder", b"x")
    assert names(tmp_path / "a") == ["folder"]


def test_a_filesystem_without_nameless_files_commits_the_same_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "O_TMPFILE")
    store = storage.connect(str(tmp_path))
    with ThreadPoolExecutor(8) as pool:
        seen = set(pool.map(lambda number: store.put_if_absent("key", b"%d" % number), range(32)))
    assert seen == {(tmp_path / "key").read_bytes()}
    assert names(tmp_path) == ["key"]


def test_a_file_changed_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(b"old")
    (info,) = listed(storage.connect(str(tmp_path)))
    other = tmp_path / "other"
    other.write_bytes(b"new")
    os.utime(other, ns=(path.stat().st_mtime_ns, path.stat().st_mtime_ns))
    other.replace(path)  # same size and time, another inode
    with pytest.raises(ChangedError):
        storage.connect(str(tmp_path)).get("key", listed=info)


def test_links_to_files_are_files_and_links_to_folders_or_nowhere_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(b"x")
    (tmp_path / "to file").symlink_to(tmp_path / "folder" / "file")
    (tmp_path / "to folder").symlink_to(tmp_path)
    (tmp_path / "to nowhere").symlink_to(tmp_path / "gone")
    (tmp_path / "to itself").symlink_to(tmp_path / "to itself")
    os.mkfifo(tmp_path / "pipe")
    assert keys(storage.connect(str(tmp_path))) == ["folder/file", "to file"]


@pytest.mark.parametrize("name", ["nothing", "file"])
def test_a_root_that_is_no_folder_is_absent(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(AbsentError, match=rf"expected a folder, found {'a file' if name == 'file' else 'nothing'}"):
        listed(storage.connect(str(tmp_path / name)))


def test_a_folder_that_vanishes_during_a_listing_is_like_its_deleted_files(tmp_path: Path) -> None:
    _local_write(tmp_path, "c/file", b"x")
    for number in range(1000):
        _local_write(tmp_path, f"a/{number:04d}", b"x")
    _local_write(tmp_path, "b/file", b"x")
    pages = storage.connect(str(tmp_path)).list_pages()
    assert len(next(pages)) == 1000
    (tmp_path / "b" / "file").unlink()
    (tmp_path / "b").rmdir()
    assert [info.key for page in pages for info in page] == ["c/file"]


def test_a_file_name_that_is_not_utf8_is_named_and_refused(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"x")
    with pytest.raises(SourceError, match=r"caf\\xe9\.jpg"):
        listed(storage.connect(str(tmp_path)))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permission_is_forbidden(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(ForbiddenError):
        listed(storage.connect(str(tmp_path)))


# --- anything else ------------------------------------------------------------------------------------------------


@contextmanager
def _web_folder(folder: Path, status_of: Mapping[str, int] | None = None) -> Iterator[str]:
    """The URL of a web server of this folder that answers these paths by a status; by hanging up if that is 0."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            """Quiet."""

        def send_head(self) -> Any:
            status = (status_of or {}).get(self.path)
            if status is None:
                return super().send_head()
            if status:
                self.send_error(status)
            return None

    with _served(ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))) as url:
        yield url


@contextmanager
def _served(server: TCPServer) -> Iterator[str]:
    """Its URL while it serves."""
    with server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/"
        finally:
            server.shutdown()
            thread.join()


def test_a_web_folder_whose_listing_has_no_sizes_can_be_read(tmp_path: Path) -> None:
    for key in ("b.jpg", "a/c.jpg"):
        _local_write(tmp_path, key, key.encode())

    with _web_folder(tmp_path) as url:
        store = storage.connect(url)
        found = listed(store)
        assert [(info.key, info.size_bytes) for info in found] == [("a/c.jpg", 7), ("b.jpg", 5)]
        assert [store.get(info.key, listed=info) for info in found] == [b"a/c.jpg", b"b.jpg"]


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nten bytes.", id="short"),
        pytest.param(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n64\r\nten bytes.", id="short-chunk"),
        pytest.param(b"HTTP/1.1 nonsense\r\n\r\n", id="no-status"),
    ],
)
def test_what_a_web_server_did_not_finish_is_asked_for_until_the_deadline(
    monkeypatch: pytest.MonkeyPatch, answer: bytes
) -> None:
    monkeypatch.setattr(store, "DEADLINE_S", 1.0)
    num_requests = itertools.count()

    class Handler(StreamRequestHandler):
        def handle(self) -> None:
            next(num_requests)
            self.request.recv(2**16)
            self.wfile.write(answer)

    with _served(ThreadingTCPServer(("127.0.0.1", 0), Handler)) as url, pytest.raises(UnavailableError):
        storage.connect(url).get("key", deadline_s=1)
    assert next(num_requests) > 1


@pytest.mark.parametrize("host", ["169.254.169.254", "2852039166", "0xa9fea9fe:80"])
def test_a_web_server_at_a_link_local_address_is_refused_before_any_request(host: str) -> None:
    for scheme in ("http", "https"):
        with pytest.raises(SourceError, match=r"found the link-local address .* check the URL"):
            storage.connect(f"{scheme}://{host}/latest/meta-data")


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (401, ForbiddenError),
        (403, ForbiddenError),
        (404, AbsentError),
        (405, SourceError),
        (410, AbsentError),
        (416, ChangedError),
        (501, SourceError),
        (429, UnavailableError),
        (500, UnavailableError),
        (503, UnavailableError),
        (0, UnavailableError),
    ],
)
def test_what_a_web_server_answers_is_what_the_error_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, expected: type[SourceError]
) -> None:
    monkeypatch.setattr(store, "DEADLINE_S", 0.2)
    (tmp_path / "key").write_bytes(b"x")
    with _web_folder(tmp_path) as url:
        assert storage.connect(url).get("key") == b"x"
    with _web_folder(tmp_path, {"/key": status}) as url, pytest.raises(SourceError) as caught:
        storage.connect(url).get("key", deadline_s=0.2)
    assert type(caught.value) is expected
    assert "\n" not in str(caught.value)
    if status:  # the folder lists it without a size, and a client that was hung up on says "not found"
        with _web_folder(tmp_path, {"/key": status}) as url, pytest.raises(SourceError) as caught:
            listed(storage.connect(url))
        assert type(caught.value) is expected
    with _web_folder(tmp_path, {"/": status}) as url, pytest.raises(SourceError) as caught:
        listed(storage.connect(url))
    assert type(caught.value) is expected
