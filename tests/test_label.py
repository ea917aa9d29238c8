"""The actor: whole units in, the same rows labeled out, whatever travels with them."""

import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import torch

from pipeline import checkpoint, label, model, schema
from pipeline.checkpoint import Checkpoint
from pipeline.errors import ConfigError
from pipeline.label import Labeler

INPUT_PX = 32
DIM = 24
SPEC = checkpoints.squash_spec(INPUT_PX)
SHAPE = (INPUT_PX, INPUT_PX, 3)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return checkpoint.resolve(str(checkpoints.write_small(tmp_path_factory.mktemp("models") / "small")))


def _labeler(found: Checkpoint, **changes: Any) -> Labeler:
    arguments: dict[str, Any] = {
        "model": found.source,
        "revision": found.revision,
        "weights_digest": found.weights_digest,
        "spec": SPEC,
        "pooling": "pooled",
        "top_k": 3,
        "device": "cpu",
        "batch_size": 4,
    }
    return Labeler(**(arguments | changes))


@pytest.fixture(scope="module")
def labeler(found: Checkpoint) -> Labeler:
    return _labeler(found)


def _image(number: int) -> npt.NDArray[np.uint8]:
    """Pixels that no other number has."""
    return np.random.default_rng(number).integers(0, 256, SHAPE, dtype=np.uint8)


def _unit(numbers: range, *, failed: set[int] = frozenset()) -> pa.Table:  # type: ignore[assignment]
    rows = [
        {
            "key": f"{number:04d}.jpg",
            "uri": f"s3://bucket/{number:04d}.jpg",
            "etag": f"etag-{number}",
            "size_bytes": 1000 + number,
            "width_px": 640,
            "height_px": 480,
            **(
                {"failure_kind": "corrupt", "failure_stage": "decode", "failure_message": f"broken {number}"}
                if number in failed
                else {"pixels": _image(number).tobytes()}
            ),
        }
        for number in numbers
    ]
    return pa.Table.from_pylist(rows, schema=schema.DECODED)


def _bytes(table: pa.Table) -> bytes:
    """The table's content as bytes, whatever its chunks, offsets and spare validity bitmaps."""
    fresh = table.take(list(range(len(table)))).combine_chunks()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(fresh)
    return bytes(sink.getvalue())


# --- rows ---------------------------------------------------------------------------------------------------------


def test_every_row_gets_the_labels_of_its_own_pixels(found: Checkpoint, labeler: Labeler) -> None:
    table = labeler(_unit(range(11)))
    classifier = model.load(found, SPEC, pooling="pooled", device="cpu", precision="fp32")
    alone = [model.predict(classifier, _image(number)[None], top_k=3) for number in range(11)]
    assert table["uri"].to_pylist() == [f"s3://bucket/{number:04d}.jpg" for number in range(11)]
    assert table["label_ids"].to_pylist() == [each.label_ids_Bk[0].tolist() for each in alone]
    np.testing.assert_allclose(table["label_scores"].to_pylist(), [each.scores_Bk[0] for each in alone], atol=1e-6)
    embedding = np.stack(table["embedding"].to_numpy())
    np.testing.assert_allclose(
        embedding, [each.embedding_BD[0] for each in alone if each.embedding_BD is not None], atol=1e-6
    )
    assert len(np.unique(embedding, axis=0)) == 11, "rows that look alike would hide a shift"


def test_label_names_stand_beside_their_ids(found: Checkpoint, labeler: Labeler) -> None:
    for row in labeler(_unit(range(6))).to_pylist():
        assert row["label_names"] == [found.label_names[label_id] for label_id in row["label_ids"]]
        assert row["label_scores"] == sorted(row["label_scores"], reverse=True)
        assert len(set(row["label_ids"])) == 3


def test_the_output_has_the_schema_of_a_labeled_unit(labeler: Labeler) -> None:
    table = labeler(_unit(range(3), failed={1}))
    assert table.schema.equals(schema.labeled(DIM))
    table.validate(full=True)


