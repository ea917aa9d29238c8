"""Label -> the polygons and lines of one drawing of it, with random variation inside the class.

What goes out is geometry without colour, size or place, so nothing but the arrangement of its patches can tell a class
from another. A module apart from `draw`, which turns the geometry into a picture, because twenty shapes are a list to
look at and add to, not something to read on the way through.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

Points = npt.NDArray[np.float64]
"""Float64 (n, 2), x to the right and y down, in the shape's own box of -1 .. 1."""

Tone = Literal["main", "accent"]


class Patch(NamedTuple):
    """One filled polygon, or with `stroke` a line of that width (in the shape's units) along the points."""

    tone: Tone
    points: Points
    stroke: float | None = None


def _points(*xy: tuple[float, float]) -> Points:
    return np.array(xy, np.float64)


def _arc(
    x: float, y: float, radius_x: float, radius_y: float | None = None, start: float = 0.0, stop: float = 360.0
) -> Points:
    """Points along an ellipse; degrees, clockwise on the screen from 3 o'clock."""
    angles = np.radians(np.linspace(start, stop, 48))
    return np.stack([x + radius_x * np.cos(angles), y + (radius_y or radius_x) * np.sin(angles)], 1)


def turned(points: Points, degrees: float, x: float = 0.0, y: float = 0.0) -> Points:
    """`points` turned about the origin, clockwise on the screen, then moved by (x, y)."""
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    moved: Points = points @ np.array([[cos, sin], [-sin, cos]]) + np.array([x, y])
    return moved


def _all_turned(patches: Sequence[Patch], degrees: float) -> list[Patch]:
    return [patch._replace(points=turned(patch.points, degrees)) for patch in patches]


def _mirrored(patches: Sequence[Patch], rng: np.random.Generator) -> list[Patch]:
    flip = np.array([rng.choice([-1.0, 1.0]), 1.0])
    return [patch._replace(points=patch.points * flip) for patch in patches]


def _arrow(rng: np.random.Generator) -> list[Patch]:
    shaft, head, neck = rng.uniform(0.13, 0.24), rng.uniform(0.45, 0.65), rng.uniform(0.0, 0.3)
    outline = _points((-1, -shaft), (neck, -shaft), (neck, -head), (1, 0), (neck, head), (neck, shaft), (-1, shaft))
    return _all_turned([Patch("main", outline)], rng.uniform(0, 360))


def _butterfly(rng: np.random.Generator) -> list[Patch]:
    upper, lower = rng.uniform(0.36, 0.44), rng.uniform(0.27, 0.36)
    wings: list[Patch] = []
    for side in (-1.0, 1.0):
        wings.append(Patch("main", turned(_arc(0.0, 0.0, 0.52, upper), side * -38, side * 0.5, -0.32)))
        wings.append(Patch("main", turned(_arc(0.0, 0.0, 0.4, lower), side * 35, side * 0.42, 0.42)))
    spots = [Patch("accent", _arc(side * 0.56, -0.36, rng.uniform(0.13, 0.19))) for side in (-1.0, 1.0)]
    feelers = [Patch("accent", _points((0, -0.5), (side * 0.12, -0.8), (side * 0.3, -0.98)), 0.07) for side in (-1, 1)]
    return [*wings, *spots, Patch("accent", _arc(0, 0.02, 0.1, 0.62)), *feelers]


def _checkerboard(rng: np.random.Generator) -> list[Patch]:
    num, parity = int(rng.integers(4, 7)), int(rng.integers(2))
    edges = np.linspace(-0.82, 0.82, num + 1)
    board = _points((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9))
    squares = [
        Patch("main", _points((left, top), (right, top), (right, bottom), (left, bottom)))
        for row, (top, bottom) in enumerate(pairwise(edges))
        for column, (left, right) in enumerate(pairwise(edges))
        if (row + column + parity) % 2
    ]
    return [Patch("accent", board), *squares]


