"""Manifests: every kind of file, every row one outcome, and labels that are those of a listing."""

import bz2
import gzip
import hashlib
import io
import json
import math
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import boto3
import checkpoints
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import servers
from cluster import ROOT, Head
from published import entries, table
from servers import Fault, S3Server

from pipeline import catalog, fetch, listing, manifest, storage
from pipeline.catalog import KeyRange
from pipeline.draw import draw_file
from pipeline.errors import ConfigError, UnstableError
from pipeline.listing import Scope
from pipeline.manifest import Row
from pipeline.store import ABSENT, BAD_URI, ObjectInfo, Source

ROWS: list[dict[str, Any]] = [
    {"uri": "s3://photos/in/b.jpg", "etag": '"e1"', "size_bytes": 7, "rating": 5, "place": 'Zürich, "HB"'},
    {"uri": "s3://photos/in/a.jpg", "etag": None, "size_bytes": None, "rating": None, "place": None},
]
EXTRAS: list[dict[str, Any]] = [{"rating": 5, "place": 'Zürich, "HB"'}, {"rating": None, "place": None}]


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def comma_separated(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pyarrow.csv.write_csv(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def json_lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


WRITERS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "m.parquet": parquet,
    "m.csv": comma_separated,
    "m.csv.gz": lambda rows: gzip.compress(comma_separated(rows)),
    "m.jsonl": json_lines,
    "M.NDJSON.bz2": lambda rows: bz2.compress(json_lines(rows)),
    "m.jsonl.zst": lambda rows: pa.compress(json_lines(rows), "zstd", asbytes=True),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No table of another test."""
    monkeypatch.setenv("LABEL_BUCKET_CACHE", str(tmp_path_factory.mktemp("cache")))


def read(name: str, data: bytes) -> list[Row]:
    return list(manifest.read(name, data, f"s3://lists/{name}"))


def listed(root: str, manifest_url: str, prefix: str = "", start_after: str = "") -> list[ObjectInfo]:
    source = storage.connect_input(root, manifest_url)
    again = storage.connect_input(source.url)
    found = [info for page in source.list_pages(prefix, start_after) for info in page]
    assert found == [info for page in again.list_pages(prefix, start_after) for info in page]
    return found


def keys_of(source: Source, ranges: list[KeyRange]) -> list[str]:
    """The keys in scope of all ranges, one after the other."""
    pages = (page for each in ranges for page in Scope().pages(source, each.after, each.through))
    return [info.key for page in pages for info, is_in_scope in page if is_in_scope]


def written(folder: Path, rows: list[dict[str, Any]], name: str = "m.parquet") -> str:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(WRITERS[name](rows))
    return str(folder / name)


# --- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_says_the_same(name: str) -> None:
    found = read(name, WRITERS[name](ROWS))
    assert [(row.uri, row.etag, row.size_bytes) for row in found] == [
        ("s3://photos/in/b.jpg", "e1", 7),
        ("s3://photos/in/a.jpg", None, None),
    ]
    extras = [json.loads(row.extra or "null") for row in found]
    # A CSV file knows texts only.
    texts = [{key: "" if value is None else str(value) for key, value in extra.items()} for extra in EXTRAS]
    assert extras == (texts if ".csv" in name else EXTRAS)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("m.parquet", b"no parquet", "cannot be read as its name says"),
        ("m.csv.gz", b"no gzip", "cannot be read as its name says"),
        ("m.csv", b"url,etag\na,b\n", r"expected a column uri, found \['url', 'etag'\]"),
        ("m.csv", b"", "expected a column uri"),
        ("m.csv", b"uri\n" + b"x" * 200_000, "cannot be read as its name says"),
        ("m.parquet", parquet([{"path": "a"}]), "expected a column uri"),
        ("m.jsonl", b'{"path": "a"}\n', "expected lines such as"),
    ],
)
def test_a_file_that_is_no_manifest_is_one_clear_line(name: str, data: bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        read(name, data)
    assert f"s3://lists/{name}" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_rows_that_are_no_text_or_no_json_are_rows() -> None:
    found = read("m.jsonl", b'{"uri": "a.jpg"}\n\nno json\n[1]\n{"uri": 7}\n{"uri": "\xff.jpg", "x": "\xfe"}\n')
    assert [row.uri for row in found] == ["a.jpg", "line 3: no json", "line 4: [1]", "7", "\udcff.jpg"]
    assert json.loads(found[-1].extra or "") == {"x": "\udcfe"}
    latin = pa.table({"uri": pa.array([b"a.jpg", b"\xe4.jpg", None], pa.binary())})
    sink = io.BytesIO()
    pq.write_table(latin, sink)
    assert [row.uri for row in read("m.parquet", sink.getvalue())] == ["a.jpg", "\udce4.jpg", None]
    assert [row.uri for row in read("m.csv", b"uri,x\n\xe4.jpg,1\nb.jpg\nc.jpg,1,2\n")] == [
        "\udce4.jpg",
        "b.jpg",
        "c.jpg",
    ]


# --- keys ---------------------------------------------------------------------------------------------------------

BAD_URIS = [
    "http://elsewhere/a.jpg",
    "simplecache::s3://photos/in/23.jpg",
    "s3://other/in/a.jpg",
    "s3://photos/input/a.jpg",
    "s3://photos/in",
    "s3://photos/in/",
    "/etc/passwd",
    "s3://photos/in/s3://photos/in/a.jpg",
    "file:///etc/passwd",
    "a\0b.jpg",
    "\udcff.jpg",
    "x" * 2000,
    "",
]


@pytest.mark.parametrize("uri", [*BAD_URIS, None])
def test_a_uri_that_names_no_object_below_the_input_is_kept_and_marked(uri: str | None) -> None:
    found = manifest.name_of(Row(uri, "etag", 3), "s3://photos/in")
    assert found.is_bad
    assert 0 < len(found.key.encode()) <= 1024
    assert (found.etag, found.size_bytes) == (None, None)


@pytest.mark.parametrize(
    ("uri", "root", "key"),
    [
        ("s3://photos/in/a/b.jpg", "s3://photos/in", "a/b.jpg"),
        ("s3a://photos/in/a.jpg", "s3://photos/in", "a.jpg"),
        ("a/b c%20d.jpg", "s3://photos/in", "a/b c%20d.jpg"),
        ("a//../b.jpg", "s3://photos/in", "a//../b.jpg"),
        ("/data/in/a.jpg", "file:///data/in", "a.jpg"),
        ("file:///data/in/a.jpg", "file:///data/in", "a.jpg"),
        ("a.jpg", "file:///data/in", "a.jpg"),
    ],
)
def test_a_uri_below_the_input_and_a_path_relative_to_it_name_an_object(uri: str, root: str, key: str) -> None:
    assert manifest.name_of(Row(uri, None, None), root)[:2] == (key, False)


@pytest.mark.parametrize(
    "uri", ["../a.jpg", "a/../../b.jpg", "/data/in/../a.jpg", "./a.jpg", "a//b.jpg", "/data/a.jpg"]
)
def test_a_path_never_leads_out_of_a_local_input(uri: str) -> None:
    assert manifest.name_of(Row(uri, None, None), "file:///data/in").is_bad


def test_a_row_that_says_nothing_is_bad_though_its_text_could_be_a_key() -> None:
    (row,) = [row for row in read("m.jsonl", b'{"uri": "a.jpg"}\nno json\n') if row.uri != "a.jpg"]
    assert manifest.name_of(row, "s3://photos/in").is_bad


def test_what_storage_calls_an_object_is_its_key_whatever_it_looks_like() -> None:
    for key in ("/a.jpg", "http://site/a.jpg", "a//b.jpg"):
        assert manifest.name_of(Row(f"s3://photos/in/{key}", "e", 1, is_key=True), "s3://photos/in")[:2] == (key, False)


def test_values_that_no_column_takes_are_none() -> None:
    rows = [{"uri": "a.jpg", "size_bytes": size, "etag": "e"} for size in (2**63, -1, 10**300, "9" * 5000, "x", 1.5)]
    found = read("m.jsonl", json_lines([*rows, {"uri": "b.jpg", "x": math.nan, "y": -math.inf, "z": 1.5}]))
    assert [row.size_bytes for row in found[:-1]] == [None] * 6
    assert json.loads(found[-1].extra or "", parse_constant=pytest.fail) == {"x": None, "y": None, "z": 1.5}
    nested = b'{"uri": "a.jpg", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"
    assert [row.is_bad for row in read("m.jsonl", b'{"uri": "b.jpg"}\n' + nested)] == [False, True]


# --- the source ---------------------------------------------------------------------------------------------------


def test_rows_come_sorted_and_once_whatever_their_order(tmp_path: Path) -> None:
    rows = [{"uri": f"{number * 7919 % 5000:04d}.jpg", "etag": "e", "size_bytes": number} for number in range(5000)]
    url = written(tmp_path / "lists", [*rows, *({**row, "size_bytes": 0} for row in rows)])
    found = listed("s3://photos/in", url)
    assert [info.key for info in found] == [f"{number:04d}.jpg" for number in range(5000)]
    sizes = {row["uri"]: row["size_bytes"] for row in rows}
    assert all(info.size_bytes == sizes[info.key] for info in found)  # the first of two rows holds
    assert [info.key for info in listed("s3://photos/in", url, start_after="4997.jpg")] == ["4998.jpg", "4999.jpg"]
    assert len(listed("s3://photos/in", url, prefix="12")) == 100
    assert [info.key for info in listed("s3://photos/in", url, "12", "1298.jpg")] == ["1299.jpg"]
    assert listed("s3://photos/in", url, "5") == []


def test_ranges_of_a_manifest_hold_its_objects_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "MIN_RANGE_OBJECTS", 300)
    rows = [{"uri": f"{number:04d}.jpg", "etag": "e", "size_bytes": 1} for number in range(1000)]
    source = storage.connect_input("s3://photos/in", written(tmp_path / "lists", rows))
    ranges = catalog.between(listing.borders(source))
    assert len(ranges) == 4
    assert keys_of(source, ranges) == [row["uri"] for row in rows]


def test_a_folder_of_manifests_is_one_and_other_files_in_it_are_none(tmp_path: Path) -> None:
    written(tmp_path / "lists", [{"uri": "b", "etag": "e", "size_bytes": 1}], "m.parquet")
    written(tmp_path / "lists", [{"uri": "a", "etag": "e", "size_bytes": 1}], "m.csv.gz")
    (tmp_path / "lists" / "_SUCCESS").write_bytes(b"")
    assert [info.key for info in listed("s3://photos/in", str(tmp_path / "lists"))] == ["a", "b"]


def test_a_folder_that_is_called_as_a_file_is_a_folder(tmp_path: Path) -> None:
    url = written(tmp_path / "list.parquet", [{"uri": "a", "etag": "e", "size_bytes": 1}], "m.parquet")
    assert [info.key for info in listed("s3://photos/in", str(Path(url).parent))] == ["a"]


def test_a_manifest_at_the_top_is_that_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, [{"uri": "a", "etag": "e", "size_bytes": 1}], "m.csv")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="found nothing"):
        listed("s3://photos/in", "/m.csv")
    with pytest.raises(ConfigError, match="in a bucket or a folder"):
        listed("s3://photos/in", "s3://lists")


def test_tables_that_nothing_used_for_long_are_removed_and_a_full_disk_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LABEL_BUCKET_CACHE", str(tmp_path / "ca#che"))
    rows = [{"uri": "a", "etag": "e", "size_bytes": 1}]
    listed("s3://photos/in", written(tmp_path / "lists", rows))
    tables = tmp_path / "ca#che" / "manifests"
    (first,) = [each for each in tables.iterdir() if each.is_dir()]
    os.utime(first, (0, 0))
    listed("s3://photos/in", written(tmp_path / "more", [*rows, *rows]))
    assert not first.is_dir()
    (second,) = [each for each in tables.iterdir() if each.is_dir()]
    os.utime(second, (0, 0))
    listed("s3://photos/in", str(tmp_path / "more" / "m.parquet"))
    listed("s3://photos/in", written(tmp_path / "lists", [*rows, {"uri": "b", "etag": "e", "size_bytes": 1}]))
    assert second.is_dir()  # it was used again
    many = [{"uri": f"{number:0500d}", "etag": "e", "size_bytes": 1} for number in range(5000)]
    url = written(tmp_path / "lists", many)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        with pytest.raises(ConfigError, match="cannot write to the cache"):
            listed("s3://photos/in", url)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_storage_refuses_to_look_at_is_one_row_and_a_link_to_a_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "s.jpg").write_bytes(b"secret")
    (tmp_path / "in" / "ln").symlink_to(tmp_path / "outside")
    (tmp_path / "in" / "a.jpg").write_bytes(b"a")
    url = written(tmp_path / "lists", [{"uri": "a.jpg"}, {"uri": "ln/s.jpg"}, {"uri": "x" * 300}])
    found = listed(f"file://{tmp_path}/in", url)
    assert [info.is_absent for info in found] == [False, True, True]
    source = storage.connect_input(f"file://{tmp_path}/in", url)
    outcomes = list(fetch.fetch(source, found, max_image_bytes=100, deadline_s=5))
    assert [isinstance(each, bytes) for each in outcomes] == [True, False, False]


def test_another_content_under_the_same_name_is_another_manifest(tmp_path: Path) -> None:
    url = written(tmp_path / "lists", [{"uri": "a", "etag": "e", "size_bytes": 1}])
    assert [info.key for info in listed("s3://photos/in", url)] == ["a"]
    written(tmp_path / "lists", [{"uri": "bc", "etag": "e", "size_bytes": 1}])
    assert [info.key for info in listed("s3://photos/in", url)] == ["bc"]


def test_storage_is_asked_only_for_what_the_manifest_does_not_say(s3: S3Server, bucket: str, tmp_path: Path) -> None:
    servers.put_quickly(s3, bucket[5:], {f"in/{number}": b"123" for number in range(4)})
    real = {info.key: info for page in storage.connect(f"{bucket}/in").list_pages() for info in page}
    rows = [
        {"uri": f"{bucket}/in/0", "etag": real["0"].etag, "size_bytes": 3, "n": 1},
        {"uri": f"{bucket}/in/1", "etag": real["1"].etag, "size_bytes": None, "n": 2},
        {"uri": "2", "etag": None, "size_bytes": 3, "n": 3},
        {"uri": "gone", "etag": None, "size_bytes": None, "n": 4},
    ]
    source = storage.connect_input(f"{bucket}/in", written(tmp_path / "lists", rows))
    (found,) = source.list_pages()
    asked = [s3.num_requests("HEAD", f"{bucket[5:]}/in/{key}") for key in ("0", "1", "2", "gone")]
    assert asked == [0, 1, 1, 1]
    assert [(info.key, info.size_bytes, info.etag) for info in found[:3]] == [
        (key, 3, real[key].etag) for key in ("0", "1", "2")
    ]
    assert found[3].is_absent
    assert [json.loads(info.extra or "") for info in found] == [{"n": number} for number in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone.csv", "found nothing of that kind"),
        ("readme.txt", "expected a .parquet, .csv, .jsonl or .ndjson file"),
        ("empty.csv", "expected rows, found none"),
    ],
)
def test_a_manifest_that_names_nothing_is_one_clear_line(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "readme.txt").write_text("a.jpg\n")
    (tmp_path / "empty.csv").write_text("uri\n")
    with pytest.raises(ConfigError, match=message):
        listed("s3://photos/in", str(tmp_path / name))


@pytest.mark.parametrize("is_csv", [True, False], ids=["csv", "parquet"])
def test_an_s3_inventory_names_the_current_objects_below_the_input(s3: S3Server, bucket: str, is_csv: bool) -> None:
    name = bucket[5:]
    objects: list[dict[str, Any]] = [
        {"key": "in/ä b+c.jpg", "size": 7, "e_tag": "e1", "storage_class": "STANDARD"},
        {"key": "in/deep.jpg", "size": 8, "e_tag": "e2", "storage_class": "GLACIER"},
        {"key": "in/ä b+c.jpg", "size": 5, "e_tag": "e0", "is_latest": False},
        {"key": "in/gone.jpg", "size": None, "e_tag": None, "is_delete_marker": True},
        {"key": "other/a.jpg", "size": 7, "e_tag": "e3", "storage_class": "STANDARD"},
    ]
    flags = {"is_latest": True, "is_delete_marker": False, "storage_class": ""}
    rows = [{"bucket": name, **flags, **each} for each in objects]
    names = ["bucket", "key", "is_latest", "is_delete_marker", "size", "e_tag", "storage_class"]
    if is_csv:
        texts = [[{None: "", True: "true", False: "false"}.get(row[each], row[each]) for each in names] for row in rows]
        for text in texts:
            text[1] = quote_plus(text[1], safe="/")
        lines = "".join(",".join(f'"{value}"' for value in text) + "\n" for text in texts)
        data, columns = gzip.compress(lines.encode()), "Bucket, Key, IsLatest, IsDeleteMarker, Size, ETag, StorageClass"
    else:
        data, columns = parquet(rows), "message s3.inventory { ... }"
    said = {
        "sourceBucket": name,
        "destinationBucket": f"arn:aws:s3:::{name}",
        "fileFormat": "CSV" if is_csv else "Parquet",
        "fileSchema": columns,
        "files": [{"key": "lists/data/1", "size": len(data), "MD5checksum": hashlib.md5(data).hexdigest()}],
    }
    files = {"lists/2026-11-26T01-00Z/manifest.json": json.dumps(said).encode(), "lists/data/1": data}
    servers.put_quickly(s3, name, files)
    found = listed(f"{bucket}/in", f"{bucket}/lists/2026-11-26T01-00Z/manifest.json")
    assert [(info.key, info.size_bytes, info.etag, info.is_archived) for info in found] == [
        ("deep.jpg", 8, "e2", True),
        ("ä b+c.jpg", 7, "e1", False),
    ]
    assert not any(method == "HEAD" and path.startswith(f"/{name}/in/") for method, path in s3.requests)
    s3.client.put_object(Bucket=name, Key="lists/data/1", Body=data[:-1])
    with pytest.raises(UnstableError, match="MD5"):
        listed(f"{bucket}/in/deep", f"{bucket}/lists/2026-11-26T01-00Z/manifest.json")


@pytest.mark.parametrize("data", [b"{}", b"no json", b'{"destinationBucket": 1}'])
def test_a_manifest_json_of_something_else_is_one_clear_line(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(data)
    with pytest.raises(ConfigError, match=r"expected the manifest\.json of an S3 Inventory"):
        listed("s3://photos/in", str(tmp_path / "manifest.json"))


# --- a run --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(checkpoints.write_small(tmp_path_factory.mktemp("model")))


def run(head: Head, root: str, output: str, model: str, *options: str) -> subprocess.CompletedProcess[str]:
    flags = ("--input", root, "--output", output, "--model", model, "--gpu-actors=1", "--max-failed-fraction=0.5")
    return head.label_bucket(*flags, *options)


@pytest.mark.slow
def test_a_manifest_labels_what_it_names_as_a_listing_does_and_its_bad_rows_are_failures(
    head: Head, s3: S3Server, bucket: str, model: str, tmp_path: Path
) -> None:
    root, client = f"{bucket}/in", boto3.client("s3")
    pictures = {f"in/{number:02d}.jpg": draw_file(3, number).data for number in range(24)}
    servers.put_quickly(s3, bucket[5:], {**pictures, "secret.jpg": pictures["in/00.jpg"]})
    rows = [{"uri": f"s3://{bucket[5:]}/{key}", "shelf": f"s{key[3]}"} for key in pictures]
    bad = [uri.replace("s3://photos", bucket) if uri != f"{bucket}/in/gone.jpg" else uri for uri in BAD_URIS]
    elsewhere = socket.create_server(("127.0.0.1", 0))
    elsewhere.setblocking(False)
    assert bad[0] == "http://elsewhere/a.jpg"
    bad[0] = f"http://127.0.0.1:{elsewhere.getsockname()[1]}/a.jpg"
    url = f"{bucket}/lists/tonight.jsonl"
    lines = [*rows[:20], *({"uri": uri} for uri in bad), {"uri": "gone.jpg"}, rows[3], {"uri": "01.jpg"}]
    client.put_object(Bucket=bucket[5:], Key="lists/tonight.jsonl", Body="".join(map(to_line, lines)).encode())
    output, begin = f"{bucket}/out", len(s3.requests)
    done = run(head, root, output, model, "--manifest", url)
    assert done.returncode == 0, done.stderr
    assert "36 rows name 34 objects" in done.stderr
    # Nothing was asked for that the bad ones seem to name: neither below the input nor in another bucket.
    asked = {path.partition("?")[0] for _, path in s3.requests[begin:]}
    assert {path for path in asked if path.startswith(f"/{bucket[5:]}/in/")} == {
        f"/{bucket[5:]}/in/{name}.jpg" for name in [*(f"{number:02d}" for number in range(20)), "gone"]
    }
    assert {path.split("/")[1] for path in asked} == {bucket[5:]}
    with pytest.raises(BlockingIOError):  # nobody waits there to be let in
        elsewhere.accept()
    with socket.create_connection(elsewhere.getsockname()), elsewhere:
        elsewhere.accept()[0].close()  # it would have been noticed
    failures = table(output, "failures")
    kinds = dict(zip(failures["uri"].to_pylist(), failures["failure_kind"].to_pylist(), strict=True))
    assert sorted(kinds.values()) == ["bad_uri"] * 13 + ["missing"]
    assert kinds[f"{root}/gone.jpg"] == "missing"
    labels = table(output, "labels")
    assert labels["uri"].to_pylist() == [row["uri"] for row in rows[:20]]
    assert [json.loads(extra)["shelf"] for extra in labels["extra"].to_pylist()] == [row["shelf"] for row in rows[:20]]
    (entry,) = entries(output)
    assert entry["counts"]["listed"] == 34
    # The same pictures by a listing: the same rows, but for what the manifest adds.
    done = run(head, root, f"{bucket}/other", model)
    assert done.returncode == 0, done.stderr
    by_listing = table(f"{bucket}/other", "labels").slice(0, 20)
    for name in set(by_listing.column_names) - {"extra", "run_id"}:
        assert by_listing[name].to_pylist() == labels[name].to_pylist(), name
    # Again, with one object overwritten and one there now: storage is asked, and nothing else is labeled.
    client.put_object(Bucket=bucket[5:], Key="in/05.jpg", Body=pictures["in/23.jpg"])
    client.put_object(Bucket=bucket[5:], Key="in/gone.jpg", Body=pictures["in/22.jpg"])
    done = run(head, root, output, model, "--manifest", url)
    assert done.returncode == 0, done.stderr
    assert {name: entries(output)[1]["counts"][name] for name in ("labeled", "failed", "unchanged", "deleted")} == {
        "labeled": 2,
        "failed": 0,
        "unchanged": 32,
        "deleted": 0,
    }
    # A night without it: the rest is new; what only a manifest named is gone.
    done = run(head, root, output, model)
    assert done.returncode == 0, done.stderr
    counts = entries(output)[2]["counts"]
    assert (counts["labeled"], counts["unchanged"], counts["deleted"]) == (4, 21, 13)
    audit = [sys.executable, "jobs/verify_labels.py", "--output", output, "--sample", "0"]
    audited = subprocess.run(audit, cwd=ROOT, env=head.environment, capture_output=True, text=True, check=False)
    assert audited.returncode == 0, audited.stdout + audited.stderr


def to_line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"


def test_objects_of_a_manifest_that_may_not_be_looked_at_are_failures_and_an_outage_is_none(
    s3: S3Server, bucket: str, faults: list[Fault], tmp_path: Path
) -> None:
    servers.put_quickly(s3, bucket[5:], {"in/a": b"a", "in/b": b"b"})
    url = written(tmp_path / "lists", [{"uri": "a"}, {"uri": "b"}])
    faults.append(Fault.always(403, "HEAD", "/a"))
    found = listed(f"{bucket}/in", url)
    assert [info.storage_class in (ABSENT, BAD_URI) for info in found] == [True, False]
