"""A checkpoint's files -> what every stage needs to know of it, without torch.

A module apart from `model`, because CPU workers need the preprocessing spec and the driver the space id, and neither
may pay for importing torch.
"""

from dataclasses import dataclass
from typing import Literal

PreprocessMode = Literal["checkpoint", "paper"]
Pooling = Literal["pooled", "cls", "distillation", "patch-mean", "none"]


@dataclass(frozen=True, kw_only=True)
class PreprocessSpec:
    """How an upright RGB image becomes the model's input; every field changes a label, so all go into the space id."""

    mode: PreprocessMode
    resize: Literal["squash", "shortest_edge", "none"]
    """`squash`: to `resize_hw_px` without keeping the aspect ratio (what the published files say). `shortest_edge`:
    that edge to `resize_hw_px[0]`, the other in proportion (how the paper evaluated)."""
    resize_hw_px: tuple[int, int]
    resample: int
    """`PIL.Image.Resampling` value; 3 is bicubic."""
    crop_px: int | None
    """Centre crop to this square, or None."""
    input_px: int
    """The model's input is uint8 (input_px, input_px, 3)."""
    rescale_factor: float
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