def test_failed_rows_stay_in_place_with_no_labels_and_a_zero_vector(labeler: Labeler) -> None:
    table = labeler(_unit(range(10), failed={0, 3, 4, 9}))
    for number, row in enumerate(table.to_pylist()):
        assert row["key"] == f"{number:04d}.jpg"
        if number in {0, 3, 4, 9}:
            assert (row["failure_kind"], row["failure_stage"]) == ("corrupt", "decode")
            assert row["failure_message"] == f"broken {number}"
            assert row["label_ids"] == row["label_names"] == row["label_scores"] == []
            assert row["embedding"] == [0.0] * DIM
        else:
            assert row["failure_kind"] is None
            assert len(row["label_ids"]) == 3
            assert np.linalg.norm(row["embedding"]) == pytest.approx(1, abs=1e-6)


def test_failures_do_not_move_labels_to_other_rows(labeler: Labeler) -> None:
    whole = labeler(_unit(range(10))).to_pylist()
    with_failures = labeler(_unit(range(10), failed={0, 3, 4})).to_pylist()
    for number in (1, 2, 5, 6, 7, 8, 9):
        assert with_failures[number]["label_ids"] == whole[number]["label_ids"]
        np.testing.assert_allclose(with_failures[number]["embedding"], whole[number]["embedding"], atol=1e-6)


@pytest.mark.parametrize("failed", [set(), {0, 1, 2}])
def test_units_of_only_failures_and_empty_tables_are_answered(labeler: Labeler, failed: set[int]) -> None:
    table = labeler(_unit(range(len(failed)), failed=failed))
    assert len(table) == len(failed)
    assert table.schema.equals(schema.labeled(DIM))


def test_without_embeddings_there_is_no_such_column(found: Checkpoint) -> None:
    table = _labeler(found, pooling="none")(_unit(range(5), failed={2}))
    assert table.schema.equals(schema.labeled(None))
    assert [len(ids) for ids in table["label_ids"].to_pylist()] == [3, 3, 0, 3, 3]


def test_a_row_without_pixels_and_without_a_failure_stops_the_run(labeler: Labeler) -> None:
    unit = _unit(range(2))
    pixels = pa.array([None, _image(1).tobytes()], pa.large_binary())
    with pytest.raises(ValueError, match=r"s3://bucket/0000\.jpg: expected either a failure or a model input"):
        labeler(unit.set_column(unit.column_names.index("pixels"), "pixels", pixels))


def test_a_failure_with_pixels_stops_the_run(labeler: Labeler) -> None:
    unit = _unit(range(2), failed={1})
    pixels = pa.array([_image(0).tobytes(), _image(1).tobytes()], pa.large_binary())
    with pytest.raises(ValueError, match=r"s3://bucket/0001\.jpg: expected either a failure or a model input"):
        labeler(unit.set_column(unit.column_names.index("pixels"), "pixels", pixels))


def test_pixels_of_another_size_stop_the_run(labeler: Labeler) -> None:
    unit = _unit(range(2))
    pixels = pa.array([_image(0).tobytes(), _image(1).tobytes()[:-3]], pa.large_binary())
    with pytest.raises(ValueError, match=r"expected 3072 bytes of pixels .* found 3069"):
        labeler(unit.set_column(unit.column_names.index("pixels"), "pixels", pixels))


# --- not finite ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensor", "value"),
    [
        ("cls_classifier.bias", np.nan),
        ("distillation_classifier.weight", np.inf),
        ("deit.layernorm.weight", np.nan),
        ("deit.layernorm.weight", 1e30),  # the norm overflows
    ],
)
@pytest.mark.parametrize("pooling", ["pooled", "none"])
def test_numbers_that_are_not_finite_are_a_failure_and_never_a_label(
    tmp_path: Path, tensor: str, value: float, pooling: str
) -> None:
    folder = checkpoints.write_small(tmp_path / "broken")
    tensors = checkpoints.load_weights(folder)
    tensors[tensor].flat[0] = value
    checkpoints.save_weights(folder, tensors)
    table = _labeler(checkpoint.resolve(str(folder)), pooling=pooling)(_unit(range(6), failed={1}))
    rows = table.to_pylist()
    assert rows[1]["failure_message"] == "broken 1"
    for row in [rows[0], *rows[2:]]:
        if pooling == "none" and value == 1e30:
            assert len(row["label_ids"]) == 3, "huge logits are finite, and nobody asked for the vector"
            continue
        assert (row["failure_kind"], row["failure_stage"]) == ("model_nonfinite", "label")
        assert row["failure_message"]
        assert row["label_ids"] == []
        assert not any(row.get("embedding", []))
    assert table["embedding" if pooling == "pooled" else "label_ids"].null_count == 0


