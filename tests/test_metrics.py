"""Accuracy, confusions and calibration, against their definitions."""

import math
from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.metrics import NUM_BINS, Metrics, Tally, bins_of, interval

NAMES = [f"class {number}" for number in range(7)]


class Picture(NamedTuple):
    truth: int
    answer: list[int]
    score: float
    failure: str | None


@st.composite
def pictures(draw: st.DrawFn) -> Picture:
    failure = draw(st.sampled_from([None, None, None, "truncated", "empty"]))
    edges = st.sampled_from([number / NUM_BINS for number in range(NUM_BINS + 1)])
    return Picture(
        truth=draw(st.integers(0, len(NAMES) - 1)),
        answer=draw(st.permutations(range(len(NAMES))))[:5],
        score=float(np.float32(draw(st.one_of(st.floats(0, 1, width=32), edges)))),
        failure=failure,
    )


def counted(seen: list[Picture], batch_size: int) -> Metrics:
    tally = Tally(NAMES)
    for start in range(0, len(seen), batch_size):
        batch = seen[start : start + batch_size]
        answered = [each for each in batch if each.failure is None]
        failed = [each for each in batch if each.failure is not None]
        tally.add_failures(
            np.array([each.truth for each in failed], np.int32), [each.failure for each in failed if each.failure]
        )
        if answered:
            tally.add(
                np.array([each.truth for each in answered], np.int32),
                np.array([each.answer for each in answered], np.int32),
                np.array([each.score for each in answered], np.float32),
            )
    return tally.metrics()


@given(st.lists(pictures(), min_size=1, max_size=60), st.integers(1, 60))
@settings(deadline=None, max_examples=150, derandomize=True)
def test_what_is_counted_in_batches_is_what_the_definitions_say_of_all_pictures(
    seen: list[Picture], batch_size: int
) -> None:
    found = counted(seen, batch_size)
    answered = [each for each in seen if each.failure is None]
    right = [each for each in answered if each.answer[0] == each.truth]
    among_5 = [each for each in answered if each.truth in each.answer]
    assert found.num_images == len(seen)
    assert found.failures == Counter(each.failure for each in seen if each.failure)
    assert found.num_failed == len(seen) - len(answered)
    assert (found.top_1, found.top_5) == (len(right) / len(seen), len(among_5) / len(seen))
    assert found.top_1_of_decoded == (len(right) / len(answered) if answered else None)
    for each in found.classes:
        of_class = [picture for picture in seen if picture.truth == each.label_id]
        assert (each.name, each.num_images) == (NAMES[each.label_id], len(of_class))
        assert each.top_1 == sum(picture in right for picture in of_class) / len(of_class)
        assert each.top_5 == sum(picture in among_5 for picture in of_class) / len(of_class)
    assert {each.label_id for each in found.classes} == {each.truth for each in seen}
    wrong = Counter((NAMES[each.truth], NAMES[each.answer[0]]) for each in answered if each not in right)
    assert {(each.name, each.taken_for): each.num_images for each in found.confusions} == wrong
    numbers = [each.num_images for each in found.confusions]
    assert numbers == sorted(numbers, reverse=True)
    if answered:
        assert found.calibration_error == pytest.approx(direct_calibration_error(answered), abs=1e-12)
    else:
        assert found.calibration_error is None


def direct_calibration_error(answered: list[Picture]) -> float:
    """Equation 3 of arXiv 1706.04599, picture by picture; a score of 0 belongs to the first bin."""
    total = 0.0
    for number in range(NUM_BINS):
        low, high = number / NUM_BINS, (number + 1) / NUM_BINS
        inside = [each for each in answered if low < each.score <= high or each.score == low == 0]
        if inside:
            accuracy = sum(each.answer[0] == each.truth for each in inside) / len(inside)
            confidence = math.fsum(each.score for each in inside) / len(inside)
            total += len(inside) / len(answered) * abs(accuracy - confidence)
    return total


def test_bins_are_closed_above() -> None:
    scores = np.array([0, 1e-9, 1 / 15, 0.0667, 2 / 15, 0.99, 1], np.float32)
    assert bins_of(scores, NUM_BINS).tolist() == [0, 0, 1, 1, 2, 14, 14]  # float32 of 1/15 and 2/15 are above them
    assert bins_of(np.array([0.5, 0.25, 0.75], np.float32), 4).tolist() == [1, 0, 2]


def test_a_model_that_is_sure_and_wrong_is_as_badly_calibrated_as_can_be() -> None:
    tally = Tally(NAMES)
    tally.add(np.array([0, 1], np.int32), np.array([[1], [0]], np.int32), np.array([1, 1], np.float32))
    found = tally.metrics()
    assert (found.top_1, found.top_5, found.calibration_error) == (0, 0, 1)
    assert [each.num_images for each in found.calibration] == [0] * 14 + [2]
    assert (found.calibration[0].confidence, found.calibration[0].accuracy) == (None, None)
    assert (found.calibration[-1].confidence, found.calibration[-1].accuracy) == (1, 0)


@pytest.mark.parametrize(("num_right", "num_images"), [(1, 2), (3, 40), (3981, 4000), (40_600, 50_000)])
def test_the_ends_of_an_interval_are_the_shares_that_the_sample_just_does_not_contradict(
    num_right: int, num_images: int
) -> None:
    low, high = interval(num_right, num_images)
    share = num_right / num_images
    assert 0 < low < share < high < 1
    for end in (low, high):
        assert abs(share - end) == pytest.approx(1.959963984540054 * math.sqrt(end * (1 - end) / num_images))


def test_an_interval_stays_within_0_and_1() -> None:
    assert interval(0, 10)[0] == 0
    assert interval(10, 10)[1] == pytest.approx(1, abs=1e-12)
    assert 0.6 < interval(10, 10)[0] < 1


def test_nothing_counted_has_no_accuracy() -> None:
    with pytest.raises(ValueError, match="expected images to have been counted, found none"):
        Tally(NAMES).metrics()
