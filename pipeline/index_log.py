"""What an index says of itself: index.json of each version, and the log that announces them, in order.

    _log/00000001.json                       one announced version; the greatest number of a space is its newest index
    index/<space>/<version>/index.json       what this version is: counts, settings, measured recall, its files
    index/<space>/<version>/vectors-….bin    ordinals and vectors, or an index of FAISS, in slices
    index/<space>/<version>/rows-….parquet   ROWS, sorted by ordinal: what stands behind a vector
    index/<space>/<version>/truth.parquet    `truth_schema`: sampled rows with their true nearest, to measure recall by

A version is complete when the log names it, and never changes. One that a build left behind when it died is in no log,
and nobody reads it.

A module of its own because building and reading must agree on it, as `schema` and `log` are for the labeling output.
"""

import re
from collections.abc import Sequence
from typing import Final, Literal, TypeVar

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline import index_files, schema, storage
from pipeline.errors import ConfigError, ConflictError
from pipeline.index_files import FileRef
from pipeline.storage import Store
from pipeline.view import LabelFile

INDEX_VERSION: Final = 1
"""Version of everything below; a reader refuses another one."""

AUTO: Final = "auto"
"""The factory is chosen by the number of rows and the memory there is."""
MIN_RECALL: Final = 0.95
"""Unless something else is asked for."""

FROM_LABELS = (
    *("uri", "image_id", "etag", "size_bytes", "width_px", "height_px", "sha256", "phash"),
    *("label_ids", "label_names", "label_scores", "run_seq"),
)
"""Columns of labels/ that an index repeats."""
ROWS = pa.schema(
    [pa.field("ordinal", pa.int64(), nullable=False), *(schema.labels(None).field(name) for name in FROM_LABELS)]
)
"""What stands behind a vector: its ordinal in the index, and the row of labels/ without the vector itself."""
_T = TypeVar("_T", bound=BaseModel)
_LOG_NAME = re.compile(r"_log/(\d{8})\.json")


def truth_schema(dim: int) -> pa.Schema:
    """One row per sampled row of the index: its vector, and its true nearest others by cosine, best first."""
    return pa.schema(
        [
            pa.field("ordinal", pa.int64(), nullable=False),
            pa.field("vector", schema.embedding_type(dim), nullable=False),
            pa.field("ordinals", pa.list_(pa.int64()), nullable=False),
            pa.field("cosines", pa.list_(pa.float32()), nullable=False),
        ]
    )


class RowsFile(FileRef):
    """A file of ROWS."""

    num_rows: int
    first_ordinal: int
    last_ordinal: int
    first_uri: str
    """Least uri of its rows."""
    last_uri: str


class Source(BaseModel):
    """Where the true vectors are."""

    model_config = ConfigDict(frozen=True)

    output: str
    """URL of the labeling output."""
    input: str
    """What the labeled keys lie below: a uri is this, a slash and the key."""
    run_id: str
    """The newest run whose outcomes the index has."""
    run_seq: int
    """Its place in the order."""
    labels: list[LabelFile]
    """The label files that hold its rows, and superseded ones."""


