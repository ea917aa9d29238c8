"""Pairs that are alike -> groups in which everybody is like the group's leader.

In: the nodes of pairs in order of rank, the pairs, and a way to ask for all that is like one node. Out: the leader of
each node of a group. A module of its own because it is the one decision of deduplication, and needs numbers only.

No transitive closure: a chain of pictures, each like the next, would end in one group whose ends are nothing alike.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class Pairs(NamedTuple):
    """Pairs of nodes that are alike, each once: a < b."""

    a: Ints
    b: Ints
    cosine: Floats


class Groups(NamedTuple):
    """Who is in which group; a leader is in its own, with cosine 1. Groups of one are left out."""

    member: Ints
    leader: Ints
    cosine: Floats
    """Of member and leader."""


def unique_pairs(a: Ints, b: Ints, cosine: Floats) -> Pairs:
    """Each pair once, whatever its order, with the greatest of its cosines; none of a node with itself. Sorted."""
    low, high = np.minimum(a, b), np.maximum(a, b)
    order = np.lexsort((-cosine, high, low))
    low, high, cosine = low[order], high[order], cosine[order]
    is_new = (low != high) & np.concatenate([[True], (low[1:] != low[:-1]) | (high[1:] != high[:-1])])[: len(low)]
    return Pairs(low[is_new], high[is_new], cosine[is_new])


def lead(ranked: Ints, pairs: Pairs, all_like: Callable[[int], tuple[Ints, Floats] | None]) -> Groups:
    """Give every node of `ranked` that has no leader yet a group of its own, with all that are like it and have none.

    `ranked` are the nodes of `pairs`, the best leader first: so a leader is the best of its group. `all_like` gives the
    nodes that are like one, and their cosines, where `pairs` may lack some of them, else None; where it lacks one that
    `pairs` has, that counts as well.
    """
    source = np.concatenate([pairs.a, pairs.b])
    order = np.argsort(source, kind="stable")
    source = source[order]
    target = np.concatenate([pairs.b, pairs.a])[order]
    cosine = np.tile(pairs.cosine, 2)[order]
    begins, ends = np.searchsorted(source, ranked), np.searchsorted(source, ranked, side="right")
    is_taken: set[int] = set()
    grouped: list[tuple[int, int, float]] = []
    for node, begin, end in zip(ranked.tolist(), begins.tolist(), ends.tolist(), strict=True):
        if node in is_taken:
            continue
        is_taken.add(node)
        like = dict(zip(target[begin:end].tolist(), cosine[begin:end].tolist(), strict=True))
        if (others := all_like(node)) is not None:
            like |= zip(others[0].tolist(), others[1].tolist(), strict=True)
        members = [(member, node, value) for member, value in like.items() if member not in is_taken]
        if members:
            grouped += [(node, node, 1.0), *members]
            is_taken.update(member for member, *_ in members)
    table = np.array(grouped, np.float64).reshape(-1, 3)  # a row number is exact up to 2**53
    return Groups(table[:, 0].astype(np.int64), table[:, 1].astype(np.int64), table[:, 2].astype(np.float32))
