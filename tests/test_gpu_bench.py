"""The script that measures a GPU, where there is none: at small size, without Ray."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gpu
import pytest
import torch
from checkpoints import PUBLISHED
from cluster import Head

ROOT = Path(__file__).resolve().parent.parent
_WITHOUT_RAY = (
    "import runpy, sys; sys.modules['ray'] = None; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
)
_SMALL = (
    *("--only", "deit-tiny-distilled", "--seconds", "0.01", "--matrix-size", "64"),
    *("--batch-size", "1", "--actor-batch-size", "2", "--unit-images", "3", "--num-photos", "2"),
)


def measured(folder: Path, program: Sequence[str], *arguments: str, **environment: str) -> tuple[dict[str, Any], str]:
    """The figures and the note."""
    figures, note = folder / "gpu.json", folder / "gpu.md"
    command = [sys.executable, *program, "tests/benchmarks/gpu.py", *_SMALL, *arguments]
    subprocess.run(
        [*command, "--json", str(figures), "--out", str(note)],
        cwd=ROOT,
        env={**os.environ, **environment},
        check=True,
        capture_output=True,
        timeout=120,
    )
    return json.loads(figures.read_text()), note.read_text()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    return measured(tmp_path_factory.mktemp("gpu"), ["-c", _WITHOUT_RAY], "--device", "cpu")


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


@pytest.mark.slow
def test_a_job_with_ray_is_measured_where_ray_is_installed(head: Head, tmp_path: Path) -> None:
    environment = {**head.environment, "RAY_ADDRESS": head.address}
    facts, note = measured(tmp_path, [], "--device", "cpu", "--ray-images", "5", **environment)
    (shape,) = facts["shapes"]
    assert shape["ray_images_per_s"] > 0
    assert f"| {shape['ray_images_per_s']:,.0f} |\n" in note


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_copies_to_a_gpu_and_what_is_hidden_of_them_are_measured(tmp_path: Path) -> None:
    facts, _ = measured(tmp_path, ["-c", _WITHOUT_RAY], "--device", "cuda", "--no-compile")
    (shape,) = facts["shapes"]
    assert shape["copy_images_per_s"] > 0
    assert math.isfinite(shape["hidden_share_of_copy"])  # of two differences that are noise in so short a time


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
