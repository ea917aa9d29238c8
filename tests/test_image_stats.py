"""Numbers about a picture: what they are on pictures for which one knows."""

import hashlib
import io

import images
import numpy as np
import pytest
from PIL import Image, ImageFilter
from scipy.fft import dct

from pipeline.decode import decode
from pipeline.image_stats import ImageStats, image_stats

PHOTOS = sorted(images.bundled_photos())


def stats_of(image: Image.Image, data: bytes = b"x", input_px: int = 224) -> ImageStats:
    return image_stats(data, image, np.asarray(image.resize((input_px, input_px)), np.uint8))


def photo(name: str) -> Image.Image:
    return decode(images.bundled_photos()[name].read_bytes())


def encoded(image: Image.Image, **options: int) -> Image.Image:
    sink = io.BytesIO()
    image.save(sink, "JPEG", **options)
    return decode(sink.getvalue())


def differing_bits(one: ImageStats, other: ImageStats) -> int:
    return ((one.phash ^ other.phash) & (2**64 - 1)).bit_count()


def test_sha256_is_that_of_the_encoded_bytes() -> None:
    assert stats_of(photo(PHOTOS[0]), b"bytes").sha256 == hashlib.sha256(b"bytes").hexdigest()


def test_luminance_of_a_plain_picture_is_its_gray() -> None:
    assert stats_of(Image.new("RGB", (31, 17), (70, 70, 70))).luminance == 70
    assert stats_of(Image.new("RGB", (8, 8), "white")).luminance == 255


def test_sharpness_is_the_variance_of_the_laplacian_and_falls_with_every_blur() -> None:
    rng = np.random.default_rng(7)
    pixels = rng.integers(0, 256, (20, 20, 3), np.uint8)
    gray = np.asarray(Image.fromarray(pixels).convert("L"), float)
    plain = [
        gray[y - 1, x] + gray[y + 1, x] + gray[y, x - 1] + gray[y, x + 1] - 4 * gray[y, x]
        for y in range(1, 19)
        for x in range(1, 19)
    ]
    found = image_stats(b"", Image.fromarray(pixels), pixels).sharpness
    assert found == pytest.approx(np.var(plain), rel=1e-5)
    assert stats_of(Image.new("RGB", (64, 64), "red")).sharpness == 0
    blurred = [stats_of(photo(PHOTOS[0]).filter(ImageFilter.GaussianBlur(radius))).sharpness for radius in (0, 1, 2, 4)]
    assert blurred == sorted(blurred, reverse=True)


def test_perceptual_hash_is_that_of_the_textbook_where_nothing_is_resized() -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (32, 32), np.uint8)
    low = dct(dct(pixels.astype(float), axis=0), axis=1)[:8, :8]
    bits = "".join("01"[int(value > np.median(low))] for value in low.ravel())
    found = stats_of(Image.fromarray(pixels).convert("RGB")).phash
    assert found % 2**64 == int(bits, 2)
    assert -(2**63) <= found < 2**63


@pytest.mark.parametrize("name", PHOTOS)
def test_perceptual_hash_hardly_changes_with_scale_and_compression(name: str) -> None:
    image = photo(name)
    half = image.resize((max(8, image.width // 2), max(8, image.height // 2)), Image.Resampling.BICUBIC)
    assert differing_bits(stats_of(image), stats_of(half)) <= 6
    assert differing_bits(stats_of(image), stats_of(encoded(image, quality=40))) <= 6


def test_perceptual_hashes_of_different_photos_are_far_apart() -> None:
    found = [stats_of(photo(name)) for name in PHOTOS]
    least = min(differing_bits(one, other) for i, one in enumerate(found) for other in found[:i])
    assert least > 12


@pytest.mark.parametrize("size_px", [(1, 1), (1, 3000), (3000, 1), (2, 2)])
def test_extreme_shapes_have_statistics_too(size_px: tuple[int, int]) -> None:
    found = stats_of(Image.new("RGB", size_px, "gray"))
    assert np.isfinite([found.sharpness, found.luminance]).all()
