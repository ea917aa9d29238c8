"""Twenty images that never change -> vectors by which an actor notices that it left the space of the output.

    pipeline/canaries/*  ──> decode ──> preprocess ──> the run's own model ──> vectors ──> check against the first run's

A space id names weights and rules, not what a library makes of them: another codec, resize kernel or torch build moves
vectors and nothing in the output would say so. So the vectors of a space's first run are kept beside its log entry, and
every actor compares itself with them before it labels anything. A module of its own because it is one question (is this
still the same space?) with one file format, and because it needs no torch: the vectors come from `label`.
"""

import hashlib
import io
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import schema, storage
from pipeline.checkpoint import PreprocessSpec
from pipeline.decode import DEFAULT_LIMITS
from pipeline.errors import AbsentError, ConfigError, ConflictError
from pipeline.log import FileRef
from pipeline.picture import Recipe, make_picture
from pipeline.storage import Store

Vectors = npt.NDArray[np.float32]
"""Float32 (NUM_CANARIES, D) of length 1, in the order of `canaries()`."""

NUM_CANARIES = 20
MIN_COSINE = 0.999
"""Below this an actor labels in another space. bf16 against fp32 stays above 0.9999, another resize or colour order
does not reach it: see the README's decisions."""
_FOLDER = Path(__file__).parent / "canaries"
_SUFFIXES = frozenset({".jpg", ".png", ".webp"})
_SPACE_ID = "label_bucket.space_id"


class Canary(NamedTuple):
    """One of the images: `<drawn class>.<ext>` and the bytes of the file."""

    name: str
    data: bytes


def canaries() -> list[Canary]:
    """The images shipped with this package, by name. ConfigError if it was installed without them."""
    paths = sorted(path for path in _FOLDER.glob("*") if path.suffix in _SUFFIXES)
    if len(paths) != NUM_CANARIES:
        raise ConfigError(f"expected {NUM_CANARIES} canary images in {_FOLDER}, found {len(paths)}; install it again")
    return [Canary(path.name, path.read_bytes()) for path in paths]


def pixels(spec: PreprocessSpec) -> list[npt.NDArray[np.uint8]]:
    """The images as the model's input, each uint8 (input_px, input_px, 3), through this process's codecs and resize."""
    recipe = Recipe(spec=spec, limits=DEFAULT_LIMITS)
    return [make_picture(each.data, recipe)[0] for each in canaries()]


