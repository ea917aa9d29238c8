"""Parity with transformers' own forward pass, and what is refused."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import numpy.typing as npt
import pytest
import skimage
import torch
import transformers
from checkpoints import PUBLISHED, Published
from PIL import Image

from pipeline import checkpoint, encoder, model
from pipeline.checkpoint import Architecture, Checkpoint, Pooling
from pipeline.errors import ConfigError
from pipeline.preprocess import preprocess, spec_from_config

_PROCESSORS: Any = transformers.AutoImageProcessor  # has no types
_ARCHITECTURES: list[Architecture] = [
    "ViTForImageClassification",
    "DeiTForImageClassification",
    "DeiTForImageClassificationWithTeacher",
]
MAX_DIFFERENCE = 1e-5
"""Of logits with a standard deviation near 1, and of coordinates of unit vectors. Measured: 2e-6 and 1e-7."""


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    """Two that scikit-image ships, and the operator's own."""
    shipped = Path(skimage.__file__).parent / "data"
    paths = [shipped / "chelsea.png", shipped / "rocket.jpg"]
    if "LABEL_BUCKET_PHOTOS" in os.environ:
        paths += sorted(Path(os.environ["LABEL_BUCKET_PHOTOS"]).rglob("*.jp*g"))[:2]
    return [Image.open(path).convert("RGB") for path in paths]