class Info(BaseModel):
    """index.json: what a version of an index is."""

    model_config = ConfigDict(frozen=True)

    index_version: Literal[1] = INDEX_VERSION
    space_id: str
    version: str
    """`<newest run_seq>-<8 hex digits>`."""
    created_at: str
    source: Source
    model_id: str
    model_revision: str
    facts: dict[str, str]
    """What the newest run says of itself in the footers of its files (`label_bucket.weights_digest`, `.preprocess`, …):
    enough to embed a query as the rows were."""
    dim: int
    metric: Literal["inner_product"] = "inner_product"
    """Of vectors of length 1, so it is the cosine."""
    factory: str
    """`exact`, or what FAISS calls this index."""
    asked_factory: str = AUTO
    """What --factory said when it was built; an update that builds anew keeps to it."""
    min_recall: float = MIN_RECALL
    """What --min-recall said; updates keep to it."""
    nprobe: int | None
    """Inverted lists that are searched for a query; None for exact."""
    num_rows: int
    next_ordinal: int
    """Greater than every ordinal that this index or one before it has given."""
    base_version: str | None
    """The version that this one updated; None for one that was built from nothing."""
    num_built_rows: int
    """Rows of the last full build. Their ordinals are the first ones, in order of uris."""
    num_changed_rows: int
    """Rows added and removed since then."""
    built_recall_at_10: float
    """As `recall_at_10`, after the last full build."""
    recall_at_10: float
    """Share of the true ten nearest that the index finds, of sampled rows."""
    num_recall_samples: int
    """Sampled rows that could be measured, see `index_recall`."""
    p50_ms: float
    """Median time of one query, where it was built."""
    seconds: float
    versions: dict[str, str]
    vectors: list[FileRef]
    rows: list[RowsFile]
    truth: FileRef

    @property
    def folder(self) -> str:
        """Where its files are, with a slash at the end."""
        return f"index/{self.space_id}/{self.version}/"


class Announcement(BaseModel):
    """A place in the index's log."""

    model_config = ConfigDict(frozen=True)

    index_version: Literal[1] = INDEX_VERSION
    space_id: str
    version: str
    info: FileRef
    announced_at: str


# --- the log ------------------------------------------------------------------------------------------------------


def read_log(store: Store) -> list[Announcement]:
    """Every announced version of every space, oldest first. ConfigError for the log of a labeling output, ConflictError
    for one with a hole, damage or a newer schema."""
    keys = list(storage.list_keys(store, "_log/"))
    if any(key.endswith(".claim.json") for key in keys):
        raise ConfigError(
            f"{store.root}: expected an index, which is --output of build_index and --index of search_images, found a"
            " labeling output, which is --input of build_index"
        )
    numbers = {match[1]: key for key in keys if (match := _LOG_NAME.fullmatch(key))}
    if sorted(numbers) != [f"{place:08d}" for place in range(1, len(numbers) + 1)]:
        raise ConflictError(f"{store.root}/_log: expected places 1 to {len(numbers)}, found a hole; restore the file")
    return [_parse(Announcement, store.get(key), f"{store.root}/{key}") for _, key in sorted(numbers.items())]


def announce(store: Store, info: Info, base_version: str | None, announced_at: str) -> None:
    """Write index.json and make this version the newest of its space. Last of a build.

    Raises ConflictError, naming it, if another version of the space was announced since `base_version` was the newest.
    """
    data = info.model_dump_json(indent=1).encode()
    ref = index_files.write(store, f"{info.folder}index.json", data)
    wanted = Announcement(space_id=info.space_id, version=info.version, info=ref, announced_at=announced_at)
    while True:
        entries = read_log(store)
        newest = newest_of(entries, info.space_id)
        if (newest.version if newest else None) != base_version:
            raise ConflictError(
                f"{store.root}: index {newest.version if newest else None} of space {info.space_id} was announced while"
                f" this command built {info.version}, which is now in vain; run it again with --update"
            )
        key = f"_log/{len(entries) + 1:08d}.json"
        store.put_if_absent(key, wanted.model_dump_json(indent=1).encode())
        # Read back before it is believed, as in `log.claim`.
        if _parse(Announcement, store.get(key), f"{store.root}/{key}") == wanted:
            return


def newest_of(entries: Sequence[Announcement], space_id: str) -> Announcement | None:
    """The newest announced version of a space."""
    return next((each for each in reversed(entries) if each.space_id == space_id), None)


def read_info(store: Store, entry: Announcement) -> Info:
    """What an announced version is. ConflictError for damage."""
    return _parse(Info, index_files.read(store, entry.info), f"{store.root}/{entry.info.key}")


def _parse(kind: type[_T], data: bytes, where: str) -> _T:
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConflictError(
            f"{where}: expected what this version (index_version {INDEX_VERSION}) writes, found"
            f" {'.'.join(map(str, first['loc']))}: {first['msg']}; use the version of this program that wrote it"
        ) from error
