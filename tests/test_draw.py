"""Drawn pictures: the same every time, told apart by shape and not by colour, in files that decode or do not."""

import hashlib
import io
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import fsspec
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, UnidentifiedImageError

from pipeline.decode import decode
from pipeline.draw import CLASSES, DAMAGES, EXTENSIONS, MAX_ASPECT, SIDE_PX, DrawnFile, draw, draw_file, encode
from pipeline.errors import FailureKind, ImageError

REPOSITORY = Path(__file__).parent.parent
JOB = REPOSITORY / "jobs" / "draw_images.py"
FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}


def run_job(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(JOB), *arguments], capture_output=True, text=True, timeout=120)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("label", CLASSES)
def test_the_same_seed_draws_the_same_picture_and_another_seed_another(label: str) -> None:
    pictures = [draw(np.random.default_rng(seed), label) for seed in (5, 5, 6)]
    assert [name for name, _ in pictures] == [label] * 3
    first, again, other = (image for _, image in pictures)
    assert first == again
    assert first != other


def test_file_names_and_bytes_depend_on_seed_and_index_alone() -> None:
    files = [draw_file(3, index) for index in (7, 8)]
    assert draw_file(3, 7) == files[0]
    assert len({file.path for file in [*files, draw_file(4, 7)]}) == 3


def test_a_new_process_draws_the_same_bytes() -> None:
    code = "import hashlib, pipeline.draw as d; print(hashlib.sha256(d.draw_file(3, 7).data).hexdigest())"
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert output.stdout.strip() == hashlib.sha256(draw_file(3, 7).data).hexdigest()


def test_a_larger_broken_fraction_leaves_the_intact_files_as_they_are() -> None:
    whole = [draw_file(1, index) for index in range(40)]
    damaged = [draw_file(1, index, broken_fraction=0.5) for index in range(40)]
    still_whole = [(a, b) for a, b in zip(whole, damaged, strict=True) if b.damage is None]
    assert 10 <= len(still_whole) <= 30
    assert all(a == b for a, b in still_whole)


def test_files_cover_all_classes_formats_and_sizes() -> None:
    files = [draw_file(2, index) for index in range(400)]
    images = [Image.open(io.BytesIO(file.data)) for file in files]
    extensions = [file.path.rpartition(".")[2] for file in files]
    assert {file.label for file in files} == set(CLASSES)
    assert [file.path.split("/")[0] for file in files] == [file.label for file in files]
    assert [image.format for image in images] == [FORMATS[extension] for extension in extensions]
    assert min(Counter(extensions).values()) > 90
    assert any(image.mode == "L" for image in images)
    sides_px = np.array([image.size for image in images])
    assert sides_px.min() >= SIDE_PX[0]
    assert sides_px.max() <= SIDE_PX[1]
    assert (sides_px.max(axis=1) / sides_px.min(axis=1)).max() <= MAX_ASPECT
    assert np.count_nonzero(sides_px[:, 0] != sides_px[:, 1]) > 100


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_every_format_decodes_to_the_picture_that_was_drawn(extension: str) -> None:
    _, image = draw(np.random.default_rng(11), "star")
    decoded = decode(encode(image, extension, quality=95))
    assert decoded.size == image.size
    difference = np.asarray(decoded, np.float32) - np.asarray(image.convert("RGB"), np.float32)
    assert np.abs(difference).mean() < (1e-9 if extension == "png" else 12)


def test_an_unknown_extension_is_refused() -> None:
    with pytest.raises(ValueError, match="tiff"):
        encode(Image.new("RGB", (8, 8)), "tiff", quality=90)


def broken(damage: str, num: int) -> list[DrawnFile]:
    files = (draw_file(9, index, broken_fraction=1.0) for index in range(100_000))
    found: list[DrawnFile] = []
    while len(found) < num:
        file = next(files)
        if file.damage == damage:
            found.append(file)
    return found


