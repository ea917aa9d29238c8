"""A unit's objects -> its model input: no row ever gets another row's pixels."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import images
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from checkpoints import squash_spec
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from servers import Fault, S3Server
from test_fetch import SOON_S, put

from pipeline import plan, prepare, schema, storage, store
from pipeline.checkpoint import PreprocessSpec
from pipeline.decode import DEFAULT_LIMITS, DecodeLimits, decode
from pipeline.errors import UnavailableError
from pipeline.image_stats import image_stats
from pipeline.picture import Recipe
from pipeline.preprocess import preprocess
from pipeline.storage import ObjectInfo

SPEC = replace(squash_spec(24), resize="squash", resize_hw_px=(28, 28), crop_px=24)


def prepared(
    url: str,
    infos: list[ObjectInfo],
    spec: PreprocessSpec = SPEC,
    limits: DecodeLimits = DEFAULT_LIMITS,
    deadline_s: float = 5,
) -> pa.Table:
    objects = plan.objects_table(storage.normalize(url), infos)
    table, busy_s = prepare.prepare_unit(
        storage.connect(url), objects, Recipe(spec=spec, limits=limits), deadline_s=deadline_s
    )
    assert table.schema.equals(schema.DECODED)
    assert table.select(schema.OBJECTS.names).equals(objects)
    assert busy_s >= 0
    return table


def pixels_of(table: pa.Table, row: int, spec: PreprocessSpec = SPEC) -> npt.NDArray[np.uint8] | None:
    value = table.column("pixels")[row].as_buffer()
    return None if value is None else np.frombuffer(value, np.uint8).reshape(spec.input_px, spec.input_px, 3)


def write(folder: Path, files: Mapping[str, bytes]) -> list[ObjectInfo]:
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return [info for page in storage.connect(str(folder)).list_pages() for info in page]


def check_rows(table: pa.Table, files: Mapping[str, bytes], spec: PreprocessSpec = SPEC) -> None:
    """Every row has the pixels and the size of the file its key names."""
    for row, key in enumerate(table.column("key").to_pylist()):
        image = decode(files[key])
        assert (table.column("width_px")[row].as_py(), table.column("height_px")[row].as_py()) == image.size
        np.testing.assert_array_equal(pixels_of(table, row, spec), preprocess(image, spec), err_msg=key)
    assert table.column("failure_kind").null_count == len(table)


@pytest.mark.parametrize("place", ["local", "s3"])
def test_every_format_and_mode_gives_its_own_pixels(place: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    files = images.samples()
    if place == "local":
        check_rows(prepared(str(tmp_path), write(tmp_path, files)), files)
    else:
        url = request.getfixturevalue("bucket")
        check_rows(prepared(url, put(request.getfixturevalue("s3"), url, files)), files)


def test_statistics_are_those_of_the_row_and_null_unless_asked_for(tmp_path: Path) -> None:
    files = {**images.samples(), "broken.jpg": b"\xff\xd8\xff"}
    infos = write(tmp_path, files)
    without = prepared(str(tmp_path), infos)
    objects = plan.objects_table(storage.normalize(str(tmp_path)), infos)
    source = storage.connect(str(tmp_path))
    recipe = Recipe(spec=SPEC, limits=DEFAULT_LIMITS, has_stats=True)
    table, _ = prepare.prepare_unit(source, objects, recipe, deadline_s=5)
    assert table.schema.equals(schema.DECODED)
    names = [field.name for field in schema.STATS]
    assert table.drop_columns(names).equals(without.drop_columns(names))
    assert all(column.null_count == len(without) for column in without.select(names).columns)
    for row in table.drop_columns(["pixels"]).to_pylist():
        data = files[row["key"]]
        if row["failure_kind"]:
            assert [row[name] for name in names] == [None] * 4
        else:
            image = decode(data)
            expected = image_stats(data, image, preprocess(image, SPEC))
            assert [row[name] for name in names] == [expected.sha256, expected.phash, *map(np.float32, expected[2:])]


def test_photographs_give_their_own_pixels(tmp_path: Path) -> None:
    files = {name: path.read_bytes() for name, path in images.bundled_photos().items()}
    spec = replace(SPEC, input_px=224, crop_px=224, resize_hw_px=(256, 256))
    check_rows(prepared(str(tmp_path), write(tmp_path, files), spec), files, spec)


def test_the_operators_photographs_give_their_own_pixels(photos_dir: Path) -> None:
    infos = [info for page in storage.connect(str(photos_dir)).list_pages() for info in page][:64]
    spec = replace(SPEC, input_px=224, crop_px=224, resize_hw_px=(256, 256))
    check_rows(
        prepared(str(photos_dir), infos, spec), {info.key: (photos_dir / info.key).read_bytes() for info in infos}, spec
    )


BROKEN = {
    "empty": b"",
    "not_an_image": b"hello, this is text",
    "unsupported_format": b"8BPS" + bytes(40),
    "truncated": images.encode(images.texture(64, 48), "JPEG")[:900],
    "too_large": images.encode(images.texture(120, 120), "PNG"),
    "bomb_pixels": images.encode(Image.new("1", (5000, 5000)), "PNG"),
    "missing": b"x",
    "changed": b"x",
}
LIMITS = DecodeLimits(max_bytes=20_000, max_pixels=1_000_000)
STAGES = dict.fromkeys(BROKEN, "decode") | dict.fromkeys(("empty", "too_large", "missing", "changed"), "fetch")


@given(st.lists(st.sampled_from(["good", "good", "good", *BROKEN]), max_size=40))
@settings(deadline=None, max_examples=25, derandomize=True)
def test_failures_in_any_places_shift_no_pixels_to_another_row(fate_of: list[str]) -> None:
    files = {
        f"{number:03d}": BROKEN.get(fate) or images.encode(images.texture(30 + number, 20, seed=number), "PNG")
        for number, fate in enumerate(fate_of)
    }
    files |= {f"{number:03d}": b"" for number, fate in enumerate(fate_of) if fate == "empty"}
    with TemporaryDirectory() as folder:
        infos = write(Path(folder), files)
        for info, fate in zip(infos, fate_of, strict=True):
            if fate == "missing":
                (Path(folder) / info.key).unlink()
            elif fate == "changed":
                (Path(folder) / info.key).write_bytes(files[info.key] * 2)
        table = prepared(folder, infos, limits=LIMITS)
    assert table.column("key").to_pylist() == list(files)
    assert table.column("failure_kind").to_pylist() == [None if fate == "good" else fate for fate in fate_of]
    for row, (fate, data) in enumerate(zip(fate_of, files.values(), strict=True)):
        found = table.slice(row, 1).to_pylist()[0]
        if fate == "good":
            image = decode(data)
            np.testing.assert_array_equal(pixels_of(table, row), preprocess(image, SPEC))
            assert (found["width_px"], found["height_px"]) == image.size
            assert (found["failure_stage"], found["failure_message"]) == (None, None)
        else:
            assert (found["pixels"], found["width_px"], found["height_px"]) == (None, None, None)
            assert found["failure_stage"] == STAGES[fate]
            assert found["failure_message"]


def test_pixels_are_handed_on_without_a_copy_when_no_image_failed() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3)).astype(np.uint8)
    array = prepare._pixels_array(pixels, np.ones(5, bool))
    array.validate(full=True)
    validity, _, data = array.buffers()
    assert (validity, array.null_count) == (None, 0)
    assert data.address == pixels.ctypes.data
    assert [value.as_py() for value in array] == [each.tobytes() for each in pixels]


@pytest.mark.parametrize("num_rows", [1, 7, 8, 9, 70])
def test_rows_without_pixels_take_no_bytes(num_rows: int) -> None:
    rng = np.random.default_rng(num_rows)
    pixels = rng.integers(0, 256, (num_rows, 2, 2, 3)).astype(np.uint8)
    for is_image in (rng.random(num_rows) < 0.5, np.zeros(num_rows, bool)):
        array = prepare._pixels_array(pixels, is_image)
        array.validate(full=True)
        assert array.null_count == num_rows - is_image.sum()
        assert array.buffers()[2].size == is_image.sum() * 12
        expected = [each.tobytes() if keep else None for each, keep in zip(pixels, is_image, strict=True)]
        assert array.to_pylist() == expected


def test_the_pixels_of_a_unit_are_one_block_in_row_order(tmp_path: Path) -> None:
    files = {f"{number}": images.encode(images.texture(30, 20, seed=number), "PNG") for number in range(4)}
    (column,) = prepared(str(tmp_path), write(tmp_path, files)).column("pixels").chunks
    block = np.frombuffer(column.buffers()[2], np.uint8).reshape(4, 24, 24, 3)
    for row, data in enumerate(files.values()):
        np.testing.assert_array_equal(block[row], preprocess(decode(data), SPEC))


def test_a_unit_of_failures_only_and_one_without_rows(tmp_path: Path) -> None:
    infos = write(tmp_path, {"a": b"", "b": b"text"})
    assert prepared(str(tmp_path), infos).column("failure_kind").to_pylist() == ["empty", "not_an_image"]
    assert len(prepared(str(tmp_path), [])) == 0


def test_an_image_whose_resize_takes_more_memory_than_there_is_becomes_a_failure_row(tmp_path: Path) -> None:
    infos = write(tmp_path, {"a.png": images.encode(images.texture(30, 20), "PNG"), "b.txt": b"text"})
    # Pillow refuses a line of more than 2 GB as it does any other allocation that fails.
    huge = replace(SPEC, resample=Image.Resampling.NEAREST, resize_hw_px=(24, 2**30))
    row, other = prepared(str(tmp_path), infos, huge).to_pylist()
    assert (row["failure_kind"], row["failure_stage"], row["pixels"]) == ("decode_oom", "decode", None)
    assert "30x20" in row["failure_message"]
    assert other["failure_kind"] == "not_an_image"


# --- storage that does not answer ---------------------------------------------------------------------------------


def _three(s3: S3Server, bucket: str) -> tuple[dict[str, bytes], list[ObjectInfo]]:
    files = {name: images.encode(images.texture(30, 20, seed=ord(name)), "PNG") for name in "abc"}
    return files, put(s3, bucket, files)


def test_an_object_that_storage_answers_for_late_is_labeled_after_all(
    s3: S3Server, bucket: str, faults: list[Fault]
) -> None:
    files, infos = _three(s3, bucket)
    faults.append(Fault("stall", "GET", "/b"))
    check_rows(prepared(bucket, infos, deadline_s=SOON_S), files)
    assert s3.num_requests("GET", f"{bucket[5:]}/b") == 2


def test_an_object_that_storage_never_answers_for_is_a_row_and_not_an_outage(
    s3: S3Server, bucket: str, faults: list[Fault]
) -> None:
    files, infos = _three(s3, bucket)
    faults.append(Fault.always("stall", "GET", "/b"))
    table = prepared(bucket, infos, deadline_s=SOON_S)
    assert table.column("failure_kind").to_pylist() == [None, "unavailable", None]
    assert "no usable answer" in table.column("failure_message")[1].as_py()
    for row in (0, 2):
        np.testing.assert_array_equal(pixels_of(table, row), preprocess(decode(files[infos[row].key]), SPEC))
    assert 4 <= s3.num_requests("GET", f"{bucket[5:]}/b") <= 6  # by each of both clients, twice within two deadlines


def test_an_outage_that_begins_near_the_end_of_a_unit_raises(
    s3: S3Server, bucket: str, faults: list[Fault], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "DEADLINE_S", SOON_S)
    _, infos = _three(s3, bucket)
    faults += [Fault.always("stall", "GET", "/b"), Fault.always("stall", "GET", "/c")]
    faults.append(Fault.always(503, "GET", bucket[5:]))  # the listing
    with pytest.raises(UnavailableError, match="list"):
        prepared(bucket, infos, deadline_s=SOON_S)


def test_storage_that_answers_for_no_object_of_a_unit_raises(
    s3: S3Server, bucket: str, faults: list[Fault], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "DEADLINE_S", SOON_S)
    _, infos = _three(s3, bucket)
    faults.append(Fault.always(503, "GET", ""))
    with pytest.raises(UnavailableError, match="no usable answer"):
        prepared(bucket, infos, deadline_s=SOON_S)
