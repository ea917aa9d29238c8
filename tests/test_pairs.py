"""Two runs side by side: what a run's name means, and rows of the same pictures."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nights import Nights
from test_predictions import ABOUT, BOTH, rows

from pipeline import pairs, predictions, storage
from pipeline.errors import ConfigError, ConflictError

URIS = st.sets(st.text("aä/z", min_size=1, max_size=4), max_size=30)


def pieces(uris: set[str], sizes: list[int], side: str) -> Iterator[pa.Table]:
    """A stream of rows, cut anywhere."""
    ordered = sorted(uris)
    while ordered:
        size = sizes.pop() if sizes else len(ordered)
        here, ordered = ordered[:size], ordered[size:]
        if here:
            yield pa.table({"uri": here, "said": [f"{side} {uri}" for uri in here]})


@given(URIS, URIS, st.lists(st.integers(1, 9), max_size=9), st.lists(st.integers(1, 9), max_size=9))
@settings(deadline=None, max_examples=200, derandomize=True)
def test_every_shared_picture_is_one_pair_and_every_other_is_counted_however_rows_are_cut(
    left: set[str], right: set[str], left_sizes: list[int], right_sizes: list[int]
) -> None:
    only: Counter[str] = Counter(a=0, b=0)
    found: list[tuple[str, str]] = []
    for a, b in pairs.joined(pieces(left, left_sizes, "a"), pieces(right, right_sizes, "b"), only):
        assert a["uri"].to_pylist() == b["uri"].to_pylist()
        found += zip(a["said"].to_pylist(), b["said"].to_pylist(), strict=True)
    assert found == [(f"a {uri}", f"b {uri}") for uri in sorted(left & right)]
    assert only == Counter(a=len(left - right), b=len(right - left))


def test_one_piece_of_each_is_in_memory_at_a_time() -> None:
    taken: Counter[str] = Counter()

    def stream(side: str) -> Iterator[pa.Table]:
        for number in range(50):
            taken[side] += 1
            yield pa.table({"uri": [f"{number:03d}"]})

    for place, _ in enumerate(pairs.joined(stream("a"), stream("b"), Counter())):
        assert max(taken.values()) <= place + 1


# --- names --------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "p#1.parquet"
    with predictions.writer(path, BOTH, ABOUT) as writer:
        for combination in BOTH:
            writer.add(rows(0, 20), combination)
    return str(path)


@pytest.mark.parametrize("part", ["preprocess=paper", "precision=bf16", "precision=bf16,preprocess=paper"])
def test_a_combination_of_a_file_is_named_by_what_tells_it_apart(file: str, part: str) -> None:
    source = pairs.open_run(f"{file}#{part}")
    assert source.run.where == f"{file}#preprocess=paper,precision=bf16"
    assert (source.run.model_id, source.run.weights_digest, source.run.embedding_dim) == ("demo", "ab", None)
    (table,) = source.read(False)
    assert set(table["precision"].to_pylist()) == {"bf16"}
    assert len(table) == 17, "three of twenty have no label"


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("", r"expected one of its combinations \(#preprocess=checkpoint,precision=fp32, #.*\), found nothing after"),
        ("#preprocess=fast", "expected one of its combinations .*, found #preprocess=fast"),
        ("#space=demo-12345678", "expected precision and preprocess after #, found space"),
        ("#precision=bf16,mode=paper", "expected precision and preprocess after #, found precision, mode"),
    ],
)
def test_a_part_that_a_file_does_not_have_is_refused(file: str, part: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pairs.open_run(file + part)


def test_a_space_of_an_output_is_named_where_there_are_several(tmp_path: Path) -> None:
    nights = Nights(storage.connect(str(tmp_path / "out")))
    nights.publish(["a", "b"], {"c": "corrupt"})
    (source,) = [pairs.open_run(str(tmp_path / "out"))]
    assert source.run.where == f"file://{tmp_path}/out#space=deit-01234567"
    assert (source.run.model_id, source.run.embedding_dim) == ("deit", 8)
    (table,) = source.read(True)
    assert table.column_names == ["uri", "label_names", "label_scores", "embedding"]
    assert table["uri"].to_pylist() == ["s3://photos/in/a", "s3://photos/in/b"]
    (table,) = source.read(False)
    assert "embedding" not in table.column_names
    nights.publish(["a"], space_id="vit-89abcdef")
    with pytest.raises(ConfigError, match=r"expected the name of one of its spaces \(deit-01234567, vit-89abcdef\)"):
        pairs.open_run(str(tmp_path / "out"))
    named = pairs.open_run(f"{tmp_path}/out#space=vit-89abcdef")
    assert [len(table) for table in named.read(False)] == [1]
    with pytest.raises(ConfigError, match="expected space after #, found precision"):
        pairs.open_run(f"{tmp_path}/out#precision=fp32")


def test_rows_that_are_out_of_order_or_doubled_are_refused(tmp_path: Path) -> None:
    for name, starts in (("backwards", (20, 0)), ("doubled", (0, 19))):
        path = tmp_path / f"{name}.parquet"
        with predictions.writer(path, BOTH[:1], ABOUT) as writer:
            for start in starts:
                writer.add(rows(start, 20), BOTH[0])
        with pytest.raises(
            ConflictError, match=rf"{name}\.parquet#.*: expected rows in order of their uris, each once"
        ):
            list(pairs.open_run(str(path)).read(False))