KINDS = {
    "truncated": {FailureKind.TRUNCATED},
    "header": {FailureKind.CORRUPT},
    "bomb": {FailureKind.BOMB_PIXELS},
    "garbage": {FailureKind.NOT_AN_IMAGE},
    "zeros": {FailureKind.NOT_AN_IMAGE},
    "empty": {FailureKind.EMPTY},
    "text": {FailureKind.NOT_AN_IMAGE},
    "html": {FailureKind.NOT_AN_IMAGE},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_file_is_one_for_pillow_and_for_the_pipeline(damage: str) -> None:
    for file in broken(damage, 6):
        assert file.label is None
        assert file.path.startswith(f"broken/{damage}-9-")
        assert file.path.rpartition(".")[2] in EXTENSIONS
        with pytest.raises((UnidentifiedImageError, OSError, Image.DecompressionBombError)):
            Image.open(io.BytesIO(file.data)).load()
        with pytest.raises(ImageError) as failure:
            decode(file.data)
        assert failure.value.kind in KINDS[damage], str(failure.value)


def colour_histogram(image: Image.Image) -> npt.NDArray[np.float64]:
    """How the pixels spread over 6 x 6 x 6 colours; the root evens out few large and many small bins."""
    pixels = np.asarray(image.convert("RGB").resize((64, 64)), np.float64).reshape(-1, 3)
    counts, _ = np.histogramdd(pixels, bins=6, range=[(0, 256)] * 3)
    return np.sqrt(counts.ravel() / len(pixels))


def test_a_colour_histogram_does_not_give_the_class_away() -> None:
    num_train, num_test = 900, 300
    drawn = [draw(np.random.default_rng((21, index))) for index in range(num_train + num_test)]
    labels = np.array([CLASSES.index(label) for label, _ in drawn])
    histograms = np.stack([colour_histogram(image) for _, image in drawn])
    # Sorted, a histogram says how many colours there are and how large their areas, whatever the colours.
    areas = -np.sort(-histograms, axis=1)[:, :24]
    for features in (histograms, areas, np.hstack([histograms, areas])):
        rows = np.hstack([features, np.ones((len(features), 1))])
        train, test = rows[:num_train], rows[num_train:]
        weights = np.linalg.solve(
            train.T @ train + 0.3 * np.eye(train.shape[1]), train.T @ np.eye(len(CLASSES))[labels[:num_train]]
        )
        learned = ((train @ weights).argmax(axis=1) == labels[:num_train]).mean()
        assert learned > 2 / len(CLASSES), "a classifier that learned nothing proves nothing"
        linear = ((test @ weights).argmax(axis=1) == labels[num_train:]).mean()
        nearest = (test @ train.T - (train**2).sum(axis=1) / 2).argmax(axis=1)
        neighbour = (labels[nearest] == labels[num_train:]).mean()
        assert max(linear, neighbour) < 0.3, (linear, neighbour)


def test_the_job_writes_the_same_files_for_the_same_arguments(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        result = run_job(
            "--output", str(tmp_path / folder), "--num-images", "60", "--seed", "4", "--broken-fraction", "0.2"
        )
        assert result.returncode == 0, result.stderr
    expected = [draw_file(4, index, broken_fraction=0.2) for index in range(60)]
    assert tree(tmp_path / "a") == {file.path: file.data for file in expected}
    assert tree(tmp_path / "b") == tree(tmp_path / "a")
    num_broken = sum(file.damage is not None for file in expected)
    assert f"{60 - num_broken} pictures of {len(CLASSES)} classes and {num_broken} broken files" in result.stdout


def test_the_job_writes_to_any_fsspec_url() -> None:
    # In a process of its own: what lies under memory:// ends with the process that wrote it.
    code = f"""
import fsspec, runpy
if __name__ == "__main__":
    job = runpy.run_path({str(JOB)!r})
    job["draw_images"]("memory://pictures/of", 5, 1)
    filesystem = fsspec.filesystem("memory")
    for path in sorted(filesystem.find("/pictures")):
        print(path, len(filesystem.cat_file(path)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    files = [draw_file(1, index) for index in range(5)]
    assert result.stdout.splitlines() == sorted(f"/pictures/of/{file.path} {len(file.data)}" for file in files), result
    assert not fsspec.filesystem("memory").find("/pictures")


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["--output", "x", "--num-images", "-1"], 2, "expected a whole number, 0 or more, found '-1'"),
        (["--output", "x", "--num-images", "1", "--broken-fraction", "2"], 2, "expected a number from 0 to 1"),
        (["--output", "nope://x", "--num-images", "1"], 2, "nope://x"),
        (["--output", "{file}/below", "--num-images", "1"], 3, "cannot write to"),
    ],
)
def test_a_wrong_argument_gets_one_line_and_writes_nothing(
    tmp_path: Path, arguments: list[str], exit_code: int, message: str
) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    result = run_job(*(argument.format(file=file) for argument in arguments))
    assert result.returncode == exit_code
    assert message in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == [file]
