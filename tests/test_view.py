"""The current view, by the function, in DuckDB and in standard SQL: the same rows, whatever happened in which night."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import nights
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from nights import Nights

from pipeline import catalog, log, schema, storage, view
from pipeline.errors import ConfigError, ConflictError
from pipeline.log import FileRef
from pipeline.storage import Store

DEIT, VIT = "deit-01234567", "vit-89abcdef"


@pytest.fixture
def output(tmp_path: Path) -> Store:
    return storage.connect(str(tmp_path / "o'ut [1]"))


@pytest.fixture
def several(output: Store, monkeypatch: pytest.MonkeyPatch) -> Nights:
    monkeypatch.setattr(catalog, "MAX_FILE_ROWS", 7)
    return nights.several(output)


@pytest.fixture
def connection() -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect() as opened:
        yield opened


def read(output: Store, space_id: str = DEIT, **options: Any) -> pa.Table:
    tables = list(view.batches(output, space_id, **options))
    return pa.concat_tables(tables)


def by_duckdb(connection: duckdb.DuckDBPyConnection, output: Store, space_id: str = DEIT) -> pa.Table:
    connection.execute(view.duckdb_sql(output, space_id))
    return connection.sql("SELECT * FROM current_labels ORDER BY uri").to_arrow_table()


def by_globs(connection: duckdb.DuckDBPyConnection, output: Store, space_id: str | None = DEIT) -> pa.Table:
    """The standard SQL over what globs find, without the log."""
    for kind in ("labels", "snapshots", "failures", "deletions"):
        glob = view._quoted(f"{view._literal(output.root.removeprefix('file://'))}/{kind}/**/*.parquet")
        has_files = any(key.endswith(".parquet") for key in storage.list_keys(output, f"{kind}/"))
        # An empty table has the columns of `labels`.
        rows = f"read_parquet({glob}, hive_partitioning = false)" if has_files else "labels LIMIT 0"
        connection.execute(f"CREATE OR REPLACE VIEW {kind} AS SELECT * FROM {rows}")
    connection.execute(view.glob_sql(space_id, "by_globs"))
    return connection.sql("SELECT * FROM by_globs ORDER BY space_id, uri").to_arrow_table()


def same(left: pa.Table, right: pa.Table) -> bool:
    return bool(left.to_pylist() == right.to_pylist())


# --- the rows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space_id", [DEIT, VIT])
def test_function_duckdb_and_standard_sql_give_the_newest_label_of_every_image_that_exists(
    several: Nights, connection: duckdb.DuckDBPyConnection, space_id: str
) -> None:
    found = read(several.output, space_id)
    expected = several.current[space_id]
    assert dict(zip(found["uri"].to_pylist(), found["run_seq"].to_pylist(), strict=True)) == expected
    assert found["uri"].to_pylist() == sorted(expected)
    assert found.schema.equals(schema.labels(nights.DIM))
    assert set(found["space_id"].to_pylist()) == {space_id}
    assert same(by_duckdb(connection, several.output, space_id), found)
    assert same(by_globs(connection, several.output, space_id), found)


def test_standard_sql_without_a_space_gives_all_spaces(several: Nights, connection: duckdb.DuckDBPyConnection) -> None:
    found = by_globs(connection, several.output, None)
    assert same(found, pa.concat_tables([read(several.output, DEIT), read(several.output, VIT)]))


def test_a_batch_is_the_rows_of_one_file_of_the_catalog(several: Nights) -> None:
    listed = catalog.files_of(several.output, log.read(several.output).newest(DEIT))
    found = list(view.batches(several.output, DEIT))
    assert 3 <= len(found) <= len(listed)
    assert max(map(len, found)) <= 7


def test_only_the_columns_that_are_asked_for_are_read_in_their_order(several: Nights) -> None:
    found = read(several.output, columns=["label_names", "uri"])
    assert found.column_names == ["label_names", "uri"]
    assert same(found, read(several.output).select(["label_names", "uri"]))
    with pytest.raises(ConfigError, match=r"expected columns of .*uri.*, found \['label'\]"):
        read(several.output, columns=["uri", "label"])


def test_only_files_with_rows_of_the_catalog_file_are_read(several: Nights, monkeypatch: pytest.MonkeyPatch) -> None:
    current = view.resolve(several.output, DEIT)
    first = current.catalog[0]
    original, names = view._read, list[FileRef]()

    def read_and_remember(output: Store, ref: FileRef, *rest: Any) -> pa.Table:
        names.append(ref)
        return original(output, ref, *rest)

    monkeypatch.setattr(view, "_read", read_and_remember)
    view.rows(several.output, current, first)
    assert 0 < len(names) < len(current.labels)
    assert all(each.first_key <= first.last_key and each.last_key >= first.first_key for each in names)


def test_a_space_in_which_everything_failed_is_empty(output: Store) -> None:
    Nights(output).publish([], {"a": "corrupt"})
    assert list(view.batches(output)) == []
    with pytest.raises(ConfigError, match="expected labeled images in space deit-01234567, found none"):
        view.duckdb_sql(output)


def test_the_view_on_s3_is_read_by_duckdb_too(bucket: str, connection: duckdb.DuckDBPyConnection) -> None:
    import fsspec

    several = nights.several(storage.connect(f"{bucket}/out"))
    # In place of httpfs, an extension that is downloaded.
    connection.register_filesystem(fsspec.filesystem("s3", skip_instance_cache=True))
    found = read(several.output)
    assert dict(zip(found["uri"].to_pylist(), found["run_seq"].to_pylist(), strict=True)) == several.current[DEIT]
    assert same(by_duckdb(connection, several.output), found)


# --- which space --------------------------------------------------------------------------------------------------


def test_one_space_needs_no_name_and_several_do(output: Store) -> None:
    with pytest.raises(ConfigError, match="expected published runs, found none"):
        view.files(output)
    first = Nights(output)
    entry = first.publish(["a", "b"])
    assert view.files(output) == entry.labels
    first.publish(["a"], space_id=VIT)
    with pytest.raises(ConfigError, match=f"one of its spaces \\({DEIT}, {VIT}\\), found none"):
        view.files(output)
    with pytest.raises(ConfigError, match=f"one of its spaces \\({DEIT}, {VIT}\\), found clip"):
        view.files(output, "clip")


# --- damage -------------------------------------------------------------------------------------------------------


def test_a_label_file_that_is_gone_is_named(several: Nights) -> None:
    ref = view.files(several.output, DEIT)[0]
    (Path(several.output.root.removeprefix("file://")) / ref.key).unlink()
    with pytest.raises(ConflictError, match=f"{ref.key}: expected the file of the log, .* found nothing; restore it"):
        read(several.output)


def test_a_labeled_key_that_no_file_has_is_named_and_so_is_a_row_that_two_have(several: Nights) -> None:
    current = view.resolve(several.output, DEIT)
    first = next(each for each in current.labels if each.first_seq == 1)
    cut = view.View(**{**vars(current), "labels": [each for each in current.labels if each is not first]})
    with pytest.raises(
        ConflictError, match=r"\d image\(s\) have no row in any label file, .* by run 00000001; restore"
    ):
        [view.rows(several.output, cut, ref) for ref in current.catalog]
    doubled = view.View(**{**vars(current), "labels": [*current.labels, first]})
    with pytest.raises(ConflictError, match="expected one row for each of"):
        [view.rows(several.output, doubled, ref) for ref in current.catalog]


def test_every_row_has_its_own_vector(several: Nights) -> None:
    found = read(several.output)
    for uri, vector in zip(found["uri"].to_pylist(), found["embedding"].to_pylist(), strict=True):
        assert vector == nights._vector(uri.removeprefix(f"{nights.ROOT}/"))
    assert pc.count_distinct(found["image_id"]).as_py() == len(found)