def test_one_image_that_breaks_the_model_does_not_touch_its_neighbours(tmp_path: Path, labeler: Labeler) -> None:
    """A model in which one pixel, white, overflows: by a huge weight on the first patch's first value."""
    folder = checkpoints.write_small(tmp_path / "fragile")
    tensors = checkpoints.load_weights(folder)
    normal = tensors["deit.embeddings.patch_embeddings.projection.weight"][0].copy()
    tensors["deit.embeddings.patch_embeddings.projection.weight"][0, 0, 0, 0] = np.float32(3e38)
    checkpoints.save_weights(folder, tensors)
    assert not np.array_equal(normal, tensors["deit.embeddings.patch_embeddings.projection.weight"][0])
    # Mean 0.4 and std 0.1: black is -4, white is 6, and either times 3e38 is infinite; 0.4 (102 of 255) is exactly 0.
    spec = checkpoints.squash_spec(INPUT_PX, mean=0.4, std=0.1)
    images = [np.full(SHAPE, 102, np.uint8) for _ in range(6)]
    images[2][8, 8] = 255
    unit = _unit(range(6))
    pixels = pa.array([image.tobytes() for image in images], pa.large_binary())
    table = _labeler(checkpoint.resolve(str(folder)), spec=spec)(
        unit.set_column(unit.column_names.index("pixels"), "pixels", pixels)
    )
    kinds = table["failure_kind"].to_pylist()
    assert kinds == [None, None, "model_nonfinite", None, None, None]
    assert [len(ids) for ids in table["label_ids"].to_pylist()] == [3, 3, 0, 3, 3, 3]


# --- grouping -----------------------------------------------------------------------------------------------------


def test_a_unit_is_the_same_bytes_whatever_the_actor_labeled_before(labeler: Labeler) -> None:
    units = [_unit(range(0, 9)), _unit(range(9, 10)), _unit(range(10, 23), failed={10, 15, 22}), _unit(range(23, 31))]
    first = [_bytes(labeler(unit)) for unit in units]
    backwards = [_bytes(labeler(unit)) for unit in reversed(units)]
    assert backwards[::-1] == first


