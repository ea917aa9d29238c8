"""What each kind of file becomes: the pixels a person would see, or the reason why there are none."""

import pickle
import random
import struct
import time
import warnings
import zlib
from io import BytesIO
from pathlib import Path

import hostile
import images
import numpy as np
import pytest
from images import BLUE, FORMATS, GRAY, GREEN, LOSSLESS, ORIENTED_FORMATS, RED
from PIL import Image, ImageOps

from pipeline.decode import DecodeLimits, decode, decode_at_least, sniff
from pipeline.errors import FailureKind, ImageError

Color = tuple[int, int, int]


def failure(data: bytes, limits: DecodeLimits | None = None) -> ImageError:
    with pytest.raises(ImageError) as caught:
        decode(data, limits or DecodeLimits())
    error = caught.value
    assert error.stage == "decode"
    assert str(error)
    assert "\n" not in str(error)
    assert " at 0x" not in str(error), "an address in the message would differ from run to run"
    return error


def pixel(image: Image.Image, x: int = 0, y: int = 0) -> Color:
    assert image.mode == "RGB"
    red, green, blue = np.asarray(image)[y, x].tolist()
    return red, green, blue


def only_pixel(data: bytes) -> Color:
    return pixel(decode(data))


def assert_close(found: Color, expected: Color, tolerance: int) -> None:
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= tolerance, (found, expected)


def assert_quadrants(image: Image.Image, tolerance: int) -> None:
    """The picture of `images.quadrants()`, whose corners differ: wrong under any turn or mirroring."""
    assert image.size == (48, 32)
    corners = [pixel(image, 6, 6), pixel(image, 41, 6), pixel(image, 6, 25), pixel(image, 41, 25)]
    for found, expected in zip(corners, (RED, GREEN, BLUE, GRAY), strict=True):
        assert_close(found, expected, tolerance)


# Formats


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_its_picture(name: str) -> None:
    exact = name in ("PNG", "WebP", "BMP", "TIFF", "GIF")
    image = decode(images.encode(images.quadrants(), name, **LOSSLESS.get(name, {})))
    assert_quadrants(image, 0 if exact else 4)


@pytest.mark.parametrize("name", images.samples())
def test_every_mode_of_every_format_gives_rgb(name: str) -> None:
    image = decode(images.samples()[name])
    assert image.mode == "RGB"
    assert image.size == ((16, 16) if "YCCK" in name else (40, 28))
    assert np.asarray(image).shape == (image.height, image.width, 3)


@pytest.mark.parametrize("name", ["GIF", "WebP", "PNG", "TIFF", *(["AVIF"] if "AVIF" in FORMATS else [])])
def test_an_animation_gives_its_first_frame(name: str) -> None:
    frames = [Image.new("RGB", (16, 16), color) for color in (RED, GREEN, BLUE)]
    data = images.encode(frames[0], name, save_all=True, append_images=frames[1:], **LOSSLESS.get(name, {}))
    assert_close(only_pixel(data), RED, 3)


def test_a_jpeg_with_a_second_picture_behind_it_gives_the_first() -> None:
    first, second = Image.new("RGB", (32, 32), RED), Image.new("RGB", (64, 64), BLUE)
    data = images.encode(first, "MPO", save_all=True, append_images=[second])
    image = decode(data)
    assert image.size == (32, 32)
    assert_close(pixel(image), RED, 2)


# Orientation


@pytest.mark.parametrize("name", ORIENTED_FORMATS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_turned_upright(name: str, orientation: int) -> None:
    data = images.encode_oriented(images.quadrants(), orientation, name, **LOSSLESS.get(name, {}))
    stored = Image.open(BytesIO(data))
    assert stored.size == ((48, 32) if orientation < 5 or name == "TIFF" else (32, 48))
    assert_quadrants(decode(data), 4)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_agrees_with_pillow_for_every_place_it_is_stored_in(orientation: int) -> None:
    picture = images.texture(20, 12)
    xmp = f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="{orientation}"/></x:xmpmeta>'.encode()
    exif = Image.Exif()
    exif[0x0112] = orientation
    profile = exif.tobytes().hex()
    text = f"\nexif\n{len(profile) // 2:8}\n{profile}\n".encode()
    image_magick = images.png_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text))
    rows = b"".join(b"\0" + row.tobytes() for row in np.asarray(picture))
    for data in (images.encode(picture, "JPEG", xmp=xmp), images.png(20, 12, chunks=image_magick, rows=rows)):
        expected = ImageOps.exif_transpose(Image.open(BytesIO(data)))
        assert decode(data).size == ((20, 12) if orientation < 5 else (12, 20))
        assert np.array_equal(np.asarray(decode(data)), np.asarray(expected))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("edge_px", "divisor"), [(None, 1), (301, 1), (300, 2), (151, 2), (150, 4), (75, 8), (8, 8)])
