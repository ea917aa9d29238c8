"""Sections of thumbnails with captions -> one HTML page that needs nothing else: no script, no network, no other file.

In: decoded pictures as JPEG thumbnails, or the reason why there is none, and strings of any origin (keys are whatever
somebody named an object). Out: the text of a page, for a laptop or a phone, light or dark, printed or read aloud.

A module of its own because search results, duplicates and reports show pictures in the same way, and because this is
the one place where a key could become markup: everything is escaped here and nowhere else.
"""

import base64
import unicodedata
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import jinja2
from PIL import Image

from pipeline import decode
from pipeline.errors import ImageError, SourceError
from pipeline.storage import Store

THUMBNAIL_PX = 160
"""Longest edge of a thumbnail."""
_JPEG_QUALITY = 75
_NUM_FETCHES = 8
_BIDI_CONTROLS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


class Tile(NamedTuple):
    """One picture with its caption."""

    title: str
    """What the picture is: its uri or path."""
    picture: bytes | None
    """A JPEG, see `thumbnail`; None where there is none."""
    reason: str = ""
    """Why there is no picture, one line."""
    lines: Sequence[str] = ()
    """The caption below the title."""
    score: float | None = None
    """Shown with three decimals."""


class Section(NamedTuple):
    """Pictures that belong together."""

    heading: str
    note: str
    """A sentence below the heading; may be empty."""
    tiles: Sequence[Tile]


def thumbnail(image: Image.Image) -> bytes:
    """An RGB picture of any size as a JPEG whose longest edge is at most 160 px; 4.8 kB for a photo."""
    small = image.copy()
    small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    file = BytesIO()
    small.save(file, "JPEG", quality=_JPEG_QUALITY)
    return file.getvalue()


def thumbnails(store: Store, uris: Sequence[str]) -> list[tuple[bytes | None, str]]:
    """Thumbnails of objects below a store, or None and why there is none, in order; eight are fetched at once."""

    def one(uri: str) -> tuple[bytes | None, str]:
        try:
            return thumbnail(decode.decode(store.get(uri[len(store.root) + 1 :]), decode.DEFAULT_LIMITS)), ""
        except ImageError as error:
            return None, f"{error.kind}: {error}"
        except SourceError as error:
            return None, str(error)

    with ThreadPoolExecutor(_NUM_FETCHES) as threads:
        return list(threads.map(one, uris))


def write(title: str, sections: Iterable[Section], note: str = "") -> str:
    """The page: `title` as its heading, `note` below it, then every section.

    Control characters and marks that turn the direction of text are shown as Python writes them, `\\n` or `\\u202e`, so
    that a caption says what the key is.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"shown": shown, "data_uri": _data_uri}
    return environment.get_template("sheet.html.j2").render(title=title, note=note, sections=list(sections))


def shown(text: str) -> str:
    """A string in which nothing is hidden: control characters and marks that turn text as Python writes them."""
    return "".join(char.encode("unicode_escape").decode() if _is_hidden(char) else char for char in text)


def _is_hidden(char: str) -> bool:
    return char in _BIDI_CONTROLS or unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp")


def _data_uri(picture: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}"
