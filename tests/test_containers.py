"""Images in tar shards and in Parquet files: listed, read, and labeled as loose objects are."""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import checkpoints
import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import servers
from cluster import ROOT, Head
from hub_server import Repository, serve_hub
from published import entries, table
from servers import Fault, S3Server
from test_manifest import WRITERS, keys_of

from pipeline import catalog, fetch, listing, storage
from pipeline.draw import draw_file
from pipeline.errors import ConfigError, ImageError
from pipeline.options import load_config
from pipeline.store import ObjectInfo

KINDS = ("webdataset", "parquet")


def shard(files: Mapping[str, bytes]) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return sink.getvalue()


def rows(images: Sequence[bytes | None], row_group_rows: int = 3) -> bytes:
    """As `datasets` writes them."""
    nested = [None if image is None else {"bytes": image, "path": f"{row}.jpg"} for row, image in enumerate(images)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    sink = io.BytesIO()
    written = pa.table({"label": list(range(len(images))), "image": pa.array(nested, kind)})
    pq.write_table(written, sink, row_group_size=row_group_rows)
    return sink.getvalue()


CONTAINER: dict[str, Callable[[Mapping[str, bytes]], tuple[str, bytes]]] = {
    "webdataset": lambda files: (".tar", shard(files)),
    "parquet": lambda files: (".parquet", rows(list(files.values()))),
}


def listed(url: str, prefix: str = "", start_after: str = "") -> list[ObjectInfo]:
    return [info for page in storage.connect_input(url).list_pages(prefix, start_after) for info in page]


def read(url: str) -> list[tuple[str, bytes | str]]:
    """Every key with its bytes, or the kind of failure."""
    infos = listed(url)
    found = fetch.fetch(storage.connect_input(url), infos, max_image_bytes=10**6, deadline_s=10)
    return [
        (info.key, str(each.kind) if isinstance(each, ImageError) else each)
        for info, each in zip(infos, found, strict=True)
    ]


def put(s3: S3Server, bucket: str, files: Mapping[str, bytes]) -> None:
    servers.put_quickly(s3, bucket[5:], {f"in/{key}": data for key, data in files.items()})


FILES = {"b.jpg": b"bb", "b.json": b"{}", "a/x.png": b"xxx", "ä.jpg": b"\0" * 1000, "b.cls": b"1"}


def test_members_of_shards_are_listed_in_order_and_read_one_by_one(s3: S3Server, bucket: str) -> None:
    put(s3, bucket, {"x.tar": shard(FILES), "x.tar-1.tar": shard({"z.jpg": b"z"}), "readme.md": b"no shard"})
    found = read(f"webdataset+{bucket}/in")
    assert found == [
        ("x.tar-1.tar/z.jpg", b"z"),
        ("x.tar/a/x.png", b"xxx"),
        ("x.tar/b.jpg", b"bb"),
        ("x.tar/ä.jpg", b"\0" * 1000),
    ]
    assert [key for key, _ in found] == sorted((key for key, _ in found), key=str.encode)


def test_rows_of_parquet_files_are_read_a_row_group_at_a_time(s3: S3Server, bucket: str) -> None:
    images = [bytes([number]) * 50 for number in range(8)]
    put(s3, bucket, {"a.parquet": rows([*images, None, b""]), "b/c.parquet": rows(images[:2])})
    before = len(s3.requests)
    found = read(f"parquet+{bucket}/in")
    gets = [path for method, path in s3.requests[before:] if method == "GET" and ".parquet" in path]
    assert found == [
        *((f"a.parquet/{number:010d}", images[number]) for number in range(8)),
        ("a.parquet/0000000008", "missing"),
        ("a.parquet/0000000009", "empty"),
        ("b/c.parquet/0000000000", images[0]),
        ("b/c.parquet/0000000001", images[1]),
    ]
    # To list and to read: each file's end and, before that, its footer; and each of five row groups once.
    assert len(gets) <= 2 * 2 * 2 + 5


def test_the_images_are_those_of_the_column_that_holds_bytes_and_is_called_so(tmp_path: Path) -> None:
    def nested(kind: pa.DataType, value: object) -> pa.Array:
        return pa.array([{"bytes": value, "path": "a"}], pa.struct([("bytes", kind), ("path", pa.string())]))

    sizes, audio, image = nested(pa.int64(), 7), nested(pa.binary(), b"sound"), nested(pa.binary(), b"x")
    pq.write_table(pa.table({"sizes": sizes, "audio": audio, "image": image}), tmp_path / "a.parquet")
    assert [data for _, data in read(f"parquet+file://{tmp_path}")] == [b"x"]
    pq.write_table(pa.table({"sizes": sizes}), tmp_path / "a.parquet")
    assert read(f"parquet+file://{tmp_path}") == [("a.parquet/(cannot be read)", "corrupt")]


def test_small_images_in_a_large_file_are_neither_empty_nor_too_large(tmp_path: Path) -> None:
    same = [b"same"] * 20_000
    pq.write_table(pa.table({"image": same, "other": [b"0"] * 20_000}), tmp_path / "a.parquet", compression="zstd")
    pq.write_table(pa.table({"image": [b"one"], "other": [os.urandom(3 * 10**6)]}), tmp_path / "b.parquet")
    assert [data for _, data in read(f"parquet+file://{tmp_path}")] == [*same, b"one"]


def test_row_groups_and_files_are_read_once_though_threads_cross_their_borders(s3: S3Server, bucket: str) -> None:
    images = [bytes([number]) * 50_000 for number in range(100)]
    put(s3, bucket, {f"{number}.parquet": rows(images[number * 25 : number * 25 + 25], 10) for number in range(4)})
    before = len(s3.requests)
    assert [data for _, data in read(f"parquet+{bucket}/in")] == images
    num_gets = sum(method == "GET" and ".parquet" in path for method, path in s3.requests[before:])
    assert num_gets <= 4 * 2 * 2 + 4 * 3 + 4


@pytest.mark.parametrize("column", ["image", "bytes"])
def test_a_plain_column_of_bytes_is_one_of_images(tmp_path: Path, column: str) -> None:
    pq.write_table(pa.table({"id": [1, 2], column: [b"one", b"two"]}), tmp_path / "a.parquet")
    assert [data for _, data in read(f"parquet+file://{tmp_path}")] == [b"one", b"two"]


def test_a_listing_of_members_begins_with_its_prefix_and_after_its_start(tmp_path: Path) -> None:
    for name in ("a.tar", "a.tar-b.tar", "c/d.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(shard({f"{number}.jpg": b"x" for number in range(3)}))
    url = f"webdataset+file://{tmp_path}"
    every = [info.key for info in listed(url)]
    assert len(every) == 9
    for number, key in enumerate(every):
        assert [info.key for info in listed(url, start_after=key)] == every[number + 1 :]
    for prefix in ("a.tar", "a.tar/", "a.tar/1", "c/", "c/d.tar/2.jpg", "none"):
        assert [info.key for info in listed(url, prefix)] == [key for key in every if key.startswith(prefix)]


def test_ranges_of_containers_hold_every_member_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "MIN_RANGE_OBJECTS", 1)
    for number in range(5):
        (tmp_path / f"{number}.tar").write_bytes(shard({f"{each}.jpg": b"x" for each in range(4)}))
    source = storage.connect_input(f"webdataset+file://{tmp_path}")
    ranges = catalog.between(listing.borders(source))
    assert len(ranges) == 6
    assert keys_of(source, ranges) == [info.key for info in listed(source.root)]


def test_of_two_members_with_one_name_the_last_holds(tmp_path: Path) -> None:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for data in (b"old", b"newer"):
            member = tarfile.TarInfo("./a.jpg")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("b.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        twin = tarfile.TarInfo("c.jpg")
        twin.type, twin.linkname = tarfile.LNKTYPE, "./a.jpg"
        tar.addfile(twin)
    (tmp_path / "x.tar").write_bytes(sink.getvalue())
    assert read(f"webdataset+file://{tmp_path}") == [("x.tar/a.jpg", b"newer"), ("x.tar/c.jpg", b"newer")]


def test_a_member_whose_bytes_are_not_there_as_they_are_unpacked_is_corrupt(tmp_path: Path) -> None:
    with (tmp_path / "s.bmp").open("wb") as file:
        file.write(b"begin")
        file.seek(10**6)
        file.write(b"end")
    subprocess.run(["tar", "-S", "--format=gnu", "-cf", "in.tar", "s.bmp"], cwd=tmp_path, check=True)
    whole = shard({"a.jpg": b"x" * 5000, "b.jpg": b"y" * 5000})
    (tmp_path / "cut.tar").write_bytes(whole[: 512 + 5120 + 512 + 100])
    header = bytearray(tarfile.TarInfo("n.jpg").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = (-600).to_bytes(12, "big", signed=True)
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header[:512]):06o}\0 ".encode()
    (tmp_path / "n.tar").write_bytes(bytes(header) + bytes(10_240))
    found = dict(read(f"webdataset+file://{tmp_path}"))
    assert found["in.tar/s.bmp"] == "corrupt"
    assert (found["cut.tar/a.jpg"], found["cut.tar/b.jpg"]) == (b"x" * 5000, "corrupt")
    assert not any(isinstance(data, bytes) for key, data in found.items() if key.startswith("n.tar"))


@pytest.mark.parametrize("size", ["1e30", "abc", "-5"])
def test_a_tar_with_impossible_numbers_gives_no_image(tmp_path: Path, size: str) -> None:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("a.jpg")
        member.pax_headers = {"size": size, "GNU.sparse.size": size}
        tar.addfile(member, io.BytesIO(b""))
    (tmp_path / "x.tar").write_bytes(sink.getvalue())
    assert not any(isinstance(data, bytes) for _, data in read(f"webdataset+file://{tmp_path}"))


def test_a_shard_that_is_refused_or_archived_is_one_failure_and_the_others_are_read(
    s3: S3Server, bucket: str, faults: list[Fault]
) -> None:
    put(s3, bucket, {f"{name}.tar": shard({"a.jpg": b"a"}) for name in ("cold", "good", "shut")})
    s3.client.put_object(Bucket=bucket[5:], Key="in/cold.tar", Body=shard({"a.jpg": b"a"}), StorageClass="GLACIER")
    faults.append(Fault.always(403, "GET", "/shut.tar"))
    assert read(f"webdataset+{bucket}/in") == [
        ("cold.tar/(cannot be read)", "archived"),
        ("good.tar/a.jpg", b"a"),
        ("shut.tar/(cannot be read)", "forbidden"),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_container_that_is_none_is_one_failure_and_the_others_are_read(tmp_path: Path, kind: str) -> None:
    suffix, good = CONTAINER[kind]({"0.jpg": b"good"})
    for name, data in {"a": b"no container at all" * 100, "b": good, "c": b"", "d": good[: len(good) // 2]}.items():
        (tmp_path / f"{name}{suffix}").write_bytes(data)
    found = dict(read(f"{kind}+file://{tmp_path}"))
    assert found[f"a{suffix}/(cannot be read)"] == "corrupt"
    assert b"good" in found.values()
    assert found[f"c{suffix}/(cannot be read)"] == "corrupt"


def test_a_shard_that_is_overwritten_changes_all_its_members_and_no_other(s3: S3Server, bucket: str) -> None:
    put(s3, bucket, {"x.tar": shard(FILES), "y.tar": shard(FILES)})
    url = f"webdataset+{bucket}/in"
    before = listed(url)
    put(s3, bucket, {"x.tar": shard({**FILES, "b.jpg": b"BB"})})
    after = listed(url)
    assert [old.etag == new.etag for old, new in zip(before, after, strict=True)] == [False] * 3 + [True] * 3
    outcomes = fetch.fetch(storage.connect_input(url), before, max_image_bytes=10**6, deadline_s=5)
    assert [str(each.kind) if isinstance(each, ImageError) else "read" for each in outcomes] == (
        ["changed"] * 3 + ["read"] * 3
    )


def test_what_is_given_as_an_input_of_containers_has_one_spelling(tmp_path: Path) -> None:
    output = ["--output", str(tmp_path / "out")]
    config = load_config(["--input", f"webdataset+{tmp_path}/in/", *output], {})
    assert config.input == f"webdataset+file://{tmp_path}/in"
    assert load_config(["--input", "parquet+s3://b/rows/", *output], {}).input == "parquet+s3://b/rows"
    with pytest.raises(ConfigError, match="outside --input"):
        load_config(["--input", f"webdataset+{tmp_path}", *output], {})
    with pytest.raises(ConfigError, match="--manifest: expected an input of loose objects"):
        storage.connect_input("parquet+s3://b/rows", "s3://b/list.csv")


# --- the hub ------------------------------------------------------------------------------------------------------

_READ = """
import hashlib, json, sys
from pipeline import fetch, storage
source = storage.connect_input(sys.argv[1])
infos = [info for page in source.list_pages() for info in page]
found = fetch.fetch(source, infos, max_image_bytes=10**6, deadline_s=10)
print(json.dumps([[info.key, info.etag, hashlib.sha256(data).hexdigest()] for info, data in zip(infos, found)]))
"""


@pytest.mark.parametrize("revision", ["", "@refs/convert/parquet"])
def test_rows_of_a_data_set_of_the_hub_are_read_as_datasets_wrote_them(tmp_path: Path, revision: str) -> None:
    pictures = [draw_file(5, number).data for number in range(6)]
    columns = {"image": [{"bytes": data, "path": None} for data in pictures], "label": list(range(6))}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    file = tmp_path / "set" / "train-00000-of-00001.parquet"
    file.parent.mkdir()
    datasets.Dataset.from_dict(columns, features=features).to_parquet(file)
    folders = {revision.removeprefix("@") or "main": file.parent}
    with serve_hub({"datasets/me/drawn": Repository(folders)}) as hub:
        # The hub's client reads its environment once, at import.
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        ended = subprocess.run(
            [sys.executable, "-c", _READ, f"parquet+hf://datasets/me/drawn{revision}"],
            cwd=ROOT,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    blob = hashlib.sha1(file.read_bytes()).hexdigest()
    assert [(key, digest) for key, _, digest in found] == [
        (f"{file.name}/{number:010d}", hashlib.sha256(data).hexdigest()) for number, data in enumerate(pictures)
    ]
    assert all(etag.startswith(f"{blob}@") for _, etag, _ in found)


# --- runs ---------------------------------------------------------------------------------------------------------


def inventory(bucket: str, key: str, infos: Sequence[ObjectInfo]) -> dict[str, bytes]:
    """The files of an S3 Inventory of these objects below in/loose, `key` the one that names the others."""
    objects = [{"key": f"in/loose/{each.key}", "size": each.size_bytes, "e_tag": each.etag} for each in infos]
    data = WRITERS["m.parquet"]([{"bucket": bucket[5:], "is_latest": True, **each} for each in objects])
    said = {
        "sourceBucket": bucket[5:],
        "destinationBucket": f"arn:aws:s3:::{bucket[5:]}",
        "fileFormat": "Parquet",
        "fileSchema": "message s3.inventory { ... }",
        "files": [{"key": "in/lists/1", "size": len(data), "MD5checksum": hashlib.md5(data).hexdigest()}],
    }
    return {key: json.dumps(said).encode(), "lists/1": data}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(checkpoints.write_small(tmp_path_factory.mktemp("model")))


@pytest.mark.slow
@pytest.mark.timeout(600)  # fourteen runs
def test_every_kind_of_input_gives_the_same_labels_to_the_same_200_pictures(
    head: Head, s3: S3Server, bucket: str, model: str
) -> None:
    files = {f"{number:03d}.jpg": draw_file(5, number, broken_fraction=0.05).data for number in range(200)}
    files["007.jpg"] = b""
    halves = [dict(list(files.items())[:100]), dict(list(files.items())[100:])]
    put(s3, bucket, {f"loose/{key}": data for key, data in files.items()})
    put(s3, bucket, {f"tar/{number}.tar": shard(half) for number, half in enumerate(halves)})
    put(s3, bucket, {f"rows/{number}.parquet": rows(list(half.values()), 30) for number, half in enumerate(halves)})
    loose = f"{bucket}/in/loose"
    names = ("m.csv", "m.jsonl", "m.parquet")
    unsorted: list[dict[str, Any]] = [
        {"uri": f"{loose}/{key}", "shelf": key[0]} for key in (*reversed(files), "003.jpg")
    ]
    put(s3, bucket, {f"lists/{name}": WRITERS[name](unsorted) for name in names})
    put(s3, bucket, inventory(bucket, "lists/manifest.json", listed(loose)))
    roots = {
        "": loose,
        "webdataset": f"webdataset+{bucket}/in/tar",
        "parquet": f"parquet+{bucket}/in/rows",
        **dict.fromkeys((*names, "manifest.json"), loose),
    }
    found: dict[str, dict[str, list[Any]]] = {}
    for kind, root in roots.items():
        output = f"{bucket}/out-{kind}"
        flags = ["--input", root, "--output", output, "--model", model, "--max-failed-fraction=0.5"]
        if root == loose and kind:
            flags += ["--manifest", f"{bucket}/in/lists/{kind}"]
        for _ in range(2):  # the second night finds nothing to do
            done = head.label_bucket(*flags, "--gpu-actors=1")
            assert done.returncode == 0, done.stderr
        first, second = entries(output)
        assert (first["counts"]["listed"], second["counts"]["unchanged"]) == (200, 200)
        labels, failures = table(output, "labels"), table(output, "failures")
        assert labels.num_rows + failures.num_rows == 200
        assert all(uri.startswith(f"{root}/") for uri in labels["uri"].to_pylist())
        columns = ("label_ids", "label_scores", "embedding", "width_px")
        found[kind] = {name: labels[name].to_pylist() for name in columns}
        found[kind]["failures"] = sorted(failures["failure_kind"].to_pylist())
        if "." in kind:  # of nights with manifests see test_manifest.py
            continue
        audit = [sys.executable, "jobs/verify_labels.py", "--output", output, "--sample", "5"]
        audited = subprocess.run(audit, cwd=ROOT, env=head.environment, capture_output=True, text=True, check=False)
        assert audited.returncode == 0, audited.stdout + audited.stderr
    assert len(found[""]["failures"]) > 3
    assert "empty" in found[""]["failures"]
    for kind in roots:
        assert found[kind] == found[""], kind
