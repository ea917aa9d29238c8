"""Counts -> bars and columns with their lengths: what a page draws and what its tables say, from the same numbers.

A module of its own because it is pure arithmetic, and the text equivalent of a chart must not be computed twice.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

MAX_PACES = 40
"""Columns of the throughput chart: still apart on a phone."""


class Bar(NamedTuple):
    """One of several counts."""

    name: str
    number: float
    share: float
    """Of the total, 0 .. 1."""
    length: float
    """Of the longest bar, 0 .. 1."""


class Pace(NamedTuple):
    """How fast images were done between two moments."""

    from_s: float
    to_s: float
    images_per_s: float
    length: float
    """Of the fastest, 0 .. 1."""


def by_number(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    """The largest first, those that are equal by name."""
    return sorted(counts.items(), key=lambda each: (-each[1], each[0]))


def bars(counts: Iterable[tuple[str, float]], total: float | None = None) -> list[Bar]:
    """A bar for each count, in order; `total` is their sum unless it is given."""
    pairs = list(counts)
    whole = sum(number for _, number in pairs) if total is None else total
    longest = max((number for _, number in pairs), default=0)
    return [Bar(name, number, _of(number, whole), _of(number, longest)) for name, number in pairs]


def paces(points: Sequence[Sequence[float]]) -> list[Pace]:
    """Images per second in equal stretches of time, at most MAX_PACES and no more than there are steps.

    From `Report.points`: seconds and images done by then, both ascending. Between two points the pace is even.
    """
    if len(points) < 2 or points[-1][0] <= points[0][0]:
        return []
    seconds, done = zip(*points, strict=True)
    borders = np.linspace(seconds[0], seconds[-1], min(MAX_PACES, len(points) - 1) + 1)
    rates = np.diff(np.interp(borders, seconds, done)) / np.diff(borders)
    stretches = zip(pairwise(borders.tolist()), rates.tolist(), strict=True)
    return [Pace(start, end, rate, _of(rate, float(rates.max()))) for (start, end), rate in stretches]


def _of(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
