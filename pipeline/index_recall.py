"""How much of what is truly nearest an index finds: sampled rows with their true nearest, and recall@10 by them.

The true nearest are gathered while vectors stream by, stored with the index, and kept true by every update: lists lose
rows that went, and rows that came are compared with all samples. So an update measures real recall without reading one
old vector.

A module of its own because building and updating measure alike, and no figure of an index is worth more than this one.
"""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from pipeline import index_log, index_vectors
from pipeline.index_vectors import Floats, Found, Ordinals

NUM_SAMPLES = 500
"""0.97 is then known to within 0.0024 (standard error of 5,000 neighbours, if they were independent)."""
NUM_TRUE = 100
"""Of each sample. Ten times what recall needs, so that a list lasts until a fifth of the rows has gone."""
DEPTH = 10
_TIE = 1e-6
"""Cosines that differ by less are equal: copies of one picture."""
_NUM_TIMED = 200

Search = Callable[[Floats, int], Found]
"""Queries (Q, D) and k -> the k nearest rows of an index."""


class Truth(NamedTuple):
    """Sampled rows of an index: ordinals (S,), vectors (S, D), and their nearest others, padded as in Found."""

    ordinals: Ordinals
    vectors: Floats
    nearest: Found


class Measured(NamedTuple):
    """What an index finds, and how fast."""

    recall_at_10: float
    """Share of the ten nearest others of the samples that were found; 1 if there was nothing to find."""
    num_samples: int
    """Samples that could be measured: not those without others, or with more equals than are known."""
    p50_ms: float
    """Median time of one query."""


def begin(ordinals: Ordinals, vectors: Floats) -> Truth:
    """Samples of which nothing is known yet."""
    return Truth(ordinals, vectors, index_vectors.nothing_found(len(ordinals), NUM_TRUE))


def nearest_others(truth: Truth, vectors_ND: Floats, ordinals_N: Ordinals) -> Found:
    """Each sample's NUM_TRUE nearest among these rows, itself left out."""
    found = index_vectors.nearest(truth.vectors, vectors_ND, ordinals_N, NUM_TRUE + 1)
    return _without(found, found.ordinals_QK == truth.ordinals[:, None], NUM_TRUE)


def merged(truth: Truth, found: Found) -> Truth:
    """With the nearest of further rows, as all rows stream by once."""
    return truth._replace(nearest=index_vectors.merged(truth.nearest, found, NUM_TRUE))


def updated(truth: Truth, removed: Ordinals, vectors_ND: Floats, added_N: Ordinals, num_rows_before: int) -> Truth:
    """What is true after some rows went and others came, in an index that had `num_rows_before`.

    A sample that went is none any more. A list knows all rows down to its last cosine, or all there are; of what came,
    it takes what is above that, because of the rest it cannot say which others lie between.
    """
    is_kept = ~np.isin(truth.ordinals, removed)
    ordinals, vectors = truth.ordinals[is_kept], truth.vectors[is_kept]
    nearest = Found(truth.nearest.cosines_QK[is_kept], truth.nearest.ordinals_QK[is_kept])
    was_complete_Q = (nearest.ordinals_QK >= 0).sum(axis=1) == num_rows_before - 1
    nearest = _without(nearest, np.isin(nearest.ordinals_QK, removed), NUM_TRUE)
    lengths_Q = (nearest.ordinals_QK >= 0).sum(axis=1)
    last_Q = nearest.cosines_QK[np.arange(len(ordinals)), np.maximum(lengths_Q, 1) - 1]
    floor_Q = np.where(was_complete_Q, -np.inf, np.where(lengths_Q > 0, last_Q, np.inf))
    kept = Truth(ordinals, vectors, nearest)
    found = nearest_others(kept, vectors_ND, added_N)
    found = _without(found, found.cosines_QK < floor_Q[:, None], NUM_TRUE)
    return merged(kept, found)


def _without(found: Found, is_out_QK: np.ndarray[tuple[int, int], np.dtype[np.bool_]], k: int) -> Found:
    """The k best that are left."""
    cosines_QK = np.where(is_out_QK, np.float32(-np.inf), found.cosines_QK)
    ordinals_QK = np.where(is_out_QK, -1, found.ordinals_QK)
    none = index_vectors.nothing_found(len(cosines_QK), k)
    return index_vectors.merged(Found(cosines_QK, ordinals_QK), none, k)


def measure(search: Search, truth: Truth, num_rows: int) -> Measured:
    """Recall@10 and the median time of single queries."""
    recall, num_samples = recall_at_10(search, truth, num_rows)
    k = min(DEPTH, num_rows)
    times_s = []
    for row in range(min(_NUM_TIMED, len(truth.vectors))):
        started_s = time.perf_counter()
        search(truth.vectors[row : row + 1], k)
        times_s.append(time.perf_counter() - started_s)
    return Measured(recall, num_samples, statistics.median(times_s) * 1e3 if times_s else 0.0)


def recall_at_10(search: Search, truth: Truth, num_rows: int) -> tuple[float, int]:
    """The share of the true ten nearest others that are found, and by how many samples that is known.

    An answer counts if it is as near as the tenth, whichever of equals it is.
    """
    if not len(truth.ordinals):
        return 1.0, 0
    found = search(truth.vectors, min(DEPTH + 1, num_rows))
    answers = _without(found, found.ordinals_QK == truth.ordinals[:, None], DEPTH).ordinals_QK
    num_wanted = num_found = num_samples = 0
    for answer, cosines, ordinals in zip(answers, *truth.nearest, strict=True):
        length = int((ordinals >= 0).sum())
        wanted = min(DEPTH, length)
        # A list that is full and all equal from the tenth on may lack further equals, which would be right answers.
        is_known = length == num_rows - 1 or (length > wanted and cosines[length - 1] < cosines[wanted - 1] - _TIE)
        if not wanted or not is_known:
            continue
        right = ordinals[:length][cosines[:length] >= cosines[wanted - 1] - _TIE]
        num_samples += 1
        num_wanted += wanted
        num_found += min(wanted, int(np.isin(answer, right).sum()))
    return (num_found / num_wanted if num_wanted else 1.0), num_samples


def to_table(truth: Truth, dim: int) -> pa.Table:
    """As index_log.truth_schema, without the padding."""
    is_there = truth.nearest.ordinals_QK >= 0
    flat = pa.array(truth.vectors.ravel(), pa.float32())
    fields = index_log.truth_schema(dim)
    return pa.Table.from_arrays(
        [
            pa.array(truth.ordinals),
            pa.FixedSizeListArray.from_arrays(flat, type=fields.field("vector").type),
            pa.array([row[here] for row, here in zip(truth.nearest.ordinals_QK, is_there, strict=True)]),
            pa.array([row[here] for row, here in zip(truth.nearest.cosines_QK, is_there, strict=True)]),
        ],
        schema=fields,
    )


def from_table(table: pa.Table) -> Truth:
    """What `to_table` made."""
    vectors = table["vector"].combine_chunks()
    nearest = index_vectors.nothing_found(len(table), NUM_TRUE)
    for row, (ordinals, cosines) in enumerate(
        zip(table["ordinals"].to_pylist(), table["cosines"].to_pylist(), strict=True)
    ):
        nearest.ordinals_QK[row, : len(ordinals)] = ordinals
        nearest.cosines_QK[row, : len(cosines)] = cosines
    flat = vectors.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    return Truth(table["ordinal"].to_numpy(), flat.reshape(len(table), vectors.type.list_size), nearest)
