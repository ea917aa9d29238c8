"""Every way to compute a forward pass beside the plain one: fp32, eager, on CPU, one image at a time."""

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import numpy.typing as npt
import pytest
import torch

from pipeline import checkpoint, model, predictor
from pipeline.decode import DEFAULT_LIMITS
from pipeline.draw import draw_file
from pipeline.model import Precision
from pipeline.picture import Recipe, make_picture
from pipeline.preprocess import spec_from_config

NUM_IMAGES = 23
"""Six micro-batches of four, which take turns; the last is not full."""
BATCH_SIZE = 4
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
WAYS = [
    pytest.param("cpu", "fp32", False, id="cpu-fp32"),
    pytest.param("cpu", "bf16", False, id="cpu-bf16"),
    pytest.param("cpu", "fp32", True, id="cpu-fp32-compiled", marks=pytest.mark.slow),
    pytest.param("cpu", "bf16", True, id="cpu-bf16-compiled", marks=pytest.mark.slow),
    pytest.param("cuda", "fp32", False, id="cuda-fp32", marks=ON_GPU),
    pytest.param("cuda", "fp32", True, id="cuda-fp32-compiled", marks=ON_GPU),
    pytest.param("cuda", "bf16", False, id="cuda-bf16", marks=ON_GPU),
    pytest.param("cuda", "bf16", True, id="cuda-bf16-compiled", marks=ON_GPU),
]


@pytest.fixture(scope="module")
def found() -> checkpoint.Checkpoint:
    """The trained one: behind random weights nearly equal numbers are other labels."""
    return checkpoint.resolve(checkpoint.DEMO)


@pytest.fixture(scope="module")
def images(found: checkpoint.Checkpoint) -> npt.NDArray[np.uint8]:
    recipe = Recipe(spec=_spec(found), limits=DEFAULT_LIMITS)
    files = [draw_file(3, number, broken_fraction=0) for number in range(NUM_IMAGES)]
    return np.stack([make_picture(file.data, recipe)[0] for file in files])


def _spec(found: checkpoint.Checkpoint) -> checkpoint.PreprocessSpec:
    return spec_from_config(found.preprocessor_config, mode="checkpoint", input_px=found.input_px)


