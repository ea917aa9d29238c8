"""The catalog: read, cut into ranges, and renewed, one file at a time."""

import dataclasses
import hashlib
import io
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_log import claim, entry_of
from test_plan import Place, row, some_keys

from pipeline import catalog, schema, storage
from pipeline.catalog import CatalogRow, KeyRange
from pipeline.errors import ConflictError
from pipeline.log import FileRef


def ref(first: str, last: str, num_rows: int) -> FileRef:
    key = f"_catalog/{first}-{last}"
    return FileRef(key=key, num_rows=num_rows, size_bytes=1, sha256="", first_key=first, last_key=last)


def tables(rows: Sequence[CatalogRow], rows_per_table: int) -> Iterator[pa.Table]:
    for start in range(0, len(rows), rows_per_table):
        yield pa.Table.from_pylist([*rows[start : start + rows_per_table]], schema.CATALOG)


# --- ranges -------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 150), max_size=30))
@settings(deadline=None, max_examples=100, derandomize=True)
def test_ranges_cover_every_key_once_and_hold_neighbouring_files_up_to_the_bound(sizes: list[int]) -> None:
    files = [ref(f"{2 * number:03d}", f"{2 * number + 1:03d}", rows) for number, rows in enumerate(sizes)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalog, "MAX_FILE_ROWS", 200)
        ranges = catalog.ranges(files, is_divisible=True)
    assert [file for each in ranges for file in each.files] == files
    assert (ranges[0].after, ranges[-1].through) == ("", None)
    assert [each.through for each in ranges[:-1]] == [each.after for each in ranges[1:]]
    assert len({each.range_id for each in ranges}) == len(ranges)
    for each, following in itertools.pairwise(ranges):
        assert each.num_rows <= 200 < each.num_rows + following.files[0].num_rows
        assert each.through == each.files[-1].last_key < following.files[0].first_key
    (whole,) = catalog.ranges(files, is_divisible=False)
    assert whole == KeyRange(range_id="00000", after="", through=None, files=tuple(files))


def test_ranges_between_borders_need_no_catalog() -> None:
    assert [(each.after, each.through) for each in catalog.between(["b", "m"])] == [("", "b"), ("b", "m"), ("m", None)]
    assert [(each.after, each.through) for each in catalog.between([])] == [("", None)]


# --- renewal ------------------------------------------------------------------------------------------------------


@given(some_keys, some_keys, st.sets(st.integers(0, 24)), st.integers(1, 9), st.integers(1, 9), st.booleans())
@settings(deadline=None, max_examples=60, derandomize=True)
def test_the_new_catalog_is_the_old_one_without_what_is_gone_and_with_what_is_fresh(
    old: list[str], fresh: list[str], gone_places: set[int], max_rows: int, rows_per_table: int, is_divisible: bool
) -> None:
    gone = [key for place, key in enumerate(old) if place in gone_places and key not in fresh]
    old_rows, fresh_rows = [row(key) for key in old], [row(key, etag="fresh") for key in fresh]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalog, "MAX_FILE_ROWS", max_rows)
        place = Place(Path(folder))
        place.remember(old_rows, rows_per_file=max_rows)
        written: list[FileRef] = []

        def write(number: int, rows: pa.Table) -> FileRef:
            assert number == len(written) - before
            assert 0 < len(rows) <= max_rows
            data = schema.encode(rows)
            keys = rows.column("key")
            key = f"_catalog/new-{len(written)}"
            place.output.put(key, data)
            written.append(
                dataclasses.replace(
                    ref(keys[0].as_py(), keys[-1].as_py(), len(rows)), key=key, sha256=hashlib.sha256(data).hexdigest()
                )
            )
            return written[-1]

        renewed: list[FileRef] = []
        ranges = catalog.ranges(place.catalog, is_divisible=is_divisible)
        for each in ranges:
            before = len(written)

            def inside(key: str, key_range: KeyRange = each) -> bool:
                return key > key_range.after and (key_range.through is None or key <= key_range.through)

            renewed += catalog.renew(
                place.output,
                each,
                tables([row(key) for key in gone if inside(key)], rows_per_table),
                tables([each for each in fresh_rows if inside(each["key"])], rows_per_table),
                write,
            )
        expected = {each["key"]: each for each in [*old_rows, *fresh_rows] if each["key"] not in gone}
        rows = list(catalog.read_rows(place.output, renewed))
        assert rows == [expected[key] for key in sorted(expected, key=str.encode)]
        assert [(file.first_key, file.last_key) for file in renewed] == [
            (found[0]["key"], found[-1]["key"])
            for found in ([*catalog.read_rows(place.output, [file])] for file in renewed)
        ]
        if not fresh and not gone:
            assert renewed == place.catalog


