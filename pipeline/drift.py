"""Published rows -> a profile of the night, and how far it is from the last one of the same space.

    rows of a labels file ──> Profile (one per file) ──merge──> Profile of the night ──compare──> Drift ──> warnings

A canary tells that the model changed; this tells that what comes in did, or what happens to it before it arrives:
labels that move as a whole, a model that is suddenly unsure, vectors that leave what an index was tuned on. A module of
its own, and pure: the bounds stand here and are tested on drawn numbers, without a store or an engine.

Both nights are samples, and small ones differ by chance. So every bound is a constant plus what chance would explain
for these two sizes.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

MIN_IMAGES = 200
"""Smaller nights are not compared: chance alone moves a sixth of 200 images between 20 classes."""
MAX_LABEL_DISTANCE = 0.15
"""Total variation: the share of images that would need another label to make both nights alike. Of 600 drawn pictures
the demo checkpoint moves 0.09 by chance (which the bound gets on top), 0.36 if they are turned by 90°, 0.61 if they are
four times as dark."""
MAX_CONFIDENCE_CHANGE = 0.05
"""In the mean top-1 score. The same pictures: 0.004 by chance, 0.24 if they are turned, 0.10 if they are blurred."""
MAX_CENTROID_DISTANCE = 0.02
"""1 - cosine of the mean vectors, as much as twenty canaries may be off together. The same pictures: 0.10 by chance, as
their vectors point everywhere, 0.60 if they are turned, 0.53 if they are blurred."""
NUM_CONFIDENCE_BINS = 20
"""Equal ones of the first label's score, the last with 1 in it."""
MAX_NORM_ERROR = 1e-3
"""From length 1, of each vector: the model's own criterion of a vector that means something."""
NUM_MOVED_LABELS = 5
_CONFIDENCE_ERRORS = 2.0
"""Standard errors; they are upper bounds themselves, see `compare`."""
_CENTROID_NOISE = 4.0
"""Multiple of the expected noise: it is a sum of squares, which few dimensions dominate."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What a set of labeled images looks like. Profiles of disjoint sets add up, see `merge`."""

    num_images: int = 0
    label_counts: dict[str, int] = field(default_factory=dict)
    """Images by the name of their first label."""
    confidence_sum: float = 0.0
    """Of the first label's softmax probability."""
    confidence_counts: list[int] = field(default_factory=lambda: [0] * NUM_CONFIDENCE_BINS)
    """Images by that score, in bins of 0.05; zeros in a report that is older than this field."""
    embedding_sum: list[float] = field(default_factory=list)
    """Of the vectors as published, so the centroid is not of length 1; empty without embeddings."""
    norm_sum: float = 0.0
    norm_min: float | None = None
    """Least length of a vector; None without embeddings or images."""
    norm_max: float | None = None

    @property
    def mean_confidence(self) -> float:
        """0 .. 1; 0 without images."""
        return self.confidence_sum / self.num_images if self.num_images else 0.0

    def share(self, label: str) -> float:
        """Share of the images with this first label, 0 .. 1."""
        return self.label_counts.get(label, 0) / self.num_images if self.num_images else 0.0

    def to_json(self) -> dict[str, Any]:
        """As plain values; labels by count, descending."""
        ordered = sorted(self.label_counts.items(), key=lambda each: (-each[1], each[0]))
        return {**asdict(self), "label_counts": dict(ordered)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Profile":
        """The inverse of `to_json`."""
        return cls(**values)


def profile_of(table: pa.Table) -> Profile:
    """The profile of rows with `label_names`, `label_scores` and, where there are vectors, `embedding` (schema.labels).

    Every row has at least one label. Sums are float64.
    """
    if not len(table):
        return Profile()
    names = pc.list_element(table.column("label_names"), 0).value_counts().to_pylist()
    scores = pc.list_element(table.column("label_scores"), 0).cast(pa.float64())
    bins_N = np.minimum(scores.to_numpy() * NUM_CONFIDENCE_BINS, NUM_CONFIDENCE_BINS - 1).astype(np.int64)
    norms = Profile()
    if "embedding" in table.column_names:
        for chunk in table.column("embedding").chunks:  # one row group at a time: no second copy of the column
            norms = merge(norms, _profile_of_vectors(chunk))
    return Profile(
        num_images=len(table),
        label_counts={each["values"]: each["counts"] for each in names},
        confidence_sum=float(pc.sum(scores).as_py()),
        confidence_counts=np.bincount(bins_N, minlength=NUM_CONFIDENCE_BINS).tolist(),
        embedding_sum=norms.embedding_sum,
        norm_sum=norms.norm_sum,
        norm_min=norms.norm_min,
        norm_max=norms.norm_max,
    )


def _profile_of_vectors(chunk: pa.FixedSizeListArray) -> Profile:
    if not len(chunk):
        return Profile()
    vectors_ND = chunk.flatten().to_numpy().reshape(len(chunk), -1)
    lengths_N = np.sqrt(np.einsum("nd,nd->n", vectors_ND, vectors_ND, dtype=np.float64))
    return Profile(
        num_images=len(chunk),
        embedding_sum=vectors_ND.sum(axis=0, dtype=np.float64).tolist(),
        norm_sum=float(lengths_N.sum()),
        norm_min=float(lengths_N.min()),
        norm_max=float(lengths_N.max()),
    )


def merge(left: Profile, right: Profile) -> Profile:
    """The profile of two disjoint sets of images of one space: in any order the same, but for float64 rounding."""
    if not left.num_images or not right.num_images:
        return left if left.num_images else right
    if len(left.embedding_sum) != len(right.embedding_sum):
        raise ValueError(
            f"expected profiles of one space, found vectors of {len(left.embedding_sum)} and"
            f" {len(right.embedding_sum)} dimensions"
        )
    norms = [each for each in (left.norm_min, right.norm_min, left.norm_max, right.norm_max) if each is not None]
    return Profile(
        num_images=left.num_images + right.num_images,
        label_counts=dict(Counter(left.label_counts) + Counter(right.label_counts)),
        confidence_sum=left.confidence_sum + right.confidence_sum,
        confidence_counts=[a + b for a, b in zip(left.confidence_counts, right.confidence_counts, strict=True)],
        embedding_sum=[a + b for a, b in zip(left.embedding_sum, right.embedding_sum, strict=True)],
        norm_sum=left.norm_sum + right.norm_sum,
        norm_min=min(norms, default=None),
        norm_max=max(norms, default=None),
    )


@dataclass(frozen=True, kw_only=True)
class Change:
    """One figure of both nights' difference, and the bound beyond which it is worth a line."""

    value: float
    bound: float

    @property
    def is_beyond(self) -> bool:
        """Whether to warn. NaN is beyond every bound."""
        return not self.value <= self.bound


@dataclass(frozen=True, kw_only=True)
class MovedLabel:
    """A label and its share of the images, 0 .. 1, tonight and in the last run."""

    label: str
    share: float
    last_share: float


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Tonight against an earlier run of the same space. The changes are None where a night is too small for them."""

    last_run_id: str
    num_images: int
    last_num_images: int
    mean_confidence: float
    last_mean_confidence: float
    labels: Change | None = None
    """Total-variation distance of the label shares, 0 .. 1."""
    moved_labels: list[MovedLabel] = field(default_factory=list)
    """The labels whose share changed most, the largest change first."""
    confidence: Change | None = None
    """Difference of the mean top-1 scores, without its sign."""
    centroid: Change | None = None
    """1 - cosine of the mean vectors, 0 .. 2; None without embeddings."""
    centroid_norm: float | None = None
    """Length of tonight's mean vector, 0 .. 1: 1 means that all images look alike."""
    last_centroid_norm: float | None = None
    norm: Change | None = None
    """Largest distance from 1 of a vector's length tonight, however few images; None without embeddings."""

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    def warnings(self) -> list[str]:
        """One line for each change beyond its bound; none in an ordinary night."""
        lines = []
        if self.labels is not None and self.labels.is_beyond:
            moved = ", ".join(f"{each.label} {each.last_share:.1%} -> {each.share:.1%}" for each in self.moved_labels)
            lines.append(
                f"labels moved: {self.labels.value:.1%} of the images would need another label to look like"
                f" {self._last} (expected at most {self.labels.bound:.1%}); most: {moved}"
            )
        if self.confidence is not None and self.confidence.is_beyond:
            lines.append(
                f"confidence moved: mean top-1 score {self.mean_confidence:.3f}, {self.last_mean_confidence:.3f} in"
                f" {self._last} (expected a change of at most {self.confidence.bound:.3f})"
            )
        if self.centroid is not None and self.centroid.is_beyond:
            lines.append(
                f"embeddings moved: cosine of the mean vectors {1 - self.centroid.value:.4f} to {self._last} (expected"
                f" at least {1 - self.centroid.bound:.4f})"
            )
        if self.norm is not None and self.norm.is_beyond:
            lines.append(
                f"embeddings are not of length 1: one is off by {self.norm.value:.4f} (expected at most"
                f" {self.norm.bound:.4f}); inner products of this run are no cosines"
            )
        return lines

    @property
    def _last(self) -> str:
        return f"run {self.last_run_id} of {self.last_num_images:,} images"


def compare(tonight: Profile, last: Profile, *, last_run_id: str = "") -> Drift:
    """How far `tonight` is from `last`, an earlier run of the same space.

    Chance is that of two samples of one distribution. Shares: the expected total variation, by the normal approximation
    (mean absolute difference of a share p: sqrt(2/pi · p(1-p)(1/n + 1/m))). Confidence: values in 0 .. 1 of mean c have
    a variance of at most c(1-c). Centroids: unit vectors whose mean has length r scatter around it by 1-r² in all, so
    the mean of n turns by (1-r²)/(r²n), squared; both nights' add up, and 1 - cosine is half of it.
    """
    norm_min, norm_max = tonight.norm_min, tonight.norm_max
    facts: dict[str, Any] = {
        "last_run_id": last_run_id,
        "num_images": tonight.num_images,
        "last_num_images": last.num_images,
        "mean_confidence": tonight.mean_confidence,
        "last_mean_confidence": last.mean_confidence,
        "norm": None
        if norm_min is None or norm_max is None
        else Change(value=max(1 - norm_min, norm_max - 1), bound=MAX_NORM_ERROR),
    }
    if min(tonight.num_images, last.num_images) < MIN_IMAGES:
        return Drift(**facts)
    both = merge(tonight, last)
    scatter = 1 / tonight.num_images + 1 / last.num_images
    confidence_error = math.sqrt(max(0.0, both.mean_confidence * (1 - both.mean_confidence)) * scatter)
    return Drift(
        **facts,
        **_compare_labels(tonight, last, both, scatter),
        **(_compare_centroids(tonight, last) if both.embedding_sum else {}),
        confidence=Change(
            value=abs(tonight.mean_confidence - last.mean_confidence),
            bound=MAX_CONFIDENCE_CHANGE + _CONFIDENCE_ERRORS * confidence_error,
        ),
    )


def _compare_labels(tonight: Profile, last: Profile, both: Profile, scatter: float) -> dict[str, Any]:
    moved = [
        MovedLabel(label=label, share=tonight.share(label), last_share=last.share(label)) for label in both.label_counts
    ]
    moved.sort(key=lambda each: (-abs(each.share - each.last_share), each.label))
    distance = sum(abs(each.share - each.last_share) for each in moved) / 2
    shares = [both.share(label) for label in both.label_counts]
    chance = sum(math.sqrt(2 / math.pi * share * (1 - share) * scatter) for share in shares) / 2
    return {
        "labels": Change(value=distance, bound=MAX_LABEL_DISTANCE + chance),
        "moved_labels": moved[:NUM_MOVED_LABELS],
    }


def _compare_centroids(tonight: Profile, last: Profile) -> dict[str, Any]:
    centroids = [np.array(each.embedding_sum) / each.num_images for each in (tonight, last)]
    here, there = (float(np.linalg.norm(each)) for each in centroids)
    if not here * there:
        cosine, chance = 0.0, math.inf
    else:
        cosine = float(centroids[0] @ centroids[1]) / (here * there)
        sizes = ((here, tonight.num_images), (there, last.num_images))
        chance = sum(max(0.0, 1 - length**2) / (2 * length**2 * number) for length, number in sizes)
    return {
        "centroid": Change(value=1 - cosine, bound=min(2.0, MAX_CENTROID_DISTANCE + _CENTROID_NOISE * chance)),
        "centroid_norm": here,
        "last_centroid_norm": there,
    }
