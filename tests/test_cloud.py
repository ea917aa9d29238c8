"""Google Cloud Storage and Azure Blob Storage as inputs: what the suite over all stores does not ask, and nights."""

import importlib.util
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import checkpoints
import fsspec
import pytest
from cloud_servers import CloudServer
from cluster import ROOT, running_head
from published import entries, table
from test_containers import read, rows, shard
from test_storage import keys, listed

from pipeline import listing, storage, store
from pipeline.draw import draw_file
from pipeline.errors import AbsentError, ConfigError, ForbiddenError, SourceError, UnavailableError

PACKAGES = {"gs": "gcsfs", "az": "adlfs"}


@pytest.fixture(params=["gs", "az"])
def server(request: pytest.FixtureRequest) -> CloudServer:
    found: CloudServer = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def bucket(server: CloudServer) -> str:
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    server.create_bucket(name)
    return name


def put(server: CloudServer, bucket: str, files: Mapping[str, bytes]) -> str:
    """The URL of these files."""
    for key, data in files.items():
        server.write(bucket, f"in/{key}", data)
    return f"{server.scheme}://{bucket}/in"


def test_keys_that_are_no_paths_and_markers_of_folders_are_listed_as_they_are(server: CloudServer, bucket: str) -> None:
    files = {"a/": b"", "a//b": b"1", "a/b": b"2", "a": b"3", "c/d": b"4", "/x": b"5", "a?x=1#y": b"6"}
    source = storage.connect(put(server, bucket, files))
    assert keys(source) == sorted(files)
    assert {info.key: source.get(info.key, listed=info) for info in listed(source)} == files
    scoped = [(info.key, is_meant) for page in listing.Scope().pages(source) for info, is_meant in page]
    assert scoped == [(key, key != "a/") for key in sorted(files)]


def test_a_neighbour_whose_name_begins_alike_is_not_listed(server: CloudServer, bucket: str) -> None:
    url = put(server, bucket, {"a": b"1"})
    server.write(bucket, "in-2/a", b"2")
    server.write(bucket, "in", b"3")
    assert keys(storage.connect(url)) == ["a"]
    assert keys(storage.connect(url.removesuffix("/in"))) == ["in", "in-2/a", "in/a"]


def test_what_was_listed_before_is_not_remembered(server: CloudServer, bucket: str) -> None:
    source = storage.connect(put(server, bucket, {"a": b"1", "b/c": b"2"}))
    (before, _) = listed(source)
    server.delete(bucket, "in/b/c")
    server.write(bucket, "in/a", b"3")
    (after,) = listed(source)
    assert source.stat("a") == after
    assert (before.key, before.size_bytes) == (after.key, after.size_bytes)
    assert before.etag != after.etag


def test_a_bucket_that_is_not_there_is_absent(server: CloudServer) -> None:
    with pytest.raises(AbsentError, match="no-such-bucket"):
        listed(storage.connect(f"{server.scheme}://no-such-bucket/in"))


def test_shards_and_parquet_files_are_read_and_another_version_of_one_is_changed(
    server: CloudServer, bucket: str
) -> None:
    files = {"x.tar": shard({"a.jpg": b"aa", "b.jpg": b"b"}), "y.parquet": rows([b"1", b"22"])}
    url = put(server, bucket, files)
    assert read(f"webdataset+{url}") == [("x.tar/a.jpg", b"aa"), ("x.tar/b.jpg", b"b")]
    assert read(f"parquet+{url}") == [("y.parquet/0000000000", b"1"), ("y.parquet/0000000001", b"22")]
    shards = storage.connect_input(f"webdataset+{url}")
    first = next(info for page in shards.list_pages() for info in page)
    server.write(bucket, "in/x.tar", files["x.tar"].replace(b"aa", b"zz"))
    with pytest.raises(SourceError, match="no longer the object that was listed"):
        shards.get(first.key, listed=first)


def test_an_archived_blob_is_listed_as_archived(az: CloudServer) -> None:
    from azure.storage.blob import BlobServiceClient

    az.create_bucket("archive")
    url = put(az, "archive", {"a": b"1", "b": b"2"})
    with BlobServiceClient.from_connection_string(az.environment["AZURE_STORAGE_CONNECTION_STRING"]) as client:
        client.get_blob_client("archive", "in/b").set_standard_blob_tier("Archive")
    assert [(info.key, info.is_archived) for info in listed(storage.connect(url))] == [("a", False), ("b", True)]


def test_a_folder_of_a_hierarchical_namespace_is_no_object(az: CloudServer) -> None:
    from azure.storage.blob import BlobServiceClient

    az.create_bucket("folders")
    url = put(az, "folders", {"a-b": b"1", "a/b": b"2"})
    with BlobServiceClient.from_connection_string(az.environment["AZURE_STORAGE_CONNECTION_STRING"]) as client:
        client.get_blob_client("folders", "in/a").upload_blob(b"", metadata={"hdi_isfolder": "true"})
    assert keys(storage.connect(url)) == ["a-b", "a/b"]
    with pytest.raises(AbsentError, match="found a folder"):
        storage.connect(url).stat("a")


# --- servers that do not do as they are asked ---------------------------------------------------------------------


@contextmanager
def _answering(status: int | None) -> Iterator[str]:
    """The address of a server that answers everything with this status; with nothing, for 3 s, if it is None."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            """Quiet."""

        def do_GET(self) -> None:
            if status is None:
                time.sleep(3)
                return
            self.send_error(status)

        do_HEAD = do_GET

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def _led_to(url: str) -> Iterator[None]:
    """Clients of this process ask `url` instead of the session's servers, and are built anew before and after."""
    key = "AAAA" * 16
    connection = f"DefaultEndpointsProtocol=http;AccountName=test;AccountKey={key};BlobEndpoint={url}/test;"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", url)
        patch.setenv("NO_GCE_CHECK", "true")
        patch.setenv("AZURE_STORAGE_CONNECTION_STRING", connection)
        _forget_clients()
        yield
    _forget_clients()