def test_micro_batches_always_have_the_same_size_and_hold_the_rows_in_order(labeler: Labeler) -> None:
    batches: list[npt.NDArray[np.uint8]] = []

    def record(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if isinstance(module, model.Classifier):
            batches.append(inputs[0].numpy().copy())

    hook = torch.nn.modules.module.register_module_forward_pre_hook(record)
    try:
        labeler(_unit(range(0, 9), failed={0, 2}))
    finally:
        hook.remove()
    expected = [[1, 3, 4, 5], [6, 7, 8]]
    assert [len(batch) for batch in batches] == [4] * len(expected)
    for batch, numbers in zip(batches, expected, strict=True):
        np.testing.assert_array_equal(batch[: len(numbers)], [_image(number) for number in numbers])


def test_units_that_are_labeled_at_once_are_the_same_bytes_as_one_after_another(labeler: Labeler) -> None:
    units = [_unit(range(first, first + 11), failed={first + 2}) for first in range(0, 40, 10)] * 5
    one_after_another = [_bytes(labeler(unit)) for unit in units]
    both_began = threading.Barrier(2)

    def label_half(first: int) -> list[bytes]:
        both_began.wait(timeout=60)
        return [_bytes(labeler(unit)) for unit in units[first::2]]

    with ThreadPoolExecutor(2) as threads:
        even, odd = threads.map(label_half, [0, 1])
    assert even == one_after_another[0::2]
    assert odd == one_after_another[1::2]


def test_a_second_actor_gives_the_same_bytes(found: Checkpoint, labeler: Labeler) -> None:
    unit = _unit(range(9), failed={4})
    assert _bytes(_labeler(found)(unit)) == _bytes(labeler(unit))


def test_sliced_and_chunked_tables_with_nulls_between_are_read_right(labeler: Labeler) -> None:
    whole = _unit(range(20), failed={2, 3, 7, 12, 19})
    expected = labeler(whole.slice(3, 12).combine_chunks().take(list(range(12))))
    sliced = whole.slice(3, 12)
    chunked = pa.concat_tables([sliced.slice(0, 1), sliced.slice(1, 0), sliced.slice(1, 6), sliced.slice(7)])
    assert chunked["pixels"].num_chunks == 4
    assert _bytes(labeler(sliced)) == _bytes(expected)
    assert _bytes(labeler(chunked)) == _bytes(expected)


def test_pixels_are_read_without_copying_them() -> None:
    column = _unit(range(6), failed={1, 4})["pixels"].slice(1)
    is_image, images = label.decoded_images(column, SHAPE)
    assert is_image.tolist() == [False, True, True, False, True]
    np.testing.assert_array_equal(images, [_image(number) for number in (2, 3, 5)])
    data = column.chunk(0).buffers()[2]
    assert data.address <= images.ctypes.data < data.address + data.size


# --- another preprocessing ----------------------------------------------------------------------------------------


def test_the_model_behind_another_normalization_is_the_one_that_was_built_for_it(
    found: Checkpoint, labeler: Labeler
) -> None:
    spec = checkpoints.squash_spec(INPUT_PX, mean=0.4, std=0.2)
    table = _unit(range(6), failed={2})
    before = _bytes(labeler(table))
    other = labeler.with_spec(spec)
    assert _bytes(other(table)) == _bytes(_labeler(found, spec=spec)(table)) != before
    assert _bytes(labeler(table)) == before
    weights = [{each.data_ptr() for each in one._predict.classifier.parameters()} for one in (labeler, other)]
    assert weights[0] == weights[1]
    with pytest.raises(ValueError, match="expected a model input of 32 px, found 16"):
        labeler.with_spec(checkpoints.squash_spec(16))


def test_the_weights_stay_in_bf16_behind_another_normalization(found: Checkpoint) -> None:
    spec = checkpoints.squash_spec(INPUT_PX, mean=0.4, std=0.2)
    table = _unit(range(3))
    other = _labeler(found, precision="bf16").with_spec(spec)
    assert _bytes(other(table)) == _bytes(_labeler(found, precision="bf16", spec=spec)(table))


# --- construction -------------------------------------------------------------------------------------------------


def test_an_actor_refuses_weights_that_the_driver_did_not_see(tmp_path: Path) -> None:
    folder = checkpoints.write_small(tmp_path / "small")
    found = checkpoint.resolve(str(folder))
    checkpoints.write_small(folder, seed=1)
    with pytest.raises(ConfigError, match=rf"expected weights with SHA-256 {found.weights_digest[:12]}…, found "):
        _labeler(found, revision=None)


@pytest.mark.parametrize("top_k", [0, 8])
def test_top_k_is_at_most_the_number_of_labels(found: Checkpoint, top_k: int) -> None:
    with pytest.raises(ConfigError, match=f"--top-k: expected 1 to 7, the labels of .*small; found {top_k}"):
        _labeler(found, top_k=top_k)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none_is_an_error_and_not_a_fallback(found: Checkpoint) -> None:
    with pytest.raises(ConfigError, match="expected a CUDA device in this actor, found none"):
        _labeler(found, device="cuda")


def test_an_actor_on_cpu_computes_with_the_threads_it_is_given(found: Checkpoint) -> None:
    _labeler(found, num_threads=1)
    assert torch.get_num_threads() == 1


def test_auto_precision_is_bf16_on_a_gpu_and_fp32_on_cpu() -> None:
    assert label.compute_precision("auto", "cuda") == "bf16"
    assert label.compute_precision("auto", "cpu") == "fp32"
    assert label.compute_precision("bf16", "cpu") == "bf16"
    assert label.compute_precision("fp32", "cuda") == "fp32"


def test_naming_the_actor_class_does_not_import_torch() -> None:
    code = "import sys; from pipeline.label import Labeler; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert pickle.loads(pickle.dumps(Labeler)) is Labeler


# --- memory -------------------------------------------------------------------------------------------------------

IN_LITTLE_MEMORY = """
import pickle, re, resource, sys, threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np
from pipeline.label import Labeler

arguments, images, num_calls, spare_bytes, into = pickle.loads(Path(sys.argv[1]).read_bytes())
labeler, both_began = Labeler(**arguments), threading.Barrier(num_calls)

def label(_):
    both_began.wait()
    found = [(batch, each.label_ids_Bk) for batch, each in labeler._predict(images, top_k=3)]
    return np.concatenate([ids[: len(images[batch])] for batch, ids in found]), [len(ids) for _, ids in found]

threads = ThreadPoolExecutor(num_calls)
list(threads.map(lambda _: both_began.wait(), range(num_calls)))  # threads have stacks
if labeler._predict.shape_BHWC[0] > 1:
    [*Labeler(**arguments | {"batch_size": 1})._predict(images[:1], top_k=3)]  # what only the first pass allocates
if spare_bytes:
    used = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (used + spare_bytes,) * 2)
Path(into).write_bytes(pickle.dumps(list(threads.map(label, range(num_calls)))))
"""


def _in_little_memory(
    tmp_path: Path, batch_size: int, spare_bytes: int, num_calls: int = 1
) -> tuple[list[tuple[npt.NDArray[np.int32], list[int]]], str]:
    """By call, labels and sizes of the micro-batches of DeiT-tiny over 70 pictures; the error. Of its own process."""
    tiny = checkpoints.PUBLISHED[0]
    found = checkpoint.resolve(str(checkpoints.write_published(tmp_path / "model", tiny)))
    arguments = {
        "model": found.source,
        "revision": found.revision,
        "weights_digest": found.weights_digest,
        "spec": checkpoints.squash_spec(224),
        "pooling": "pooled",
        "top_k": 3,
        "device": "cpu",
        "batch_size": batch_size,
    }
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (70, 224, 224, 3), dtype=np.uint8)
    given, into = tmp_path / "given", tmp_path / "into"
    given.write_bytes(pickle.dumps((arguments, images, num_calls, spare_bytes, str(into))))
    # Or every thread would reserve address space of its own for what it allocates.
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-c", IN_LITTLE_MEMORY, str(given)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return pickle.loads(into.read_bytes()) if into.exists() else [], done.stderr


