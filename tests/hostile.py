"""Every kind of hostile, broken or odd image, made in code, with the outcome it must have: the one table of them.

An outcome is a kind of failure as failures/ names it, or `image`: it is labeled.
"""

import base64
import io
import random
import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import images
from images import FORMATS, encode, png, png_chunk, quadrants, texture
from PIL import Image

IMAGE = "image"


class Hostile(NamedTuple):
    """Bytes that somebody may have put into a bucket."""

    data: bytes
    outcome: str


def table() -> dict[str, Hostile]:
    """Name -> bytes and outcome. None is larger than 34 MB, most are a few kB."""
    groups = {
        "bomb_pixels": pixel_bombs(),
        "bomb_scans": {"JPEG of 1000 scans": images.many_scans_jpeg(1000, (2000, 2000))},
        "bomb_metadata": metadata_bombs(),
        "truncated": truncated(),
        "not_an_image": masquerades(),
        "unsupported_format": other_formats(),
        "corrupt": corrupt(),
        IMAGE: {**polyglots(), **odd_images(), **shapes()},
        "empty": {"nothing": b""},
    }
    return {name: Hostile(data, kind) for kind, group in groups.items() for name, data in group.items()}


def pixel_bombs() -> dict[str, bytes]:
    """Few bytes, many pixels."""
    jpeg = bytearray(encode(quadrants(), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 65_500, 65_500)
    gif = bytearray(encode(quadrants(), "GIF"))
    gif[6:10] = struct.pack("<HH", 65_535, 65_535)
    bmp = bytearray(encode(quadrants(), "BMP"))
    bmp[18:26] = struct.pack("<ii", 60_000, 60_000)
    return {
        "PNG of 9400² in 260 kB": png(9400, 9400, rows=b"\0" * (9400 * 3 + 1) * 9400),
        "PNG of 60000² without pixels": png(60_000, 60_000, rows=b""),
        "PNG with an edge of 65,536": png(65_536, 1, rows=b""),
        "PNG of 1 x 49 million": png(1, 49_000_000, rows=b""),
        "JPEG whose frame says 65500²": bytes(jpeg),
        "GIF whose screen is 65535²": bytes(gif),
        "BMP whose header says 60000²": bytes(bmp),
        "TIFF of 10000² of one colour": encode(Image.new("L", (10_000, 10_000)), "TIFF", compression="tiff_deflate"),
        "WebP of 10000² of one colour": encode(Image.new("RGB", (10_000, 10_000)), "WebP", lossless=True, method=0),
    }


def metadata_bombs() -> dict[str, bytes]:
    """Megabytes that are no pixels, or so many pieces that walking through them is the attack."""
    inflating = zlib.compress(bytes(3 * 2**20))
    row = b"\0abc"
    jpeg = encode(quadrants(), "JPEG")
    gif = encode(quadrants(), "GIF")
    gif_header = 13 + (3 << ((gif[10] & 7) + 1))
    entry = struct.pack("<HHQQ", 256, 3, 1, 1)
    strips = struct.pack("<HHII", 273, 4, 1_100_000, 8)
    return {
        "PNG text": png(1, 1, chunks=png_chunk(b"zTXt", b"k\0\0" + inflating), rows=row),
        "PNG profile": png(1, 1, chunks=png_chunk(b"iCCP", b"k\0\0" + inflating), rows=row),
        "PNG text behind": png(1, 1, rows=row, after=png_chunk(b"iTXt", bytes(17 * 2**20))),
        "PNG chunks": png(1, 1, chunks=png_chunk(b"tEXt", b"") * 66_000, rows=row),
        "JPEG segments": jpeg[:2] + b"\xff\xe5\0\2" * 70_000 + jpeg[2:],
        "JPEG segment bytes": jpeg[:2] + (b"\xff\xe5\xff\xff" + bytes(65_533)) * 260 + jpeg[2:],
        "JPEG junk": jpeg[:2] + b"\xff" * 1_100_000 + jpeg[2:],
        "JPEG junk only": jpeg[:2] + b"\xff" + bytes(1_100_000),
        "GIF comment": gif[:gif_header] + b"!\xfe" + b"\1a" * 70_000 + b"\0" + gif[gif_header:],
        "GIF extensions": gif[:gif_header] + b"!\xfe\0" * 70_000 + gif[gif_header:],
        "TIFF entries": b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, 70_000) + entry * 70_000,
        "TIFF values": b"II*\0\x08\0\0\0" + struct.pack("<H", 1) + strips + bytes(4 * 1_100_000),
    }