def test_a_jpeg_is_decoded_to_no_less_than_was_asked_for_and_its_size_is_that_of_the_object(
    orientation: int, edge_px: int | None, divisor: int
) -> None:
    data = images.encode_oriented(images.texture(801, 600), orientation, "JPEG")
    image, size_px = decode_at_least(data, edge_px)
    assert size_px == (801, 600)
    assert image.size == (-(-801 // divisor), 600 // divisor)


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WebP"])
def test_damaged_exif_is_ignored_without_a_warning(name: str) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x011A], exif[0x010F] = 6, 72.0, "a maker of cameras"
    exif.get_ifd(0x8769)[0x9003] = "2026:11:22 10:00:00"
    whole = exif.tobytes()
    rng = random.Random(11)
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 10)):
            damaged[rng.randrange(6, len(damaged))] = rng.choice((0, 255, rng.randrange(256)))
        damaged = damaged[: rng.randrange(7, len(damaged) + 1)]
        data = images.encode(images.texture(9, 5), name, exif=bytes(damaged))
        assert decode(data).size in ((9, 5), (5, 9))


def test_a_damaged_colour_profile_is_ignored() -> None:
    for name in ("JPEG", "PNG", "WebP", "TIFF"):
        data = images.encode(images.quadrants(), name, icc_profile=b"no profile at all" * 9, **LOSSLESS.get(name, {}))
        assert_quadrants(decode(data), 4)


