"""Encoded bytes of one object -> RGB uint8 picture, upright and bounded, or the reason why there is none.

In: the bytes as stored, of any origin and intent. Out: a Pillow image of mode RGB, or `errors.ImageError` with stage
`decode`. Apart from `preprocess`, because these rules do not depend on the model, and because this is the one place
that meets hostile input: what a codec can do to a worker is limited or caught here.

The order is: size in bytes, magic bytes (an allowlist, before Pillow sees the file), limits on what stands before and
between the pixels, header, limit on pixels, and only then the codec.
"""

import itertools
import re
import struct
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from pipeline.errors import FailureKind, ImageError

DECODE_RULES_VERSION = 1
"""Part of the space id: raised whenever the pixels of some valid image change (EXIF, alpha, bit depth, colour)."""


@dataclass(frozen=True, kw_only=True)
class DecodeLimits:
    """What one image may cost; anything above is a failure row."""

    max_bytes: int = 64 * 2**20
    """Encoded size."""
    max_pixels: int = 50_000_000
    """Width × height. Pillow's own warning at 89 million pixels is an error whatever stands here."""
    max_edge_px: int = 65_535
    """Width and height, each: what JPEG can hold. The weights of a resize grow with the edge, whatever the other one
    is: 1 x 49,000,000 took 2.1 GB."""
    max_metadata_bytes: int = 16 * 2**20
    """Bytes that are not pixels. Phones store megabytes of depth maps before the picture."""
    max_scans: int = 64
    """Scans of a JPEG. Encoders write about 10; each costs a pass over all pixels (17 ms per 16 million)."""
    max_cpu_s: int = 5
    """Processor time, in the kernel's unit of whole seconds: up to one more is let through. 50 million pixels take 2 to
    3. This and the next two hold in the child process of `contain`."""
    max_wall_s: float = 60.0
    """For what uses no processor time. Long, because a crowded machine is no property of an image."""
    max_address_bytes: int = 2 * 2**30
    """Address space beyond what the child has when it starts. 50 million pixels take up to 0.7 GB."""


DEFAULT_LIMITS = DecodeLimits()

# Pillow's plugins by name, and not Image.open: that would open a JPEG with an MPF index as MPO, and it answers every
# damaged header with the same "cannot identify image file".
_PLUGINS: dict[str, type[ImageFile.ImageFile]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WebP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
}
if AvifImagePlugin.SUPPORTED:
    _PLUGINS["AVIF"] = AvifImagePlugin.AvifImageFile

# Order matters where one is a prefix of another (raw files of cameras begin as TIFF does).
_MAGIC = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\x00\x10\x00\x00\x00CR", "Canon raw"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"II+\x00", "TIFF"),
    (b"MM\x00+", "TIFF"),
    (b"\x00\x00\x00\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
    (b"\xff\x0a", "JPEG XL"),
    (b"II\xbc", "JPEG XR"),
    (b"8BPS", "PSD"),
    (b"\x00\x00\x01\x00", "ICO"),
    (b"\x00\x00\x02\x00", "CUR"),
    (b"icns", "ICNS"),
    (b"DDS ", "DDS"),
    (b"qoif", "QOI"),
    (b"BPG\xfb", "BPG"),
    (b"\x8aMNG\r\n\x1a\n", "MNG"),
    (b"\x8bJNG\r\n\x1a\n", "JNG"),
    (b"v/1\x01", "OpenEXR"),
    (b"#?RADIANCE", "Radiance HDR"),
    (b"SIMPLE  =", "FITS"),
    (b"gimp xcf", "XCF"),
    (b"FUJIFILMCCD-RAW", "Fujifilm raw"),
    (b"IIRO", "Olympus raw"),
    (b"IIRS", "Olympus raw"),
    (b"IIU\x00", "Panasonic raw"),
)
_HEIF_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1", b"crx "})
_BMP_HEADER_BYTES = frozenset({12, 16, 40, 52, 56, 64, 108, 124})

# More segments, chunks or blocks than any encoder writes: 64 MiB in PNG chunks of 8 KiB are 8192.
_MAX_SEGMENTS = 65_536
_MAX_JUNK_BYTES = 2**20  # Pillow reads these one by one, 0.6 s for a MiB
_MAX_TIFF_VALUES = 1_000_000

_TIFF_TYPE_BYTES = {3: 2, 4: 4, 5: 8, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}