def truncated() -> dict[str, bytes]:
    """Uploads that broke off."""
    made = {f"{name} cut at {share:.0%}": (name, share) for name in FORMATS for share in (0.5, 0.95)}
    files = {name: encode(texture(60, 40), name) for name in FORMATS}
    cut = {title: files[name][: int(len(files[name]) * share)] for title, (name, share) in made.items()}
    progressive = encode(texture(60, 40), "JPEG", progressive=True)
    return {
        **cut,
        "JPEG of nothing but its magic": b"\xff\xd8\xff\xe0",
        "PNG of nothing but its magic": b"\x89PNG\r\n\x1a\n",
        "GIF of nothing but its magic": b"GIF89a",
        "TIFF of nothing but its magic": b"II*\0",
        "progressive JPEG without its last scan": progressive[: progressive.rindex(b"\xff\xda")],
        "PNG header without pixels": png(10, 10)[:-12],
        "TIFF whose directory lies behind its end": b"II*\0" + struct.pack("<I", 10**6),
    }


def masquerades() -> dict[str, bytes]:
    """What is called .jpg and is none."""
    jpeg = encode(quadrants(), "JPEG")
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("photo.jpg", jpeg)
    return {
        "text": b"hello",
        "text that begins as a BMP": b"BM is how this text begins, and nothing more",
        "HTML page with an SVG in it": b"<!DOCTYPE html><html><body><svg></svg></body></html>",
        "error page of a store": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
        "JSON": b'{"error": "not found"}',
        "pointer of git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        "JPEG in base64": base64.b64encode(jpeg),
        "JPEG in a data URI": b"data:image/jpeg;base64," + base64.b64encode(jpeg),
        "JPEG in a ZIP": zipped.getvalue(),
        "JPEG behind a PDF's magic": b"%PDF-1.7\n" + jpeg,
        "JPEG behind one byte": b"\0" + jpeg,
        "PNG sent as text": encode(quadrants(), "PNG").replace(b"\r\n", b"\n"),
        "text in UTF-16": "hello".encode("utf-16"),
        "zeros": bytes(2000),
        "two bytes of a JPEG": b"\xff\xd8",
        "MP4": b"\x00\x00\x00\x18ftypmp42\x00\x00\x00\x00mp42isom" + bytes(40),
        "sound in RIFF": b"RIFF\x24\x00\x00\x00WAVEfmt ",
        "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n",
        "pickle that runs a command": b"cos\nsystem\n(S'true'\ntR.",
    }


def other_formats() -> dict[str, bytes]:
    """Images of formats that are not decoded."""
    twelve_bits = bytearray(encode(quadrants(), "JPEG"))
    twelve_bits[twelve_bits.index(b"\xff\xc0") + 4] = 12
    return {
        "HEIF": b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(99),
        "JPEG 2000": encode(quadrants(), "JPEG2000"),
        "JPEG XL": b"\x00\x00\x00\x0cJXL \r\n\x87\n",
        "ICO": encode(quadrants(), "ICO"),
        "Netpbm": encode(quadrants(), "PPM"),
        "DDS": encode(quadrants(), "DDS"),
        "PSD": b"8BPS\x00\x01" + bytes(99),
        "Canon raw": b"II*\x00\x10\x00\x00\x00CR\x02\x00" + bytes(99),
        "SVG that asks for a file": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "SVG of a billion laughs": b'<!DOCTYPE x [<!ENTITY a "ha">]><svg xmlns="http://www.w3.org/2000/svg">&a;</svg>',
        "JPEG of twelve bits": bytes(twelve_bits),
    }


