"""What somebody searches with -> a unit vector: a picture by the code that labeled the index's pictures, or numbers.

In: a path or URL, or JSON. Out: float32 of length 1, and for a picture its labels. A module of its own because it is
the only part of a search that needs a model, and torch.
"""

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from pipeline import decode, run_model, schema, storage
from pipeline.errors import ConfigError
from pipeline.picture import Recipe
from pipeline.prepare import prepare_encoded
from pipeline.run_model import Settings

Vector = npt.NDArray[np.float32]
_NPY = b"\x93NUMPY"


class Picture(NamedTuple):
    """A picture that is not in the index, as the index's own model sees it."""

    vector: Vector
    labels: list[tuple[str, float]]
    """Names and scores, best first."""
    image: Image.Image


def read(path_or_url: str) -> bytes:
    """The bytes of one object: a local path or any URL that fsspec can open. Raises as storage does."""
    scheme, separator, rest = path_or_url.partition("://")
    if separator and scheme not in ("file", "local"):
        folder, _, name = rest.rpartition("/")
        folder = folder and f"{scheme}://{folder}"
    else:
        path = Path(rest if separator else path_or_url)
        folder, name = str(path.parent), path.name
    if not folder or not name:
        raise ConfigError(f"expected the path or URL of a file, found {path_or_url}")
    return storage.connect(folder).get(name)


def picture(path_or_url: str, wanted: Settings, names: Iterable[str | None]) -> Picture:
    """A picture through the wanted decoding, preprocessing and model, which is looked for under these names.

    Raises ConfigError, with the kind of failure, for a picture that would be a failure row; what `read`,
    `run_model.find` and `run_model.labeler` raise.
    """
    data = read(path_or_url)
    # One row as the plan lists it, so that every rule for pictures holds here as well.
    row = {"key": path_or_url, "uri": path_or_url, "size_bytes": len(data)}
    objects = pa.Table.from_pylist([row], schema.OBJECTS)
    decoded, _ = prepare_encoded(objects, [(0, data)], Recipe(spec=wanted.spec, limits=decode.DEFAULT_LIMITS))
    _check(decoded, path_or_url)
    # One picture at a time: a batch is padded to its size, and computed as a whole.
    labeled = run_model.labeler(wanted, run_model.find(wanted, names), batch_size=1)(decoded)
    _check(labeled, path_or_url)
    (found,) = labeled.to_pylist()
    return Picture(
        vector=np.array(found["embedding"], np.float32),
        labels=list(zip(found["label_names"], found["label_scores"], strict=True)),
        image=decode.decode(data),
    )


def _check(table: pa.Table, what: str) -> None:
    kind, message = table["failure_kind"][0].as_py(), table["failure_message"][0].as_py()
    if kind is not None:
        raise ConfigError(f"--image {what}: {kind}: {message}")


def numbers(text: str, dim: int) -> Vector:
    """A vector as JSON, or the path or URL of a file with JSON or of a .npy file; scaled to length 1.

    Raises ConfigError for anything that is not `dim` finite numbers, or has no direction.
    """
    where = "--vector" if text.lstrip().startswith("[") else f"--vector {text}"
    data = text.encode() if where == "--vector" else read(text)
    try:
        values: Any = np.load(io.BytesIO(data), allow_pickle=False) if data[:6] == _NPY else json.loads(data)
        vector = np.asarray(values, np.float64)
    except (ValueError, TypeError, OverflowError, EOFError) as error:
        raise ConfigError(f"{where}: expected a list of {dim} numbers, as JSON or .npy, found {data[:40]!r}") from error
    if vector.shape not in ((dim,), (1, dim)):
        raise ConfigError(f"{where}: expected {dim} numbers, as many as the index has, found shape {vector.shape}")
    greatest = np.abs(vector).max()
    if not (np.isfinite(greatest) and greatest > 0):
        num_bad = int((~np.isfinite(vector)).sum())
        raise ConfigError(f"{where}: expected finite numbers that are not all 0, found {num_bad} NaN or infinite")
    vector = vector.ravel() / greatest  # so that no square overflows
    return np.asarray(vector / np.linalg.norm(vector), np.float32)
