"""The published folder as its consumers read it: pyarrow, pandas, DuckDB, Polars, datasets and, where it is, Spark."""

import re
import shutil
from collections.abc import Callable, Iterator
from datetime import UTC
from pathlib import Path
from typing import Any

import checkpoints
import datasets
import duckdb
import nights
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from cluster import Head
from nights import Nights

from pipeline import catalog, schema, storage, view
from pipeline.draw import draw_file

NUM_IMAGES = 40
DIM = 24
README = (Path(__file__).resolve().parent.parent / "README.md").read_text()


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


# --- several nights, several spaces: every reader sees the same rows ----------------------------------------------


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Nights:
    """Nights of two spaces, with nulls wherever the schema allows them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalog, "MAX_FILE_ROWS", 7)
        return nights.several(storage.connect(str(tmp_path_factory.mktemp("nights") / "out")))


@pytest.fixture(scope="module")
def spark() -> Iterator[Any]:
    """A Spark of this process; the test is skipped where there is none."""
    sql = pytest.importorskip("pyspark.sql", reason="no Spark here: pip install pyspark (0.5 GB)")
    if shutil.which("java") is None:
        pytest.skip("no Java here, which Spark needs")
    local = sql.SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false")
    for name in ("spark.driver.host", "spark.driver.bindAddress"):
        local = local.config(name, "127.0.0.1")
    session = local.config("spark.sql.session.timeZone", "UTC").getOrCreate()
    yield session
    session.stop()


def labels_of(several: Nights) -> Path:
    return Path(several.output.root.removeprefix("file://")) / "labels"


def by_pyarrow(labels: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = ds.dataset(labels, format="parquet", partitioning="hive").to_table().to_pylist()
    return rows


def by_pandas(labels: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pd.read_parquet(labels).to_dict("records")
    return rows


def by_duckdb(labels: Path) -> list[dict[str, Any]]:
    with duckdb.connect() as connection:
        found = connection.sql(f"FROM read_parquet('{labels}/**/*.parquet', hive_partitioning = true)")
        rows: list[dict[str, Any]] = found.to_arrow_table().to_pylist()
        return rows


def by_polars(labels: Path) -> list[dict[str, Any]]:
    return pl.scan_parquet(labels / "**" / "*.parquet", hive_partitioning=True).collect().to_dicts()


def by_datasets(labels: Path) -> list[dict[str, Any]]:
    files = [str(path) for path in labels.rglob("*.parquet")]
    rows = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    # The only reader that leaves out what stands in the path.
    return [{**row, "space": row["space_id"], "run_date": None} for row in rows]


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """A row in Python's own types."""

    def value(found: Any) -> Any:
        if isinstance(found, np.ndarray | list):
            return [each.item() if isinstance(each, np.generic) else each for each in found]
        if found is None or found is pd.NaT or found != found:  # pandas says NaN where an int is null
            return None
        return found.replace(tzinfo=UTC) if hasattr(found, "hour") else found

    return {name: str(row[name]) if name == "run_date" else value(row[name]) for name in sorted(row)}


def expected_rows(labels: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """Every row of every file with what its path says, by uri and run."""
    found = {}
    for path in labels.rglob("*.parquet"):
        space, run_date = (folder.partition("=")[2] for folder in path.relative_to(labels).parts[:2])
        for row in pq.ParquetFile(path).read().to_pylist():
            found[row["uri"], row["run_seq"]] = plain({**row, "space": space, "run_date": run_date})
    return found


def check_rows(rows: list[dict[str, Any]], several: Nights, *, has_date: bool = True) -> None:
    expected = expected_rows(labels_of(several))
    assert len(rows) == len(expected) > 30
    for row in rows:
        wanted = expected[row["uri"], row["run_seq"]]
        assert plain(row) == (wanted if has_date else {**wanted, "run_date": "None"})


@pytest.mark.parametrize("read", [by_pyarrow, by_pandas, by_duckdb, by_polars, by_datasets])
def test_reader_sees_every_value_null_and_partition_of_several_nights(
    several: Nights, read: Callable[[Path], list[dict[str, Any]]]
) -> None:
    check_rows(read(labels_of(several)), several, has_date=read is not by_datasets)


def test_spark_sees_every_value_null_and_partition_of_several_nights(several: Nights, spark: Any) -> None:
    frame = spark.read.parquet(str(labels_of(several)))
    types = dict(frame.dtypes)
    assert {name: types[name] for name in ("image_id", "last_modified", "embedding", "label_ids", "run_date")} == {
        **{"image_id": "bigint", "last_modified": "timestamp", "run_date": "date"},
        **{"embedding": "array<float>", "label_ids": "array<int>"},
    }
    check_rows([row.asDict() for row in frame.collect()], several)


def test_spark_runs_the_standard_sql_of_the_view(several: Nights, spark: Any) -> None:
    root = labels_of(several).parent
    several.snapshot()
    for kind in ("labels", "snapshots", "failures", "deletions"):
        files = [str(path) for path in (root / kind).rglob("*.parquet")]
        spark.read.parquet(*files).createOrReplaceTempView(kind)
    for space_id, current in several.current.items():
        text = view.glob_sql(space_id).replace("VIEW", "TEMPORARY VIEW", 1).rstrip().rstrip(";")
        spark.sql(text)
        rows = spark.sql("SELECT uri, run_seq, embedding FROM current_labels").collect()
        assert {row["uri"]: row["run_seq"] for row in rows} == current
        for row in rows:
            assert row["embedding"] == nights._vector(row["uri"].removeprefix(f"{nights.ROOT}/"))


def test_files_keep_the_rules_of_old_readers(several: Nights) -> None:
    """No null within or instead of a vector, float32, no extension types, times in microseconds of UTC."""
    for path in labels_of(several).rglob("*.parquet"):
        file = pq.ParquetFile(path)
        vectors = file.read().column("embedding").combine_chunks()
        assert (vectors.null_count, vectors.flatten().null_count) == (0, 0)
        by_path = {file.schema.column(place).path: file.schema.column(place) for place in range(len(file.schema))}
        assert by_path["embedding.list.element"].physical_type == "FLOAT"
        assert by_path["label_scores.list.element"].physical_type == "FLOAT"
        assert {each.physical_type for each in by_path.values()} == {"INT32", "INT64", "FLOAT", "BYTE_ARRAY"}
        when = by_path["last_modified"].logical_type
        assert "isAdjustedToUTC=true, timeUnit=microseconds" in str(when)
        for field in file.schema_arrow:
            assert not isinstance(field.type, pa.BaseExtensionType)
            assert b"ARROW:extension:name" not in (field.metadata or {})


def test_lines_of_the_readme_read_an_output(several: Nights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = [each for each in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "load_dataset" in each]
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(labels_of(several).parent.parent)
    names: dict[str, Any] = {}
    exec(block, names)
    num_rows = len(expected_rows(labels_of(several)))
    assert [len(names[each]) for each in ("table", "frame", "dataset")] == [num_rows] * 3
