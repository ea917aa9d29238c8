"""A night's profile adds up however its files were cut, and only a night that is another kind of night is warned of."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import schema, storage
from pipeline.drift import Profile, compare, merge, profile_of
from pipeline.progress import MAX_REPORTS_READ, Report

LABELS = ("arrow", "clock", "fish", "house")


def _table(labels: list[str], scores: list[float], vectors_ND: npt.NDArray[np.float32] | None) -> pa.Table:
    """The columns of a labels file that a profile reads, with a second label in each row."""
    columns: dict[str, pa.Array] = {
        "label_names": pa.array([[label, "other"] for label in labels], pa.list_(pa.string())),
        "label_scores": pa.array([[score, 0.0] for score in scores], pa.list_(pa.float32())),
    }
    if vectors_ND is not None:
        kind = schema.embedding_type(vectors_ND.shape[1])
        columns["embedding"] = pa.FixedSizeListArray.from_arrays(pa.array(vectors_ND.ravel()), type=kind)
    return pa.table(columns)


def _night(
    seed: int, num_images: int, *, shares: list[float] | None = None, confidence: float = 0.7, turn: float = 0.0
) -> Profile:
    """A drawn night: labels by their shares, scores around `confidence`, vectors around a centre turned by `turn`."""
    rng = np.random.default_rng(seed)
    labels = rng.choice([f"label {number}" for number in range(50)], num_images, p=shares or [1 / 50] * 50).tolist()
    scores = rng.beta(4 * confidence, 4 * (1 - confidence), num_images).tolist()
    centre = np.zeros(64)
    centre[0], centre[1] = math.cos(turn), math.sin(turn)
    vectors = 0.8 * centre + rng.standard_normal((num_images, 64)) / 8
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return profile_of(_table(labels, scores, vectors.astype(np.float32)))


# --- profiles -----------------------------------------------------------------------------------------------------


def test_a_profile_counts_first_labels_and_sums_scores_and_vectors() -> None:
    vectors = np.array([[1, 0], [0, 1], [0.6, 0.8]], np.float32)
    found = profile_of(_table(["fish", "clock", "fish"], [0.5, 0.25, 0.75], vectors))
    assert (found.num_images, found.label_counts) == (3, {"fish": 2, "clock": 1})
    assert found.confidence_sum == 1.5
    assert found.mean_confidence == 0.5
    assert found.share("fish") == pytest.approx(2 / 3)
    assert found.share("house") == 0
    assert found.embedding_sum == pytest.approx([1.6, 1.8])
    assert (found.norm_min, found.norm_max) == pytest.approx((1, 1))
    assert found.norm_sum == pytest.approx(3)


def test_vectors_are_summed_in_float64_and_as_they_are() -> None:
    vectors = np.full((3000, 2), np.float32(0.1))
    vectors[0] = [3e7, 0]
    found = profile_of(_table(["fish"] * 3000, [0.5] * 3000, vectors))
    assert found.embedding_sum[0] == pytest.approx(3e7 + 2999 * float(np.float32(0.1)), abs=1e-6)
    assert found.norm_max == pytest.approx(3e7)
    assert found.norm_min == pytest.approx(math.sqrt(0.02))


def test_without_embeddings_or_rows_the_profile_says_so() -> None:
    found = profile_of(_table(["fish"], [0.5], None))
    assert (found.embedding_sum, found.norm_min, found.norm_max) == ([], None, None)
    assert profile_of(_table([], [], np.zeros((0, 2), np.float32))) == Profile()
    assert profile_of(schema.labels(4).empty_table()) == Profile()
    assert Profile().mean_confidence == 0


_ROWS = st.lists(
    st.tuples(st.sampled_from(LABELS), st.floats(0, 1, width=32), st.floats(-1, 1, width=32)), min_size=0, max_size=12
)


def _of_rows(rows: list[tuple[str, float, float]]) -> Profile:
    vectors = np.array([[x, 1] for _, _, x in rows], np.float32).reshape(-1, 2)
    return profile_of(_table([label for label, _, _ in rows], [score for _, score, _ in rows], vectors))


def _close(left: Profile, right: Profile) -> bool:
    exact = ("num_images", "label_counts", "norm_min", "norm_max")
    return all(getattr(left, name) == getattr(right, name) for name in exact) and np.allclose(
        [left.confidence_sum, left.norm_sum, *left.embedding_sum],
        [right.confidence_sum, right.norm_sum, *right.embedding_sum],
        rtol=1e-12,
        atol=1e-12,
    )


@settings(deadline=None)
@given(_ROWS, _ROWS, _ROWS)
def test_profiles_add_up_in_any_order_and_however_the_rows_are_cut(
    first: list[tuple[str, float, float]],
    second: list[tuple[str, float, float]],
    third: list[tuple[str, float, float]],
) -> None:
    a, b, c = (_of_rows(rows) for rows in (first, second, third))
    whole = _of_rows([*first, *second, *third])
    assert _close(merge(merge(a, b), c), whole)
    assert _close(merge(a, merge(b, c)), whole)
    assert _close(merge(c, merge(b, a)), whole)
    assert merge(a, Profile()) == merge(Profile(), a) == a


@settings(deadline=None)
@given(_ROWS)
def test_a_profile_survives_json(rows: list[tuple[str, float, float]]) -> None:
    found = _of_rows(rows)
    assert Profile.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_sliced_and_chunked_tables_have_the_profile_of_their_rows() -> None:
    rng = np.random.default_rng(0)
    whole = _table(
        [LABELS[number % 4] for number in range(20)], rng.random(20).tolist(), rng.random((20, 3)).astype(np.float32)
    )
    part = whole.slice(3, 12)
    chunked = pa.concat_tables([part.slice(0, 5), part.slice(5, 0), part.slice(5)])
    fresh = part.take(list(range(12))).combine_chunks()
    assert _close(profile_of(part), profile_of(fresh))
    assert _close(profile_of(chunked), profile_of(fresh))


def test_profiles_of_two_spaces_do_not_add_up() -> None:
    one, other = (profile_of(_table(["fish"], [0.5], np.ones((1, dim), np.float32))) for dim in (2, 3))
    with pytest.raises(ValueError, match="expected profiles of one space, found vectors of 2 and 3 dimensions"):
        merge(one, other)


# --- comparison ---------------------------------------------------------------------------------------------------


def _profile(counts: dict[str, int], **changes: Any) -> Profile:
    number = sum(counts.values())
    values = {"label_counts": counts, "confidence_sum": 0.8 * number, "embedding_sum": [0.6 * number, 0.0]}
    norms = {"norm_sum": float(number), "norm_min": 1.0, "norm_max": 1.0}
    return Profile(num_images=number, **{**values, **norms, **changes})


def test_the_figures_are_those_computed_by_hand() -> None:
    tonight = _profile({"fish": 600, "clock": 400}, confidence_sum=700.0, embedding_sum=[480.0, 360.0])
    last = _profile({"fish": 1500, "house": 500})
    found = compare(tonight, last, last_run_id="00000007-abc")
    assert found.labels is not None
    assert found.confidence is not None
    assert found.centroid is not None
    assert found.labels.value == pytest.approx((0.15 + 0.4 + 0.25) / 2)
    scatter = 1 / 1000 + 1 / 2000
    noise = sum(math.sqrt(2 / math.pi * p * (1 - p) * scatter) for p in (0.7, 0.4 / 3, 0.5 / 3)) / 2
    assert found.labels.bound == pytest.approx(0.15 + noise)
    assert [each.label for each in found.moved_labels] == ["clock", "house", "fish"]
    assert found.confidence.value == pytest.approx(0.1)
    mean = 2300 / 3000
    assert found.confidence.bound == pytest.approx(0.05 + 2 * math.sqrt(mean * (1 - mean) * scatter))
    assert found.centroid.value == pytest.approx(1 - 0.8)
    assert found.centroid.bound == pytest.approx(0.02 + 4 * (0.64 / 0.72 * scatter))
    assert (found.centroid_norm, found.last_centroid_norm) == pytest.approx((0.6, 0.6))


def test_each_warning_is_one_line_that_says_what_moved_and_what_was_expected() -> None:
    tonight = _profile(
        {"fish": 600, "clock": 400}, confidence_sum=600.0, embedding_sum=[480.0, 360.0], norm_min=0.9, norm_max=1.0
    )
    lines = compare(tonight, _profile({"fish": 1500, "house": 500}), last_run_id="00000007-abc").warnings()
    last = "run 00000007-abc of 2,000 images"
    assert lines == [
        f"labels moved: 40.0% of the images would need another label to look like {last} (expected at most 16.8%);"
        " most: clock 0.0% -> 40.0%, house 25.0% -> 0.0%, fish 75.0% -> 60.0%",
        f"confidence moved: mean top-1 score 0.600, 0.800 in {last} (expected a change of at most 0.084)",
        f"embeddings moved: cosine of the mean vectors 0.8000 to {last} (expected at least 0.9747)",
        "embeddings are not of length 1: one is off by 0.1000 (expected at most 0.0010); inner products of this run are"
        " no cosines",
    ]


def test_a_night_below_200_images_is_only_asked_for_the_length_of_its_vectors() -> None:
    last = _profile({"fish": 5000})
    small = _profile({"clock": 199}, confidence_sum=0.0, embedding_sum=[-199.0, 0.0])
    for found in (compare(small, last), compare(last, small)):
        assert (found.labels, found.confidence, found.centroid) == (None, None, None)
        assert found.warnings() == []
    assert len(compare(replace(small, norm_max=1.5), last).warnings()) == 1
    assert compare(_profile({"clock": 200}), last).labels is not None


def test_nights_without_embeddings_are_compared_by_their_labels() -> None:
    bare = {"embedding_sum": [], "norm_sum": 0.0, "norm_min": None, "norm_max": None}
    found = compare(_profile({"fish": 900}, **bare), _profile({"house": 900}, **bare))
    assert (found.centroid, found.norm) == (None, None)
    assert [line.partition(":")[0] for line in found.warnings()] == ["labels moved"]


def test_vectors_that_point_everywhere_have_no_centroid_to_move() -> None:
    last = _profile({"fish": 900})
    for nowhere in ([0.0, 0.0], [1.0, -1.0]):
        assert compare(_profile({"fish": 900}, embedding_sum=nowhere), last).warnings() == []


def test_vectors_that_are_mirrored_are_warned_of() -> None:
    mirrored = _profile({"fish": 900}, embedding_sum=[-540.0, 0.0])
    assert [line.partition(":")[0] for line in compare(mirrored, _profile({"fish": 900})).warnings()] == [
        "embeddings moved"
    ]


# --- nights as samples --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_images", "last_num_images"), [(200, 200), (200, 5000), (3000, 300)])
def test_two_nights_of_one_kind_are_never_warned_of_whatever_their_sizes(num_images: int, last_num_images: int) -> None:
    rng = np.random.default_rng(1)
    shares = rng.dirichlet(np.full(50, 0.5)).tolist()
    for seed in range(50):
        tonight = _night(2 * seed, num_images, shares=shares)
        last = _night(2 * seed + 1, last_num_images, shares=shares)
        assert compare(tonight, last).warnings() == []


@pytest.mark.parametrize(
    ("change", "warned"),
    [
        ({"shares": [0.34, *[0.66 / 49] * 49]}, "labels moved"),
        ({"confidence": 0.5}, "confidence moved"),
        ({"turn": 0.6}, "embeddings moved"),
    ],
    ids=["labels", "confidence", "embeddings"],
)
def test_a_night_that_moved_in_one_respect_is_warned_of_in_that_one(change: dict[str, Any], warned: str) -> None:
    last = _night(0, 2000)
    assert [line.partition(":")[0] for line in compare(_night(1, 1000, **change), last).warnings()] == [warned]


# --- in the report ------------------------------------------------------------------------------------------------


def _report(run_id: str) -> Report:
    return Report(run_id=run_id, exit_code=0)


def test_the_report_holds_the_profile_and_what_it_was_compared_with(tmp_path: Path) -> None:
    output = storage.connect_output(str(tmp_path))
    first, second, third = _report("1-a"), _report("2-b"), _report("3-c")
    assert first.add_profile(output, _night(0, 400), []) == []
    assert first.drift is None
    first.write(output)
    assert second.add_profile(output, _night(1, 30), ["1-a"]) == []
    second.write(output)
    lines = third.add_profile(output, _night(2, 400, confidence=0.4), ["2-b", "1-a"])
    assert [line.partition(":")[0] for line in lines] == ["confidence moved"]
    assert "in run 1-a of 400 images" in lines[0], "the night between was too small to compare with"
    third.write(output)
    read = Report.read(output, "3-c")
    assert read is not None
    assert read.drift is not None
    assert Profile.from_json(read.profile or {}) == _night(2, 400, confidence=0.4)
    assert read.drift["last_run_id"] == "1-a"
    assert read.drift["confidence"]["value"] > read.drift["confidence"]["bound"]


def test_reports_that_are_missing_damaged_or_of_another_version_are_passed_over(tmp_path: Path) -> None:
    output = storage.connect_output(str(tmp_path))
    good = _report("1-a")
    good.add_profile(output, _night(0, 400), [])
    good.write(output)
    output.put("_runs/2-b/report.json", b"{damaged")
    output.put("_runs/3-c/report.json", b'{"profile": null}')
    output.put("_runs/4-d/report.json", b'{"profile": {"num_images": 900, "unknown": 1}}')
    tonight = _report("6-f")
    tonight.add_profile(output, _night(1, 400), ["5-e", "4-d", "3-c", "2-b", "1-a"])
    assert tonight.drift is not None
    assert tonight.drift["last_run_id"] == "1-a"
    alone = _report("7-g")
    alone.add_profile(output, _night(1, 400), [*["5-e"] * MAX_REPORTS_READ, "1-a"])
    assert alone.drift is None, "an output of a thousand small nights is not read through"
