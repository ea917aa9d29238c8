"""The file of an evaluation's answers: whole or absent, and read a combination at a time."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import predictions
from pipeline.errors import ConfigError, SourceError
from pipeline.predictions import Combination

BOTH = [Combination("checkpoint", "fp32"), Combination("paper", "bf16")]
ABOUT = {"model_id": "demo", "weights_digest": "ab", "data": "file:///in"}


def rows(start: int, count: int, label: str = "fish") -> pa.Table:
    names = [name for name in predictions.SCHEMA.names if name not in Combination._fields]
    return pa.Table.from_pylist(
        [
            {
                "uri": f"file:///in/{number:05d}",
                "true_name": label,
                "true_id": number % 3,
                "label_ids": [] if number % 7 == 0 else [number % 3, 9],
                "label_names": [] if number % 7 == 0 else [label, "other"],
                "label_scores": [] if number % 7 == 0 else [0.75, 0.25],
                "failure_kind": "truncated" if number % 7 == 0 else None,
                "failure_message": "ends early" if number % 7 == 0 else None,
            }
            for number in range(start, start + count)
        ],
        pa.schema([predictions.SCHEMA.field(name) for name in names]),
    )


def test_rows_of_each_combination_come_back_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictions, "_ROW_GROUP_ROWS", 40)
    path = tmp_path / "p.parquet"
    with predictions.writer(path, BOTH, ABOUT) as writer:
        for start in range(0, 100, 20):
            writer.add(rows(start, 20), BOTH[0])
            writer.add(rows(start, 20, "bird"), BOTH[1])
        assert not path.exists()
    assert list(tmp_path.iterdir()) == [path]
    assert pq.ParquetFile(path).metadata.num_row_groups == 5
    assert pq.read_schema(path).remove_metadata().equals(predictions.SCHEMA)
    assert predictions.about(path) == (BOTH, ABOUT)
    for combination, label in zip(BOTH, ("fish", "bird"), strict=True):
        pieces = list(predictions.batches(path, combination))
        assert len(pieces) > 1
        found = pa.concat_tables(pieces)
        assert found.drop_columns(list(Combination._fields)).to_pylist() == rows(0, 100, label).to_pylist()


def test_an_evaluation_that_ends_early_leaves_the_file_of_the_last_one(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    with predictions.writer(path, BOTH[:1], ABOUT) as writer:
        writer.add(rows(0, 3), BOTH[0])
    before = path.read_bytes()

    def write_some_and_fail() -> None:
        with predictions.writer(path, BOTH[:1], ABOUT) as writer:
            writer.add(rows(0, 5), BOTH[0])
            raise SourceError("gone")

    with pytest.raises(SourceError, match="gone"):
        write_some_and_fail()
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(SourceError, match=r"--predictions .*/none/p\.parquet: cannot be written \(FileNotFoundError"),
        predictions.writer(tmp_path / "none" / "p.parquet", BOTH, ABOUT),
    ):
        pass


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"absent\.parquet: expected a file of --predictions, found FileNotFoundError"
    ):
        predictions.about(tmp_path / "absent.parquet")
    pq.write_table(pa.table({"uri": ["a"]}), tmp_path / "foreign.parquet")
    with pytest.raises(ConfigError, match=r"foreign\.parquet: expected .* found Parquet that something else wrote"):
        predictions.about(tmp_path / "foreign.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match=r"bad\.parquet: expected a file of --predictions, found ArrowInvalid"):
        predictions.about(tmp_path / "bad.parquet")


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    with predictions.writer(path, BOTH[:1], ABOUT) as writer:
        writer.add(rows(0, 2000), BOTH[0])
    data = bytearray(path.read_bytes())
    data[4:400] = bytes(396)
    path.write_bytes(data)
    with pytest.raises(SourceError, match=r"p\.parquet: cannot be read \("):
        list(predictions.batches(path, BOTH[0]))
