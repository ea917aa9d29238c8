"""(seed, index) -> one labelled picture as the bytes of a JPEG, PNG or WebP file, or a broken file of a known kind.

The drawn pictures are what the project's own checkpoint is trained on, what the quickstart labels and what the tests
read, on machines that reach no data set. Classes differ in shape and arrangement; colours, size, place, background and
noise come from the same distributions for all of them, so colour does not give a class away.

A module of its own because training, evaluation, tests and the quickstart must draw from one distribution. Pillow and
numpy only; every function is pure, and the same (seed, index) gives the same bytes with the same versions of both.
"""

import io
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from pipeline.shapes import SHAPES, Patch, Points, turned

CLASSES: tuple[str, ...] = tuple(SHAPES)
"""Every label, in the order of the checkpoint's label ids."""

SIDE_PX = (96, 320)
"""Bounds of a picture's width and height."""

MAX_ASPECT = 1.5
"""Longest over shortest edge: the checkpoint's preprocessing squashes to a square, and a shape must survive that."""

EXTENSIONS = ("jpg", "png", "webp")

MARGIN = 0.06
"""Share of the picture at each edge kept free: the checkpoint's centre crop cuts (73 - 64) / 2 / 73 of it."""

_SUPERSAMPLING = 2


class DrawnFile(NamedTuple):
    """One file of a drawn data set, with the truth about it."""

    path: str
    """`<label>/<label>-<seed>-<index>.<ext>`; `broken/<damage>-<seed>-<index>.<ext>` for a broken one."""
    label: str | None
    """One of `CLASSES`, or None for a broken file."""
    damage: str | None
    """One of `DAMAGES`, or None for an intact file."""
    data: bytes


def draw_file(seed: int, index: int, *, broken_fraction: float = 0.0) -> DrawnFile:
    """Number `index` of the data set `seed`.

    Neither the number of files nor the other files play a part. A larger `broken_fraction` breaks more files and leaves
    the intact ones as they are.

    Args:
        seed: Names the data set; 0 or more.
        index: 0 or more.
        broken_fraction: Expected share of broken files, 0 .. 1.
    """
    rng = np.random.default_rng((seed, index))
    is_broken = rng.random() < broken_fraction
    label, image = draw(rng)
    extension = str(rng.choice(EXTENSIONS))
    data = encode(image, extension, quality=int(rng.integers(60, 96)))
    if not is_broken:
        return DrawnFile(f"{label}/{label}-{seed}-{index:07d}.{extension}", label, None, data)
    damage = str(rng.choice(list(DAMAGES)))
    path = f"broken/{damage}-{seed}-{index:07d}.{extension}"
    return DrawnFile(path, None, damage, DAMAGES[damage](data, rng))


def draw(rng: np.random.Generator, label: str | None = None) -> tuple[str, Image.Image]:
    """A picture of `label` (of a random class if None): `(label, image)`.

    The image is RGB, one in twenty gray (mode L), with edges within `SIDE_PX` and `MAX_ASPECT`.
    """
    label = str(rng.choice(CLASSES)) if label is None else label
    size_px = _size_px(rng)
    palette = _palette(rng)
    canvas = _background(rng, (size_px[0] * _SUPERSAMPLING, size_px[1] * _SUPERSAMPLING), palette)
    _paint(canvas, SHAPES[label](rng), rng, palette)
    image = canvas.reduce(_SUPERSAMPLING)
    if rng.random() < 0.3:
        image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 1.2))))
    noise = rng.standard_normal((size_px[1], size_px[0], 3), np.float32) * np.float32(rng.uniform(0, 14))
    image = Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))
    return label, image.convert("L") if rng.random() < 0.05 else image


def encode(image: Image.Image, extension: str, *, quality: int) -> bytes:
    """`image` as a file of `extension` (`jpg`, `png` or `webp`); `quality` 1 .. 100, without meaning for PNG."""
    buffer = io.BytesIO()
    match extension:
        case "jpg":
            image.save(buffer, "JPEG", quality=quality)
        case "png":
            image.save(buffer, "PNG", compress_level=1)
        case "webp":
            # Method 0 is 5 times as fast as the default, for files a few per cent larger.
            image.save(buffer, "WEBP", quality=quality, method=0)
        case _:
            raise ValueError(f"expected an extension out of {EXTENSIONS}, found {extension!r}")
    return buffer.getvalue()


# --- picture: size, colours, background, transform ---


def _size_px(rng: np.random.Generator) -> tuple[int, int]:
    short_px = round(np.exp(rng.uniform(*np.log(SIDE_PX))))
    if rng.random() < 0.25:
        return short_px, short_px
    long_px = int(rng.integers(short_px, min(SIDE_PX[1], int(short_px * MAX_ASPECT)) + 1))
    return (short_px, long_px) if rng.random() < 0.5 else (long_px, short_px)


