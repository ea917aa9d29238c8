"""Encoded bytes of one object -> model input, size and statistics, or the reason why there are none.

A module of its own because this is what happens to one image, wherever it happens: in the killable child of `contain`,
or in a test.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.checkpoint import PreprocessSpec
from pipeline.decode import DecodeLimits, decode_at_least
from pipeline.errors import FailureKind, ImageError
from pipeline.image_stats import ImageStats, image_stats
from pipeline.preprocess import least_edge_px, preprocess


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is done to every image of a run."""

    spec: PreprocessSpec
    limits: DecodeLimits
    has_stats: bool = False


class Facts(NamedTuple):
    """What is known of a picture beside its pixels."""

    size_px: tuple[int, int]
    """Width and height of the upright picture."""
    stats: ImageStats | None
    """None unless the recipe asks for them."""


def make_picture(data: bytes, recipe: Recipe) -> tuple[npt.NDArray[np.uint8], Facts]:
    """Pixels, uint8 (input_px, input_px, 3) in C order, and facts. Raises ImageError (stage `decode`), nothing else."""
    image, size_px = decode_at_least(data, least_edge_px(recipe.spec), recipe.limits)
    try:
        pixels = preprocess(image, recipe.spec, size_px)
        return pixels, Facts(size_px, image_stats(data, image, pixels) if recipe.has_stats else None)
    except MemoryError as error:
        message = f"memory ran out while resizing {image.width}x{image.height} pixels"
        raise ImageError(FailureKind.DECODE_OOM, message, stage="decode") from error
