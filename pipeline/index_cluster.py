"""Files of a view's catalog encoded as Ray Data does it: actors that hold the trained index, a file for each task.

    file numbers ──> encode (actor pool) ──> an `Encoded` per slice, in order, added by the driver as it comes

What an index of 1e8 rows costs is this step: reading every label file, and finding the list of every vector. Adding is
a copy, and stays in the driver, which must hold the whole index anyhow.

A module of its own because it imports ray.data, and an index of a million rows is built without a cluster.
"""

import io
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy

from pipeline import dataset, index_encode
from pipeline.index_encode import Encoded, Job
from pipeline.index_log import RowsFile
from pipeline.index_vectors import Found, Vectors
from pipeline.meter import metered

_ACTOR_CPUS = 1
_ACTOR_BYTES = 2 << 30
"""What one reserves: a slice and a file of labels, thrice at worst, and the trained lists."""


def on_cluster(job: Job, vectors: Vectors) -> Iterator[Encoded]:
    """Every file of the catalog, on all nodes. Errors as `index_encode.encode_file`."""
    num_files = len(job.current.catalog)
    if not num_files:
        return
    dataset.set_context(max_block_bytes=None, preserve_order=True)
    cpus: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    rows = (
        ray.data.from_items([{"number": number} for number in range(num_files)], override_num_blocks=num_files)
        .map_batches(
            _Encode,
            fn_constructor_args=(ray.put((job, vectors)),),
            batch_size=1,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(min_size=1, max_size=max(1, min(num_files, int(cpus.get("CPU", 1))))),
            num_cpus=_ACTOR_CPUS,
            memory=_ACTOR_BYTES,
        )
        .iter_rows()
    )
    for row in metered(rows, "encoding slices of the view", None):
        yield Encoded(
            rows=RowsFile.model_validate_json(row["rows"]),
            codes=_array(row["codes"]),
            ordinals=_array(row["ordinals"]),
            nearest=Found(_array(row["cosines"]), _array(row["neighbours"])),
        )


class _Encode:
    """The actor: an index without vectors, and the job."""

    def __init__(self, shared: "ray.ObjectRef[tuple[Job, Vectors]]") -> None:
        self._job, self._vectors = ray.get(shared)

    def __call__(self, files: pa.Table) -> Iterator[pa.Table]:
        for number in files["number"].to_pylist():
            for each in index_encode.encode_file(self._job, self._vectors, number):
                yield pa.table(
                    {
                        "rows": [each.rows.model_dump_json()],
                        "codes": _packed(each.codes),
                        "ordinals": _packed(each.ordinals),
                        "cosines": _packed(each.nearest.cosines_QK),
                        "neighbours": _packed(each.nearest.ordinals_QK),
                    }
                )


def _packed(array: np.ndarray) -> pa.Array:
    """An array with its shape and type as one value."""
    sink = io.BytesIO()
    np.save(sink, array, allow_pickle=False)
    return pa.array([sink.getvalue()], pa.large_binary())


def _array(data: bytes) -> np.ndarray:
    return np.asarray(np.load(io.BytesIO(data), allow_pickle=False))