def _predicted(
    found: checkpoint.Checkpoint,
    images: npt.NDArray[np.uint8],
    device: str,
    precision: Precision,
    *,
    is_compiled: bool,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Labels, scores and vectors."""
    model.prepare_process(None)
    classifier = model.load(found, _spec(found), pooling="pooled", device=device, precision=precision)
    shape = (BATCH_SIZE, found.input_px, found.input_px, 3)
    predict = predictor.Predictor(classifier, shape, is_compiled=is_compiled)
    assert predict.is_compiled == is_compiled
    rows = [(each, len(images[batch])) for batch, each in predict(images, top_k=5)]
    assert [number for _, number in rows] == [4, 4, 4, 4, 4, 3]
    vectors = [each.embedding_BD[:number] for each, number in rows if each.embedding_BD is not None]
    return (
        np.concatenate([each.label_ids_Bk[:number] for each, number in rows]),
        np.concatenate([each.scores_Bk[:number] for each, number in rows]),
        np.concatenate(vectors),
    )


@pytest.fixture(scope="module")
def plain(found: checkpoint.Checkpoint, images: npt.NDArray[np.uint8]) -> model.Prediction:
    classifier = model.load(found, _spec(found), pooling="pooled", device="cpu", precision="fp32")
    each = [model.predict(classifier, image[None].copy(), top_k=5) for image in images]
    return model.Prediction(
        np.concatenate([one.label_ids_Bk for one in each]),
        np.concatenate([one.scores_Bk for one in each]),
        np.concatenate([one.embedding_BD for one in each if one.embedding_BD is not None]),
        np.concatenate([one.is_finite_B for one in each]),
    )


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # which torch uses in its compiler
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")  # which are not wanted
@pytest.mark.parametrize(("device", "precision", "is_compiled"), WAYS)
def test_every_way_to_compute_agrees_with_one_image_at_a_time_in_float32(
    found: checkpoint.Checkpoint,
    images: npt.NDArray[np.uint8],
    plain: model.Prediction,
    device: str,
    precision: Precision,
    is_compiled: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    ids, scores, vectors = _predicted(found, images, device, precision, is_compiled=is_compiled)
    assert [each.getMessage() for each in caplog.records if each.name == predictor.__name__] == [], (
        "it was not compiled"
    )
    assert plain.embedding_BD is not None
    cosines = (vectors * plain.embedding_BD).sum(axis=1)
    pairs = zip(ids.tolist(), plain.label_ids_Bk.tolist(), strict=True)
    top5_agreement = np.mean([len({*ours} & {*theirs}) / 5 for ours, theirs in pairs])
    if precision == "fp32":
        np.testing.assert_allclose(vectors, plain.embedding_BD, atol=1e-5)  # measured on CPU, compiled: 2e-7
        np.testing.assert_allclose(scores, plain.scores_Bk, atol=1e-5)  # 3e-7
        assert top5_agreement == 1
    else:
        assert cosines.min() > 0.9995  # measured on CPU: 0.99993; compiled: 0.99997
        np.testing.assert_allclose(scores, plain.scores_Bk, atol=0.02)  # 0.006
        assert top5_agreement > 0.95  # 0.99
        assert not np.array_equal(vectors, plain.embedding_BD), "bf16 was not used"


@pytest.fixture(scope="module", params=[checkpoints.PUBLISHED[4], checkpoints.PUBLISHED[6]], ids=lambda each: each.name)
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> checkpoint.Checkpoint:
    """Of the real size, one with two heads and one with one."""
    folder = tmp_path_factory.mktemp("published")
    return checkpoint.resolve(str(checkpoints.write_published(folder / "checkpoint", request.param)))


@ON_GPU
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
@pytest.mark.parametrize(("precision", "is_compiled"), [("fp32", False), ("bf16", False), ("bf16", True)])
def test_a_checkpoint_of_a_published_shape_gives_on_a_gpu_the_vectors_of_float32_on_cpu(
    published: checkpoint.Checkpoint, precision: Precision, is_compiled: bool
) -> None:
    check_published(published, "cuda", precision, is_compiled=is_compiled)


@pytest.mark.slow
def test_a_checkpoint_of_a_published_shape_gives_in_bf16_the_vectors_of_float32(
    published: checkpoint.Checkpoint,
) -> None:
    check_published(published, "cpu", "bf16", is_compiled=False)


def check_published(found: checkpoint.Checkpoint, device: str, precision: Precision, *, is_compiled: bool) -> None:
    recipe = Recipe(spec=_spec(found), limits=DEFAULT_LIMITS)
    images = np.stack([make_picture(draw_file(3, each, broken_fraction=0).data, recipe)[0] for each in range(6)])
    plain = model.load(found, recipe.spec, pooling="pooled", device="cpu", precision="fp32")
    expected = model.predict(plain, images, top_k=5).embedding_BD
    classifier = model.load(found, recipe.spec, pooling="pooled", device=device, precision=precision)
    predict = predictor.Predictor(classifier, (4, *images.shape[1:]), is_compiled=is_compiled)
    assert predict.is_compiled == is_compiled
    each = [(one.embedding_BD, len(images[batch])) for batch, one in predict(images, top_k=5)]
    vectors = np.concatenate([vector_BD[:number] for vector_BD, number in each if vector_BD is not None])
    assert expected is not None
    # Behind random weights the vectors of all images are alike: what makes them differ is their distance from the mean.
    error = np.linalg.norm(vectors - expected, axis=1)
    spread = np.linalg.norm(expected - expected.mean(axis=0), axis=1)
    assert (error / spread).max() < (1e-3 if precision == "fp32" else 0.1)  # measured on CPU: 0.023
    assert ((vectors[:, None] - expected[None]) ** 2).sum(axis=2).argmin(axis=1).tolist() == list(range(len(images)))


@ON_GPU
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_gpu_with_too_little_memory_computes_fewer_images_at_once(
    published: checkpoint.Checkpoint, is_compiled: bool, caplog: pytest.LogCaptureFixture
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (128, published.input_px, published.input_px, 3), dtype=np.uint8)
    classifier = model.load(published, _spec(published), pooling="pooled", device="cuda", precision="bf16")
    few = predictor.Predictor(classifier, (2, *images.shape[1:]), is_compiled=False)
    expected = np.concatenate([one.embedding_BD for _, one in few(images, top_k=5) if one.embedding_BD is not None])
    torch.cuda.empty_cache()
    pinned_bytes = 4 * images.nbytes
    total_bytes = torch.cuda.mem_get_info()[1]
    most_bytes = torch.cuda.memory_reserved() + pinned_bytes + (48 * 2**20 if published.input_px == 224 else 2**28)
    torch.cuda.set_per_process_memory_fraction(most_bytes / total_bytes)
    try:
        predict = predictor.Predictor(classifier, images.shape, is_compiled=is_compiled)
        rows = [(one.embedding_BD, len(images[batch])) for batch, one in predict(images, top_k=5)]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    vectors = np.concatenate([vector_BD[:number] for vector_BD, number in rows if vector_BD is not None])
    assert "out of memory with 128 images per forward pass: going on with 64" in caplog.text
    assert predict.is_compiled == is_compiled
    assert 1 < predict.shape_BHWC[0] < 128
    assert (vectors * expected).sum(axis=1).min() > 0.999


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
@pytest.mark.parametrize(
    ("device", "precision", "is_compiled"),
    [
        pytest.param("cpu", "fp32", False, id="cpu"),
        pytest.param("cuda", "bf16", True, id="cuda-compiled", marks=ON_GPU),
    ],
)
def test_calls_at_once_get_the_answers_to_their_own_images(
    found: checkpoint.Checkpoint,
    images: npt.NDArray[np.uint8],
    device: str,
    precision: Precision,
    is_compiled: bool,
) -> None:
    model.prepare_process(None)
    classifier = model.load(found, _spec(found), pooling="pooled", device=device, precision=precision)
    shape = (BATCH_SIZE, found.input_px, found.input_px, 3)
    predict = predictor.Predictor(classifier, shape, is_compiled=is_compiled)

    def vectors(given: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        each = [(one.embedding_BD, len(given[batch])) for batch, one in predict(given, top_k=5)]
        return np.concatenate([vector_BD[:number] for vector_BD, number in each if vector_BD is not None])

    orders = [np.random.default_rng(number).permutation(NUM_IMAGES) for number in range(12)]
    one_after_another = [vectors(images[order]) for order in orders]
    with ThreadPoolExecutor(3) as threads:
        at_once = list(threads.map(lambda order: vectors(images[order]), orders))
    np.testing.assert_array_equal(at_once, one_after_another)


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
@pytest.mark.parametrize(
    ("device", "is_compiled"),
    [pytest.param("cpu", False, id="cpu"), pytest.param("cuda", True, id="cuda-compiled", marks=ON_GPU)],
)
def test_a_call_that_filled_a_micro_batch_before_another_one_halved_them_fills_it_again(
    found: checkpoint.Checkpoint,
    images: npt.NDArray[np.uint8],
    plain: model.Prediction,
    device: str,
    is_compiled: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    classifier = model.load(found, _spec(found), pooling="pooled", device=device, precision="fp32")
    shape = (2 * BATCH_SIZE, found.input_px, found.input_px, 3)
    predict = predictor.Predictor(classifier, shape, is_compiled=is_compiled)
    fill = predict._fill

    def fill_and_halve(turn: predictor._Turn, given: npt.NDArray[np.uint8]) -> None:
        fill(turn, given)
        predict._halve(2 * BATCH_SIZE, "out of memory elsewhere")

    monkeypatch.setattr(predict, "_fill", fill_and_halve)
    rows = [(each, len(images[batch])) for batch, each in predict(images, top_k=5)]
    assert [number for _, number in rows] == [4, 4, 4, 4, 4, 3]
    ids = np.concatenate([each.label_ids_Bk[:number] for each, number in rows])
    np.testing.assert_array_equal(ids, plain.label_ids_Bk)


def test_a_compiled_pass_that_has_no_memory_for_one_image_is_done_without(
    found: checkpoint.Checkpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_memory(_part: Any, _given: torch.Tensor) -> Any:
        raise RuntimeError("backend='inductor' raised: CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: no_memory)
    classifier = model.load(found, _spec(found), pooling="pooled", device="cpu", precision="fp32")
    predict = predictor.Predictor(classifier, (2, found.input_px, found.input_px, 3), is_compiled=True)
    assert (predict.is_compiled, predict.shape_BHWC[0]) == (False, 1)
    assert "out of memory with 2 images per forward pass: going on with 1" in caplog.text
    assert "CUDA out of memory. Tried to allocate; going on without, which is slower" in caplog.text


def test_a_compiled_pass_that_has_too_little_memory_is_compiled_for_half_as_many_images(
    found: checkpoint.Checkpoint,
    images: npt.NDArray[np.uint8],
    plain: model.Prediction,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def compile_for_little_memory(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        def run(part: Any, given: torch.Tensor) -> Any:
            if len(given) > BATCH_SIZE:
                raise torch.OutOfMemoryError(f"no room for {len(given)}")
            return function(part, given)

        return run

    monkeypatch.setattr(torch, "compile", compile_for_little_memory)
    classifier = model.load(found, _spec(found), pooling="pooled", device="cpu", precision="fp32")
    predict = predictor.Predictor(classifier, (4 * BATCH_SIZE, found.input_px, found.input_px, 3), is_compiled=True)
    assert predict.is_compiled
    assert predict.shape_BHWC[0] == BATCH_SIZE
    assert [each.getMessage() for each in caplog.records] == [
        "out of memory with 16 images per forward pass: going on with 8",
        "out of memory with 8 images per forward pass: going on with 4",
    ]
    ids = np.concatenate([each.label_ids_Bk[: len(images[batch])] for batch, each in predict(images, top_k=5)])
    np.testing.assert_array_equal(ids, plain.label_ids_Bk)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_micro_batches_of_a_fifth_size_are_compiled_as_those_of_the_first_were(tmp_path: Path) -> None:
    found = checkpoint.resolve(str(checkpoints.write_small(tmp_path / "small")))
    classifier = model.load(found, _spec(found), pooling="pooled", device="cpu", precision="fp32")
    num_graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for number, size in enumerate((16, 8, 4, 2, 1), start=1):
        forward = predictor.compiled(classifier, (size, found.input_px, found.input_px, 3))
        assert forward is not classifier
        found_graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] - num_graphs
        assert found_graphs == 2 * number, "one of the embedding, one that stands for all layers"


WITHOUT_A_COMPILER = """
import sys
import numpy as np
from pipeline import checkpoint, model, predictor
from pipeline.preprocess import spec_from_config

found = checkpoint.resolve(checkpoint.DEMO)
spec = spec_from_config(found.preprocessor_config, mode="checkpoint", input_px=found.input_px)
classifier = model.load(found, spec, pooling="pooled", device="cpu", precision="fp32")
predict = predictor.Predictor(classifier, (1, found.input_px, found.input_px, 3), is_compiled=True)
images = np.zeros((1, found.input_px, found.input_px, 3), np.uint8)
((_, prediction),) = predict(images, top_k=5)
assert not predict.is_compiled
assert (prediction.label_ids_Bk == model.predict(classifier, images, top_k=5).label_ids_Bk).all()
"""


@pytest.mark.slow
def test_a_node_without_a_compiler_computes_without_and_says_so(tmp_path: Path) -> None:
    environment = {**os.environ, "CXX": "/no/such/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_A_COMPILER], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("torch.compile: ")
    assert "/no/such/compiler" in done.stderr
    assert done.stderr.rstrip().endswith("going on without, which is slower")


@pytest.mark.parametrize(
    ("free_bytes", "bytes_per_image", "most", "expected"),
    [
        (80e9, 12e6, 256, 256),
        (2e9, 12e6, 256, 64),  # 83 would fit
        (2 * 64 * 12e6, 12e6, 256, 64),
        (1e6, 12e6, 256, 1),  # then it runs out of memory and says so
        (80e9, 12e6, 48, 48),
    ],
)
def test_a_micro_batch_on_a_gpu_takes_at_most_half_of_its_free_memory(
    free_bytes: float, bytes_per_image: float, most: int, expected: int
) -> None:
    assert predictor.batch_size_for(int(free_bytes), bytes_per_image, most) == expected


@ON_GPU
def test_a_small_model_fits_a_gpu_whole_units_at_a_time(found: checkpoint.Checkpoint) -> None:
    classifier = model.load(found, _spec(found), pooling="pooled", device="cuda", precision="bf16")
    assert predictor.fitting_batch_size(classifier, found.input_px, 256) == 256
