"""Leader groups against their definition, for random points on a circle."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline import leaders
from pipeline.leaders import Floats, Ints, Pairs

MIN_COSINE = 0.9
angles = st.lists(st.integers(0, 359), min_size=2, max_size=40)


def cosines(degrees: list[int]) -> Floats:
    return np.cos(np.radians(np.subtract.outer(degrees, degrees))).astype(np.float32)


def found_pairs(cosine_NN: Floats, num_neighbours: int) -> Pairs:
    """What a search for so many neighbours of every point finds, from both of its ends or from one."""
    near = np.argsort(-cosine_NN, axis=1, kind="stable")[:, : num_neighbours + 1]
    a, b = np.repeat(np.arange(len(near)), near.shape[1]), near.ravel()
    is_near = cosine_NN[a, b] >= MIN_COSINE
    return leaders.unique_pairs(a[is_near], b[is_near], cosine_NN[a, b][is_near])


@given(angles, st.integers(1, 3), st.randoms())
def test_everybody_is_like_the_leader_and_leaders_are_not_like_each_other(
    degrees: list[int], num_neighbours: int, random: "np.random.Generator"
) -> None:
    cosine_NN = cosines(degrees)
    pairs = found_pairs(cosine_NN, num_neighbours)
    ranked = np.unique(np.concatenate([pairs.a, pairs.b]))
    random.shuffle(ranked)

    def all_like(node: int) -> tuple[Ints, Floats]:
        like = np.flatnonzero(cosine_NN[node] >= MIN_COSINE)
        return like, cosine_NN[node][like]

    groups = leaders.lead(ranked, pairs, all_like)
    leader_of = dict(zip(groups.member.tolist(), groups.leader.tolist(), strict=True))
    assert len(leader_of) == len(groups.member)
    rank = {node: place for place, node in enumerate(ranked.tolist())}
    for member, leader in leader_of.items():
        assert cosine_NN[member, leader] >= MIN_COSINE
        assert rank[leader] <= rank[member]
        assert leader_of[leader] == leader
    assert np.array_equal(
        groups.cosine,
        np.where(groups.member == groups.leader, 1, cosine_NN[groups.member, groups.leader]).astype(np.float32),
    )
    heads = sorted(set(leader_of.values()) | (set(ranked.tolist()) - set(leader_of)))
    assert all(cosine_NN[a, b] < MIN_COSINE for a in heads for b in heads if a < b)


def test_a_chain_is_not_one_group() -> None:
    degrees = list(range(0, 60, 10))  # like the next and the one after it, 25 degrees and a bit
    pairs = found_pairs(cosines(degrees), 5)
    groups = leaders.lead(np.arange(6), pairs, lambda _: None)
    assert list(zip(groups.member.tolist(), groups.leader.tolist(), strict=True)) == [
        *((0, 0), (1, 0), (2, 0)),
        *((3, 3), (4, 3), (5, 3)),
    ]


def test_a_pair_counts_though_a_search_from_its_leader_does_not_find_it() -> None:
    cosine_NN = cosines([0, 1, 2])
    pairs = found_pairs(cosine_NN, 2)
    groups = leaders.lead(np.arange(3), pairs, lambda _: (np.array([1]), cosine_NN[0, [1]]))
    assert sorted(groups.member.tolist()) == [0, 1, 2]
    assert groups.leader.tolist() == [0, 0, 0]


def test_a_pair_that_both_ends_found_is_one_with_its_greatest_cosine() -> None:
    pairs = leaders.unique_pairs(
        np.array([5, 2, 2, 3, 9]), np.array([2, 5, 4, 3, 1]), np.array([0.95, 0.96, 0.97, 1, 0.98], np.float32)
    )
    assert (pairs.a.tolist(), pairs.b.tolist()) == ([1, 2, 2], [9, 4, 5])
    assert np.allclose(pairs.cosine, [0.98, 0.97, 0.96])


def test_without_pairs_there_are_no_groups() -> None:
    nothing = np.array([], np.int64)
    pairs = leaders.unique_pairs(nothing, nothing, np.array([], np.float32))
    assert len(leaders.lead(nothing, pairs, lambda _: None).member) == 0