class _Palette(NamedTuple):
    background: Points
    second_background: Points
    main: Points
    accent: Points


def _palette(rng: np.random.Generator) -> _Palette:
    """RGB colours, 0 .. 255; background, main and accent differ in brightness, so a gray picture shows the shape."""
    weights = np.array([0.299, 0.587, 0.114])
    while True:
        colours = rng.uniform(0, 255, (3, 3))
        luma = np.sort(colours @ weights)
        if np.diff(luma).min() > 45:
            break
    background, main, accent = colours
    second = (background + rng.normal(0, 28, 3)).clip(0, 255)
    return _Palette(background, second, main, accent)


def _background(rng: np.random.Generator, size_px: tuple[int, int], palette: _Palette) -> Image.Image:
    """Flat, a gradient, or soft blotches of the two background colours: a grid of 1, 2 x 2 or more cells, enlarged."""
    kind = rng.integers(3)
    cells = (1, 1) if kind == 0 else (2, 2) if kind == 1 else tuple(rng.integers(3, 24, 2))
    mix = rng.uniform(0, 1, (*cells, 1))
    colours = palette.background + mix * (palette.second_background - palette.background)
    return Image.fromarray(colours.astype(np.uint8)).resize(size_px, Image.Resampling.BICUBIC)


def _paint(canvas: Image.Image, patches: Sequence[Patch], rng: np.random.Generator, palette: _Palette) -> None:
    """Draws the shape onto the canvas: stretched, rotated by up to 20 degrees, anywhere inside the margins."""
    scale_px = rng.uniform(0.28, 0.43) * min(canvas.size)
    stretch = np.array([1.0, rng.uniform(0.87, 1.15)])
    degrees = rng.uniform(-20, 20)
    half = np.array(canvas.size) / 2
    reach = (half - np.array(canvas.size) * MARGIN - scale_px).clip(0)
    centre = half + rng.uniform(-reach, reach)
    colours = {"main": palette.main, "accent": palette.accent}
    outline_px = scale_px * rng.uniform(0.04, 0.08) if rng.random() < 0.3 else 0.0
    pen = ImageDraw.Draw(canvas)
    for patch in patches:
        points = turned(patch.points * stretch, degrees) * scale_px + centre
        colour = _rgb(colours[patch.tone])
        if patch.stroke is not None:
            _line(pen, points, patch.stroke * scale_px, colour)
            continue
        pen.polygon([tuple(point) for point in points.tolist()], fill=colour)
        if outline_px and patch.tone == "main":
            _line(pen, np.vstack([points, points[:1]]), outline_px, _rgb(palette.accent))


def _line(pen: ImageDraw.ImageDraw, points: Points, width_px: float, colour: tuple[int, int, int]) -> None:
    """A line with round ends and joints."""
    pen.line(points.ravel().tolist(), fill=colour, width=max(1, round(width_px)))
    for x, y in points.tolist():
        r = max(0.5, width_px / 2)
        pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)


def _rgb(colour: Points) -> tuple[int, int, int]:
    red, green, blue = (int(channel) for channel in colour)
    return red, green, blue


# --- broken files ---


def _truncated(data: bytes, rng: np.random.Generator) -> bytes:
    return data[: int(len(data) * rng.uniform(0.5, 0.9))]


def _damaged_header(data: bytes, _rng: np.random.Generator) -> bytes:
    # The first 12 bytes hold the magic of all three formats: still recognizable as what it was.
    return data[:12] + bytes(byte ^ 0xA5 for byte in data[12:76]) + data[76:]


def _bomb(_data: bytes, _rng: np.random.Generator) -> bytes:
    """A PNG of some 70 bytes whose header, valid in itself, announces 65500 x 65500 px."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 65500, 65500, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


DAMAGES: dict[str, Callable[[bytes, np.random.Generator], bytes]] = {
    "truncated": _truncated,
    "header": _damaged_header,
    "bomb": _bomb,
    "garbage": lambda data, rng: b"\x17" + rng.bytes(len(data)),
    "zeros": lambda data, _rng: bytes(len(data)),
    "empty": lambda _data, _rng: b"",
    "text": lambda _data, rng: f"order {rng.integers(10**6)}: not a picture\n".encode() * 20,
    "html": lambda _data, _rng: b"<!DOCTYPE html>\n<html><body><h1>404 Not Found</h1></body></html>\n",
}
"""The kinds of broken file: the name in the file's path -> what it makes of an intact file. Pillow reads none."""
