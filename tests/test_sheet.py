"""Contact sheets: whatever a key is, the page shows it as text; a browser shows every picture, light and dark."""

import warnings
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import browser
import images
import numpy as np
import pytest
from browser import LAPTOP, PHONE
from PIL import Image

from pipeline import decode, sheet, storage
from pipeline.sheet import Section, Tile

COLOURS = [(220, 30, 20), (20, 200, 40), (30, 40, 210), (230, 200, 30), (200, 40, 200), (20, 180, 190)]
ODD = {
    "s3://b/<script>alert(1)</script>.jpg": "s3://b/<script>alert(1)</script>.jpg",
    "s3://b/\"><img src=x onerror='alert(1)'>&amp;": "s3://b/\"><img src=x onerror='alert(1)'>&amp;",
    "s3://b/صورة/قطة.jpg": "s3://b/صورة/قطة.jpg",
    "s3://b/a\nb\r\t\x00.jpg": "s3://b/a\\nb\\r\\t\\x00.jpg",
    "s3://b/\u202egpj.exe": "s3://b/\\u202egpj.exe",
    "s3://b/{{ 7 * 7 }}{% raw %}": "s3://b/{{ 7 * 7 }}{% raw %}",
    "s3://b/" + "k" * 893: "s3://b/" + "k" * 893,
}
"""A key -> what the page shows."""


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def solid(colour: tuple[int, int, int], size: tuple[int, int] = (400, 400)) -> bytes:
    return sheet.thumbnail(Image.new("RGB", size, colour))


def colours() -> str:
    tiles = [Tile(f"s3://b/{number}.jpg", solid(colour), score=0.5) for number, colour in enumerate(COLOURS)]
    return sheet.write("Colours", [Section("All", "", tiles)])


# --- text ---------------------------------------------------------------------------------------------------------


def test_odd_keys_are_text_wherever_they_stand() -> None:
    picture = solid(COLOURS[0])
    plain = Page(
        sheet.write("x", [Section("x", "x", [Tile("x", picture, lines=["x"]), Tile("x", None, "x")])] * 4, "x")
    )
    for key, shown in ODD.items():
        tiles = [Tile(key, picture, lines=[key]), Tile(key, None, key)]
        page = Page(sheet.write(key, [Section(key, key, tiles)] * 4, key))
        is_long = len(key) > 120
        assert [tag for tag, _ in page.tags if tag not in ("details", "summary", "p")] == [
            tag for tag, _ in plain.tags if tag not in ("details", "summary", "p")
        ], key
        text = "".join(page.text)
        # Title, heading and note of the page; four links; four sections' heading, note, line, two titles and a reason.
        assert text.count(shown) == 3 + 4 + 4 * 6, key
        assert [each["alt"] for each in page.all("img")] == [f"Thumbnail of {shown}"] * 4
        assert len(page.all("summary")) == 1 + 8 * is_long


def test_page_needs_no_script_and_nothing_from_elsewhere() -> None:
    page = Page(sheet.write("t", [Section("a", "", [Tile("k", solid(COLOURS[0]))]), Section("b", "", [])]))
    policy = {
        "http-equiv": "Content-Security-Policy",
        "content": "default-src 'none'; img-src data:; style-src 'unsafe-inline'",
    }
    assert policy in page.all("meta")
    assert {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "form", "base"} == set()
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        assert (attributes.get("src") or "data:").startswith("data:")
        assert (attributes.get("href") or "#").startswith("#")
    assert "url(" not in "".join(page.text)
    assert "@import" not in "".join(page.text)


def test_links_headings_and_captions_are_in_the_order_of_the_page() -> None:
    tiles = [Tile("k", solid(COLOURS[0]), lines=["cat 0.91"], score=0.98765)]
    page = Page(sheet.write("t", [Section(str(number), "", tiles) for number in range(4)]))
    assert [tag for tag, _ in page.tags if tag in ("h1", "h2", "a", "figure", "figcaption")] == [
        *("h1", "a", "a", "a", "a"),
        *("h2", "figure", "figcaption") * 4,
    ]
    assert [each["href"] for each in page.all("a")] == [f"#{each['id']}" for each in page.all("section")]
    assert [each["aria-labelledby"] for each in page.all("section")] == [each["id"] for each in page.all("h2")]
    assert "".join(page.text).count("0.9877") == 4
    assert "nav" not in [tag for tag, _ in Page(sheet.write("t", [Section("a", "", tiles)] * 3)).tags]


