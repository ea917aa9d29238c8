"""The Arrow schema of every boundary, their versions, and the footer metadata: the contract with consumers.

Between stages a unit travels as one table, one row per object, in key order:

    objects   (plan -> fetch)       what the listing said
    decoded   (preprocess -> label) objects + outcome so far + pixels
    labeled   (label -> parts)      objects + outcome + labels + embedding; a staged part is this table

A failure is marked in place (`failure_kind` is not null), so no stage drops, adds or moves a row.
"""

import hashlib
import io
import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

SCHEMA_VERSION = 4
"""Version of everything below and of the log. A reader refuses another one. Version 1 had its state per run, not per
key range; version 2 no statistics of images; version 3 no other columns of a manifest."""

_VERSION = b"label_bucket.schema_version"
_TIMESTAMP = pa.timestamp("us", tz="UTC")

OBJECTS = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),  # relative to the source's root; its exact bytes
        pa.field("uri", pa.string(), nullable=False),
        pa.field("etag", pa.string()),
        pa.field("version_id", pa.string()),
        pa.field("size_bytes", pa.int64(), nullable=False),
        pa.field("last_modified", _TIMESTAMP),
        pa.field("storage_class", pa.string()),
        pa.field("extra", pa.string()),  # JSON object of a manifest's other columns
    ]
)

UNITS = pa.schema(
    [
        pa.field("unit_id", pa.string(), nullable=False),
        pa.field("num_objects", pa.int64(), nullable=False),
        pa.field("encoded_bytes", pa.int64(), nullable=False),
        pa.field("objects", pa.list_(pa.struct(list(OBJECTS))), nullable=False),
    ]
)

_OUTCOME = [
    pa.field("width_px", pa.int32()),
    pa.field("height_px", pa.int32()),
    pa.field("failure_kind", pa.string()),  # null: no failure so far
    pa.field("failure_stage", pa.string()),
    pa.field("failure_message", pa.string()),
]

STATS = [
    # Null without --image-stats. Always there, so that a night with it and one without are one table.
    pa.field("sha256", pa.string()),
    pa.field("phash", pa.int64()),
    pa.field("sharpness", pa.float32()),
    pa.field("luminance", pa.float32()),
]

# Pixels are large_binary, not a tensor column: zero-copy both ways, nulls cost nothing, no Ray extension type.
DECODED = pa.schema([*OBJECTS, *_OUTCOME, *STATS, pa.field("pixels", pa.large_binary())])


def embedding_type(dim: int) -> pa.DataType:
    """Type of the embedding column: float32, `dim` values, no nulls inside.

    The child is named `element`, because BYTE_STREAM_SPLIT is silently ignored unless the leaf's path is exactly
    `embedding.list.element`.
    """
    return pa.list_(pa.field("element", pa.float32(), nullable=False), dim)


