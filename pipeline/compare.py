"""compare(a, b): two runs over the same pictures -> what changes from one to the other.

In: the names of two runs, as `pairs` reads them. Out: a `Comparison`: how often labels agree, where they flip, how far
vectors are apart, and which run is right where truth is known. A module of its own because it asks no model and needs
neither images nor Ray: what others wrote is enough.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import pairs
from pipeline.errors import ConfigError
from pipeline.meter import metered
from pipeline.metrics import bins_of
from pipeline.pairs import Run

NUM_BINS = 10
_DISTANCES = np.geomspace(1e-9, 2, 2001)
"""Edges of a histogram of 1 - cosine, 1.1 % apart: a percentile of any number of vectors in 16 kB."""


@dataclass(frozen=True)
class ClassFlips:
    """Pictures that run A gives this label."""

    name: str
    num_images: int
    num_flipped: int


@dataclass(frozen=True)
class BinFlips:
    """Pictures whose best label run A gives a score in (above, up_to]."""

    above: float
    up_to: float
    num_images: int
    num_flipped: int


@dataclass(frozen=True)
class Flip:
    """A best label of run A that is another one in run B."""

    name: str
    becomes: str
    num_images: int


@dataclass(frozen=True, kw_only=True)
class Cosines:
    """Of a picture's two vectors, over all pictures of both runs."""

    mean: float
    first_percentile: float
    """One in a hundred is lower; within 1.1 % of its distance to 1."""
    least: float
    least_uri: str


