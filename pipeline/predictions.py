"""What a model said of each picture of a labeled set, as one Parquet file: written as it comes, read in uri order.

A module of its own because evaluation writes this file and comparison reads it.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import ConfigError, SourceError
from pipeline.storage import describe

SCHEMA = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("preprocess", pa.string(), nullable=False),
        pa.field("precision", pa.string(), nullable=False),
        pa.field("true_name", pa.string(), nullable=False),  # as the labeled set calls it
        pa.field("true_id", pa.int32(), nullable=False),  # the model's label for it
        pa.field("label_ids", pa.list_(pa.int32()), nullable=False),  # best first; none where the picture failed
        pa.field("label_names", pa.list_(pa.string()), nullable=False),
        pa.field("label_scores", pa.list_(pa.float32()), nullable=False),
        pa.field("failure_kind", pa.string()),
        pa.field("failure_message", pa.string()),
    ]
)
"""One row per picture, preprocessing and precision; the rows of one of these are in uri order."""

_FOOTER = "label_bucket.predictions"
_ROW_GROUP_ROWS = 16_384


class Combination(NamedTuple):
    """Of what an evaluation varies."""

    preprocess: str
    precision: str

    def __str__(self) -> str:
        return f"preprocess={self.preprocess},precision={self.precision}"


class Writer:
    """Collects rows into row groups."""

    def __init__(self, file: pq.ParquetWriter) -> None:
        self._file = file
        self._waiting: list[pa.Table] = []

    def add(self, rows: pa.Table, combination: Combination) -> None:
        """Write rows that have all columns but those of the combination."""
        for name, value in combination._asdict().items():
            rows = rows.append_column(name, pa.repeat(pa.scalar(value), len(rows)))
        self._waiting.append(rows.select(SCHEMA.names).cast(SCHEMA))
        if sum(map(len, self._waiting)) >= _ROW_GROUP_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write what is waiting."""
        if self._waiting:
            self._file.write_table(pa.concat_tables(self._waiting))
            self._waiting.clear()


@contextmanager
def writer(path: Path, combinations: list[Combination], about: Mapping[str, str]) -> Iterator[Writer]:
    """A writer of `path`, which appears when the block ends well. `about` (model, set) stands in the footer.

    Raises SourceError if it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    footer = {_FOOTER: json.dumps({"combinations": combinations, **about})}
    try:
        with pq.ParquetWriter(partial, SCHEMA.with_metadata(footer), compression="zstd") as file:
            rows = Writer(file)
            yield rows
            rows.flush()
        partial.replace(path)
    except OSError as error:
        raise SourceError(f"--predictions {path}: cannot be written ({describe(error)})") from error
    finally:
        partial.unlink(missing_ok=True)


def about(path: Path) -> tuple[list[Combination], dict[str, str]]:
    """What a file holds: its combinations, and what its writer said of the model and the set.

    Raises ConfigError for a file that is not there or that `writer` did not write.
    """
    try:
        footer = (pq.read_schema(path).metadata or {}).get(_FOOTER.encode())
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"{path}: expected a file of --predictions, found {describe(error)}") from error
    if footer is None:
        raise ConfigError(f"{path}: expected a file of --predictions, found Parquet that something else wrote")
    content = json.loads(footer)
    return [Combination(*each) for each in content.pop("combinations")], content


def batches(path: Path, combination: Combination) -> Iterator[pa.Table]:
    """The rows of one combination in uri order, a row group's at a time. Raises SourceError for a damaged file."""
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_ROW_GROUP_ROWS):
                is_wanted = pc.and_(
                    *(pc.equal(batch.column(name), value) for name, value in combination._asdict().items())
                )
                yield pa.table(batch.filter(is_wanted))
    except (OSError, pa.ArrowException) as error:
        raise SourceError(f"{path}: cannot be read ({describe(error)})") from error
