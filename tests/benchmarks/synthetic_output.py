"""An output of any number of nights and rows with clustered unit vectors, published without a picture or a model."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import catalog, files, log, schema
from pipeline.catalog import KeyRange
from pipeline.log import FileRef
from pipeline.storage import Store

ROOT = "s3://photos/in"
SPACE = "synthetic-01234567"
NUM_CLUSTERS = 1000
ROWS_PER_FILE = 60_000


def vectors(numbers: np.ndarray, dim: int, seed: Sequence[int]) -> np.ndarray:
    """float32 (N, dim) of length 1 around 1,000 centres that depend on nothing; `numbers` choose the centres,
    `seed` what is around them."""
    centres = np.random.default_rng(0).normal(size=(NUM_CLUSTERS, dim)).astype(np.float32)
    found = centres[numbers % NUM_CLUSTERS]
    # In a space of many dimensions noise must lie in a few, or all neighbours are equally far.
    basis = np.random.default_rng(1).normal(size=(32, dim)).astype(np.float32)
    found = found + np.random.default_rng(seed).normal(size=(len(numbers), 32)).astype(np.float32) @ basis * 0.12
    return np.asarray(found / np.linalg.norm(found, axis=1, keepdims=True), np.float32)


def publish(
    output: Store, labeled: np.ndarray, deleted: np.ndarray, dim: int, embeddings: np.ndarray | None = None
) -> None:
    """A night in which the keys of these numbers are labeled, or gone; `embeddings` are those of the labeled, in order
    of their numbers, in place of what `vectors` gives."""
    state = log.read(output)
    base = state.newest(SPACE)
    claim = log.claim(
        output,
        state,
        {"input": ROOT, "space_id": SPACE, "embedding_dim": dim, "top_k": 2},
        run_date="2026-11-25",
        model_id="synthetic",
        model_revision="r1",
        metadata={"label_bucket.space_id": SPACE},
        now="2026-11-25T03:00:00+00:00",
    )
    labeled, deleted = np.sort(labeled), np.sort(deleted)
    where = f"space={SPACE}/run_date=2026-11-25/part-{claim.run_id}"
    gone, fresh = _outcomes(deleted, 0), _outcomes(labeled, claim.run_seq)
    entry = log.entry_of(
        claim,
        "run",
        "2026-11-25T04:00:00+00:00",
        counts={"labeled": len(labeled)},
        labels=[
            files.put(output, f"labels/{where}-{start:09d}.parquet", files.labels(rows, claim, dim), claim, str(start))
            for start in range(0, len(labeled), ROWS_PER_FILE)
            # Another seed for each file: rows of two would be copies of one another.
            for here in [slice(start, start + ROWS_PER_FILE)]
            for made in [
                vectors(labeled[here], dim, (claim.run_seq, start)) if embeddings is None else embeddings[here]
            ]
            for rows in [_rows(labeled[here], made)]
        ],
        deletions=[files.put(output, f"deletions/{where}.parquet", files.deletions(gone, claim), claim, "0")]
        if len(gone)
        else [],
        catalog=catalog.write_manifest(
            output,
            SPACE,
            claim.run_id,
            catalog.renew(
                output,
                KeyRange(range_id="00000", after="", through=None, files=tuple(catalog.files_of(output, base))),
                [gone] if len(gone) else [],
                [fresh] if len(fresh) else [],
                lambda number, rows: _put_catalog(output, claim, number, rows),
            ),
        ),
    )
    log.commit(output, entry)


def _put_catalog(output: Store, claim: log.Claim, number: int, rows: pa.Table) -> FileRef:
    return files.put(output, f"_catalog/space={SPACE}/{claim.run_id}-{number:05d}.parquet", rows, claim, str(number))


def _keys(numbers: np.ndarray) -> pa.Array:
    return pc.binary_join_element_wise(
        "photos/", pa.array([f"{number:09d}" for number in numbers.tolist()], pa.string()), ".jpg", ""
    )


def _outcomes(numbers: np.ndarray, run_seq: int) -> pa.Table:
    count = len(numbers)
    columns = {
        "key": _keys(numbers),
        "etag": pa.nulls(count, pa.string()),
        "size_bytes": np.full(count, 1000),
        "last_modified": pa.nulls(count, schema.CATALOG.field("last_modified").type),
        "failure_kind": pa.nulls(count, pa.string()),
        "run_seq": np.full(count, run_seq),
    }
    return pa.table(columns).cast(schema.CATALOG)


def _rows(numbers: np.ndarray, embeddings: np.ndarray) -> pa.Table:
    count, dim, keys = *embeddings.shape, _keys(numbers)
    names = pa.array([f"class {number}" for number in numbers % NUM_CLUSTERS])
    known = {
        "key": keys,
        "uri": pc.binary_join_element_wise(ROOT, keys, "/"),
        "size_bytes": pa.array(np.full(count, 1000)),
        "width_px": pa.array(np.full(count, 640, np.int32)),
        "height_px": pa.array(np.full(count, 480, np.int32)),
        "label_ids": _lists(pa.array((numbers % NUM_CLUSTERS).astype(np.int32)), pa.int32()),
        "label_names": _lists(names, pa.string()),
        "label_scores": _lists(pa.array(np.full(count, 0.75, np.float32)), pa.float32()),
        "embedding": pa.FixedSizeListArray.from_arrays(pa.array(embeddings.ravel()), type=schema.embedding_type(dim)),
    }
    wanted = schema.labeled(dim)
    return pa.Table.from_arrays([known.get(field.name, pa.nulls(count, field.type)) for field in wanted], schema=wanted)


def _lists(values: pa.Array, of: pa.DataType) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(np.arange(len(values) + 1, dtype=np.int32)), values, type=pa.list_(of))
