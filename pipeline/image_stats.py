"""A decoded picture -> four numbers about it that cost little while its pixels are in hand.

In: encoded bytes, the upright RGB picture, the model's input. Out: schema.STATS. A module of its own because nothing in
labeling depends on it: `--image-stats` turns it on. For photos of 450 x 313 pixels it takes 0.5 to 0.9 ms, where
decoding and resizing take 3.
"""

import hashlib
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageStat

_HASH_PX = 32
_HASH_FREQUENCIES = 8


class ImageStats(NamedTuple):
    """Values of schema.STATS, in its order."""

    sha256: str
    """Of the encoded bytes, hex: equal for exact copies."""
    phash: int
    """Perceptual hash, 64 bits as a signed integer: few bits differ between copies that were scaled or compressed."""
    sharpness: float
    """Variance of the Laplacian of the model input's luminance, 0 to 255 per pixel: low where it is blurred."""
    luminance: float
    """Mean luminance of the whole picture, 0 (black) to 255."""


def image_stats(data: bytes, image: Image.Image, pixels: npt.NDArray[np.uint8]) -> ImageStats:
    """The numbers of one picture: `data` as stored, `image` as decoded, `pixels` uint8 (H, W, 3), the model input.

    Luminance is Pillow's, ITU-R 601-2.
    """
    gray = image.convert("L")
    return ImageStats(
        sha256=hashlib.sha256(data).hexdigest(),
        phash=_perceptual_hash(gray),
        sharpness=_laplacian_variance(np.asarray(Image.fromarray(pixels).convert("L"), np.int16)),
        luminance=float(ImageStat.Stat(gray).mean[0]),
    )


def _perceptual_hash(gray: Image.Image) -> int:
    """For each of the 8 x 8 lowest frequencies of a 32 x 32 picture: whether it is above their median. The first row's
    first is the highest bit.

    The hash of http://www.hackerfactor.com/blog/index.php?/archives/432-Looks-Like-It.html as `imagehash.phash` has it,
    but for the gap: with it Pillow first averages whole pixels, which takes 0.15 ms instead of 0.63.
    """
    small = np.asarray(gray.resize((_HASH_PX, _HASH_PX), Image.Resampling.LANCZOS, reducing_gap=3.0), np.float64)
    low = _COSINES @ small @ _COSINES.T
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big", signed=True)


def _laplacian_variance(gray_HW: npt.NDArray[np.int16]) -> float:
    """Of four neighbours, without the border (Pech-Pacheco et al., "Diatom autofocusing in brightfield microscopy").

    In int16, where a sum of four fits, it takes a third of the time that it takes in float32.
    """
    laplacian_HW = gray_HW[:-2, 1:-1] + gray_HW[2:, 1:-1]
    laplacian_HW += gray_HW[1:-1, :-2]
    laplacian_HW += gray_HW[1:-1, 2:]
    laplacian_HW -= 4 * gray_HW[1:-1, 1:-1]
    return float(np.var(laplacian_HW.ravel().astype(np.float32)))


def _dct_rows(num_rows: int, num_samples: int) -> npt.NDArray[np.float64]:
    """The first rows of the discrete cosine transform of type II, without scaling: (num_rows, num_samples)."""
    return np.cos(np.pi / num_samples * np.outer(np.arange(num_rows), np.arange(num_samples) + 0.5))


_COSINES = _dct_rows(_HASH_FREQUENCIES, _HASH_PX)