@dataclass(frozen=True, kw_only=True)
class Truth:
    """Where the true labels are known."""

    top_1_a: float
    top_1_b: float
    num_only_a_right: int
    num_only_b_right: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What changes from A to B. Labels are the same if their names are; shares are 0 .. 1 of the pictures that both
    label.
    """

    a: Run
    b: Run
    num_both: int
    """Pictures that both label."""
    num_only_a: int
    """Pictures that only A labels: failed, gone or never seen in B."""
    num_only_b: int
    top_1_agreement: float
    top_k: int
    """Labels per picture that are compared: the fewer of both."""
    top_k_agreement: float
    """The same labels among the first k, in any order."""
    top_k_overlap: float
    """Mean share of the first k labels that both have."""
    best_a_in_b: float
    """A's best label is among the first k of B."""
    best_b_in_a: float
    mean_score_change: float
    """Of the best label's score, B - A."""
    classes: list[ClassFlips]
    """By number of flips."""
    bins: list[BinFlips]
    flips: list[Flip]
    """By number."""
    cosines: Cosines | None
    truth: Truth | None

    def to_json(self) -> str:
        """Indented JSON."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"


def compare(name_a: str, name_b: str) -> Comparison:
    """Join two runs and count. Raises ConfigError for one that is not there, that is not named among several, or that
    has no picture in common with the other, ConflictError or SourceError for a damaged one.
    """
    left, right = pairs.open_run(name_a), pairs.open_run(name_b)
    runs = left.run, right.run
    has_vectors = left.run.embedding_dim is not None and left.run.embedding_dim == right.run.embedding_dim
    counts = _Counts()
    streams = [metered(each.read(has_vectors), f"reading {each.run.where}", None, size=len) for each in (left, right)]
    for rows_a, rows_b in pairs.joined(streams[0], streams[1], counts.only):
        counts.add(rows_a, rows_b)
    if not counts.num_both:
        raise ConfigError(
            f"expected pictures that both runs label, found none among {counts.only['a']:,} of {runs[0].where} and"
            f" {counts.only['b']:,} of {runs[1].where}; do their uris have the same root?"
        )
    return counts.comparison(*runs)


# --- counting -----------------------------------------------------------------------------------------------------


class _Counts:
    """Sums over the pictures of both runs."""

    def __init__(self) -> None:
        self.only: Counter[str] = Counter(a=0, b=0)
        self.num_both = 0
        self._top_k: int | None = None
        self._sums: Counter[str] = Counter()
        self._score_change = self._overlap = self._cosine_sum = 0.0
        self._classes: Counter[str] = Counter()
        self._flips: Counter[tuple[str, str]] = Counter()
        self._in_bin, self._flipped_in_bin = (np.zeros(NUM_BINS, np.int64) for _ in range(2))
        self._distances = np.zeros(len(_DISTANCES) + 1, np.int64)
        self._least = (np.inf, "")

    def add(self, left: pa.Table, right: pa.Table) -> None:
        """Count rows of the same pictures."""
        if not len(left):
            return
        self.num_both += len(left)
        names_a, names_b = left["label_names"].to_pylist(), right["label_names"].to_pylist()
        self._add_labels(names_a, names_b)
        best_a, best_b = (_best(each["label_scores"]) for each in (left, right))
        self._score_change += float((best_b.astype(np.float64) - best_a).sum())
        is_flipped = np.array([a[0] != b[0] for a, b in zip(names_a, names_b, strict=True)])
        bins = bins_of(best_a, NUM_BINS)
        self._in_bin += np.bincount(bins, minlength=NUM_BINS)
        self._flipped_in_bin += np.bincount(bins[is_flipped], minlength=NUM_BINS)
        if "embedding" in left.column_names:
            self._add_vectors(left["uri"], _vectors(left), _vectors(right))
        if "true_id" in left.column_names and "true_id" in right.column_names:
            self._add_truth(left, right)

    def _add_labels(self, names_a: Sequence[list[str]], names_b: Sequence[list[str]]) -> None:
        for a, b in zip(names_a, names_b, strict=True):
            k = min(len(a), len(b))
            self._top_k = k if self._top_k is None else min(k, self._top_k)
            num_shared = len(set(a[:k]) & set(b[:k]))
            self._overlap += num_shared / k
            self._sums.update(top_1=a[0] == b[0], top_k=num_shared == k, a_in_b=a[0] in b[:k], b_in_a=b[0] in a[:k])
            self._classes[a[0]] += 1
            if a[0] != b[0]:
                self._flips[a[0], b[0]] += 1

    def _add_vectors(self, uris: pa.ChunkedArray, a_ND: npt.NDArray[np.float64], b_ND: npt.NDArray[np.float64]) -> None:
        norm_N = np.linalg.norm(a_ND, axis=1) * np.linalg.norm(b_ND, axis=1)
        cosine_N = np.einsum("nd,nd->n", a_ND, b_ND) / norm_N
        self._cosine_sum += float(cosine_N.sum())
        places = np.digitize(1 - cosine_N, _DISTANCES)
        self._distances += np.bincount(places, minlength=len(self._distances))
        least = int(np.argmin(cosine_N))
        self._least = min(self._least, (float(cosine_N[least]), uris[least].as_py()))

    def _add_truth(self, left: pa.Table, right: pa.Table) -> None:
        is_right_a, is_right_b = (
            np.array([ids[0] for ids in each["label_ids"].to_pylist()]) == each["true_id"].to_numpy()
            for each in (left, right)
        )
        self._sums.update(
            with_truth=len(left),
            right_a=int(is_right_a.sum()),
            right_b=int(is_right_b.sum()),
            only_right_a=int((is_right_a & ~is_right_b).sum()),
            only_right_b=int((is_right_b & ~is_right_a).sum()),
        )

    def comparison(self, a: Run, b: Run) -> Comparison:
        """What has been counted; at least one picture."""
        num, sums = self.num_both, self._sums
        flipped: Counter[str] = Counter()
        for (name, _), number in self._flips.items():
            flipped[name] += number
        return Comparison(
            a=a,
            b=b,
            num_both=num,
            num_only_a=self.only["a"],
            num_only_b=self.only["b"],
            top_1_agreement=sums["top_1"] / num,
            top_k=self._top_k or 0,
            top_k_agreement=sums["top_k"] / num,
            top_k_overlap=self._overlap / num,
            best_a_in_b=sums["a_in_b"] / num,
            best_b_in_a=sums["b_in_a"] / num,
            mean_score_change=self._score_change / num,
            classes=sorted(
                (ClassFlips(name, number, flipped[name]) for name, number in self._classes.items()),
                key=lambda each: (-each.num_flipped, each.name),
            ),
            bins=[
                BinFlips(i / NUM_BINS, (i + 1) / NUM_BINS, int(self._in_bin[i]), int(self._flipped_in_bin[i]))
                for i in range(NUM_BINS)
            ],
            flips=[
                Flip(*names, number)
                for names, number in sorted(self._flips.items(), key=lambda each: (-each[1], each[0]))
            ],
            cosines=self._cosines(),
            truth=self._truth(),
        )

    def _cosines(self) -> Cosines | None:
        total = int(self._distances.sum())
        if not total:
            return None
        # The place below which all but the farthest hundredth are.
        place = int(np.searchsorted(np.cumsum(self._distances), total - total // 100))
        return Cosines(
            mean=self._cosine_sum / total,
            first_percentile=max(self._least[0], 1 - float(_DISTANCES[min(place, len(_DISTANCES) - 1)])),
            least=self._least[0],
            least_uri=self._least[1],
        )

    def _truth(self) -> Truth | None:
        sums = self._sums
        if not sums["with_truth"]:
            return None
        return Truth(
            top_1_a=sums["right_a"] / sums["with_truth"],
            top_1_b=sums["right_b"] / sums["with_truth"],
            num_only_a_right=sums["only_right_a"],
            num_only_b_right=sums["only_right_b"],
        )


def _best(scores: pa.ChunkedArray) -> npt.NDArray[np.float32]:
    best: npt.NDArray[np.float32] = pc.list_element(scores, 0).to_numpy()
    return best


def _vectors(table: pa.Table) -> npt.NDArray[np.float64]:
    column = table["embedding"].combine_chunks()
    flat: npt.NDArray[Any] = column.flatten().to_numpy()
    return flat.astype(np.float64).reshape(len(table), -1)