def _forget_clients() -> None:
    for scheme, package in PACKAGES.items():
        if importlib.util.find_spec(package):
            fsspec.get_filesystem_class(scheme).clear_instance_cache()


@pytest.mark.parametrize("scheme", ["gs", "az"])
@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (401, ForbiddenError),
        (403, ForbiddenError),
        (404, AbsentError),
        (501, SourceError),
        (503, UnavailableError),
        (None, UnavailableError),
    ],
)
def test_what_a_cloud_answers_is_what_the_error_says_within_the_deadline(
    monkeypatch: pytest.MonkeyPatch, scheme: str, status: int | None, expected: type[SourceError]
) -> None:
    pytest.importorskip(PACKAGES[scheme])
    monkeypatch.setattr(store, "DEADLINE_S", 1.0)
    with _answering(status) as url, _led_to(url):
        source = storage.connect(f"{scheme}://bucket/in")
        info = storage.ObjectInfo("key", 1, "1", None)
        for ask in (
            lambda: source.get("key", listed=info, deadline_s=1),
            lambda: source.get_range(info, 0, 1, deadline_s=1),
            lambda: source.stat("key"),
            lambda: listed(source),
        ):
            began_s = time.monotonic()
            with pytest.raises(SourceError) as caught:
                ask()
            assert type(caught.value) is expected
            assert "\n" not in str(caught.value)
            assert time.monotonic() - began_s < 2.5


@pytest.mark.parametrize("scheme", ["gs", "az"])
@pytest.mark.parametrize("host", ["169.254.169.254", "[fd00:ec2::254]"])
def test_an_endpoint_at_a_link_local_address_is_refused_before_any_request(scheme: str, host: str) -> None:
    pytest.importorskip(PACKAGES[scheme])
    setting = {"gs": "STORAGE_EMULATOR_HOST", "az": "AZURE_STORAGE_CONNECTION_STRING"}[scheme]
    with _led_to(f"http://{host}"), pytest.raises(SourceError, match=rf"found the link-local address .*{setting}"):
        storage.connect(f"{scheme}://bucket/in")


@pytest.mark.parametrize("url", ["gs://bucket/out", "gcs://bucket/out", "az://bucket/out", "abfs://bucket/out"])
def test_a_cloud_is_no_output(url: str) -> None:
    with pytest.raises(ConfigError, match="--output must be an s3:// URL or a local folder, found"):
        storage.connect_output(url)


@pytest.mark.parametrize("scheme", ["gs", "az"])
def test_a_package_that_is_missing_is_named(scheme: str) -> None:
    code = f"""
import sys
sys.modules["{PACKAGES[scheme]}"] = None
from pipeline import errors, options, storage
for ask in (
    lambda: storage.connect_input("{scheme}://bucket/in"),
    lambda: options.load_config(["--input", "{scheme}://bucket/in", "--output", "out"], {{}}),
):
    try:
        ask()
    except errors.ConfigError as error:
        print(error)
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.count("\n") == 2
    assert all(f"nstall {PACKAGES[scheme]}" in line for line in ended.stdout.splitlines())


@pytest.mark.parametrize("url", ["gs://", "az:///x"])
def test_a_url_without_a_bucket_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="found no bucket"):
        storage.connect(url)


# --- nights -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_200_pictures_have_the_labels_that_they_have_in_a_folder_and_another_night_labels_what_was_overwritten(
    server: CloudServer, bucket: str, tmp_path: Path
) -> None:
    files = {f"{number % 7}/{number:03d}.jpg": draw_file(5, number, broken_fraction=0.05).data for number in range(200)}
    url = put(server, bucket, files)
    for key, data in files.items():
        (tmp_path / "in" / key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / key).write_bytes(data)
    model = str(checkpoints.write_small(tmp_path / "model"))
    columns = ("label_ids", "label_scores", "embedding", "width_px")
    found = {}
    with running_head({**os.environ, **server.environment}) as head:
        for root in (url, f"file://{tmp_path}/in"):
            output = str(tmp_path / root.partition("://")[0])
            flags = ("--input", root, "--output", output, "--model", model, "--max-failed-fraction=0.5")
            done = head.label_bucket(*flags)
            assert done.returncode == 0, done.stderr
            labels, failures = table(output, "labels"), table(output, "failures")
            found[root] = {
                "uris": [uri.removeprefix(root) for uri in labels["uri"].to_pylist()],
                "failures": sorted(failures["failure_kind"].to_pylist()),
                **{name: labels[name].to_pylist() for name in columns},
            }
        server.write(bucket, "in/0/000.jpg", files["1/001.jpg"])
        server.delete(bucket, "in/2/002.jpg")
        output = str(tmp_path / server.scheme)
        done = head.label_bucket("--input", url, "--output", output, "--model", model, "--max-failed-fraction=0.5")
        assert done.returncode == 0, done.stderr
        counts = entries(output)[-1]["counts"]
        assert (counts["unchanged"], counts["listed"], counts["deleted"]) == (198, 199, 1)
    in_cloud, in_folder = found.values()
    assert in_cloud == in_folder
    assert len(in_cloud["uris"]) + len(in_cloud["failures"]) == 200
    assert in_cloud["failures"]
