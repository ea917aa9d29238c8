"""Hostile, broken and odd images through the CPU task, all in one child: exactly one row each, the right one."""

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import effort
import hostile
import images
import numpy as np
import pyarrow as pa
import pytest
from checkpoints import squash_spec
from hostile import IMAGE

from pipeline import contain, plan, prepare, schema
from pipeline.contain import Child
from pipeline.decode import DEFAULT_LIMITS, decode
from pipeline.errors import ImageError
from pipeline.picture import Recipe
from pipeline.storage import ObjectInfo

RECIPE = Recipe(spec=replace(squash_spec(24), mode="paper"), limits=DEFAULT_LIMITS, has_stats=True)
FAST = replace(RECIPE, spec=replace(RECIPE.spec, mode="fast"))
MAX_PEAK_BYTES = 2**30
"""Of the child: a picture of 50 megapixels, its upright copy and the program."""
GOLDEN = Path(__file__).with_name("golden_pixels.json")


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    contain.child_of.cache_clear()
    yield contain.child_of(RECIPE)
    contain.child_of.cache_clear()


def rows_of(files: Mapping[str, bytes], recipe: Recipe = RECIPE) -> list[dict[str, object]]:
    """What the CPU task makes of these files, as rows."""
    infos = [ObjectInfo(key, len(data), "e", None) for key, data in files.items()]
    objects = plan.objects_table("s3://bucket/in", infos)
    table, _ = prepare.prepare_encoded(objects, enumerate(files.values()), recipe)
    assert table.schema.equals(schema.DECODED)
    effort.COUNTS["bad inputs tried"] += len(files)
    return list(
        table.append_column("has_pixels", pa.compute.is_valid(table["pixels"])).drop_columns(["pixels"]).to_pylist()
    )


def peak_bytes(child: Child) -> int:
    """The most memory that the child ever held."""
    assert child._process is not None
    status = Path(f"/proc/{child._process.pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def check_one_row_each(files: Mapping[str, bytes], rows: list[dict[str, object]]) -> None:
    """In order, and each either has pixels and a size or a reason of one line."""
    assert [row["key"] for row in rows] == list(files)
    for row in rows:
        is_image = row["failure_kind"] is None
        assert row["has_pixels"] is (row["width_px"] is not None) is (row["sha256"] is not None) is is_image, row["key"]
        assert is_image or "\n" not in str(row["failure_message"]), row["key"]


@pytest.mark.usefixtures("child")
@pytest.mark.parametrize("recipe", [RECIPE, FAST], ids=["paper", "fast"])
def test_every_kind_of_hostile_image_has_its_documented_outcome(recipe: Recipe) -> None:
    table = hostile.table()
    assert len(table) >= 45
    rows = rows_of({name: each.data for name, each in table.items()}, recipe)
    check_one_row_each({name: each.data for name, each in table.items()}, rows)
    found = {str(row["key"]): row["failure_kind"] or IMAGE for row in rows}
    assert found == {name: each.outcome for name, each in table.items()}
    assert peak_bytes(contain.child_of(recipe)) <= MAX_PEAK_BYTES


def test_no_hostile_image_costs_much_processor_time() -> None:
    for name, each in hostile.table().items():
        started_s = time.process_time()
        with contextlib.suppress(ImageError):
            decode(each.data)
        assert time.process_time() - started_s < 1, name


def test_a_thousand_flipped_and_cut_files_are_a_thousand_rows(child: Child) -> None:
    files = dict(hostile.damaged(20261125, 1050))
    rows = rows_of(files)
    assert len(rows) == 1050
    check_one_row_each(files, rows)
    outcomes = {row["failure_kind"] for row in rows}
    assert {None, "corrupt", "truncated", "not_an_image"} <= outcomes
    assert peak_bytes(child) <= MAX_PEAK_BYTES


@pytest.mark.parametrize("name", [*images.samples(), *(f"orientation {number}" for number in range(1, 9))])
def test_every_mode_and_orientation_has_its_golden_pixels(name: str) -> None:
    """Means of 4 x 4 cells, so that another version of a lossy codec may differ by a little and a colour may not."""
    wanted = np.array(json.loads(GOLDEN.read_text())[name])
    assert np.abs(cells(golden_inputs()[name]) - wanted).max() <= 3


def golden_inputs() -> dict[str, bytes]:
    """A file of every format and mode, and one for each EXIF orientation."""
    turned = {f"orientation {n}": images.encode_oriented(images.texture(40, 28), n, "PNG") for n in range(1, 9)}
    return {**images.samples(), **turned}


def cells(data: bytes) -> np.ndarray:
    """The picture (28, 40, 3) as the means of its cells, (4, 4, 3)."""
    pixels = np.asarray(decode(data), np.float64)
    height_px, width_px = pixels.shape[:2]
    blocks = pixels[: height_px // 4 * 4, : width_px // 4 * 4].reshape(4, height_px // 4, 4, width_px // 4, 3)
    return np.asarray(blocks.mean((1, 3)))