def vectors_of(
    label_ids_BK: npt.NDArray[np.int32],
    scores_BK: npt.NDArray[np.float32],
    embedding_BD: npt.NDArray[np.float32] | None,
) -> npt.NDArray[np.float32]:
    """What to compare of a prediction with all K labels, float32 of length 1: the embedding, or the logits without one.

    Softmax scores give logits back up to a constant, which centring removes. Their cosine is steadier than that of the
    scores: where two labels compete, a logit that is off by 0.1 would count as another space. Rows of NaN, or not of
    length 1, where the model gave no direction.
    """
    if embedding_BD is not None:
        return embedding_BD
    logits_BK = np.empty(scores_BK.shape, np.float64)
    log_scores_BK = np.log(np.maximum(scores_BK, np.finfo(np.float32).tiny), dtype=np.float64)
    np.put_along_axis(logits_BK, label_ids_BK.astype(np.int64), log_scores_BK, axis=1)
    logits_BK -= logits_BK.mean(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
        return np.asarray(logits_BK / np.linalg.norm(logits_BK, axis=1, keepdims=True), np.float32)


def check_lengths(vectors: Vectors, model: str) -> None:
    """Raise ConfigError unless every vector has length 1: a model for which one has not labels nothing rightly."""
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
    for each, length in zip(canaries(), lengths, strict=True):
        if not abs(length - 1) < 1e-3:  # also NaN
            raise ConfigError(
                f"model {model}: expected finite numbers for the canary image {each.name}, found none; are its weights"
                " damaged, or is --precision too coarse for them?"
            )


def cosines(found: Vectors, expected: Vectors) -> npt.NDArray[np.float64]:
    """Cosine of each canary's two vectors, in float64; NaN where one of them is."""
    left, right = found.astype(np.float64), expected.astype(np.float64)
    lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    return np.asarray((left * right).sum(axis=1) / lengths, np.float64)


def check(found: Vectors, expected: Vectors) -> None:
    """Raise ConflictError unless this process computes the vectors of the space's first run."""
    if found.shape != expected.shape:
        raise ConflictError(
            f"expected canary vectors of shape {expected.shape} as in this space's first run, found {found.shape}; use"
            " another --output"
        )
    each = cosines(found, expected)
    worst = int(np.argmin(each))  # a NaN comes first
    if not each[worst] >= MIN_COSINE:
        raise ConflictError(
            f"canary image {canaries()[worst].name}: expected the vector of this space's first run (cosine >="
            f" {MIN_COSINE}), found cosine {each[worst]:.6f} on node {platform.node()}, and"
            f" {int((~(each >= MIN_COSINE)).sum())} of {len(each)} canaries off; nothing may be labeled like this."
            " Compare `versions` and `device` in that run's report.json with this node's and install the same, or give"
            " this run up with --abandon-run and use another --output"
        )


# --- the reference beside the log ---------------------------------------------------------------------------------


def write(output: Store, run_id: str, space_id: str, vectors: Vectors) -> FileRef:
    """Commit the vectors of a space's first run, and describe the file that then stands, whoever wrote it."""
    standing = output.put_if_absent(_key(run_id), _encode(vectors, space_id))
    return _reference(run_id, standing)


def find(output: Store, run_id: str) -> FileRef | None:
    """The file that `write` left for this run, or None: for who finishes a run and has no model."""
    data = storage.get_or_none(output, _key(run_id))
    return None if data is None else _reference(run_id, data)


def read(output: Store, reference: FileRef, space_id: str) -> Vectors:
    """The vectors of a file that a log entry names.

    Raises ConflictError if it is missing, damaged, of another space, or made from other images than this version ships.
    """
    where = f"{output.root}/{reference.key}"
    try:
        data = output.get(reference.key)
    except AbsentError as error:
        raise ConflictError(f"{where}: the canary vectors of this space are gone; {_REMEDY}") from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != reference.sha256:
        raise ConflictError(
            f"{where}: expected canary vectors with SHA-256 {reference.sha256[:12]}…, found {digest[:12]}…; {_REMEDY}"
        )
    return _decode(data, space_id, where)


_REMEDY = "restore the file, or use another --output"


def _key(run_id: str) -> str:
    return f"_runs/{run_id}/canaries.parquet"


def _reference(run_id: str, data: bytes) -> FileRef:
    return FileRef(
        key=_key(run_id), num_rows=NUM_CANARIES, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest()
    )


def _digests(images: Sequence[Canary]) -> list[str]:
    return [hashlib.sha256(each.data).hexdigest() for each in images]


def _encode(vectors: Vectors, space_id: str) -> bytes:
    images = canaries()
    wanted = schema.canaries(vectors.shape[1])
    columns = [
        pa.array([each.name for each in images]),
        pa.array(_digests(images)),
        pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), type=wanted.field("vector").type),
    ]
    return schema.encode(pa.table(columns, schema=wanted), {_SPACE_ID: space_id})


def _decode(data: bytes, space_id: str, where: str) -> Vectors:
    try:
        table = pq.read_table(io.BytesIO(data))
        metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        names, digests = table.column("name").to_pylist(), table.column("sha256").to_pylist()
        vectors = np.stack(table.column("vector").to_numpy()).astype(np.float32)
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise ConflictError(f"{where}: expected canary vectors, found {storage.describe(error)}; {_REMEDY}") from error
    expected = {_SPACE_ID: space_id, "label_bucket.schema_version": str(schema.SCHEMA_VERSION)}
    for name, value in expected.items():
        if metadata.get(name) != value:
            raise ConflictError(f"{where}: expected {name} {value}, found {metadata.get(name)}; {_REMEDY}")
    images = canaries()
    if (names, digests) != ([each.name for each in images], _digests(images)):
        raise ConflictError(
            f"{where}: was made from other canary images than those of this version; use the version of this program"
            " that wrote it, or another --output"
        )
    return vectors
