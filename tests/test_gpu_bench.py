"""The script that measures a GPU, where there is none: at small size, without Ray."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu
import pytest
from checkpoints import PUBLISHED

ROOT = Path(__file__).resolve().parent.parent
_WITHOUT_RAY = (
    "import runpy, sys; sys.modules['ray'] = None; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
)
_SMALL = (
    *("--device", "cpu", "--only", "deit-tiny-distilled", "--seconds", "0.01", "--matrix-size", "64"),
    *("--batch-size", "1", "--actor-batch-size", "2", "--unit-images", "3", "--num-photos", "2"),
)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The figures and the note."""
    folder = tmp_path_factory.mktemp("gpu")
    figures, note = folder / "gpu.json", folder / "gpu.md"
    command = [sys.executable, "-c", _WITHOUT_RAY, "tests/benchmarks/gpu.py", *_SMALL]
    subprocess.run(
        [*command, "--json", str(figures), "--out", str(note)], cwd=ROOT, check=True, capture_output=True, timeout=120
    )
    return json.loads(figures.read_text()), note.read_text()


def test_every_figure_is_there_and_positive(written: tuple[dict[str, Any], str]) -> None:
    facts, _ = written
    (shape,) = facts["shapes"]
    assert shape.pop("name") == "facebook/deit-tiny-distilled-patch16-224"
    assert facts["matrix_product_tflop_per_s"] > 0
    needs_gpu = {"copy_images_per_s", "hidden_share_of_copy", "ray_images_per_s"}
    assert {name for name, value in shape.items() if value is None} == needs_gpu
    assert not shape.pop("is_ceiling_compiled")
    assert not shape.pop("is_actor_compiled")
    assert all(value > 0 for name, value in shape.items() if name not in needs_gpu)
    assert shape["actor_share_of_ceiling"] == pytest.approx(shape["actor_images_per_s"] / shape["ceiling_images_per_s"])


def test_note_says_on_what_and_how_it_was_measured(written: tuple[dict[str, Any], str]) -> None:
    facts, note = written
    assert facts["commit"] in note
    assert facts["device"] in note
    assert f"torch {facts['torch']}" in note
    assert "| facebook/deit-tiny-distilled-patch16-224 |" in note
    assert "/tmp" not in note


# As counted by the authors of DeiT, in billions of multiplications with an addition: 1.3, 4.6, 17.6 and 55.5.
@pytest.mark.parametrize(
    ("name", "gflop"),
    [
        ("facebook/deit-tiny-patch16-224", 2.5),
        ("facebook/deit-small-patch16-224", 9.2),
        ("facebook/deit-base-patch16-224", 35.1),
        ("facebook/deit-base-patch16-384", 110.9),
    ],
)
def test_operations_of_a_forward_pass_are_the_published_ones(name: str, gflop: float) -> None:
    (shape,) = [each for each in PUBLISHED if each.name == name]
    assert gpu.gflop_per_image(shape, 1000) == pytest.approx(gflop, rel=0.01)
