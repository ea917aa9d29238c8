"""True labels and a model's answers -> accuracy, per class, confusions and calibration, in one pass.

A module of its own because these are definitions: they need numpy, and neither images nor models nor Ray.

Shapes: N images, K labels, k of them answered per image.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

NUM_BINS = 15
"""Of the confidence, as in Guo et al., section 2 and table 1."""
TOP_K = 5
_Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Bin:
    """The images whose best label has a score in (above, up_to]."""

    above: float
    up_to: float
    num_images: int
    confidence: float | None
    """Mean score of the best label; None for an empty bin."""
    accuracy: float | None
    """Share of them whose best label is the true one."""


@dataclass(frozen=True)
class ClassAccuracy:
    """The images of one class."""

    label_id: int
    name: str
    num_images: int
    top_1: float
    top_5: float


@dataclass(frozen=True)
class Confusion:
    """Images of one class that were taken for another."""

    name: str
    taken_for: str
    num_images: int


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Shares are 0 .. 1 and of all images; one without an answer is wrong."""

    num_images: int
    num_failed: int
    failures: dict[str, int]
    """Why an image has no answer: kind of failure -> how many."""
    top_1: float
    top_1_interval: tuple[float, float]
    """Where the accuracy on all such images lies with 95 % confidence, seen from a sample of this size (Wilson)."""
    top_5: float
    top_5_interval: tuple[float, float]
    top_1_of_decoded: float | None
    """Share of those with an answer; None if there are none."""
    calibration_error: float | None
    """Expected calibration error, of those with an answer."""
    calibration: list[Bin]
    classes: list[ClassAccuracy]
    """Those that occur, by id."""
    confusions: list[Confusion]
    """By number, most frequent first."""


class Tally:
    """Counts batches of images of one model, preprocessing and precision. Holds some numbers per label and per pair of
    labels that were confused, and nothing per image.
    """

    def __init__(self, label_names: Sequence[str]) -> None:
        self._names, num_labels = label_names, len(label_names)
        self.failures: Counter[str] = Counter()
        self._num_images, self._num_top_1, self._num_top_5 = (np.zeros(num_labels, np.int64) for _ in range(3))
        self._confusions: Counter[tuple[int, int]] = Counter()
        self._num_in_bin, self._num_right_in_bin = (np.zeros(NUM_BINS, np.int64) for _ in range(2))
        self._score_in_bin = np.zeros(NUM_BINS, np.float64)

    def add(
        self, truth_N: npt.NDArray[np.int32], answer_Nk: npt.NDArray[np.int32], best_score_N: npt.NDArray[np.float32]
    ) -> None:
        """Count images that have an answer: ids of the k best labels, best first, and the score of the best."""
        is_top_1_N = answer_Nk[:, 0] == truth_N
        is_top_5_N = (answer_Nk[:, :TOP_K] == truth_N[:, None]).any(axis=1)
        num_labels = len(self._num_images)
        self._num_images += np.bincount(truth_N, minlength=num_labels)
        self._num_top_1 += np.bincount(truth_N[is_top_1_N], minlength=num_labels)
        self._num_top_5 += np.bincount(truth_N[is_top_5_N], minlength=num_labels)
        wrong = ~is_top_1_N
        self._confusions.update(zip(truth_N[wrong].tolist(), answer_Nk[wrong, 0].tolist(), strict=True))
        bin_N = bins_of(best_score_N, NUM_BINS)
        self._num_in_bin += np.bincount(bin_N, minlength=NUM_BINS)
        self._num_right_in_bin += np.bincount(bin_N[is_top_1_N], minlength=NUM_BINS)
        self._score_in_bin += np.bincount(bin_N, best_score_N.astype(np.float64), NUM_BINS)

    def add_failures(self, truth_N: npt.NDArray[np.int32], kinds: Sequence[str]) -> None:
        """Count images that have none."""
        self._num_images += np.bincount(truth_N, minlength=len(self._num_images))
        self.failures.update(kinds)

    def metrics(self) -> Metrics:
        """What has been counted. Raises ValueError for nothing."""
        num_images, num_failed = int(self._num_images.sum()), self.failures.total()
        if not num_images:
            raise ValueError("expected images to have been counted, found none")
        num_top_1, num_top_5 = int(self._num_top_1.sum()), int(self._num_top_5.sum())
        num_answered = num_images - num_failed
        bins = self._bins()
        return Metrics(
            num_images=num_images,
            num_failed=num_failed,
            failures=dict(self.failures.most_common()),
            top_1=num_top_1 / num_images,
            top_1_interval=interval(num_top_1, num_images),
            top_5=num_top_5 / num_images,
            top_5_interval=interval(num_top_5, num_images),
            top_1_of_decoded=num_top_1 / num_answered if num_answered else None,
            calibration_error=calibration_error(bins) if num_answered else None,
            calibration=bins,
            classes=[
                ClassAccuracy(i, self._names[i], n, int(self._num_top_1[i]) / n, int(self._num_top_5[i]) / n)
                for i, n in enumerate(self._num_images.tolist())
                if n
            ],
            confusions=[
                Confusion(self._names[true], self._names[best], number)
                for (true, best), number in sorted(self._confusions.items(), key=lambda each: (-each[1], each[0]))
            ],
        )

    def _bins(self) -> list[Bin]:
        return [
            Bin(
                number / NUM_BINS,
                (number + 1) / NUM_BINS,
                int(count),
                float(self._score_in_bin[number] / count) if count else None,
                float(self._num_right_in_bin[number] / count) if count else None,
            )
            for number, count in enumerate(self._num_in_bin)
        ]


def bins_of(score_N: npt.NDArray[np.float32], num_bins: int) -> npt.NDArray[np.int64]:
    """The bin of each score: number b for b/num_bins < score <= (b+1)/num_bins, 0 for a score of 0."""
    edges = np.arange(1, num_bins) / num_bins
    return np.digitize(score_N.astype(np.float64), edges, right=True)


def calibration_error(bins: Sequence[Bin]) -> float:
    """Expected calibration error: the mean over images of |accuracy - confidence| of their bin.

    Equation 3 of Guo et al., "On Calibration of Modern Neural Networks" (arXiv 1706.04599), which has bins of equal
    width, closed above.
    """
    total = sum(each.num_images for each in bins)
    return sum(
        each.num_images / total * abs(each.accuracy - each.confidence)
        for each in bins
        if each.accuracy is not None and each.confidence is not None
    )


def interval(num_right: int, num_images: int) -> tuple[float, float]:
    """95 % interval of a share, 0 .. 1.

    Wilson, "Probable inference, the law of succession, and statistical inference" (JASA 22, 1927): also sensible near 0
    and 1, where the normal approximation leaves the range.
    """
    share, z2 = num_right / num_images, _Z_95**2
    middle = (share + z2 / (2 * num_images)) / (1 + z2 / num_images)
    half = _Z_95 / (1 + z2 / num_images) * math.sqrt(share * (1 - share) / num_images + z2 / (4 * num_images**2))
    return max(0.0, middle - half), min(1.0, middle + half)
