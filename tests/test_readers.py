"""The published folder as its consumers read it: pyarrow, pandas, DuckDB, Polars and datasets."""

from pathlib import Path

import checkpoints
import datasets
import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from cluster import Head

from pipeline import schema
from pipeline.draw import draw_file

NUM_IMAGES = 40
DIM = 24


@pytest.fixture(scope="module")
def output(head: Head, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labels of 40 pictures with embeddings of 24 dimensions, and one failure."""
    root = tmp_path_factory.mktemp("readers")
    for index in range(NUM_IMAGES):
        file = draw_file(11, index)
        path = root / "in" / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.data)
    (root / "in" / "zero.jpg").touch()
    model = str(checkpoints.write_small(root / "model"))
    options = ("--input", str(root / "in"), "--output", str(root / "out"), "--model", model, "--gpu-actors=1")
    done = head.label_bucket(*options, "--run-date=2026-11-22")
    assert done.returncode == 0, done.stderr
    return root / "out"


def test_every_file_has_the_declared_schema_metadata_and_encoding(output: Path) -> None:
    (path,) = (output / "labels").rglob("*.parquet")
    file = pq.ParquetFile(path)
    assert file.schema_arrow.equals(schema.labels(DIM))
    metadata = {name.decode(): value.decode() for name, value in file.schema_arrow.metadata.items()}
    expected = {
        "label_bucket.schema_version": str(schema.SCHEMA_VERSION),
        "label_bucket.embedding_dim": str(DIM),
        "label_bucket.embedding_dtype": "float32",
        "label_bucket.embedding_normalization": "l2",
        "label_bucket.embedding_metric": "inner_product",
        "label_bucket.embedding_pooling": "pooled",
        "label_bucket.compute_dtype": "fp32",
    }
    assert expected.items() <= metadata.items()
    for name in (
        "model_id",
        "model_revision",
        "weights_digest",
        "label_set_digest",
        "preprocess",
        "space_id",
        "run_id",
    ):
        assert metadata[f"label_bucket.{name}"], name
    leaf = file.metadata.row_group(0).column(file.metadata.num_columns - 1)
    assert leaf.path_in_schema == "embedding.list.element"
    assert "BYTE_STREAM_SPLIT" in leaf.encodings
    assert not leaf.is_stats_set


def test_pyarrow_reads_rows_types_and_partitions(output: Path) -> None:
    table = ds.dataset(output / "labels", format="parquet", partitioning="hive").to_table()
    assert table.num_rows == NUM_IMAGES
    assert set(table["run_date"].to_pylist()) == {"2026-11-22"}
    assert set(table["space"].to_pylist()) == set(table["space_id"].to_pylist())
    assert table.schema.field("embedding").type.equals(schema.embedding_type(DIM))
    assert table.schema.field("last_modified").type == pa.timestamp("us", tz="UTC")
    failures = ds.dataset(output / "failures", format="parquet", partitioning="hive").to_table()
    assert failures["failure_kind"].to_pylist() == ["empty"]


def test_duckdb_reads_labels_and_computes_with_vectors(output: Path) -> None:
    relation = f"read_parquet('{output}/labels/**/*.parquet', hive_partitioning = true)"
    connection = duckdb.connect()
    count, run_date = connection.execute(f"select count(*), any_value(run_date) from {relation}").fetchall()[0]
    assert (count, str(run_date)) == (NUM_IMAGES, "2026-11-22")
    similar = connection.execute(
        f"select min(list_inner_product(embedding, embedding)), max(label_scores[1]) from {relation}"
    ).fetchall()[0]
    assert similar[0] == pytest.approx(1, abs=1e-5)
    assert 0 < similar[1] <= 1


def test_pandas_reads_lists_as_arrays(output: Path) -> None:
    frame = pd.read_parquet(output / "labels")
    assert len(frame) == NUM_IMAGES
    assert np.stack(list(frame["embedding"])).shape == (NUM_IMAGES, DIM)
    assert np.stack(list(frame["label_ids"])).shape == (NUM_IMAGES, 5)
    assert frame["image_id"].is_unique


def test_polars_reads_fixed_size_vectors_and_partitions(output: Path) -> None:
    frame = pl.read_parquet(output / "labels" / "**" / "*.parquet", hive_partitioning=True)
    assert frame.height == NUM_IMAGES
    assert frame.schema["embedding"] == pl.Array(pl.Float32, DIM)
    assert str(frame["run_date"][0]) == "2026-11-22"


def test_datasets_reads_typed_features(output: Path, tmp_path: Path) -> None:
    files = [str(path) for path in (output / "labels").rglob("*.parquet")]
    data = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path))
    assert len(data) == NUM_IMAGES
    assert data.features["embedding"] == datasets.List(datasets.Value("float32"), length=DIM)
    assert data.features["label_names"] == datasets.List(datasets.Value("string"))
    assert data.features["image_id"] == datasets.Value("int64")
    assert len(data[0]["embedding"]) == DIM


def test_image_ids_are_the_documented_hash_of_the_uri(output: Path) -> None:
    table = ds.dataset(output / "labels", format="parquet").to_table(columns=["image_id", "uri"])
    for row in table.to_pylist():
        assert row["image_id"] == schema.image_id(row["uri"]) >= 0
    assert schema.image_id("s3://bucket/key") == 3082239684429075829
