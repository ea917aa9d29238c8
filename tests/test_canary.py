"""The twenty images that never change, and the vectors by which an actor knows that it is in the output's space."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline import canary, checkpoint, schema, storage
from pipeline.checkpoint import Checkpoint, PreprocessSpec
from pipeline.decode import decode, sniff
from pipeline.draw import CLASSES
from pipeline.errors import ConfigError, ConflictError
from pipeline.label import Labeler
from pipeline.preprocess import spec_from_config
from pipeline.storage import Store

SHA256 = {
    "arrow.jpg": "ced748cfd82d23869db85c160c5678bf283b796681c2dce7f91a56815c01ced6",
    "butterfly.jpg": "2cba1253966b3bd5a7172cae286490d0577bb9cac5431665bb2adcd5390e3fba",
    "checkerboard.jpg": "c4e6400c8d95fd4d2ccf784bae59c12c2ee11ebcf032691cc1ecb7a9fe23f917",
    "clock.png": "76bf8a3b971e6805ea6c2935ecad3005389857fd4019ef65bc8a62a6049aea4d",
    "cup.jpg": "143f8f7e18df9962e44398c1e3ac0f8900c01a09529daf9758ab4da9a35a2832",
    "fish.webp": "a8b0980aa0e488f8aa75b38aa4839c4b8366316ce483b5931fc37e495395ed59",
    "flower.jpg": "9755d7d033c53cf992e263892265c2cce088df0c3d8825f82599c0650723806e",
    "heart.jpg": "77a4d6c2173a3b26d92159a0005c585f944c96dbacfb61b180c77b96e42200a9",
    "house.jpg": "78c62c57b50b7f3abf9c6f50fec92eb93517bb7c0079d7e28a68ca4d4333163f",
    "key.jpg": "8a398b5085247a78da85ef9107af150ff7b950dcaeb253c6846047b4651b1a33",
    "ladder.png": "2a28c8791b62cbf3fdb4d361dace0d2655e28f9492b8af9d8cf94c9f8db1819e",
    "lightning.jpg": "9bc793104ceb80af58a934b36eab5cd72dd340bc50cd63b8e66393023621cef3",
    "moon.webp": "4731808e4059eb7f9ab09cf3452d224dd2bc22b2e8e8eb7b16544c52f5160f79",
    "mushroom.jpg": "4885a42395f96b9b9f97c3a74c28158ab73b67d01ceebcc25fb970ca148286d4",
    "sailboat.jpg": "b49717980c5fa787a1ae94bfebb7f952a8b2200b310c390ba004baff8daca0cd",
    "smiley.jpg": "a6fb2d92abd34b078256bb09e1a305159854302f4e8ef38d7d6bb32adaa7b727",
    "spiral.jpg": "b58ea5415e0a22a3056e51ebf7c088501e8d26cfd3ee25d0f80798e28bc3f9f7",
    "star.png": "3b34d184fa1914fb8a06dc2fac1b60d2edbb0e5c07efdff1084f7bef18175390",
    "tree.jpg": "e03efc0703cb53ac046b820ebee088374b78d19a6e64b0c1325e04dc21d9e27a",
    "umbrella.webp": "7bff9517bbaffc2c0382528ea8004c31d51539636894e50a4efb99283bb91ce0",
}
SPACE = "small-12345678"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return checkpoint.resolve(str(checkpoints.write_small(tmp_path_factory.mktemp("models") / "small")))


@pytest.fixture(scope="module")
def demo() -> Checkpoint:
    return checkpoint.resolve(checkpoint.DEMO)


@pytest.fixture
def output(tmp_path: Path) -> Store:
    return storage.connect_output(str(tmp_path / "out"))


def _spec(found: Checkpoint) -> PreprocessSpec:
    return spec_from_config(found.preprocessor_config, mode="checkpoint", input_px=found.input_px)


def _vectors(found: Checkpoint, spec: PreprocessSpec | None = None, **changes: Any) -> canary.Vectors:
    arguments: dict[str, Any] = {
        "model": found.source,
        "revision": None,
        "weights_digest": found.weights_digest,
        "spec": spec or _spec(found),
        "pooling": "pooled",
        "top_k": 3,
        "device": "cpu",
    }
    return Labeler(**(arguments | changes)).canary_vectors()


def _unit_vectors(dim: int = 8, seed: int = 0) -> canary.Vectors:
    values = np.random.default_rng(seed).standard_normal((canary.NUM_CANARIES, dim)).astype(np.float32)
    return np.asarray(values / np.linalg.norm(values, axis=1, keepdims=True), np.float32)


# --- the images ---------------------------------------------------------------------------------------------------


def test_the_canaries_are_the_same_bytes_for_ever() -> None:
    assert {each.name: hashlib.sha256(each.data).hexdigest() for each in canary.canaries()} == SHA256
    assert sum(len(each.data) for each in canary.canaries()) <= 120_000


def test_there_is_one_picture_of_each_drawn_class_in_three_formats_and_two_modes() -> None:
    found = canary.canaries()
    assert [each.name.partition(".")[0] for each in found] == list(CLASSES)
    formats = [sniff(each.data) for each in found]
    assert [formats.count(name) for name in ("JPEG", "PNG", "WebP")] == [14, 3, 3]
    is_gray = [np.ptp(np.asarray(decode(each.data)), axis=2).max() == 0 for each in found]
    assert [each.name for each, gray in zip(found, is_gray, strict=True) if gray] == ["ladder.png"]


def test_the_model_trained_on_drawn_pictures_names_every_canary_rightly(demo: Checkpoint) -> None:
    centred_logits = _vectors(demo, pooling="none")
    assert centred_logits.shape == (20, len(demo.label_names))
    labels = [demo.label_names[label_id] for label_id in centred_logits.argmax(axis=1)]
    assert labels == [each.name.partition(".")[0] for each in canary.canaries()]


# --- the vectors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["pooled", "none"])
def test_two_builds_of_a_model_give_the_same_vectors(small: Checkpoint, pooling: str) -> None:
    first = _vectors(small, pooling=pooling)
    assert first.shape == (20, 24 if pooling == "pooled" else 7)
    assert first.dtype == np.float32
    np.testing.assert_array_equal(_vectors(small, pooling=pooling), first)
    np.testing.assert_allclose(np.linalg.norm(first, axis=1), 1, atol=1e-6)
    assert len(np.unique(first, axis=0)) == 20


@pytest.mark.parametrize("batch_size", [1, 7, 20, 64])
def test_the_batch_size_does_not_matter(small: Checkpoint, batch_size: int) -> None:
    found = _vectors(small, batch_size=batch_size)
    np.testing.assert_allclose(found, _vectors(small), atol=1e-6)


def test_without_an_embedding_the_vector_is_the_logits_around_their_mean() -> None:
    logits = np.array([[4.0, 1.0, -2.0], [0.0, 0.0, 90.0]])
    scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    order = np.argsort(-scores, axis=1, kind="stable")
    found = canary.vectors_of(
        order.astype(np.int32), np.take_along_axis(scores, order, axis=1).astype(np.float32), None
    )
    np.testing.assert_allclose(found[0], np.array([3, 0, -3]) / np.sqrt(18), atol=1e-6)
    # A score of e^-90 is no float32 any more: its logit is off, the direction is not.
    np.testing.assert_allclose(found[1], np.array([-1, -1, 2]) / np.sqrt(6), atol=1e-6)


@pytest.mark.parametrize("pooling", ["pooled", "none"])
@pytest.mark.parametrize("model", ["small", "demo"])
def test_bf16_is_the_same_space_as_fp32(pooling: str, model: str, request: pytest.FixtureRequest) -> None:
    found = request.getfixturevalue(model)
    coarse, fine = (_vectors(found, pooling=pooling, precision=precision) for precision in ("bf16", "fp32"))
    assert not np.array_equal(coarse, fine)
    assert canary.cosines(coarse, fine).min() > 0.9995
    canary.check(coarse, fine)


@pytest.mark.parametrize(
    ("tensor", "value"), [("deit.layernorm.weight", np.nan), ("deit.layernorm.weight", 1e30)], ids=["nan", "overflow"]
)
def test_a_model_whose_numbers_are_not_finite_is_refused(tmp_path: Path, tensor: str, value: float) -> None:
    folder = checkpoints.write_small(tmp_path / "broken")
    tensors = checkpoints.load_weights(folder)
    tensors[tensor].flat[0] = value
    checkpoints.save_weights(folder, tensors)
    with pytest.raises(
        ConfigError, match=r"model .*broken: expected finite numbers for the canary image arrow\.jpg, found none"
    ):
        _vectors(checkpoint.resolve(str(folder)))


# --- the check ----------------------------------------------------------------------------------------------------


def test_one_changed_weight_tensor_is_another_space(tmp_path: Path, small: Checkpoint) -> None:
    folder = checkpoints.write_small(tmp_path / "changed")
    tensors = checkpoints.load_weights(folder)
    tensors["deit.encoder.layer.1.output.dense.weight"] *= np.float32(1.5)
    checkpoints.save_weights(folder, tensors)
    with pytest.raises(ConflictError, match=r"expected the vector of this space's first run \(cosine >= 0\.999\)"):
        canary.check(_vectors(checkpoint.resolve(str(folder))), _vectors(small))


@pytest.mark.parametrize(
    "change",
    [{"rescale_factor": 1 / 127.5}, {"image_mean": (0.5,) * 3, "image_std": (0.5,) * 3}, {"resample": 0}],
    ids=["rescale", "mean and std", "nearest"],
)
def test_another_preprocessing_is_another_space(demo: Checkpoint, change: dict[str, Any]) -> None:
    with pytest.raises(ConflictError, match="of 20 canaries off"):
        canary.check(_vectors(demo, replace(_spec(demo), **change)), _vectors(demo))


def test_the_message_names_the_worst_image_and_its_cosine() -> None:
    expected = _unit_vectors()
    found = expected.copy()
    found[3] = -expected[3]
    found[5, 0] += np.float32(0.5)
    with pytest.raises(ConflictError, match=r"^canary image clock\.png: .*found cosine -1\.000000 on node .* 2 of 20"):
        canary.check(found, expected)
    canary.check(expected * np.float32(0.5), expected)  # only the direction counts


def test_vectors_without_a_direction_or_of_another_length_never_pass() -> None:
    expected = _unit_vectors()
    found = expected.copy()
    found[7] = np.nan
    with pytest.raises(ConflictError, match=r"canary image heart\.jpg: .*found cosine nan"):
        canary.check(found, expected)
    with pytest.raises(ConflictError, match=r"of shape \(20, 8\) .* found \(20, 9\)"):
        canary.check(_unit_vectors(9), expected)


# --- the reference ------------------------------------------------------------------------------------------------


def test_the_vectors_of_the_first_run_can_be_read_back(output: Store) -> None:
    vectors = _unit_vectors()
    reference = canary.write(output, "00000001-abc", SPACE, vectors)
    data = output.get("_runs/00000001-abc/canaries.parquet")
    assert (reference.key, reference.num_rows) == ("_runs/00000001-abc/canaries.parquet", 20)
    assert (reference.size_bytes, reference.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    np.testing.assert_array_equal(canary.read(output, reference, SPACE), vectors)
    assert canary.find(output, "00000001-abc") == reference
    assert canary.find(output, "00000002-abc") is None


def test_any_parquet_reader_sees_which_images_and_which_space(output: Store, tmp_path: Path) -> None:
    reference = canary.write(output, "run", SPACE, _unit_vectors())
    table = pq.read_table(tmp_path / "out" / reference.key)
    assert dict(zip(table["name"].to_pylist(), table["sha256"].to_pylist(), strict=True)) == SHA256
    assert table.schema.metadata[b"label_bucket.space_id"] == SPACE.encode()
    assert table.schema.metadata[b"label_bucket.schema_version"] == str(schema.SCHEMA_VERSION).encode()


def test_a_resumed_run_compares_itself_with_what_its_first_attempt_wrote(output: Store) -> None:
    first = canary.write(output, "run", SPACE, _unit_vectors(seed=0))
    assert canary.write(output, "run", SPACE, _unit_vectors(seed=1)) == first
    np.testing.assert_array_equal(canary.read(output, first, SPACE), _unit_vectors(seed=0))


def test_a_missing_or_damaged_reference_is_a_conflict(output: Store) -> None:
    reference = canary.write(output, "run", SPACE, _unit_vectors())
    data = output.get(reference.key)
    output.put(reference.key, data[:-20] + bytes(20))
    with pytest.raises(ConflictError, match=r"canaries\.parquet: expected canary vectors with SHA-256 .*restore"):
        canary.read(output, reference, SPACE)
    # As `find` describes it, which has nothing to compare it with.
    damaged = canary.find(output, "run")
    assert damaged is not None
    with pytest.raises(ConflictError, match=r"canaries\.parquet: expected canary vectors, found .*restore the file"):
        canary.read(output, damaged, SPACE)
    with pytest.raises(ConflictError, match=r"canary vectors of this space are gone; restore the file, or use another"):
        canary.read(output, replace(reference, key="_runs/gone/canaries.parquet"), SPACE)


def test_the_reference_of_another_space_or_of_other_images_is_a_conflict(
    output: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reference = canary.write(output, "run", SPACE, _unit_vectors())
    with pytest.raises(ConflictError, match=f"expected label_bucket.space_id other-1, found {SPACE}"):
        canary.read(output, reference, "other-1")
    for each in canary.canaries():
        (tmp_path / each.name).write_bytes(each.data + b"\0" * (each.name == "cup.jpg"))
    monkeypatch.setattr(canary, "_FOLDER", tmp_path)
    with pytest.raises(ConflictError, match="made from other canary images than those of this version"):
        canary.read(output, reference, SPACE)
    (tmp_path / "cup.jpg").unlink()
    with pytest.raises(ConfigError, match=r"expected 20 canary images in .*, found 19; install it again"):
        canary.canaries()
