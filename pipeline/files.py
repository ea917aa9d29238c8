"""Rows of parts and plans -> one published Parquet file, written once, with everything its readers need to know.

A module of its own because what a file says of itself (columns of the run, footer, bounds, digests) is the same for all
folders that readers see, and for the catalog.
"""

import hashlib
import io
import json

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import schema
from pipeline.errors import TRANSIENT, ConflictError
from pipeline.log import Claim, FileRef
from pipeline.storage import Store

_SOURCES_DIGEST = "label_bucket.parts_digest"


def labels(table: pa.Table, claim: Claim, embedding_dim: int | None) -> pa.Table:
    """Rows of staged parts that have a label -> schema.labels."""
    return _with_run(table.filter(pc.is_null(table.column("failure_kind"))), claim, schema.labels(embedding_dim))


def failures(table: pa.Table, claim: Claim) -> pa.Table:
    """Rows of staged parts that have none -> schema.FAILURES."""
    table = table.filter(pc.is_valid(table.column("failure_kind")))
    is_transient = pc.is_in(table.column("failure_kind"), pa.array([str(kind) for kind in TRANSIENT]))
    return _with_run(table.append_column("is_transient", is_transient), claim, schema.FAILURES)


def deletions(table: pa.Table, claim: Claim) -> pa.Table:
    """Catalog rows of objects that are gone -> schema.DELETIONS."""
    uris = [f"{claim.identity['input']}/{key}" for key in table.column("key").to_pylist()]
    return _with_run(pa.table({"uri": uris, "etag": table.column("etag")}), claim, schema.DELETIONS)


def _with_run(table: pa.Table, claim: Claim, wanted: pa.Schema) -> pa.Table:
    """`table` with the run's own columns, as `wanted`."""
    constants = {
        "model_id": claim.model_id,
        "model_revision": claim.model_revision,
        "space_id": claim.identity["space_id"],
        "run_id": claim.run_id,
        "run_seq": claim.run_seq,
    }
    columns = []
    for field in wanted:
        if field.name == "image_id":
            columns.append(pa.array([schema.image_id(uri) for uri in table.column("uri").to_pylist()], field.type))
        elif field.name in constants:
            columns.append(pa.repeat(pa.scalar(constants[field.name], field.type), len(table)))
        else:
            columns.append(table.column(field.name))
    return pa.table(columns, schema=wanted)


def put(output: Store, key: str, rows: pa.Table, claim: Claim, sources_digest: str) -> FileRef:
    """Write a published file once: `rows` in key order, with `key` or `uri` among their columns.

    One that exists must come from the same sources; it may differ in its bytes when another version of the Parquet
    writer made it.
    """
    metadata = {**claim.metadata, "label_bucket.run_id": claim.run_id, _SOURCES_DIGEST: sources_digest}
    if key.startswith(("labels/", "snapshots/")):
        metadata["huggingface"] = huggingface_features(rows.schema)
    data = schema.encode(rows, metadata)
    standing = output.put_if_absent(key, data)
    if standing is not data:
        found = (pq.read_schema(io.BytesIO(standing)).metadata or {}).get(_SOURCES_DIGEST.encode(), b"").decode()
        if found != sources_digest:
            raise ConflictError(f"{output.root}/{key}: exists and was not made from the parts of run {claim.run_id}")
    first, last = _bounds(rows, f"{claim.identity['input']}/")
    return FileRef(
        key=key,
        num_rows=len(rows),
        size_bytes=len(standing),
        sha256=hashlib.sha256(standing).hexdigest(),
        first_key=first,
        last_key=last,
    )


def _bounds(rows: pa.Table, root: str) -> tuple[str, str]:
    if not len(rows):
        return "", ""
    if "key" in rows.column_names:
        return rows.column("key")[0].as_py(), rows.column("key")[-1].as_py()
    uris = rows.column("uri")
    return uris[0].as_py().removeprefix(root), uris[-1].as_py().removeprefix(root)


def huggingface_features(table_schema: pa.Schema) -> str:
    """The footer value that tells `datasets` the types of the columns."""
    from datasets import Features

    return json.dumps({"info": {"features": Features.from_arrow_schema(table_schema).to_dict()}})