def test_warnings_of_the_caller_are_as_before() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = list(warnings.filters)
        decode(images.encode(images.quadrants(), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff"))
        assert warnings.filters == before


# Colour


def test_sixteen_bit_gray_is_scaled_by_65535() -> None:
    values = np.array([[0, 128, 129, 40000, 65535]], np.uint16)
    expected = [0, 0, 1, 156, 255]
    assert np.asarray(decode(images.png16(values)))[0].tolist() == [[value] * 3 for value in expected]
    for byte_order in ("<u2", ">u2"):
        tiff = images.encode(Image.fromarray(values.astype(byte_order)), "TIFF")
        assert np.asarray(decode(tiff))[0, :, 1].tolist() == expected
    integers = images.encode(Image.fromarray(values.astype(np.int32)), "TIFF")
    assert np.asarray(decode(integers))[0, :, 2].tolist() == expected


def test_sixteen_bit_transparent_gray_is_white() -> None:
    data = images.png16(np.array([[40000, 65535, 100]], np.uint16), images.png_chunk(b"tRNS", struct.pack(">H", 100)))
    assert np.asarray(decode(data))[0, :, 0].tolist() == [156, 255, 255]


def test_sixteen_bit_transparent_colour_is_white() -> None:
    colors = np.array([[[0x1234, 0x2345, 0x3456], [0x34, 0x45, 0x56], [0xFFFF, 0, 0]]], np.uint16)
    data = images.png16(colors, images.png_chunk(b"tRNS", struct.pack(">HHH", 0x1234, 0x2345, 0x3456)))
    assert np.asarray(decode(data))[0].tolist() == [[255, 255, 255], [0, 0, 0], [255, 0, 0]]


@pytest.mark.parametrize("white", [1, 255, 65535])
def test_float_gray_is_scaled_by_the_white_it_uses(white: int) -> None:
    values = np.array([[0, 0.5, 1, np.nan, -3]], np.float32) * white
    assert np.asarray(decode(images.encode(Image.fromarray(values), "TIFF")))[0, :, 0].tolist() == [0, 128, 255, 0, 0]


def test_thirty_two_bit_gray_is_scaled_by_its_range() -> None:
    values = np.array([[0, 2**30, 2**31 - 1, -5]], np.int32)
    assert np.asarray(decode(images.encode(Image.fromarray(values), "TIFF")))[0, :, 0].tolist() == [0, 128, 255, 0]


def test_gray_and_one_bit_become_rgb() -> None:
    for name in ("PNG", "TIFF", "BMP"):
        assert only_pixel(images.encode(Image.new("L", (3, 3), 77), name)) == (77, 77, 77)
        assert only_pixel(images.encode(Image.new("1", (3, 3), 1), name)) == (255, 255, 255)
        assert only_pixel(images.encode(Image.new("1", (3, 3), 0), name)) == (0, 0, 0)


def test_a_transparent_red_pixel_is_white() -> None:
    assert only_pixel(images.encode(Image.new("RGBA", (1, 1), (255, 0, 0, 0)), "PNG")) == (255, 255, 255)


@pytest.mark.parametrize("name", ["PNG", "TIFF", "WebP", *(["AVIF"] if "AVIF" in FORMATS else [])])
def test_alpha_is_composited_on_white(name: str) -> None:
    data = images.encode(Image.new("RGBA", (8, 8), (255, 0, 40, 128)), name, **LOSSLESS.get(name, {}))
    # (128 * c + 127 * 255) / 255
    assert_close(only_pixel(data), (255, 127, 147), 2 if name == "AVIF" else 0)


@pytest.mark.parametrize("name", ["PNG", "TIFF"])
def test_gray_with_alpha_is_composited_on_white(name: str) -> None:
    assert only_pixel(images.encode(Image.new("LA", (2, 2), (100, 51)), name)) == (224, 224, 224)


def palette_image() -> Image.Image:
    image = Image.new("P", (3, 1))
    image.putpalette([*RED, *GREEN, *BLUE])
    image.putdata([0, 1, 2])
    return image


@pytest.mark.parametrize("name", ["PNG", "GIF", "BMP", "TIFF"])
def test_a_palette_gives_its_colours(name: str) -> None:
    assert np.asarray(decode(images.encode(palette_image(), name)))[0].tolist() == [[*RED], [*GREEN], [*BLUE]]


@pytest.mark.parametrize("name", ["PNG", "GIF"])
def test_the_transparent_colour_of_a_palette_is_white(name: str) -> None:
    data = images.encode(palette_image(), name, transparency=1)
    assert np.asarray(decode(data))[0].tolist() == [[*RED], [255, 255, 255], [*BLUE]]


def test_a_palette_with_an_alpha_of_each_colour_is_composited_on_white() -> None:
    data = images.encode(palette_image(), "PNG", transparency=bytes([255, 0, 51]))
    assert np.asarray(decode(data))[0].tolist() == [[*RED], [255, 255, 255], [210, 212, 246]]


def test_a_palette_beside_an_alpha_channel_is_composited_on_white() -> None:
    image = palette_image().convert("PA")
    image.putalpha(Image.frombytes("L", (3, 1), bytes([255, 0, 51])))
    assert np.asarray(decode(images.encode(image, "TIFF")))[0].tolist() == [[*RED], [255, 255, 255], [210, 212, 246]]


def test_the_inks_of_a_cmyk_jpeg_are_inverted_as_adobe_stores_them() -> None:
    data = images.encode(Image.new("CMYK", (16, 16), (0, 204, 51, 51)), "JPEG", quality=100)
    assert b"Adobe" in data
    # (255 - ink) * (255 - black) / 255
    assert_close(only_pixel(data), (204, 41, 163), 2)


def test_a_ycck_jpeg_gives_its_colours() -> None:
    data = images.ycck_jpeg((200, 100, 50), black=51)
    assert_close(only_pixel(data), (160, 80, 40), 2)


def test_a_cmyk_tiff_gives_its_colours() -> None:
    assert only_pixel(images.encode(Image.new("CMYK", (2, 2), (0, 204, 51, 51)), "TIFF")) == (204, 41, 163)


# Size


def test_one_pixel_is_an_image() -> None:
    for name in FORMATS:
        image = decode(images.encode(Image.new("RGB", (1, 1), GRAY), name, **LOSSLESS.get(name, {})))
        assert image.size == (1, 1)
        assert_close(pixel(image), GRAY, 2)


@pytest.mark.parametrize("name", ["JPEG", "PNG", "TIFF"])
def test_a_line_of_30000_pixels_is_an_image(name: str) -> None:
    assert decode(images.encode(Image.new("RGB", (1, 30_000), RED), name)).size == (1, 30_000)


def test_limits_are_met_exactly() -> None:
    data = images.encode(images.quadrants(), "PNG")
    assert decode(data, DecodeLimits(max_bytes=len(data), max_pixels=48 * 32)).size == (48, 32)
    assert failure(data, DecodeLimits(max_bytes=len(data) - 1)).kind == FailureKind.TOO_LARGE
    assert failure(data, DecodeLimits(max_pixels=48 * 32 - 1)).kind == FailureKind.BOMB_PIXELS


# Outcomes


def test_no_bytes_are_empty() -> None:
    assert failure(b"").kind == FailureKind.EMPTY


@pytest.mark.parametrize(
    "data",
    [
        b"hello",
        b"\xff\xd8",
        b"BM is how this text begins, and nothing more",
        b"%PDF-1.7\n",
        b"PK\x03\x04" + bytes(60),
        b"<!DOCTYPE html><html><body><svg></svg></body></html>",
        b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
        b"\x00\x00\x00\x18ftypmp42\x00\x00\x00\x00mp42isom" + bytes(40),
        b"RIFF\x24\x00\x00\x00WAVEfmt ",
        bytes(2000),
    ],
)
def test_bytes_without_the_magic_of_an_image_are_not_an_image(data: bytes) -> None:
    assert failure(data).kind == FailureKind.NOT_AN_IMAGE


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(99), "HEIF"),
        (b"\x00\x00\x00\x18ftypcrx \x00\x00\x00\x01crx isom" + bytes(99), "HEIF"),
        (images.encode(images.quadrants(), "JPEG2000"), "JPEG 2000"),
        (images.encode(images.quadrants(), "ICO"), "ICO"),
        (images.encode(images.quadrants(), "PPM"), "Netpbm"),
        (images.encode(images.quadrants(), "DDS"), "DDS"),
        (b"8BPS\x00\x01" + bytes(99), "PSD"),
        (b"\x00\x00\x00\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"II*\x00\x10\x00\x00\x00CR\x02\x00" + bytes(99), "Canon raw"),
        (b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- drawn -->\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
    ],
)
def test_an_image_of_another_format_is_unsupported_by_name(data: bytes, name: str) -> None:
    error = failure(data)
    assert error.kind == FailureKind.UNSUPPORTED_FORMAT
    assert str(error).endswith(f"found {name}")


def test_an_avif_that_calls_itself_mif1_is_an_avif() -> None:
    assert sniff(b"\x00\x00\x00\x1cftypmif1\x00\x00\x00\x00mif1avifmiaf") == "AVIF"


def test_a_jpeg_of_twelve_bits_is_unsupported() -> None:
    data = bytearray(images.encode(images.quadrants(), "JPEG"))
    data[data.index(b"\xff\xc0") + 4] = 12
    error = failure(bytes(data))
    assert error.kind == FailureKind.UNSUPPORTED_FORMAT
    assert "12-bit" in str(error)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("share", [0.4, 0.7, 0.95])
def test_a_truncated_image_becomes_a_failure(name: str, share: float) -> None:
    data = images.encode(images.texture(60, 40), name)
    error = failure(data[: int(len(data) * share)])
    assert error.kind == FailureKind.TRUNCATED
    assert f"{int(len(data) * share)} bytes of {name}" in str(error)


def test_pixels_that_fail_their_checksum_are_corrupt() -> None:
    data = bytearray(images.encode(images.texture(60, 40), "PNG"))
    data[data.index(b"IDAT") + 300] ^= 0x55
    assert failure(bytes(data)).kind == FailureKind.CORRUPT


def test_a_jpeg_without_tables_is_corrupt() -> None:
    data = images.encode(images.quadrants(), "JPEG")
    damaged = data.replace(b"\xff\xdb", b"\xff\xe9")
    assert failure(damaged).kind == FailureKind.CORRUPT


# Bombs: the kind, and what refusing it costs


def test_too_many_pixels_are_refused_from_the_header() -> None:
    rows = b"\0" * (9400 * 3 + 1) * 9400
    data = images.png(9400, 9400, rows=rows)
    assert len(data) < 300_000
    started = time.process_time()
    assert failure(data).kind == FailureKind.BOMB_PIXELS
    assert time.process_time() - started < 0.5


@pytest.mark.parametrize("size", [(60_000, 60_000), (10_000, 10_000)])
def test_sizes_above_pillows_own_limits_are_the_same_failure(size: tuple[int, int]) -> None:
    assert failure(images.png(*size, rows=b"")).kind == FailureKind.BOMB_PIXELS
    assert failure(images.png(*size, rows=b""), DecodeLimits(max_pixels=10**6)).kind == FailureKind.BOMB_PIXELS


@pytest.mark.parametrize("size", [(1, 49_000_000), (65_536, 1), (1, 65_536)])
def test_an_edge_that_would_make_the_resize_a_bomb_is_refused_from_the_header(size: tuple[int, int]) -> None:
    error = failure(images.png(*size, rows=b""))
    assert error.kind == FailureKind.BOMB_PIXELS
    assert f"{size[0]}x{size[1]}" in str(error)


def test_the_longest_edge_that_is_allowed_is_an_image() -> None:
    assert decode(images.encode(Image.new("RGB", (65_535, 1), RED), "PNG")).size == (65_535, 1)


def test_too_many_scans_are_refused_before_any_is_decoded() -> None:
    data = images.many_scans_jpeg(1000, (4000, 4000))
    started = time.process_time()
    assert failure(data).kind == FailureKind.BOMB_SCANS
    assert time.process_time() - started < 0.2
    assert decode(images.many_scans_jpeg(64)).size == (64, 64)
    assert failure(images.many_scans_jpeg(65)).kind == FailureKind.BOMB_SCANS


def test_bytes_that_look_like_scans_outside_of_the_picture_do_not_count() -> None:
    data = images.encode(images.quadrants(), "JPEG", quality=95, subsampling=0, comment=b"\xff\xda" * 500)
    assert_quadrants(decode(data + b"\xff\xda" * 500), 6)


@pytest.mark.parametrize("name", hostile.metadata_bombs())
def test_a_metadata_bomb_is_refused_at_little_cost(name: str) -> None:
    data = hostile.metadata_bombs()[name]
    started = time.process_time()
    assert failure(data).kind == FailureKind.BOMB_METADATA
    assert time.process_time() - started < 0.5


def test_metadata_below_the_limits_is_no_reason_to_refuse() -> None:
    data = images.encode(images.quadrants(), "JPEG", quality=95, subsampling=0)
    depth_map = (b"\xff\xe1\xff\xff" + bytes(65_533)) * 100
    assert_quadrants(decode(data[:2] + depth_map + data[2:]), 6)


# Anything at all


@pytest.mark.parametrize("seed", range(4))
def test_flipped_bits_and_cut_files_give_an_image_or_an_image_error(seed: int) -> None:
    rng = random.Random(seed)
    outcomes = set()
    for name, data in images.samples().items():
        for damage in range(7):
            damaged = bytearray(data)
            if damage < 2:
                damaged = damaged[: rng.randrange(len(data))]
            else:
                # Half of the flips hit the header, where they do most.
                end = len(data) if damage < 5 else min(len(data), 120)
                for _ in range(rng.randint(1, 8)):
                    damaged[rng.randrange(end)] ^= 1 << rng.randrange(8)
            started = time.process_time()
            try:
                image = decode(bytes(damaged))
                assert (image.mode, image.width * image.height > 0) == ("RGB", True), name
                outcomes.add("image")
            except ImageError as error:
                outcomes.add(error.kind.value)
            assert time.process_time() - started < 5, name
    assert {"image", "corrupt", "truncated", "not_an_image"} <= outcomes


def test_the_same_bytes_give_the_same_message() -> None:
    data = images.encode(images.texture(30, 20), "PNG")[:200]
    assert str(failure(data)) == str(failure(data))


def test_a_failure_travels_between_processes() -> None:
    error = failure(b"hello")
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.kind, str(copy), copy.stage) == (error.kind, str(error), "decode")


@pytest.mark.parametrize("name", images.bundled_photos())
def test_a_photo_gives_the_pixels_that_pillow_gives(name: str) -> None:
    path = images.bundled_photos()[name]
    image = decode(path.read_bytes())
    opened = Image.open(path)
    if opened.has_transparency_data:
        pytest.skip("composited on white here: other pixels than Pillow's, tested above")
    assert np.array_equal(np.asarray(image), np.asarray(ImageOps.exif_transpose(opened).convert("RGB")))


@pytest.mark.parametrize("path", images.operator_photos(), ids=lambda path: path.name)
def test_a_photo_of_the_operator_gives_the_pixels_that_pillow_gives(path: Path) -> None:
    expected = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    assert np.array_equal(np.asarray(decode(path.read_bytes())), np.asarray(expected))