def corrupt() -> dict[str, bytes]:
    """The container is whole, what is in it is not."""
    jpeg, file = encode(quadrants(), "JPEG"), bytearray(encode(texture(60, 40), "PNG"))
    file[file.index(b"IDAT") + 300] ^= 0x55
    gif, webp = encode(texture(60, 40), "GIF"), bytearray(encode(texture(60, 40), "WebP"))
    webp[20:40] = bytes(20)
    tiff = bytearray(encode(texture(60, 40), "TIFF", compression="tiff_lzw"))
    tiff[8:200] = b"\xff" * 192
    bmp = bytearray(encode(texture(60, 40), "BMP"))
    bmp[18:26] = bytes(8)
    pixels = b"\0" * (10 * 3 + 1) * 10
    avif = encode(texture(60, 40), "AVIF") if "AVIF" in FORMATS else b""
    return {
        "PNG whose pixels fail their checksum": bytes(file),
        "PNG whose pixels are no zlib stream": png(10, 10, chunks=png_chunk(b"IDAT", b"not zlib at all")),
        "PNG of 0 x 0": png(0, 0, rows=b""),
        "PNG of an unknown colour type": png(10, 10, rows=pixels, depth_and_color=0x0805),
        "JPEG without tables": jpeg.replace(b"\xff\xdb", b"\xff\xe9"),
        "WebP whose frame header is zeros": bytes(webp),
        "TIFF whose strips are noise": bytes(tiff),
        "GIF without a picture": gif[:13] + gif[13 : 13 + (3 << ((gif[10] & 7) + 1))] + b";",
        "BMP of 0 x 0": bytes(bmp),
        **({"AVIF without its codec's configuration": avif.replace(b"av1C", b"free")} if avif else {}),
    }


def polyglots() -> dict[str, bytes]:
    """Images that are also something else: pixels are all that is taken from them."""
    jpeg, page = encode(quadrants(), "JPEG"), b"<script>alert(1)</script>"
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("x.txt", "x")
    return {
        "JPEG and ZIP": jpeg + zipped.getvalue(),
        "JPEG with PHP as its comment": encode(quadrants(), "JPEG", comment=b"<?php system($_GET[0]); ?>"),
        "JPEG with a page behind it": jpeg + page,
        "PNG with a page behind it": encode(quadrants(), "PNG") + page,
        "PNG with a page as its text": png(1, 1, chunks=png_chunk(b"tEXt", b"k\0" + page), rows=b"\0abc"),
        "GIF with a page as its comment": encode(quadrants(), "GIF", comment=page),
        "two JPEGs in one file": jpeg + encode(texture(40, 28), "JPEG"),
    }


def odd_images() -> dict[str, bytes]:
    """Whole images with something about them that software trips over."""
    frames = [texture(40, 28, seed) for seed in range(3)]
    exif = Image.Exif()
    exif[0x0112] = 77
    made = {
        f"{name} animated": encode(frames[0], name, save_all=True, append_images=frames[1:]) for name in ("GIF", "WebP")
    }
    made |= {"PNG animated": encode(frames[0], "PNG", save_all=True, append_images=frames[1:])}
    made |= {"TIFF of three pages": encode(frames[0], "TIFF", save_all=True, append_images=frames[1:])}
    made |= {"JPEG with a second picture (MPO)": encode(frames[0], "MPO", save_all=True, append_images=frames[1:])}
    made |= {f"{name} of orientation 77": encode(frames[0], name, exif=exif) for name in ("JPEG", "PNG", "WebP")}
    made |= {"JPEG with EXIF of noise": encode(frames[0], "JPEG", exif=b"Exif\0\0" + random.Random(0).randbytes(500))}
    made |= {"JPEG with a profile of noise": encode(frames[0], "JPEG", icc_profile=random.Random(1).randbytes(500))}
    made |= {"PNG with 300 times its pixels": png(4, 4, rows=bytes(13 * 4 * 300))}
    return {**made, **images.samples()}


def shapes() -> dict[str, bytes]:
    """As small, long and thin as it gets."""
    sizes = ((1, 1), (1, 30_000), (30_000, 1), (65_535, 1), (3, 2))
    return {f"PNG of {width} x {height}": encode(Image.new("RGB", (width, height)), "PNG") for width, height in sizes}


def damaged(seed: int, number: int) -> Iterator[tuple[str, bytes]]:
    """That many flips and cuts, over all formats and modes in turn; the same for the same seed.

    One in three is a cut; half of the others flip bits of the header, where they do most.
    """
    rng = random.Random(seed)
    files = list(images.samples().items())
    for index in range(number):
        name, data = files[index % len(files)]
        spoilt = bytearray(data)
        if rng.random() < 1 / 3:
            spoilt = spoilt[: rng.randrange(len(data))]
        else:
            end = len(data) if rng.random() < 0.5 else min(len(data), 120)
            for _ in range(rng.randint(1, 8)):
                spoilt[rng.randrange(end)] ^= 1 << rng.randrange(8)
        yield f"{index:05d} {name}", bytes(spoilt)