def labeled(embedding_dim: int | None) -> pa.Schema:
    """Schema of a labeled unit and of a staged part. `embedding_dim` is None for runs without embeddings.

    A failed row has empty label lists and a zero vector.
    """
    fields = [
        *OBJECTS,
        *_OUTCOME,
        *STATS,
        pa.field("label_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("label_names", pa.list_(pa.string()), nullable=False),
        pa.field("label_scores", pa.list_(pa.float32()), nullable=False),
    ]
    if embedding_dim is not None:
        fields.append(pa.field("embedding", embedding_type(embedding_dim), nullable=False))
    return pa.schema(fields)


def labels(embedding_dim: int | None) -> pa.Schema:
    """Schema of `labels/`: one row per labeled image, sorted by uri."""
    fields = [
        pa.field("image_id", pa.int64(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("etag", pa.string()),
        pa.field("version_id", pa.string()),
        pa.field("size_bytes", pa.int64(), nullable=False),
        pa.field("last_modified", _TIMESTAMP),
        pa.field("extra", pa.string()),
        pa.field("width_px", pa.int32(), nullable=False),
        pa.field("height_px", pa.int32(), nullable=False),
        *STATS,
        pa.field("label_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("label_names", pa.list_(pa.string()), nullable=False),
        pa.field("label_scores", pa.list_(pa.float32()), nullable=False),
        pa.field("model_id", pa.string(), nullable=False),
        pa.field("model_revision", pa.string(), nullable=False),
        pa.field("space_id", pa.string(), nullable=False),
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("run_seq", pa.int64(), nullable=False),
    ]
    if embedding_dim is not None:
        fields.append(pa.field("embedding", embedding_type(embedding_dim), nullable=False))
    return pa.schema(fields)


FAILURES = pa.schema(
    [
        pa.field("image_id", pa.int64(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("etag", pa.string()),
        pa.field("version_id", pa.string()),
        pa.field("size_bytes", pa.int64(), nullable=False),
        pa.field("last_modified", _TIMESTAMP),
        pa.field("extra", pa.string()),
        pa.field("failure_kind", pa.string(), nullable=False),
        pa.field("failure_stage", pa.string(), nullable=False),
        pa.field("failure_message", pa.string(), nullable=False),
        pa.field("is_transient", pa.bool_(), nullable=False),
        pa.field("space_id", pa.string(), nullable=False),
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("run_seq", pa.int64(), nullable=False),
    ]
)

DELETIONS = pa.schema(
    [
        pa.field("image_id", pa.int64(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("etag", pa.string()),
        pa.field("space_id", pa.string(), nullable=False),
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("run_seq", pa.int64(), nullable=False),
    ]
)

CATALOG = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("etag", pa.string()),
        pa.field("size_bytes", pa.int64(), nullable=False),
        pa.field("last_modified", _TIMESTAMP),
        pa.field("failure_kind", pa.string()),  # null: labeled
        pa.field("run_seq", pa.int64(), nullable=False),  # the run that gave this outcome
    ]
)


def canaries(dim: int) -> pa.Schema:
    """Schema of the vectors by which actors check themselves: one row per canary image, by name."""
    return pa.schema(
        [
            pa.field("name", pa.string(), nullable=False),
            pa.field("sha256", pa.string(), nullable=False),  # of the image's file
            pa.field("vector", embedding_type(dim), nullable=False),
        ]
    )


def image_id(uri: str) -> int:
    """Positive 63-bit id of an image: the same in every run and for every model.

    SHA-256 of the uri's UTF-8 bytes, first eight bytes big-endian, top bit cleared. Search indexes want integers; at
    1e9 images there is a 5 % chance of one collision, so the uri stays the key.
    """
    return int.from_bytes(hashlib.sha256(uri.encode()).digest()[:8], "big") >> 1


def digest(value: Any) -> str:
    """SHA-256, in hex, of `value` as canonical JSON (sorted keys, no spaces, UTF-8)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def encode(table: pa.Table, metadata: Mapping[str, str] | None = None, *, row_group_rows: int = 16_384) -> bytes:
    """`table` as the bytes of a Parquet file whose footer says `metadata` and the schema version.

    zstd 1; embeddings byte-stream-split without dictionary or statistics. Deterministic for one pyarrow version.
    129.9 MB against 158.0 MB with pyarrow's defaults for 100k x 384 float32.
    """
    options: dict[str, Any] = {}
    if "embedding" in table.column_names:
        leaf = "embedding.list.element"
        flat = [name for name in table.column_names if not pa.types.is_nested(table.schema.field(name).type)]
        options = {
            "column_encoding": {leaf: "BYTE_STREAM_SPLIT"},
            "use_dictionary": [*flat, "label_ids.list.element", "label_names.list.element"],
            "write_statistics": flat,
        }
    sink = io.BytesIO()
    table = table.replace_schema_metadata({_VERSION.decode(): str(SCHEMA_VERSION), **(metadata or {})})
    pq.write_table(table, sink, compression="zstd", compression_level=1, row_group_size=row_group_rows, **options)
    return sink.getvalue()


def version_of(file_schema: pa.Schema) -> int | None:
    """The schema version that a file's footer says; None for a file that this program did not write."""
    found = (file_schema.metadata or {}).get(_VERSION, b"").decode()
    return int(found) if found.isdigit() else None