# Not stuffing (00), fill (FF) or restart markers, which are all that stands within a scan.
_JPEG_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_SOS, _EOI = 0xDA, 0xD9
_JPEG_WITHOUT_LENGTH = frozenset({0x01, 0xD8})

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_TO_8_BIT = ((np.arange(65536, dtype=np.uint32) * 255 + 32767) // 65535).astype(np.uint8)


def decode(data: bytes, limits: DecodeLimits = DEFAULT_LIMITS) -> Image.Image:
    """The picture in `data`, as a person sees it.

    Returns an image of mode RGB (8 bits): first frame, upright by its EXIF orientation (where that is missing, by
    XMP's: the rule of Pillow's `exif_transpose`), alpha composited on white, colour profiles ignored. It is never
    scaled: its `size` is the object's width and height. 16-bit gray is scaled by 65535; 32-bit and float gray by the
    smallest of the customary whites (float: 1, 255, 65535; integer: 65535, 2³¹-1) that holds its brightest pixel.

    Raises `ImageError` (stage `decode`, one line) of kind empty, too_large, not_an_image, unsupported_format,
    truncated, corrupt, bomb_pixels, bomb_scans, bomb_metadata, or decode_oom if memory ran out; nothing else.

    Warnings are silenced while it runs, through filters that belong to the process: use it from one thread.
    """
    return decode_at_least(data, None, limits)[0]


def decode_at_least(
    data: bytes, edge_px: int | None, limits: DecodeLimits = DEFAULT_LIMITS
) -> tuple[Image.Image, tuple[int, int]]:
    """As `decode`, and the object's width and height; but a JPEG comes at a half, a quarter or an eighth of its size
    (rounded up) as long as neither edge is shorter than `edge_px`: its codec then skips frequencies that a resize would
    only remove. Every format in full if that is None.
    """
    name = _admit(data, limits)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return _decode(data, name, edge_px, limits)
    except ImageError:
        raise
    except Exception as error:
        raise _reason(error, data, name) from error


def sniff(data: bytes) -> str | None:
    """Name of the image format that the first bytes of `data` announce, decodable or not; None if it is no image."""
    for magic, name in _MAGIC:
        if data.startswith(magic):
            return name
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WebP"
    if data.startswith(b"BM") and int.from_bytes(data[14:18], "little") in _BMP_HEADER_BYTES:
        return "BMP"
    if data[4:8] == b"ftyp":
        box = data[8 : min(int.from_bytes(data[:4]), 256)]
        brands = {box[i : i + 4] for i in range(0, len(box), 4) if i != 4}  # the second word is a version
        if brands & {b"avif", b"avis"}:
            return "AVIF"
        return "HEIF" if brands & _HEIF_BRANDS else None
    if re.match(rb"P[1-7]\s", data):
        return "Netpbm"
    head = data[:4096].removeprefix(b"\xef\xbb\xbf").lstrip()
    # The first tag that is neither a declaration nor a comment is the root element.
    if head.startswith(b"<") and (root := re.search(rb"<([A-Za-z][\w.-]*)[\s:>]", head)) and root[1] == b"svg":
        return "SVG"
    return None


def too_large(num_bytes: int, limits: DecodeLimits) -> ImageError:
    """The failure of so many encoded bytes."""
    return _failure(FailureKind.TOO_LARGE, f"expected at most {limits.max_bytes} bytes, found {num_bytes}")


def _admit(data: bytes, limits: DecodeLimits) -> str:
    """Name of the format of `data` if a codec may see it."""
    if not data:
        raise _failure(FailureKind.EMPTY, "expected an image, found 0 bytes")
    if len(data) > limits.max_bytes:
        raise too_large(len(data), limits)
    name = sniff(data)
    if name is None:
        raise _failure(
            FailureKind.NOT_AN_IMAGE, f"expected an image, found {len(data)} bytes that begin with {data[:12]!r}"
        )
    if name not in _PLUGINS:
        raise _failure(FailureKind.UNSUPPORTED_FORMAT, f"expected one of {', '.join(_PLUGINS)}, found {name}")
    if name == "JPEG":
        _check_jpeg(data, limits)
    elif name == "PNG":
        _check_png(data, limits)
    elif name == "GIF":
        _check_gif(data)
    elif name == "TIFF":
        _check_tiff(data)
    return name


def _decode(data: bytes, name: str, edge_px: int | None, limits: DecodeLimits) -> tuple[Image.Image, tuple[int, int]]:
    image = _PLUGINS[name](BytesIO(data))
    width_px, height_px = image.size
    if width_px * height_px > limits.max_pixels:
        raise _failure(
            FailureKind.BOMB_PIXELS,
            f"expected at most {limits.max_pixels} pixels, found {width_px}x{height_px} in {len(data)} bytes of {name}",
        )
    if max(width_px, height_px) > limits.max_edge_px:
        raise _failure(
            FailureKind.BOMB_PIXELS,
            f"expected edges of at most {limits.max_edge_px} pixels, found {width_px}x{height_px} in {name}",
        )
    if edge_px is not None and name == "JPEG":
        image.draft(None, (edge_px, edge_px))
    image.load()
    rgb = _to_rgb(image)
    orientation = _orientation(image)
    turn = _UPRIGHT.get(orientation)
    is_on_its_side = orientation >= 5 and turn is not None
    size = (height_px, width_px) if is_on_its_side else (width_px, height_px)
    return rgb if turn is None else rgb.transpose(turn), size


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 .. 8; 1 if there is none or it is unreadable. (TIFF is already upright when loaded.)"""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, struct.error):
        return 1
    return orientation if isinstance(orientation, int) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_to_8_bit(image)).convert("RGB")
    transparent = image.info.get("transparency")
    if isinstance(transparent, tuple) and max(transparent) > 255:
        # A PNG of 16 bits: Pillow keeps the high bytes of its pixels, but all of this colour.
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        on_white = Image.new("RGB", image.size, "white")
        on_white.paste(rgba, mask=rgba)
        return on_white
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bit(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Gray of any depth (h, w) -> uint8 (h, w). Pillow's own conversion clips at 255 instead of scaling."""
    values: npt.NDArray[Any] = np.asarray(image)
    if image.mode == "F":
        values = np.nan_to_num(values)
    brightest = values.max()
    if image.mode != "F" and brightest <= 65535:
        gray: npt.NDArray[np.uint8] = _TO_8_BIT[np.maximum(values, 0)]
    else:
        whites = (1, 255, 65535) if image.mode == "F" else (2**31 - 1,)
        white = next((white for white in whites if brightest <= white), whites[-1])
        gray = (np.clip(values, 0, white) * (255 / white) + 0.5).astype(np.uint8)
    if isinstance(transparent := image.info.get("transparency"), int):
        gray[values == transparent] = 255
    return gray


def _jpeg_scans(data: bytes) -> Iterator[int]:
    """Offset of every start of scan up to the end of the first image."""
    position, junk_bytes, code = 2, 0, 0
    for _ in range(_MAX_SEGMENTS):
        marker = _JPEG_MARKER.search(data, position)
        if code != _SOS:
            junk_bytes += (marker.start() if marker else len(data)) - position
        if junk_bytes > _MAX_JUNK_BYTES:
            raise _too_much_metadata(f"more than {_MAX_JUNK_BYTES} bytes outside of any JPEG segment")
        if marker is None or data[marker.end() - 1] == _EOI:
            return
        code, position = data[marker.end() - 1], marker.end()
        if code == _SOS:
            yield marker.start()
        if code not in _JPEG_WITHOUT_LENGTH:
            position += max(2, int.from_bytes(data[position : position + 2]))
    raise _too_much_metadata(f"more than {_MAX_SEGMENTS} JPEG segments")


def _check_jpeg(data: bytes, limits: DecodeLimits) -> None:
    scans = _jpeg_scans(data)
    header_bytes = next(scans, len(data))
    if header_bytes > limits.max_metadata_bytes:
        raise _too_much_metadata(f"{header_bytes} bytes before the first scan of a JPEG")
    num_scans = 1 + sum(1 for _ in itertools.islice(scans, limits.max_scans))
    if num_scans > limits.max_scans:
        raise _failure(FailureKind.BOMB_SCANS, f"expected at most {limits.max_scans} scans in a JPEG, found more")


def _check_png(data: bytes, limits: DecodeLimits) -> None:
    position, metadata_bytes = 8, 0
    for _ in range(_MAX_SEGMENTS):
        if position + 8 > len(data):
            return
        length = int.from_bytes(data[position : position + 4])
        if data[position + 4 : position + 8] != b"IDAT":
            metadata_bytes += min(length, len(data) - position)
        position += 12 + length
        if metadata_bytes > limits.max_metadata_bytes:
            raise _too_much_metadata(f"{metadata_bytes} bytes of PNG chunks that are not pixels")
    raise _too_much_metadata(f"more than {_MAX_SEGMENTS} PNG chunks")


def _check_gif(data: bytes) -> None:
    position = 13 + (3 << ((data[10] & 7) + 1) if len(data) > 10 and data[10] & 0x80 else 0)
    num_blocks = 0
    while data[position : position + 1] == b"!":
        position += 2
        while position < len(data) and data[position] and num_blocks <= _MAX_SEGMENTS:
            position += 1 + data[position]
            num_blocks += 1
        position += 1
        num_blocks += 1
        if num_blocks > _MAX_SEGMENTS:
            raise _too_much_metadata(f"more than {_MAX_SEGMENTS} GIF blocks before the picture")


def _check_tiff(data: bytes) -> None:
    """Pillow makes a Python object of every value of the first directory."""
    num_entries, entries = _tiff_directory(data)
    if num_entries > _MAX_SEGMENTS:
        raise _too_much_metadata(f"{num_entries} entries in a TIFF directory")
    # A count beyond the end of the file is damage, which Pillow skips.
    num_values = sum(count for kind, count, _ in entries if _TIFF_TYPE_BYTES.get(kind, 1) > 1 and count < len(data))
    if num_values > _MAX_TIFF_VALUES:
        raise _too_much_metadata(f"{num_values} values in a TIFF directory")


def _tiff_directory(data: bytes) -> tuple[int, list[tuple[int, int, int]]]:
    """How many entries the first directory announces, and (type, count, offset) of those up to _MAX_SEGMENTS present.

    No entry at all, (1, []), if the directory stands beyond the end of the file.
    """
    order = "<" if data[:1] == b"I" else ">"
    is_big = data[2:4] in (b"+\x00", b"\x00+")
    offset_format, count_format, entry_format = ("QQ", "Q", "2xHQQ") if is_big else ("4xI", "H", "2xHII")
    try:
        start = struct.unpack_from(order + offset_format, data)[-1]
        (num_entries,) = struct.unpack_from(order + count_format, data, start)
    except struct.error:
        return 1, []
    start += struct.calcsize(order + count_format)
    entry_bytes = struct.calcsize(order + entry_format)
    num_present = max(0, min(num_entries, _MAX_SEGMENTS, (len(data) - start) // entry_bytes))
    directory = data[start : start + num_present * entry_bytes]
    return num_entries, list(struct.iter_unpack(order + entry_format, directory))


def _reason(error: Exception, data: bytes, name: str) -> ImageError:
    """What a codec's exception means to the owner of the object."""
    text = " ".join(str(error).split())[:200]
    if " " not in text:  # a KeyError or the like, of which Pillow passes on only the key
        text = f"{type(error.__cause__ or error).__name__} {text}".rstrip()
    lower = text.lower()
    found = f"{len(data)} bytes of {name}"
    if isinstance(error, MemoryError):
        return _failure(FailureKind.DECODE_OOM, f"memory ran out while decoding {found}")
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return _failure(FailureKind.BOMB_PIXELS, f"{found}: {text}")
    if "max_text_" in lower:
        return _too_much_metadata(f"{found}: {text}")
    if "truncated" in lower or _ends_early(data, name):
        return _failure(FailureKind.TRUNCATED, f"{found} that end before the picture does: {text}")
    if lower.startswith(("cannot handle", "unknown pixel mode", "unsupported bmp", "windows media photo")):
        return _failure(FailureKind.UNSUPPORTED_FORMAT, f"{found} of a kind that is not decoded: {text}")
    return _failure(FailureKind.CORRUPT, f"{found} that do not decode: {text}")


def _ends_early(data: bytes, name: str) -> bool:
    """Whether the container itself says that bytes are missing at the end."""
    if name == "JPEG":
        first_scan = next(_jpeg_scans(data), None)
        return first_scan is None or b"\xff\xd9" not in data[first_scan:]
    if name == "PNG":
        return b"IEND" not in data
    if name == "GIF":
        return not data.rstrip(b"\x00").endswith(b";")
    if name == "WebP":
        return 8 + int.from_bytes(data[4:8], "little") > len(data)
    if name == "BMP":
        return int.from_bytes(data[2:6], "little") > len(data)
    if name == "AVIF":
        position = 0
        while 0 <= position < len(data) and (length := int.from_bytes(data[position : position + 4])) >= 8:
            position += length
        return position > len(data)
    num_entries, entries = _tiff_directory(data)
    return len(entries) < num_entries or any(
        count * size > 8 and offset + count * size > len(data)
        for kind, count, offset in entries
        if (size := _TIFF_TYPE_BYTES.get(kind, 1))
    )


def _too_much_metadata(found: str) -> ImageError:
    return _failure(FailureKind.BOMB_METADATA, f"expected a picture with little around it, found {found}")


def _failure(kind: FailureKind, message: str) -> ImageError:
    return ImageError(kind, message, stage="decode")
