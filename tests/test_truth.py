"""Labeled sets of every kind: the same pictures, still encoded, each with what the set calls it."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import Repository, serve_hub
from servers import S3Server
from test_fetch import put

from pipeline import storage, truth
from pipeline.draw import CLASSES, draw_file
from pipeline.errors import ConfigError, SourceError
from pipeline.truth import Item, LabeledSet

FILES = [draw_file(5, index) for index in range(12)]


def write_folder(folder: Path) -> Path:
    for file in FILES:
        (folder / file.path).parent.mkdir(parents=True, exist_ok=True)
        (folder / file.path).write_bytes(file.data)
    return folder


def rows(**changes: Any) -> pa.Table:
    columns: dict[str, Sequence[Any]] = {
        "image": [{"bytes": file.data, "path": file.path} for file in FILES],
        "label": [file.label for file in FILES],
    }
    return pa.table({name: column for name, column in {**columns, **changes}.items() if column is not None})


def write_parquet(path: Path, **changes: Any) -> str:
    pq.write_table(rows(**changes), path, row_group_size=5)
    return str(path)


def write_typed(path: Path) -> str:
    """With the footer of `datasets`: a column of type Image, and one of type ClassLabel."""
    from datasets import ClassLabel, Features, Image

    features = Features({"image": Image(), "label": ClassLabel(names=sorted(CLASSES))})
    table = rows(label=pa.array([sorted(CLASSES).index(str(file.label)) for file in FILES]))
    footer = {"huggingface": json.dumps({"info": {"features": features.to_dict()}})}
    pq.write_table(table.replace_schema_metadata(footer), path)
    return str(path)


def contents(labeled: LabeledSet, **options: Any) -> list[tuple[str | None, bytes]]:
    """What is called what, folder or not."""
    return [(item.label, _data(labeled, item)) for item in truth.items(labeled, **options)]


def _data(labeled: LabeledSet, item: Item) -> bytes:
    return storage.connect(labeled.root).get(item.info.key) if item.data is None else item.data


EXPECTED = [(file.label, file.data) for file in FILES]


# --- folders ------------------------------------------------------------------------------------------------------


def test_a_folder_of_classes_is_listed_in_byte_order_with_the_uris_of_a_labeling_run(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in")
    for path in ("notes.txt", ".DS_Store", "fish/.hidden.jpg", ".git/config"):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(b"x")
    (folder / "fish" / "more").mkdir()
    (folder / "fish" / "more" / "ohne Endung").write_bytes(FILES[0].data)
    labeled = truth.open_set(str(folder))
    keys = sorted([file.path for file in FILES] + ["fish/more/ohne Endung"])
    found = list(truth.items(labeled))
    assert [item.info.key for item in found] == keys
    assert [item.label for item in found] == [key.partition("/")[0] for key in keys]
    assert labeled.uri_root == f"file://{folder}"
    assert (labeled.num_images, labeled.num_outside) == (13, 1)
    assert labeled.names == tuple(sorted({str(file.label) for file in FILES} | {"fish"}))


def test_a_bucket_prefix_of_classes_is_read_like_a_folder(s3: S3Server, bucket: str) -> None:
    put(s3, bucket, {f"val/{file.path}": file.data for file in FILES})
    labeled = truth.open_set(f"{bucket}/val/")
    assert labeled.uri_root == f"{bucket}/val"
    assert contents(labeled) == [(file.label, file.data) for file in sorted(FILES, key=lambda file: file.path)]


def test_a_bucket_prefix_of_data_files_is_told_how_to_name_them(s3: S3Server, bucket: str) -> None:
    put(s3, bucket, {"val/a.jpg": b"x", "val/b.parquet": b"y"})
    with pytest.raises(ConfigError, match=r"expected <class>/<file>, found b\.parquet; give URL/\*\.parquet instead"):
        truth.open_set(f"{bucket}/val")


def test_parquet_in_a_bucket_is_a_set_too(s3: S3Server, bucket: str, tmp_path: Path) -> None:
    write_parquet(tmp_path / "x.parquet")
    put(s3, bucket, {"val/x.parquet": (tmp_path / "x.parquet").read_bytes()})
    labeled = truth.open_set(f"{bucket}/val/*.parquet")
    assert labeled.uri_root == f"{bucket}/val/*.parquet#data"
    assert contents(labeled) == EXPECTED


@pytest.mark.parametrize("files", [[], ["a.jpg", "b.jpg"], [".x/a.jpg"]])
def test_a_folder_without_a_picture_in_a_class_is_refused(tmp_path: Path, files: list[str]) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    num_outside = sum(not name.startswith(".") for name in files)
    with pytest.raises(SourceError, match=f"expected pictures as <class>/<file>, found {num_outside} files and no"):
        truth.open_set(str(tmp_path))


def test_a_folder_of_classes_has_no_columns_or_splits(tmp_path: Path) -> None:
    write_folder(tmp_path)
    with pytest.raises(ConfigError, match="has no splits or columns; give the folder of the split itself"):
        truth.open_set(str(tmp_path), split="train")


@pytest.mark.parametrize("where", ["no/such/folder", "/no/such", "no such", "./nothing"])
def test_a_name_that_is_neither_here_nor_a_hub_id_asks_no_hub(where: str) -> None:
    with pytest.raises(ConfigError, match="expected a folder, a URL, Parquet files or a hub id, found no such folder"):
        truth.open_set(where)


# --- tables -------------------------------------------------------------------------------------------------------


def test_parquet_with_bytes_is_read_in_its_order_whether_or_not_it_was_written_by_datasets(tmp_path: Path) -> None:
    typed = truth.open_set(write_typed(tmp_path / "typed.parquet"))
    assert typed.names == tuple(sorted(CLASSES))
    assert contents(typed) == EXPECTED
    plain = truth.open_set(write_parquet(tmp_path / "plain.parquet"))
    assert plain.names is None
    assert contents(plain) == EXPECTED
    assert [item.info.key for item in truth.items(plain)] == [f"{number:010d}" for number in range(12)]
    assert plain.uri_root == f"file://{tmp_path}/plain.parquet#data"


def test_bytes_alone_are_a_picture_and_numbers_are_labels(tmp_path: Path) -> None:
    where = write_parquet(
        tmp_path / "x.parquet", image=[file.data for file in FILES], label=None, cls=list(range(-1, 11))
    )
    found = contents(truth.open_set(where))
    assert [label for label, _ in found] == [str(number) for number in range(-1, 11)]
    assert [data for _, data in found] == [file.data for file in FILES]


def test_a_picture_that_stands_beside_the_table_is_read_from_there(tmp_path: Path) -> None:
    write_folder(tmp_path / "in")
    images = [{"bytes": None, "path": f"{tmp_path}/in/{file.path}"} for file in FILES]
    where = write_parquet(tmp_path / "x.parquet", image=images)
    assert contents(truth.open_set(where)) == EXPECTED
    (tmp_path / "in" / FILES[3].path).unlink()
    with pytest.raises(SourceError, match=rf"{FILES[3].path}: not found"):
        contents(truth.open_set(where))


def test_a_row_without_a_picture_or_a_label_is_there_without_it(tmp_path: Path) -> None:
    images = [None, {"bytes": None, "path": None}, *({"bytes": file.data, "path": None} for file in FILES[2:])]
    where = write_parquet(tmp_path / "x.parquet", image=images, label=[None, *(file.label for file in FILES[1:])])
    assert contents(truth.open_set(where)) == [(None, b""), (FILES[1].label, b""), *EXPECTED[2:]]


def test_the_class_of_a_test_split_is_no_label(tmp_path: Path) -> None:
    from datasets import ClassLabel, Features, Image

    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    table = rows(label=pa.array([-1, 0, 1, None] * 3))
    footer = {"huggingface": json.dumps({"info": {"features": features.to_dict()}})}
    pq.write_table(table.replace_schema_metadata(footer), tmp_path / "x.parquet")
    labeled = truth.open_set(str(tmp_path / "x.parquet"))
    assert [item.label for item in truth.items(labeled)] == [None, "a", "b", None] * 3


def test_a_folder_of_data_files_is_loaded_with_its_splits(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-0.parquet")
    write_parquet(tmp_path / "test-0.parquet", label=["fish"] * 12)
    with pytest.raises(
        ConfigError, match=r"expected --split to be one of its splits \(train, test\), found none given"
    ):
        truth.open_set(str(tmp_path))
    with pytest.raises(ConfigError, match=r"\(train, test\), found val"):
        truth.open_set(str(tmp_path), split="val")
    labeled = truth.open_set(str(tmp_path), split="test")
    assert {label for label, _ in contents(labeled)} == {"fish"}
    assert labeled.uri_root == f"file://{tmp_path}#test"


def test_several_parquet_files_are_one_set(tmp_path: Path) -> None:
    for number in range(2):
        pq.write_table(rows().slice(6 * number, 6), tmp_path / f"{number}.parquet")
    assert contents(truth.open_set(f"{tmp_path}/*.parquet")) == EXPECTED


@pytest.mark.parametrize(
    ("changes", "named", "message"),
    [
        (
            {"image": None},
            {},
            r"expected one image column, found none among label \(string\); name it with --image-column",
        ),
        (
            {"label": None},
            {},
            r"expected one label column, found none among image \(.*\); name it with --label-column",
        ),
        ({"thumb": [b"x"] * 12}, {}, "expected one image column, found image and thumb among"),
        ({"target": [1] * 12}, {}, "expected one label column, found label and target among"),
        ({"score": [0.5] * 12}, {"label_column": "score"}, "--label-column score: expected a column with one class"),
        ({}, {"image_column": "label"}, "--image-column label: expected a column with images or bytes, found image"),
        ({}, {"image_column": "picture"}, "--image-column picture: expected a column with images or bytes"),
        ({"label": [[1]] * 12}, {}, "expected one label column, found none"),
    ],
)
def test_columns_that_cannot_be_told_are_listed(
    tmp_path: Path, changes: dict[str, Any], named: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        truth.open_set(write_parquet(tmp_path / "x.parquet", **changes), **named)


def test_columns_that_are_named_are_read(tmp_path: Path) -> None:
    where = write_parquet(tmp_path / "x.parquet", thumb=[b"x"] * 12, kind=["fish"] * 12)
    labeled = truth.open_set(where, image_column="thumb", label_column="kind")
    assert contents(labeled) == [("fish", b"x")] * 12


def test_files_that_are_not_there_or_not_parquet_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.parquet: expected data files, found none"):
        truth.open_set(str(tmp_path / "gone.parquet"))
    (tmp_path / "bad.parquet").write_bytes(b"hello")
    with pytest.raises(ConfigError, match=r"bad\.parquet: cannot be loaded \(ArrowInvalid: Parquet file size is 5"):
        truth.open_set(str(tmp_path / "bad.parquet"))


def test_a_file_that_ends_in_the_middle_of_its_rows_is_named(tmp_path: Path) -> None:
    sink = io.BytesIO()
    pq.write_table(rows(), sink, row_group_size=5)
    data = bytearray(sink.getvalue())
    data[len(data) // 3 : len(data) // 2] = bytes(len(data) // 2 - len(data) // 3)
    (tmp_path / "x.parquet").write_bytes(data)
    with pytest.raises(SourceError, match=r"--dataset file://.*x\.parquet: cannot be read on \("):
        contents(truth.open_set(str(tmp_path / "x.parquet")))


# --- the hub ------------------------------------------------------------------------------------------------------

_OPEN = """
import json, sys
from pipeline import truth
from pipeline.errors import LabelBucketError
for where, split in json.loads(sys.argv[1]):
    try:
        labeled = truth.open_set(where, split=split)
        print(json.dumps([labeled.uri_root, [[item.label, len(item.data)] for item in truth.items(labeled)]]))
    except LabelBucketError as error:
        print(json.dumps([error.exit_code, str(error)]))
