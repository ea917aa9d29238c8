"""One unit's objects -> its model input: fetch, decode and preprocess as one CPU task.

A module of its own because these three stages share a task: encoded bytes never enter the object store, and network
waits overlap decoding. Same rows in, same order out; a failure is marked in its row and touches no other.
"""

import time
from collections.abc import Iterable, Iterator
from functools import partial

import numpy as np
import pyarrow as pa

from pipeline import contain, schema
from pipeline.decode import DecodeLimits
from pipeline.errors import FailureKind, ImageError
from pipeline.fetch import fetch
from pipeline.picture import Facts, Recipe
from pipeline.storage import ObjectInfo, Source

_BATCH_BYTES = 4 * 2**20


def prepare_unit(store: Source, objects: pa.Table, recipe: Recipe, *, deadline_s: float) -> tuple[pa.Table, float]:
    """`objects` (schema.OBJECTS) as schema.DECODED, and the seconds the task spent decoding and preprocessing.

    Pixels are uint8 (input_px, input_px, 3) in C order; columns of schema.STATS are null unless the recipe has them.
    Raises as `fetched` does; then none of the unit is a row.
    """
    return prepare_encoded(objects, fetched(store, objects, recipe.limits, deadline_s=deadline_s), recipe)


def fetched(
    store: Source, objects: pa.Table, limits: DecodeLimits, *, deadline_s: float
) -> Iterator[tuple[int, bytes | ImageError]]:
    """The row and the encoded bytes of each object, or its failure.

    Objects that storage did not answer for get a second deadline after all others, so they come twice: what comes last
    holds. Raises UnavailableError in an outage and ForbiddenError if the identity lost its permission, as `fetch` does.
    """
    infos = [
        ObjectInfo(
            row["key"], row["size_bytes"], row["etag"], row["last_modified"], row["storage_class"], row["version_id"]
        )
        for row in objects.to_pylist()
    ]
    read = partial(fetch, store, max_image_bytes=limits.max_bytes, deadline_s=deadline_s)
    again = []
    for row, data in enumerate(read(infos)):
        if isinstance(data, ImageError) and data.kind is FailureKind.UNAVAILABLE:
            again.append(row)
        yield row, data
    yield from zip(again, read([infos[row] for row in again]), strict=True)


def prepare_encoded(
    objects: pa.Table, encoded: Iterable[tuple[int, bytes | ImageError]], recipe: Recipe
) -> tuple[pa.Table, float]:
    """The half of `prepare_unit` that needs no store: the same result, from (row, bytes or failure) in any order.

    Every row of `objects` must come, and may come again after a failure, which then no longer holds.
    """
    edge_px = recipe.spec.input_px
    pixels = np.empty((len(objects), edge_px, edge_px, 3), np.uint8)
    results: dict[int, Facts | ImageError] = {}
    child = contain.child_of(recipe)
    busy_s = 0.0
    for batch in _batches(encoded):
        results |= {row: data for row, data in batch if isinstance(data, ImageError)}
        images = {row: data for row, data in batch if isinstance(data, bytes)}
        if not images:
            continue
        started_s = time.perf_counter()
        made, outcomes = child.make_pictures(list(images.values()))
        pixels[list(images)] = made
        busy_s += time.perf_counter() - started_s
        results |= zip(images, outcomes, strict=True)
    return _decoded(objects, [results[row] for row in range(len(objects))], pixels), busy_s


def _batches(
    encoded: Iterable[tuple[int, bytes | ImageError]],
) -> Iterator[list[tuple[int, bytes | ImageError]]]:
    """As many at once as a child takes, unless they are large: then handing over costs little and memory more."""
    batch: list[tuple[int, bytes | ImageError]] = []
    num_bytes = 0
    for row, data in encoded:
        batch.append((row, data))
        num_bytes += len(data) if isinstance(data, bytes) else 0
        if len(batch) == contain.MAX_IMAGES or num_bytes >= _BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def _decoded(objects: pa.Table, results: list[Facts | ImageError], pixels: np.ndarray) -> pa.Table:
    pictures = [None if isinstance(result, ImageError) else result for result in results]
    failures = [result if isinstance(result, ImageError) else None for result in results]
    stats = [picture and picture.stats for picture in pictures]
    columns = {
        "width_px": [picture and picture.size_px[0] for picture in pictures],
        "height_px": [picture and picture.size_px[1] for picture in pictures],
        "failure_kind": [failure and str(failure.kind) for failure in failures],
        "failure_stage": [failure and failure.stage for failure in failures],
        "failure_message": [failure and str(failure) for failure in failures],
        **{field.name: [each and getattr(each, field.name) for each in stats] for field in schema.STATS},
        "pixels": _pixels_array(pixels, np.array([failure is None for failure in failures], bool)),
    }
    for name, values in columns.items():
        field = schema.DECODED.field(name)
        objects = objects.append_column(field, pa.array(values, field.type))
    return objects


def _pixels_array(pixels: np.ndarray, is_image: np.ndarray) -> pa.LargeBinaryArray:
    """Pixels of the rows that have some, back to back and without a copy where all have; null for the others."""
    num_rows, num_images = len(is_image), int(is_image.sum())
    data = pixels if num_images == num_rows else pixels[is_image]
    row_bytes = pixels[0].nbytes if num_rows else 0
    offsets = np.concatenate([[0], np.cumsum(np.where(is_image, row_bytes, 0))]).astype(np.int64)
    validity = pa.array(is_image).buffers()[1] if num_images < num_rows else None
    buffers = [validity, pa.py_buffer(offsets), pa.py_buffer(data)]
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), num_rows, buffers, num_rows - num_images)