@pytest.fixture(scope="module")
def plenty(tmp_path_factory: pytest.TempPathFactory) -> npt.NDArray[np.int32]:
    """The labels of an actor that has memory enough."""
    ((labels, sizes),), error = _in_little_memory(tmp_path_factory.mktemp("plenty"), 64, 0)
    assert sizes == [64, 64], error
    return labels


@pytest.mark.slow
@pytest.mark.parametrize("num_calls", [1, 2])
def test_an_actor_that_runs_out_of_memory_halves_its_micro_batches_and_labels_every_image(
    tmp_path: Path, num_calls: int, plenty: npt.NDArray[np.int32]
) -> None:
    little, error = _in_little_memory(tmp_path, 64, 60 * 2**20, num_calls)
    assert len(little) == num_calls, error
    assert error.count("out of memory with 64 images per forward pass: going on with 32") == 1
    for labels, sizes in little:
        assert sizes[0] < 64
        np.testing.assert_array_equal(labels, plenty)


def test_a_model_whose_input_has_no_room_in_memory_says_so(found: Checkpoint) -> None:
    with pytest.raises(ConfigError, match="expected memory for it and for its input on this node, found too little"):
        _labeler(found, batch_size=10**12)


@pytest.mark.parametrize(
    ("most", "num_rows", "expected"),
    [(512, 361, 368), (256, 361, 184), (512, 1024, 512), (8, 1024, 8), (8, 361, 8), (100, 361, 96)],
)
def test_micro_batches_are_of_a_size_that_leaves_little_of_the_last_one_empty(
    most: int, num_rows: int, expected: int
) -> None:
    assert label.even_batch_size(most, num_rows) == expected


def test_a_model_that_has_no_memory_for_one_image_says_so(tmp_path: Path) -> None:
    _, error = _in_little_memory(tmp_path, 1, 2**20)
    assert "ConfigError" in error
    assert "expected memory for one image of 224 px on this node, found too little" in error