"""


def test_a_set_of_the_hub_is_streamed_and_one_that_is_not_for_you_says_so(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    write_typed(tmp_path / "set" / "validation-00000-of-00001.parquet")
    repositories = {
        "datasets/me/drawn": Repository({"main": tmp_path / "set"}),
        "datasets/me/gated": Repository({"main": tmp_path / "set"}, is_gated=True),
    }
    wanted = [["me/drawn", "validation"], ["me/drawn", "train"], ["me/gated", None], ["me/typo", None]]
    with serve_hub(repositories) as hub:
        # The hub's clients read their environment once, at import.
        ended = subprocess.run(
            [sys.executable, "-c", _OPEN, json.dumps(wanted)],
            env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert not [request for request in hub.requests if request.startswith("GET datasets/me/gated/resolve/")]
    drawn, train, gated, typo = map(json.loads, ended.stdout.splitlines())
    assert drawn == ["me/drawn#validation", [[file.label, len(file.data)] for file in FILES]]
    assert train == [
        2,
        "--dataset me/drawn: expected --split to be one of its splits (validation), found train",
    ]
    for code, message in (gated, typo):
        assert code == 2
        assert "not on the hub or not for this login; check the name, accept its terms" in message
    assert "is a gated dataset on the Hub" in gated[1]


# --- some of them -------------------------------------------------------------------------------------------------


def test_a_limit_gives_the_first_ones_and_a_fraction_the_same_ones_for_the_same_seed(tmp_path: Path) -> None:
    labeled = truth.open_set(write_parquet(tmp_path / "x.parquet"))
    assert contents(labeled, limit=5) == EXPECTED[:5]
    half = [item.info.key for item in truth.items(labeled, fraction=0.5)]
    assert half == [item.info.key for item in truth.items(labeled, fraction=0.5)]
    assert half == sorted(half)
    assert 0 < len(half) < 12
    others = [[item.info.key for item in truth.items(labeled, fraction=0.5, seed=seed)] for seed in range(1, 4)]
    assert any(other != half for other in others)
    assert [item.info.key for item in truth.items(labeled, fraction=0.5, limit=2)] == half[:2]


def test_a_fraction_is_that_share_of_many_pictures() -> None:
    kept = sum(truth._draw(f"0/{number}") < 0.3 for number in range(20_000))
    assert 5_800 < kept < 6_200
