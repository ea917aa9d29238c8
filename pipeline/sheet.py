"""Sections of thumbnails with captions -> one HTML page that needs nothing else: no script, no network, no other file.

In: decoded pictures as JPEG thumbnails, or the reason why there is none, and strings of any origin (keys are whatever
somebody named an object). Out: the text of a page, for a laptop or a phone, light or dark, printed or read aloud.

A module of its own because search results, duplicates and reports show pictures in the same way, and because this is
the one place where a key could become markup: everything is escaped here and nowhere else.
"""

import base64
import logging
import math
import time
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from PIL import Image

from pipeline import contain, fetch, storage
from pipeline.checkpoint import PreprocessSpec
from pipeline.decode import DEFAULT_LIMITS
from pipeline.errors import ConfigError, ImageError, SourceError
from pipeline.meter import metered
from pipeline.picture import Recipe
from pipeline.storage import ObjectInfo

THUMBNAIL_PX = 160
"""Longest edge of a thumbnail."""
MIN_LISTED_SECTIONS = 4
"""Fewer have no table of contents."""
_JPEG_QUALITY = 75
_FETCH_DEADLINE_S = 30.0
_RECIPE = Recipe(
    spec=PreprocessSpec(
        mode="fast",
        resize="squash",
        resize_hw_px=(THUMBNAIL_PX, THUMBNAIL_PX),
        resample=Image.Resampling.LANCZOS,  # not one for which the child would load torch
        crop_px=None,
        input_px=THUMBNAIL_PX,
        rescale_factor=1 / 255,
        image_mean=(0.0, 0.0, 0.0),
        image_std=(1.0, 1.0, 1.0),
    ),
    limits=replace(DEFAULT_LIMITS, max_wall_s=10.0),
)
_log = logging.getLogger(__name__)
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
    """Shown with four decimals: 0.9996 is not 1."""


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


def thumbnails(
    input_url: str, rows: Sequence[Mapping[str, Any]], *, max_s: float = math.inf
) -> list[tuple[bytes | None, str]]:
    """Thumbnails of listed objects in order, or None and why there is none: rows with `uri`, `etag`, `size_bytes`.

    An object that is another one since it was listed is not shown. Pictures are decoded in a child process: whatever
    they do to a codec, the page is made. Raises nothing for storage: what does not answer, or refuses everything, is
    the reason of all that follow, and so is `max_s`, after which no further picture is begun; an object may take a
    quarter of it.
    """
    found: list[tuple[bytes | None, str]] = []
    why = f"not read within {max_s:g} s"
    until_s = time.monotonic() + max_s
    try:
        store = storage.connect_input(input_url)
        objects = [ObjectInfo(row["uri"][len(input_url) + 1 :], row["size_bytes"], row["etag"], None) for row in rows]
        max_bytes, deadline_s = _RECIPE.limits.max_bytes, min(max_s / 4, _FETCH_DEADLINE_S)
        with (
            closing(contain.Child(_RECIPE)) as child,
            closing(fetch.fetch(store, objects, max_image_bytes=max_bytes, deadline_s=deadline_s)) as fetched,
        ):
            for each in metered(fetched, "reading pictures", len(objects)):
                found.append(_thumbnail(child, each))
                if time.monotonic() > until_s:
                    break
    except (SourceError, ConfigError) as error:
        why = str(error)
        _log.warning("the page lacks %s pictures: %s", f"{len(rows) - len(found):,}", why)
    return found + [(None, why)] * (len(rows) - len(found))


def _thumbnail(child: contain.Child, fetched: bytes | ImageError) -> tuple[bytes | None, str]:
    try:
        if isinstance(fetched, ImageError):
            raise fetched
        pixels, facts = child.make_picture(fetched)
    except ImageError as error:
        return None, f"{error.kind}: {error}"
    scale = min(1.0, THUMBNAIL_PX / max(facts.size_px))  # it came as a square
    width_px, height_px = (max(1, round(edge_px * scale)) for edge_px in facts.size_px)
    return thumbnail(Image.fromarray(pixels).resize((width_px, height_px))), ""


def write(title: str, sections: Iterable[Section], note: str = "") -> str:
    """The page: `title` as its heading, `note` below it, then every section.

    Control characters and marks that turn the direction of text are shown as Python writes them, `\\n` or `\\u202e`, so
    that a caption says what the key is.
    """
    return render("sheet.html.j2", title=title, note=note, sections=list(sections), min_listed=MIN_LISTED_SECTIONS)


def render(template: str, **values: Any) -> str:
    """A page of `templates/` that shows `values`, each of them as text; filters: `shown`, `data_uri`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"shown": shown, "data_uri": _data_uri}
    return environment.get_template(template).render(**values)


def counted(number: int, one: str, several: str | None = None) -> str:
    """`1 pair`, `1,000 pairs`; `several` where that is not `one` and an s."""
    return f"{number:,} {one if number == 1 else several or f'{one}s'}"


def shown(text: str) -> str:
    """A string in which nothing is hidden: control characters and marks that turn text as Python writes them."""
    return "".join(char.encode("unicode_escape").decode() if _is_hidden(char) else char for char in text)


def _is_hidden(char: str) -> bool:
    return char in _BIDI_CONTROLS or unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp")


def _data_uri(picture: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}"