def _reference(found: Checkpoint, images: list[Image.Image]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Logits and final tokens, all by transformers: its processor, its class, its loading."""
    processor = _PROCESSORS.from_pretrained(found.folder, backend="pil")
    network = getattr(transformers, found.architecture).from_pretrained(found.folder).eval()
    with torch.inference_mode():
        pixels = processor(images, return_tensors="pt")["pixel_values"]
        logits = network(pixels).logits.numpy()
        tokens = network.base_model(pixels).last_hidden_state.numpy()
    return logits, tokens


def _ours(
    found: Checkpoint, images: list[Image.Image], pooling: Pooling = "pooled", top_k: int = 5
) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None, model.Prediction]:
    spec = spec_from_config(found.preprocessor_config, mode="checkpoint", input_px=found.input_px)
    pixels = np.stack([preprocess(image, spec) for image in images])
    classifier = model.load(found, spec, pooling=pooling, device="cpu", precision="fp32")
    with torch.inference_mode():
        logits, embedding = classifier(torch.from_numpy(pixels))
    prediction = model.predict(classifier, pixels, top_k=top_k)
    return logits.numpy(), None if embedding is None else embedding.numpy(), prediction


def _unit(vectors: npt.NDArray[Any]) -> npt.NDArray[Any]:
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    return np.asarray(vectors / lengths)


# --- parity -------------------------------------------------------------------------------------------------------


@pytest.fixture(
    params=[pytest.param(each, marks=[pytest.mark.slow] * (each.hidden == 768)) for each in PUBLISHED],
    ids=[each.name for each in PUBLISHED],
)
def published(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Published, Checkpoint]]:
    chosen: Published = request.param
    folder = checkpoints.write_published(tmp_path / chosen.name, chosen)
    yield chosen, checkpoint.resolve(str(folder))
    shutil.rmtree(folder)  # 350 MB each; pytest keeps its folders


def test_a_published_architecture_gives_what_transformers_gives(
    published: tuple[Published, Checkpoint], photos: list[Image.Image], record_property: Any
) -> None:
    expected, found = published
    assert (found.architecture, found.input_px, found.embedding_dim, len(found.label_names)) == (
        expected.architecture,
        expected.input_px,
        expected.hidden,
        1000,
    )
    images = photos[:1] if expected.hidden == 768 else photos
    logits, tokens = _reference(found, images)
    num_heads = 2 if expected.architecture == "DeiTForImageClassificationWithTeacher" else 1
    embedding = _unit(tokens[:, :num_heads].mean(axis=1))

    our_logits, our_embedding, prediction = _ours(found, images)
    assert our_embedding is not None
    assert np.std(logits) > 0.3, "random weights so small that everything would look equal"
    differences = np.abs(our_logits - logits).max(), np.abs(our_embedding - embedding).max()
    record_property("max_abs_difference", f"logits {differences[0]:.1e} embedding {differences[1]:.1e}")
    print(f"{expected.name}: max |Δ| logits {differences[0]:.1e}, embedding {differences[1]:.1e}")
    assert max(differences) < MAX_DIFFERENCE
    np.testing.assert_array_equal(prediction.label_ids_Bk, np.argsort(-logits, axis=1, kind="stable")[:, :5])
    assert prediction.is_finite_B.all()


def test_the_own_checkpoint_gives_what_transformers_gives(photos: list[Image.Image]) -> None:
    found = checkpoint.resolve(checkpoint.DEMO)
    logits, tokens = _reference(found, photos)
    our_logits, embedding, prediction = _ours(found, photos)
    np.testing.assert_allclose(our_logits, logits, atol=1e-4)  # trained logits reach 10 and more
    np.testing.assert_allclose(np.asarray(embedding), _unit(tokens[:, :2].mean(axis=1)), atol=MAX_DIFFERENCE)
    np.testing.assert_array_equal(prediction.label_ids_Bk, np.argsort(-logits, axis=1, kind="stable")[:, :5])


@pytest.mark.parametrize("architecture", _ARCHITECTURES)
def test_scores_are_the_softmax_of_the_logits_and_sum_to_one(
    tmp_path: Path, photos: list[Image.Image], architecture: Architecture
) -> None:
    found = checkpoint.resolve(str(checkpoints.write_small(tmp_path / "small", architecture)))
    logits, _ = _reference(found, photos)
    _, _, prediction = _ours(found, photos, top_k=7)
    exponentials = np.exp(logits.astype(np.float64))
    softmax = exponentials / exponentials.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(prediction.scores_Bk, -np.sort(-softmax, axis=1), atol=1e-6)
    np.testing.assert_allclose(prediction.scores_Bk.sum(axis=1), 1, atol=1e-6)
    assert prediction.scores_Bk.dtype == np.float32
    assert prediction.label_ids_Bk.dtype == np.int32


@pytest.mark.parametrize("architecture", _ARCHITECTURES)
@pytest.mark.parametrize("pooling", ["pooled", "cls", "distillation", "patch-mean", "none"])
def test_each_pooling_is_made_of_its_tokens_after_the_final_layernorm(
    tmp_path: Path, photos: list[Image.Image], architecture: Architecture, pooling: Pooling
) -> None:
    found = checkpoint.resolve(str(checkpoints.write_small(tmp_path / "small", architecture)))
    is_distilled = architecture == "DeiTForImageClassificationWithTeacher"
    if pooling == "distillation" and not is_distilled:
        with pytest.raises(ConfigError, match=f"needs a model with a distillation head, found {architecture}"):
            _ours(found, photos, pooling)
        return
    _, tokens = _reference(found, photos)
    assert tokens.shape[1] == 16 + (1 if architecture == "ViTForImageClassification" else 2)
    _, embedding, prediction = _ours(found, photos, pooling)
    if pooling == "none":
        assert embedding is None
        assert prediction.embedding_BD is None
        return
    expected = {
        "pooled": tokens[:, :2].mean(axis=1) if is_distilled else tokens[:, 0],
        "cls": tokens[:, 0],
        "distillation": tokens[:, 1],
        "patch-mean": tokens[:, -16:].mean(axis=1),
    }[pooling]
    assert embedding is not None
    assert embedding.dtype == np.float32
    np.testing.assert_allclose(embedding, _unit(expected), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(embedding, axis=1), 1, atol=1e-6)


def test_normalization_is_that_of_the_hugging_face_processor(tmp_path: Path) -> None:
    found = checkpoint.resolve(str(checkpoints.write_small(tmp_path / "small")))
    processor = _PROCESSORS.from_pretrained(found.folder, backend="pil")
    spec = spec_from_config(found.preprocessor_config, mode="checkpoint", input_px=found.input_px)
    every_value = np.arange(1024).astype(np.uint8).repeat(3).reshape(1, 32, 32, 3)
    expected = processor(list(every_value), do_resize=False, do_center_crop=False, return_tensors="pt")["pixel_values"]
    classifier = model.load(found, spec, pooling="none", device="cpu", precision="fp32")
    found_BCHW = classifier.embedding.normalized(torch.from_numpy(every_value))
    torch.testing.assert_close(found_BCHW, expected, rtol=0, atol=0)


def test_a_one_head_fine_tune_is_loaded_with_its_one_head(tmp_path: Path, photos: list[Image.Image]) -> None:
    found = checkpoint.resolve(str(checkpoints.write_small(tmp_path / "fine-tune", "DeiTForImageClassification")))
    logits, _ = _reference(found, photos)
    our_logits, _, _ = _ours(found, photos)
    np.testing.assert_allclose(our_logits, logits, atol=1e-6)
    spec = checkpoints.squash_spec(32)
    assert len(model.load(found, spec, pooling="cls", device="cpu", precision="fp32").heads) == 1


def test_a_folder_written_by_todays_transformers_loads_too(tmp_path: Path, photos: list[Image.Image]) -> None:
    old = checkpoint.resolve(str(checkpoints.write_small(tmp_path / "old")))
    transformers.DeiTForImageClassificationWithTeacher.from_pretrained(old.folder).save_pretrained(tmp_path / "new")
    _PROCESSORS.from_pretrained(old.folder, backend="pil").save_pretrained(tmp_path / "new")
    new = checkpoint.resolve(str(tmp_path / "new"))
    np.testing.assert_array_equal(_ours(new, photos)[0], _ours(old, photos)[0])
    assert new.label_names == old.label_names


def test_equal_scores_are_ordered_by_id(tmp_path: Path, photos: list[Image.Image]) -> None:
    folder = checkpoints.write_small(tmp_path / "small", "ViTForImageClassification")
    tensors = checkpoints.load_weights(folder)
    tensors["classifier.weight"][:] = 0
    tensors["classifier.bias"][:] = [1, 2, 1, 2, 1, 2, 1]
    checkpoints.save_weights(folder, tensors)
    _, _, prediction = _ours(checkpoint.resolve(str(folder)), photos, top_k=7)
    assert prediction.label_ids_Bk.tolist() == [[1, 3, 5, 0, 2, 4, 6]] * len(photos)


def test_bf16_gives_unit_vectors_in_float32(tmp_path: Path, photos: list[Image.Image]) -> None:
    found = checkpoint.resolve(str(checkpoints.write_small(tmp_path / "small")))
    spec = spec_from_config(found.preprocessor_config, mode="checkpoint", input_px=found.input_px)
    pixels = np.stack([preprocess(image, spec) for image in photos])
    bf16 = model.load(found, spec, pooling="pooled", device="cpu", precision="bf16")
    rounded = model.predict(bf16, pixels, top_k=5)
    assert rounded.embedding_BD is not None
    assert rounded.embedding_BD.dtype == rounded.scores_Bk.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rounded.embedding_BD, axis=1), 1, atol=1e-6)


# --- what is refused ----------------------------------------------------------------------------------------------


def _load(folder: Path) -> model.Classifier:
    spec = checkpoints.squash_spec(32)
    return model.load(checkpoint.resolve(str(folder)), spec, pooling="pooled", device="cpu", precision="fp32")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return checkpoints.write_small(tmp_path / "small")


@pytest.mark.parametrize(
    "name", ["deit.layernorm.weight", "distillation_classifier.bias", "deit.encoder.layer.1.output.dense.weight"]
)
def test_a_missing_tensor_is_refused(folder: Path, name: str) -> None:
    tensors = checkpoints.load_weights(folder)
    del tensors[name]
    checkpoints.save_weights(folder, tensors)
    with pytest.raises(
        ConfigError, match=r"expected exactly the tensors of DeiTForImage.*, found 1 missing: "
    ) as raised:
        _load(folder)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["deit.pooler.dense.weight", "deit.encoder.layer.2.output.dense.bias", "fc.weight"])
def test_an_unexpected_tensor_is_refused(folder: Path, name: str) -> None:
    checkpoints.save_weights(folder, checkpoints.load_weights(folder) | {name: np.zeros(24, np.float32)})
    with pytest.raises(ConfigError, match=r"expected exactly the tensors of DeiTForImage.*, found 1 unexpected: "):
        _load(folder)


def test_a_one_head_checkpoint_that_claims_two_heads_is_refused(tmp_path: Path) -> None:
    folder = checkpoints.write_small(tmp_path / "fine-tune", "DeiTForImageClassification")
    checkpoints.edit_config(folder, architectures=["DeiTForImageClassificationWithTeacher"])
    with pytest.raises(
        ConfigError, match=r"found 4 missing: cls_classifier\.bias, cls_classifier\.weight, distillation"
    ):
        _load(folder)


def test_a_two_head_checkpoint_that_claims_one_head_is_refused(folder: Path) -> None:
    checkpoints.edit_config(folder, architectures=["DeiTForImageClassification"])
    with pytest.raises(ConfigError, match=r"found 2 missing: classifier\.bias, classifier\.weight"):
        _load(folder)


def test_heads_for_another_number_of_labels_are_refused(folder: Path) -> None:
    checkpoints.edit_config(folder, id2label={"0": "cat", "1": "dog"})
    with pytest.raises(ConfigError, match=r"found 4 mismatched: cls_classifier\.bias, "):
        _load(folder)


def test_code_that_comes_with_a_checkpoint_is_not_run(folder: Path, tmp_path: Path) -> None:
    for name in ("AutoConfig", "AutoModelForImageClassification"):
        checkpoints.edit_config(folder, auto_map={name: "theirs.Theirs"})
        (folder / "theirs.py").write_text(f"open({str(tmp_path / 'was-run')!r}, 'w')")
        _load(folder)
    assert not (tmp_path / "was-run").exists()


def test_a_truncated_weights_file_is_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="cannot be loaded as DeiTForImageClassificationWithTeacher") as raised:
        _load(folder)
    assert "\n" not in str(raised.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none_is_an_error_and_not_a_fallback(folder: Path) -> None:
    with pytest.raises(ConfigError, match="expected a CUDA device in this actor, found none"):
        model.load(
            checkpoint.resolve(str(folder)),
            checkpoints.squash_spec(32),
            pooling="pooled",
            device="cuda",
            precision="fp32",
        )


@pytest.mark.parametrize("spare_px", [0, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_patches_are_the_same_multiplied_as_on_a_gpu_and_convolved_as_on_cpu(
    tmp_path: Path, precision: model.Precision, spare_px: int
) -> None:
    found = checkpoint.resolve(str(checkpoints.write_small(tmp_path / "small")))
    spec = spec_from_config(found.preprocessor_config, mode="checkpoint", input_px=found.input_px)
    projection = model.load(found, spec, pooling="none", device="cpu", precision=precision).embedding.projection
    edge_px = found.input_px + spare_px
    pixels = torch.randn(3, 3, edge_px, edge_px, dtype=projection.weight.dtype)
    convolved, multiplied = (
        embed(projection, pixels) for embed in (encoder.convolved_patches, encoder.multiplied_patches)
    )
    assert convolved.shape[0] == 3
    assert convolved.std() > 0.1
    torch.testing.assert_close(multiplied, convolved)