# --- pictures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "expected"), [((400, 300), (160, 120)), ((3, 3000), (1, 160)), ((20, 10), (20, 10))])
def test_thumbnail_has_at_most_160_px_and_keeps_its_shape(size: tuple[int, int], expected: tuple[int, int]) -> None:
    image = Image.new("RGB", size, COLOURS[0])
    with Image.open(BytesIO(sheet.thumbnail(image))) as small:
        assert (small.format, small.mode, small.size) == ("JPEG", "RGB", expected)
    assert image.size == size


def test_whatever_decodes_has_a_thumbnail() -> None:
    for name, data in images.samples().items():
        image = decode.decode(data)
        with Image.open(BytesIO(sheet.thumbnail(image))) as small:
            difference = abs(np.asarray(small, dtype=float) - np.asarray(image, dtype=float))
            assert difference.mean() < 20, name


def test_thumbnails_leave_the_warnings_of_the_process_as_they_were(tmp_path: Path) -> None:
    store = storage.connect(str(tmp_path))
    for number in range(60):
        store.put(f"{number}.jpg", solid(COLOURS[number % len(COLOURS)]))
    (listed,) = store.list_pages()
    rows = [{"uri": f"{store.root}/{info.key}", "etag": info.etag, "size_bytes": info.size_bytes} for info in listed]
    before = list(warnings.filters)
    assert all(picture is not None for picture, _ in sheet.thumbnails(store.root, rows))
    assert list(warnings.filters) == before


def test_thumbnails_of_files_have_the_shape_of_their_pictures_and_stop_in_time(tmp_path: Path) -> None:
    store = storage.connect(str(tmp_path))
    shapes = {"a.png": (400, 300), "b.png": (30, 900), "c.png": (20, 10)}
    for name, size in shapes.items():
        store.put(name, images.encode(Image.new("RGB", size, COLOURS[0]), "PNG"))
    (listed,) = store.list_pages()
    rows = [{"uri": f"{store.root}/{info.key}", "etag": info.etag, "size_bytes": info.size_bytes} for info in listed]
    found = [Image.open(BytesIO(picture)) for picture, _ in sheet.thumbnails(store.root, rows) if picture]
    assert [each.size for each in found] == [(160, 120), (5, 160), (20, 10)]
    assert all(np.abs(np.asarray(each, dtype=int) - COLOURS[0]).max() <= 6 for each in found)
    late = sheet.thumbnails(store.root, rows, max_s=0.1)[1:]
    assert late == [(None, "not read within 0.1 s")] * 2  # starting the child takes longer


def extents(shot: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the pixels of a colour, as far as JPEG keeps it; there must be many."""
    is_meant = abs(np.asarray(shot, dtype=int) - colour).max(axis=2) <= 6
    assert is_meant.sum() > 100 * 100, colour
    rows, columns = np.nonzero(is_meant.any(axis=1))[0], np.nonzero(is_meant.any(axis=0))[0]
    return int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])


@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize(("window", "num_columns"), [(LAPTOP, 6), (PHONE, 2)], ids=["laptop", "phone"])
def test_browser_shows_every_picture(tmp_path: Path, window: tuple[int, int], num_columns: int, is_dark: bool) -> None:
    shot = browser.screenshot(colours(), tmp_path, window, is_dark=is_dark)
    assert shot.size == window
    found = [extents(shot, colour) for colour in COLOURS[: 2 * num_columns]]
    lefts, tops = sorted({left for left, *_ in found}), sorted({top for _, top, *_ in found})
    assert (len(lefts), len(tops)) == (num_columns, len(found) // num_columns)
    assert all(abs((right - left) - (bottom - top)) <= 1 for left, top, right, bottom in found)
    edge = np.asarray(shot)[:, -5:]  # nothing reaches the edge: the page is not wider than its window
    assert (edge == edge[0, 0]).all()
    assert (edge[0, 0].mean() < 60) == is_dark


def test_browser_wraps_long_keys_within_their_tile(tmp_path: Path) -> None:
    tiles = [Tile(key, solid(COLOURS[0]), lines=[key]) for key in ODD]
    shot = np.asarray(
        browser.screenshot(sheet.write("k" * 900, [Section("s" * 300, "n" * 300, tiles)]), tmp_path, PHONE)
    )
    assert (shot[:, -5:] == shot[0, -1]).all()