def _clock(rng: np.random.Generator) -> list[Patch]:
    hour, minute = rng.uniform(0, 360, 2)
    ticks = [
        Patch("accent", turned(_points((0, -0.72), (0, -0.58)), angle), 0.09)
        for angle in range(0, 360, int(rng.choice([30, 90])))
    ]
    hands = [
        Patch("accent", turned(_points((0, 0), (0, -0.36)), hour), 0.13),
        Patch("accent", turned(_points((0, 0), (0, -0.58)), minute), 0.09),
    ]
    bells = [Patch("main", _arc(side * 0.62, -0.78, 0.24)) for side in (-1, 1)]
    feet = [Patch("main", _points((side * 0.45, 0.6), (side * 0.65, 0.98)), 0.16) for side in (-1, 1)]
    face = [Patch("main", _arc(0, 0, 0.88)), Patch("accent", _arc(0, 0, 0.84), rng.uniform(0.06, 0.12))]
    return [*bells, *feet, *face, *ticks, *hands]


def _cup(rng: np.random.Generator) -> list[Patch]:
    top, bottom = rng.uniform(0.58, 0.68), rng.uniform(0.4, 0.62)
    body = _points((-0.75, -0.3), (-0.75 + 2 * top, -0.3), (-0.75 + top + bottom, 0.9), (-0.75 + top - bottom, 0.9))
    right = -0.75 + 2 * top
    handle = Patch("main", _arc(right - 0.06, 0.2, rng.uniform(0.36, 0.44), 0.32, -90, 90), 0.15)
    steam_y = np.linspace(-0.95, -0.45, 12)
    steam = [
        Patch("accent", np.stack([x + 0.07 * np.sin(steam_y * 13), steam_y], 1), 0.09)
        for x in np.linspace(-0.45, right - 0.3, int(rng.integers(2, 4)))
    ]
    band = _points((-0.6, 0.1), (right - 0.18, 0.1))
    return _mirrored([handle, Patch("main", body), Patch("accent", band, rng.uniform(0.06, 0.14)), *steam], rng)


def _fish(rng: np.random.Generator) -> list[Patch]:
    height = rng.uniform(0.42, 0.56)
    tail = Patch("main", _points((0.4, 0), (1.0, -0.52), (0.86, 0), (1.0, 0.52)))
    fin = Patch("main", _points((-0.25, -height * 0.8), (0.3, -height - 0.3), (0.3, -height * 0.6)))
    gill = Patch("accent", _arc(-0.5, 0, 0.2, height * 0.55, -70, 70), 0.06)
    eye = Patch("accent", _arc(-0.66, -0.13, rng.uniform(0.08, 0.11)))
    return _mirrored([tail, fin, Patch("main", _arc(-0.22, 0, 0.76, height)), gill, eye], rng)


def _flower(rng: np.random.Generator) -> list[Patch]:
    num = int(rng.integers(5, 8))
    petals = [
        Patch("main", turned(_arc(0.42, 0, 0.3, 0.95 / num + 0.03), angle, 0, -0.3))
        for angle in np.arange(num) * 360 / num + rng.uniform(0, 72)
    ]
    stem = Patch("accent", _points((0, -0.1), (0.03, 0.95)), 0.11)
    leaves = [
        Patch("accent", turned(_arc(0.28, 0, 0.28, 0.11), angle, 0.02, y)) for angle, y in ((-35, 0.75), (-145, 0.85))
    ]
    return [stem, *leaves, *petals, Patch("accent", _arc(0, -0.3, rng.uniform(0.17, 0.23)))]


def _heart(rng: np.random.Generator) -> list[Patch]:
    t = np.linspace(0, 2 * np.pi, 80)
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 17
    outline = np.stack([0.97 * np.sin(t) ** 3, y * rng.uniform(0.9, 1.05)], 1)
    if rng.random() < 0.3:
        return [Patch("main", outline), Patch("accent", outline * 0.6 - [0, 0.03])]
    return [Patch("main", outline)]