def test_files_in_which_nothing_changed_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "MAX_FILE_ROWS", 10)
    place = Place(tmp_path)
    place.remember([row(f"{number:03d}") for number in range(100)], rows_per_file=10)
    (whole,) = catalog.ranges(place.catalog, is_divisible=False)
    written: list[list[str]] = []

    def write(number: int, rows: pa.Table) -> FileRef:
        written.append(rows.column("key").to_pylist())
        return ref(written[-1][0], written[-1][-1], len(rows))

    gone, fresh = tables([row("042")], 1), tables([row("071", etag="e2"), row("2")], 1)
    renewed = catalog.renew(place.output, whole, gone, fresh, write)
    assert [len(each) for each in written] == [9, 10, 5, 6]  # the last file grew past its bound and was split
    kept = [file for file in renewed if file in place.catalog]
    assert kept == [file for number, file in enumerate(place.catalog) if number not in (4, 7, 9)]


def test_files_are_bounded_by_the_bytes_of_their_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "MAX_FILE_KEY_BYTES", 100)
    place = Place(tmp_path)
    fresh = tables([row(f"{number:010d}") for number in range(35)], 35)
    sizes: list[int] = []

    def write(number: int, rows: pa.Table) -> FileRef:
        sizes.append(len(rows))
        return ref("a", "b", len(rows))

    catalog.renew(place.output, place.whole, [], fresh, write)
    assert sum(sizes) == 35
    assert max(sizes) <= 10


# --- what stands --------------------------------------------------------------------------------------------------


def test_a_manifest_is_written_once_and_read_back_through_the_log_entry(tmp_path: Path) -> None:
    output = storage.connect(str(tmp_path))
    files = [ref("a", "é b", 3), ref("f", "g", 2)]
    listed = catalog.write_manifest(output, "deit-0", "00000001-0123abcd", files)
    assert listed.num_rows == 5
    assert catalog.write_manifest(output, "deit-0", "00000001-0123abcd", files) == listed
    entry = entry_of(claim(output), catalog=listed)
    assert catalog.files_of(output, entry) == files
    assert catalog.files_of(output, None) == []
    with pytest.raises(ConflictError, match="exists and lists other files"):
        catalog.write_manifest(output, "deit-0", "00000001-0123abcd", files[:1])
    output.put(listed.key, b"{}")
    with pytest.raises(ConflictError, match=r"00000001-0123abcd\.json: expected the file of the log, .*restore it"):
        catalog.files_of(output, entry)


@pytest.mark.parametrize("version", [schema.SCHEMA_VERSION + 1, None])
def test_a_catalog_of_another_schema_is_a_conflict(tmp_path: Path, version: int | None) -> None:
    place = Place(tmp_path)
    place.remember([row("a")])
    table = pa.Table.from_pylist([row("a")], schema.CATALOG)
    data = schema.encode(table, {"label_bucket.schema_version": str(version)} if version else {})
    if version is None:
        sink = io.BytesIO()
        pq.write_table(table, sink)
        data = sink.getvalue()
    place.output.put("_catalog/0.parquet", data)
    found = dataclasses.replace(place.catalog[0], sha256=hashlib.sha256(data).hexdigest())
    with pytest.raises(ConflictError, match=f"expected schema version {schema.SCHEMA_VERSION}, found {version}"):
        list(catalog.read_rows(place.output, [found]))
