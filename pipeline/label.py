"""A decoded unit -> a labeled unit: the actor that holds the model.

A module apart from `model`, because the driver and Ray's task machinery import it to name the actor class, and must not
pay for torch: the import happens in the actor's constructor.
"""

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import canary, checkpoint, plan, schema
from pipeline.errors import ConfigError, FailureKind
from pipeline.storage import describe

if TYPE_CHECKING:
    from pipeline.model import Precision, Prediction

Device = Literal["cpu", "cuda"]

DEFAULT_BATCH_SIZE: dict[Device, int] = {"cpu": 8, "cuda": 512}
"""Images per forward pass. On a GPU, fewer where its memory asks for it: with 256 the actors of DeiT-tiny have 86 and
89 % of what the model alone has, with 512 they have 97 and 98 (tests/benchmarks/gpu.md). On CPU those whose activations
stay in the cache: 7 % faster than 32 for DeiT-tiny, 14 % for DeiT-small (tests/benchmarks/cpu_forward.md)."""
CALLS_PER_ACTOR: dict[Device, int] = {"cpu": 1, "cuda": 2}
"""Units that an actor is given at once: on a GPU two, so that it has the first images of one while the other's results
are fetched and handed on. On CPU both would only share the cores."""
_ADDED = ("label_ids", "label_names", "label_scores", "embedding")


def compute_precision(precision: Literal["auto", "fp32", "bf16"], device: Device) -> "Precision":
    """What the model computes in: `auto` is bf16 on a GPU and fp32 on CPU."""
    if precision != "auto":
        return precision
    return "bf16" if device == "cuda" else "fp32"


class Labeler:
    """The actor. Built where it runs, from small picklable arguments; called with one unit (schema.DECODED) at a time.

    Micro-batches hold the decodable rows of the unit, `batch_size` of them: a row's result depends on its unit and on
    nothing that happened to travel with it.

    `model` and `revision` are those of `checkpoint.resolve`, here on the actor's node; `weights_digest` is the one
    that the driver saw, and finding another is a ConfigError. So are a device that is not there and a `top_k` larger
    than the number of labels. `num_threads` is torch's on CPU, a fixed number because sums in another order differ in
    the last bit.
    """

    def __init__(
        self,
        *,
        model: str,
        revision: str | None,
        weights_digest: str,
        spec: checkpoint.PreprocessSpec,
        pooling: checkpoint.Pooling,
        top_k: int,
        device: Device,
        precision: Literal["auto", "fp32", "bf16"] = "auto",
        batch_size: int | None = None,
        num_threads: int = 1,
        is_compiled: bool = False,
        cache_dir: Path | None = None,
    ) -> None:
        from pipeline import model as torch_model
        from pipeline import predictor

        found = checkpoint.resolve(model, revision, cache_dir=cache_dir)
        if found.weights_digest != weights_digest:
            raise ConfigError(
                f"model {model}: expected weights with SHA-256 {weights_digest[:12]}…, found"
                f" {found.weights_digest[:12]}… in {found.folder} on this node; was it overwritten during the run?"
            )
        if not 1 <= top_k <= len(found.label_names):
            raise ConfigError(f"--top-k: expected 1 to {len(found.label_names)}, the labels of {model}; found {top_k}")
        torch_model.prepare_process(num_threads if device == "cpu" else None)
        try:
            classifier = torch_model.load(
                found, spec, pooling=pooling, device=device, precision=compute_precision(precision, device)
            )
            if batch_size is None:
                fitting = predictor.fitting_batch_size(classifier, spec.input_px, DEFAULT_BATCH_SIZE[device])
                batch_size = even_batch_size(fitting, plan.UnitSizes.of(spec.input_px, 2).max_unit_rows)
            shape = (batch_size, spec.input_px, spec.input_px, 3)
            self._predict = predictor.Predictor(classifier, shape, is_compiled=is_compiled)
        except Exception as error:
            if not predictor.is_out_of_memory(error):
                raise
            raise ConfigError(
                f"model {model}: expected memory for it and for its input on this node, found too little:"
                f" {describe(error)}; use nodes or devices with more, a smaller --batch-size or fewer --gpu-actors"
            ) from error
        self._model, self._spec = model, spec
        self._label_names = np.array(found.label_names, dtype=object)
        self._top_k = top_k
        self._embedding_dim = None if pooling == "none" else found.embedding_dim

    @property
    def is_compiled(self) -> bool:
        """Whether the forward pass is compiled, and not only meant to be."""
        return self._predict.is_compiled

    def with_spec(self, spec: checkpoint.PreprocessSpec) -> "Labeler":
        """The same model, which is in memory once, for units of another preprocessing."""
        if spec.input_px != self._spec.input_px:
            raise ValueError(f"expected a model input of {self._spec.input_px} px, found {spec.input_px}")
        other = copy.copy(self)
        other._predict, other._spec = self._predict.with_spec(spec), spec
        return other

    def __call__(self, table: pa.Table) -> pa.Table:
        """Label one unit. The pixels stay behind.

        Rows that failed before have empty label lists and a zero vector; rows for which the model gave no finite
        numbers become failures of kind `model_nonfinite`, stage `label`. Raises ValueError for a row that neither
        failed nor has the pixels of one model input: a stage before this one is broken.
        """
        is_image, images_NHWC = decoded_images(table["pixels"], self._predict.shape_BHWC[1:])
        has_failed = table["failure_kind"].is_valid().to_numpy()
        if (is_image == has_failed).any():
            uri = table["uri"][np.flatnonzero(is_image == has_failed)[0]]
            raise ValueError(f"{uri}: expected either a failure or a model input's pixels, found both or neither")
        rows = np.flatnonzero(is_image)
        results = _Results(len(table), self._top_k, self._embedding_dim)
        for batch, prediction in self._predict(images_NHWC, top_k=self._top_k):
            results.put(rows[batch], prediction)
        return self._to_table(table, results)

    def canary_vectors(self) -> canary.Vectors:
        """The vectors of the canary images, through the codecs, the resize and the model that units go through.

        The embedding; without one (pooling `none`) the centred logits. Raises ConfigError if a vector is not finite.
        """
        images_NHWC, vectors = np.stack(canary.pixels(self._spec)), []
        for batch, found in self._predict(images_NHWC, top_k=len(self._label_names)):
            num_images = len(images_NHWC[batch])
            vectors.append(canary.vectors_of(found.label_ids_Bk, found.scores_Bk, found.embedding_BD)[:num_images])
        canary.check_lengths(np.concatenate(vectors), self._model)
        return np.concatenate(vectors)

    def _to_table(self, table: pa.Table, results: "_Results") -> pa.Table:
        nonfinite = pa.array(results.is_nonfinite)
        replaced = {
            "failure_kind": FailureKind.MODEL_NONFINITE.value,
            "failure_stage": "label",
            "failure_message": "the model gave numbers that are not finite for this image",
        }
        wanted = schema.labeled(self._embedding_dim)
        columns = []
        for field in wanted:
            if field.name in _ADDED:
                columns.append(results.column(field, self._label_names))
            elif field.name in replaced:
                columns.append(pc.if_else(nonfinite, replaced[field.name], table[field.name]))
            else:
                columns.append(table[field.name])
        return pa.Table.from_arrays(columns, schema=wanted)