def _house(rng: np.random.Generator) -> list[Patch]:
    eaves, door = rng.uniform(-0.2, 0.0), rng.choice([-0.35, 0.0, 0.3])
    walls = _points((-0.72, eaves), (0.72, eaves), (0.72, 0.92), (-0.72, 0.92))
    roof = _points((-1, eaves), (0, -0.98), (1, eaves))
    chimney = _points((0.42, -0.85), (0.66, -0.85), (0.66, eaves), (0.42, eaves))
    doorway = _points((door - 0.16, 0.38), (door + 0.16, 0.38), (door + 0.16, 0.92), (door - 0.16, 0.92))
    window_x = -0.45 if door >= 0 else 0.4
    window = _points(
        *((window_x + dx, 0.32 + dy) for dx, dy in ((-0.15, -0.15), (0.15, -0.15), (0.15, 0.15), (-0.15, 0.15)))
    )
    parts = [Patch("accent", chimney)] * int(rng.random() < 0.6)
    return [*parts, Patch("main", walls), Patch("accent", roof), Patch("accent", doorway), Patch("accent", window)]


def _key(rng: np.random.Generator) -> list[Patch]:
    ring, width = rng.uniform(0.28, 0.36), rng.uniform(0.14, 0.19)
    teeth = [
        Patch("main", _points((x, 0), (x, rng.uniform(0.3, 0.42))), width)
        for x in np.linspace(0.9, 0.45, int(rng.integers(2, 4)))
    ]
    bow = Patch("main", _arc(-0.58, 0, ring), width * 1.2)
    return _all_turned(
        _mirrored([bow, Patch("main", _points((-0.25, 0), (0.92, 0)), width), *teeth], rng), rng.uniform(0, 360)
    )


def _ladder(rng: np.random.Generator) -> list[Patch]:
    half, foot, width = rng.uniform(0.3, 0.42), rng.uniform(0.0, 0.1), rng.uniform(0.1, 0.15)
    rails = [Patch("main", _points((side * half, -0.97), (side * (half + foot), 0.97)), width) for side in (-1, 1)]
    rung_tone: Tone = "accent" if rng.random() < 0.3 else "main"
    rungs = [
        Patch(rung_tone, _points((-half - foot / 2, y), (half + foot / 2, y)), width * 0.9)
        for y in np.linspace(-0.75, 0.75, int(rng.integers(4, 7)))
    ]
    return [*rungs, *rails]


def _lightning(rng: np.random.Generator) -> list[Patch]:
    outline = _points((0.1, -1), (-0.55, 0.12), (-0.08, 0.12), (-0.3, 1), (0.55, -0.22), (0.1, -0.22), (0.48, -1))
    return _mirrored([Patch("main", outline * [rng.uniform(0.9, 1.2), 1])], rng)


def _moon(rng: np.random.Generator) -> list[Patch]:
    depth = rng.uniform(0.25, 0.55)
    outer = _arc(0, 0, 0.95, start=50, stop=310)
    tip_x, tip_y = outer[0]
    inner = np.stack([tip_x - depth * (1 - np.linspace(-1, 1, 40) ** 2) - 0.12, np.linspace(-tip_y, tip_y, 40)], 1)
    return _mirrored([Patch("main", turned(np.vstack([outer, inner]), 0, 0.25))], rng)


def _mushroom(rng: np.random.Generator) -> list[Patch]:
    stem = rng.uniform(0.2, 0.3)
    stalk = _points((-stem, 0), (stem, 0), (stem * 1.25, 0.92), (-stem * 1.25, 0.92))
    cap = _arc(0, 0.12, 0.95, rng.uniform(0.85, 1.05), 180, 360)
    size = rng.uniform(0.11, 0.16)
    spots = [Patch("accent", _arc(x, y, size)) for x, y in ((-0.52, -0.16), (0.02, -0.5), (0.5, -0.14), (0.0, -0.08))]
    return [Patch("accent", stalk), Patch("main", cap), *spots]


