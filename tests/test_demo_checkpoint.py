"""The checkpoint that `--model demo` names: small, in the format of 2021, and right about drawn pictures."""

import io
import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoModelForImageClassification, DeiTForImageClassificationWithTeacher, DeiTImageProcessorPil

import pipeline
from pipeline.checkpoint import DEMO, resolve
from pipeline.decode import decode
from pipeline.draw import CLASSES, draw_file
from pipeline.model import load, predict
from pipeline.preprocess import preprocess, spec_from_config

DEMO_FOLDER = Path(pipeline.__file__).parent / "demo"
TRAIN_DEMO = Path(__file__).parent.parent / "jobs" / "train_demo.py"
FRESH_SEED = 77


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    return runpy.run_path(str(TRAIN_DEMO))


def read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((DEMO_FOLDER / name).read_text())
    return content


def test_the_weights_are_at_most_3_mb_of_float32_safetensors() -> None:
    path = DEMO_FOLDER / "model.safetensors"
    assert path.stat().st_size <= 3_000_000
    with safe_open(path, framework="pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F32"}  # noqa: SIM118


def test_the_preprocessor_file_has_the_text_of_2021() -> None:
    config = read("preprocessor_config.json")
    assert config["size"] == 73
    assert config["crop_size"] == 64
    assert config["feature_extractor_type"] == "DeiTFeatureExtractor"
    assert config["resample"] == 3
    assert config["image_mean"] == [0.485, 0.456, 0.406]
    assert config["image_std"] == [0.229, 0.224, 0.225]
    assert config["do_resize"] is config["do_center_crop"] is config["do_normalize"] is True
    assert not {"image_processor_type", "do_rescale", "rescale_factor"} & set(config)


def test_the_config_names_a_distilled_deit_and_every_class() -> None:
    config = read("config.json")
    assert config["architectures"] == ["DeiTForImageClassificationWithTeacher"]
    assert config["model_type"] == "deit"
    assert (config["image_size"], config["patch_size"]) == (64, 8)
    assert config["id2label"] == {str(position): label for position, label in enumerate(CLASSES)}
    assert config["label2id"] == {label: position for position, label in enumerate(CLASSES)}


def test_every_tensor_is_there_and_none_is_left_over() -> None:
    loaded: Any = DeiTForImageClassificationWithTeacher.from_pretrained(DEMO_FOLDER, output_loading_info=True)
    model, report = loaded
    assert not any(report.values()), report
    assert model.dtype == torch.float32


def test_held_out_pictures_get_their_labels(job: dict[str, Any]) -> None:
    accuracy = job["evaluate"](DEMO, 400, FRESH_SEED)
    assert accuracy.top_1 >= 0.95, accuracy
    assert accuracy.top_5 >= 0.99, accuracy
    assert accuracy.nearest_is_same_class >= 0.9, accuracy


def test_transformers_alone_gives_the_labels_of_the_pipeline() -> None:
    files = [draw_file(FRESH_SEED, index) for index in range(48)]
    model = AutoModelForImageClassification.from_pretrained(DEMO_FOLDER).eval()
    processor = DeiTImageProcessorPil.from_pretrained(DEMO_FOLDER)
    images = [Image.open(io.BytesIO(file.data)).convert("RGB") for file in files]
    with torch.inference_mode():
        expected_BK = model(**processor(images, return_tensors="pt")).logits.softmax(dim=1).numpy()

    checkpoint = resolve(DEMO)
    spec = spec_from_config(checkpoint.preprocessor_config, mode="checkpoint", input_px=checkpoint.input_px)
    classifier = load(checkpoint, spec, pooling="none", device="cpu", precision="fp32")
    pixels_BHWC = np.stack([preprocess(decode(file.data), spec) for file in files])
    prediction = predict(classifier, pixels_BHWC, top_k=1)

    assert prediction.label_ids_Bk[:, 0].tolist() == expected_BK.argmax(axis=1).tolist()
    np.testing.assert_allclose(prediction.scores_Bk[:, 0], expected_BK.max(axis=1), atol=1e-5)


def test_training_is_reproducible_and_writes_the_files_that_the_pipeline_reads(
    job: dict[str, Any], tmp_path: Path
) -> None:
    arguments = "--num-images 128 --epochs 2 --num-held-out 16 --folder"
    command = [sys.executable, str(TRAIN_DEMO), *arguments.split(), str(tmp_path / "by_script")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert "16 pictures of seed" in result.stdout

    drawn = [job["_draw_resized"](job["TRAIN_SEED"], index) for index in range(128)]
    pixels_NHWC = torch.from_numpy(np.stack([pixels for _, pixels in drawn]))
    pictures = job["Pictures"](
        pixels_NHWC.permute(0, 3, 1, 2).contiguous(), torch.tensor([label for label, _ in drawn])
    )
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(job["TRAIN_SEED"])
        teacher = job["train_teacher"](pictures, 1, 64)
        job["save"](job["train_student"](pictures, teacher, 2, 64), tmp_path / "here")
    torch.set_num_threads(num_threads)

    here, by_script = tmp_path / "here", tmp_path / "by_script"
    assert (here / "model.safetensors").read_bytes() == (by_script / "model.safetensors").read_bytes()
    for name in ("config.json", "preprocessor_config.json"):
        assert (by_script / name).read_text() == (DEMO_FOLDER / name).read_text()
    assert resolve(str(by_script)).label_names == CLASSES


@pytest.mark.parametrize("option", ["--num-images", "--epochs", "--batch-size", "--num-held-out"])
def test_a_count_that_is_not_one_is_refused_before_anything_is_drawn(
    job: dict[str, Any], option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        job["main"]([option, "0"])
    assert stop.value.code == 2
    assert "expected a whole number, 1 or more, found '0'" in capsys.readouterr().err