def even_batch_size(most: int, num_rows: int) -> int:
    """The smallest multiple of 8, at most `most`, that is through with a unit of so many rows in as few passes: of 361
    rows (384 px) one pass of 368, as 512 would compute 151 rows of nothing.
    """
    num_passes = -(-num_rows // most)
    return min(most, -(-num_rows // num_passes // 8) * 8)


class _Results:
    """What the model said, by row of the table; zeros where it was not asked."""

    def __init__(self, num_rows: int, top_k: int, embedding_dim: int | None) -> None:
        self.label_ids = np.zeros((num_rows, top_k), dtype=np.int32)
        self.scores = np.zeros((num_rows, top_k), dtype=np.float32)
        self.embedding = np.zeros((num_rows, embedding_dim or 0), dtype=np.float32)
        self.is_labeled = np.zeros(num_rows, dtype=bool)
        self.is_nonfinite = np.zeros(num_rows, dtype=bool)

    def put(self, rows: npt.NDArray[np.intp], prediction: "Prediction") -> None:
        """Store the first `len(rows)` rows of a padded batch's prediction."""
        count = len(rows)
        is_finite = prediction.is_finite_B[:count]
        self.is_labeled[rows] = is_finite
        self.is_nonfinite[rows] = ~is_finite
        self.label_ids[rows] = prediction.label_ids_Bk[:count]
        self.scores[rows] = prediction.scores_Bk[:count]
        if prediction.embedding_BD is not None:
            self.embedding[rows] = np.where(is_finite[:, None], prediction.embedding_BD[:count], 0)

    def column(self, field: pa.Field, label_names: npt.NDArray[np.object_]) -> pa.Array:
        """One of the columns that labeling adds, with the type of `field`."""
        if field.name == "embedding":
            return pa.FixedSizeListArray.from_arrays(pa.array(self.embedding.ravel()), type=field.type)
        labeled_ids = self.label_ids[self.is_labeled].ravel()
        values = {
            "label_ids": labeled_ids,
            "label_names": label_names[labeled_ids],
            "label_scores": self.scores[self.is_labeled].ravel(),
        }[field.name]
        offsets = np.concatenate([[0], np.cumsum(self.is_labeled * self.label_ids.shape[1])]).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, field.type.value_type), type=field.type)


def decoded_images(
    column: pa.ChunkedArray, shape_HWC: tuple[int, int, int]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.uint8]]:
    """Which rows of a large_binary column are not null, and their pixels, uint8 (N, H, W, C): back to back as they lie
    in Arrow's buffer, and copied only if the column has several chunks.

    Raises ValueError for a value that is not the size of `shape_HWC`.
    """
    row_bytes = int(np.prod(shape_HWC))
    is_valid, images = [np.empty(0, bool)], []
    for chunk in column.chunks:
        is_valid.append(chunk.is_valid().to_numpy(zero_copy_only=False))
        if chunk.null_count == len(chunk):  # also the empty chunk; neither needs to have buffers
            continue
        _, offsets_buffer, data_buffer = chunk.buffers()
        # Buffers know nothing of the slice that the chunk is.
        offsets = np.frombuffer(offsets_buffer, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
        sizes_bytes, expected_bytes = np.diff(offsets), np.where(is_valid[-1], row_bytes, 0)
        if (sizes_bytes != expected_bytes).any():
            (row, *_) = np.flatnonzero(sizes_bytes != expected_bytes)
            raise ValueError(
                f"expected {expected_bytes[row]} bytes of pixels (uint8 {shape_HWC}), found {sizes_bytes[row]}"
            )
        data = np.frombuffer(data_buffer, np.uint8)[offsets[0] : offsets[-1]]
        images.append(data.reshape(-1, *shape_HWC))
    if len(images) == 1:
        return np.concatenate(is_valid), images[0]
    return np.concatenate(is_valid), np.concatenate([np.empty((0, *shape_HWC), np.uint8), *images])