def _sailboat(rng: np.random.Generator) -> list[Patch]:
    mast = rng.uniform(-0.1, 0.1)
    hull = _points((-0.95, 0.45), (0.95, 0.45), (0.6, 0.95), (-0.65, 0.95))
    sails = [
        Patch("main", _points((mast + 0.08, -0.95), (mast + 0.08, 0.32), (0.88, 0.32))),
        Patch("main", _points((mast - 0.1, -0.7), (mast - 0.1, 0.32), (-0.75, 0.32))),
    ]
    return _mirrored([Patch("accent", _points((mast, -0.98), (mast, 0.5)), 0.08), *sails, Patch("accent", hull)], rng)


def _smiley(rng: np.random.Generator) -> list[Patch]:
    gap, eye, smile = rng.uniform(0.28, 0.38), rng.uniform(0.1, 0.15), rng.uniform(0.4, 0.55)
    eyes = [Patch("accent", _arc(side * gap, -0.25, eye, eye * rng.uniform(1, 1.6))) for side in (-1, 1)]
    mouth = Patch("accent", _arc(0, 0.08, smile, start=20, stop=160), rng.uniform(0.09, 0.15))
    return [Patch("main", _arc(0, 0, 0.95)), *eyes, mouth]


def _spiral(rng: np.random.Generator) -> list[Patch]:
    turns = rng.uniform(2.3, 3.3)
    t = np.linspace(0.04, 1, 160)
    angle = 2 * np.pi * turns * t + rng.uniform(0, 2 * np.pi)
    line = 0.93 * t[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
    return _mirrored([Patch("main", line, rng.uniform(0.1, 0.15))], rng)


def _star(rng: np.random.Generator) -> list[Patch]:
    radius = np.where(np.arange(10) % 2 == 0, 1.0, rng.uniform(0.38, 0.5))
    angle = np.radians(np.arange(10) * 36 - 90)
    return [Patch("main", radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1))]


def _tree(rng: np.random.Generator) -> list[Patch]:
    trunk = rng.uniform(0.1, 0.17)
    stem = Patch("accent", _points((-trunk, 0.5), (trunk, 0.5), (trunk, 0.98), (-trunk, 0.98)))
    tops, num = -0.98, int(rng.integers(3, 5))
    step = 1.6 / num
    tiers = [
        Patch("main", _points((0, tops + i * step * 0.85), (0.42 + 0.4 * i / num, y), (-0.42 - 0.4 * i / num, y)))
        for i, y in ((i, tops + i * step * 0.85 + step * 1.25) for i in range(num))
    ]
    return [stem, *reversed(tiers)]


def _umbrella(rng: np.random.Generator) -> list[Patch]:
    num, rim = int(rng.integers(3, 6)), 0.05
    dome = _arc(0, rim, 0.97, rng.uniform(0.85, 1.0), 180, 360)
    width = 1.94 / num
    scallops = [_arc(0.97 - width * (i + 0.5), rim, width / 2, width * 0.3, 0, -180) for i in range(num)]
    shaft = _points((0, -0.98), (0, 0.75))
    handle = _arc(-0.16, 0.75, 0.16, start=0, stop=180)
    ribs = [Patch("accent", _points((0, -0.85), (0.97 - width * i, rim)), 0.045) for i in range(1, num)]
    canopy = Patch("main", np.vstack([dome, *scallops]))
    return _mirrored([Patch("accent", shaft, 0.1), Patch("accent", handle, 0.1), canopy, *ribs], rng)


SHAPES: dict[str, Callable[[np.random.Generator], list[Patch]]] = {
    "arrow": _arrow,
    "butterfly": _butterfly,
    "checkerboard": _checkerboard,
    "clock": _clock,
    "cup": _cup,
    "fish": _fish,
    "flower": _flower,
    "heart": _heart,
    "house": _house,
    "key": _key,
    "ladder": _ladder,
    "lightning": _lightning,
    "moon": _moon,
    "mushroom": _mushroom,
    "sailboat": _sailboat,
    "smiley": _smiley,
    "spiral": _spiral,
    "star": _star,
    "tree": _tree,
    "umbrella": _umbrella,
}
"""Label -> function that draws it from a random generator. The order is that of the checkpoint's label ids."""
