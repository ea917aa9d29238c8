"""Makes the bytes of image files in code: every format, mode, orientation and kind of damage that the tests need."""

import importlib.util
import os
import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, features

FORMATS = ("JPEG", "PNG", "WebP", "GIF", "BMP", "TIFF", *(("AVIF",) if features.check("avif") else ()))
ORIENTED_FORMATS = tuple(name for name in FORMATS if name not in ("GIF", "BMP"))
LOSSLESS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 100, "subsampling": 0},
    "WebP": {"lossless": True, "exact": True},
    "AVIF": {"quality": 100, "subsampling": "4:4:4"},
}
TO_STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""Orientation -> what the camera did to an upright picture."""

RED, GREEN, BLUE, GRAY = (220, 30, 20), (20, 200, 40), (30, 40, 210), (120, 120, 120)


def quadrants(width_px: int = 48, height_px: int = 32) -> Image.Image:
    """Four colours in the four corners: red, green / blue, gray."""
    image = Image.new("RGB", (width_px, height_px), RED)
    image.paste(GREEN, (width_px // 2, 0, width_px, height_px // 2))
    image.paste(BLUE, (0, height_px // 2, width_px // 2, height_px))
    image.paste(GRAY, (width_px // 2, height_px // 2, width_px, height_px))
    return image


def texture(width_px: int, height_px: int, seed: int = 0) -> Image.Image:
    """Noise over gradients: no two pixels alike, so that a shift by one pixel shows."""
    rng = np.random.default_rng(seed)
    rows = np.linspace(0, 160, height_px)[:, None, None]
    columns = np.linspace(0, 60, width_px)[None, :, None]
    return Image.fromarray((rows + columns + rng.integers(0, 35, (height_px, width_px, 3))).astype(np.uint8))


def encode(image: Image.Image, name: str, **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, name, **options)
    return file.getvalue()


def encode_oriented(upright: Image.Image, orientation: int, name: str, **options: Any) -> bytes:
    """`upright` as a camera stores it: turned, with the EXIF orientation that turns it back."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    turn = TO_STORED[orientation]
    return encode(upright if turn is None else upright.transpose(turn), name, exif=exif, **options)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(
    width_px: int,
    height_px: int,
    *,
    chunks: bytes = b"",
    rows: bytes | None = None,
    depth_and_color: int = 0x0802,
    after: bytes = b"",
) -> bytes:
    """A PNG with anything in its header; without `rows` it has no pixels."""
    header = struct.pack(">IIHBBB", width_px, height_px, depth_and_color, 0, 0, 0)
    pixels = png_chunk(b"IDAT", zlib.compress(rows)) if rows is not None else b""
    start = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header)
    return start + chunks + pixels + after + png_chunk(b"IEND", b"")


def png16(values: npt.NDArray[np.uint16], chunks: bytes = b"") -> bytes:
    """16-bit PNG, gray (h, w) or RGB (h, w, 3)."""
    height_px, width_px = values.shape[:2]
    rows = b"".join(b"\x00" + row.astype(">u2").tobytes() for row in values)
    color = 0x1000 if values.ndim == 2 else 0x1002
    return png(width_px, height_px, chunks=chunks, rows=rows, depth_and_color=color)


def ycck_jpeg(rgb: tuple[int, int, int], black: int, size: tuple[int, int] = (16, 16)) -> bytes:
    """A JPEG as Adobe writes it: inverted inks as YCCK, transform 2 in the Adobe segment.

    YCCK is YCbCr of the complement of what is stored (jdcolor.c of libjpeg), so of the inks themselves: 255 - `rgb`.
    """
    inks = (255 - rgb[0], 255 - rgb[1], 255 - rgb[2])
    ycc = Image.new("RGB", (1, 1), inks).convert("YCbCr").getpixel((0, 0))
    assert isinstance(ycc, tuple)
    # Pillow inverts all four channels of what it writes; only for K that is wanted.
    image = Image.new("CMYK", size, (255 - int(ycc[0]), 255 - int(ycc[1]), 255 - int(ycc[2]), black))
    data = bytearray(encode(image, "JPEG", quality=100, subsampling=0))
    adobe = data.index(b"Adobe")
    data[adobe + 11] = 2
    return bytes(data)


def many_scans_jpeg(num_scans: int, size: tuple[int, int] = (64, 64)) -> bytes:
    """A progressive JPEG whose last scan is there again and again."""
    data = encode(quadrants(*size), "JPEG", progressive=True, quality=60)
    last = data.rindex(b"\xff\xda")
    present = data.count(b"\xff\xda")
    return data[:last] + data[last:-2] * (num_scans - present + 1) + b"\xff\xd9"


def samples() -> dict[str, bytes]:
    """One small file of every format and mode, all of them decodable."""
    picture = texture(40, 28)
    alpha = picture.convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(picture.size))
    palette = picture.quantize(32)
    gray = picture.convert("L")
    deep = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    made = {f"{name} RGB": encode(picture, name) for name in FORMATS}
    made |= {f"JPEG {mode}": encode(picture.convert(mode), "JPEG") for mode in ("L", "CMYK")}
    made |= {"JPEG YCCK": ycck_jpeg(RED, 40), "JPEG progressive": encode(picture, "JPEG", progressive=True)}
    made |= {f"PNG {image.mode}": encode(image, "PNG") for image in (gray, alpha, palette, deep, gray.convert("1"))}
    made |= {"PNG LA": encode(alpha.convert("LA"), "PNG"), "PNG P transparent": encode(palette, "PNG", transparency=3)}
    made |= {"WebP RGBA": encode(alpha, "WebP"), "WebP lossless": encode(alpha, "WebP", lossless=True)}
    made |= {"GIF P transparent": encode(palette, "GIF", transparency=3)}
    made |= {f"BMP {mode}": encode(picture.convert(mode), "BMP") for mode in ("1", "L", "P")}
    for mode in ("1", "L", "P", "LA", "PA", "RGBA", "CMYK", "YCbCr", "LAB", "I", "F"):
        made[f"TIFF {mode}"] = encode(alpha.convert(mode) if mode in ("LA", "RGBA") else picture.convert(mode), "TIFF")
    made |= {"TIFF I;16": encode(deep, "TIFF")}
    for compression in ("tiff_lzw", "tiff_deflate", "jpeg", "packbits"):
        made[f"TIFF {compression}"] = encode(picture, "TIFF", compression=compression)
    if "AVIF" in FORMATS:
        made["AVIF RGBA"] = encode(alpha, "AVIF")
    made |= {f"{name} upside down": encode_oriented(picture, 3, name) for name in ORIENTED_FORMATS}
    return made


def bundled_photos() -> dict[str, Path]:
    """Photographs and drawings inside the installed scikit-image, in RGB, RGBA, gray and palette."""
    spec = importlib.util.find_spec("skimage")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "data"
    names = (
        "astronaut.png",
        "camera.png",
        "chelsea.png",
        "coffee.png",
        "logo.png",
        "motorcycle_left.png",
        "rocket.jpg",
    )
    return {name: folder / name for name in (*names, "no_time_for_that_tiny.gif", "retina.jpg")}


def operator_photos() -> list[Path]:
    """The photos of the folder in the environment variable LABEL_BUCKET_PHOTOS; none if it is not set."""
    folder = os.environ.get("LABEL_BUCKET_PHOTOS")
    return sorted(path for path in Path(folder).iterdir() if path.is_file()) if folder else []
