"""Upright RGB picture -> the model's uint8 input, and the preprocessor file that says how.

In: a Pillow image from `decode`, and a `PreprocessSpec`. Out: a numpy array at model size; rescaling and normalization
happen on the device. A module of its own, because CPU workers run it and must not import transformers, nor torch but in
mode `fast`, and because every bit of it is part of the result: mode `checkpoint` gives exactly the pixels of the
Hugging Face processor (PIL backend), mode `paper` those of the evaluation that the DeiT paper reports, and mode `fast`
nearly those of `checkpoint` for less work.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, NoReturn

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from pipeline.checkpoint import PreprocessMode, PreprocessSpec
from pipeline.errors import ConfigError

_PROCESSORS = ("DeiT", "ViT")
# "FeatureExtractor" is what the files of 2021 say; "Fast" names a torchvision backend of the same processor.
_PROCESSOR_SUFFIXES = ("FeatureExtractor", "ImageProcessor", "ImageProcessorFast", "ImageProcessorPil")

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_MAX_RESIZED_PX = 2**24
"""Above this a shortest-edge resize computes only what the crop keeps: 1x30000 would become 256x7680000."""
# Fields of which one value is supported; absent means that value.
_ONLY = {
    "do_rescale": True,
    "do_pad": False,
    "default_to_square": True,
    "data_format": "channels_first",
}

_BICUBIC = int(Image.Resampling.BICUBIC)
_MAX_FILTER_SUPPORT_PX = 5  # more than the widest of Pillow's filters reaches (4.5 px)


_REDUCING_GAP = 2.0
"""Mode `fast`: what is decoded stays so many times larger than what it is resized to. Pillow's documentation of
`reducing_gap` calls 2 good and 3 nearly indistinguishable."""
_TORCH_FILTERS: dict[int, str] = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}
"""Those of which torch has a kernel for uint8."""


def least_edge_px(spec: PreprocessSpec) -> int | None:
    """How short the edges of a picture may be decoded to (`decode.decode_at_least`); None: it is decoded in full."""
    if spec.mode != "fast" or spec.resize == "none":
        return None
    return math.ceil(_REDUCING_GAP * max(spec.resize_hw_px))


def preprocess(
    image: Image.Image, spec: PreprocessSpec, full_size: tuple[int, int] | None = None
) -> npt.NDArray[np.uint8]:
    """The model input of an upright RGB image. `full_size` is the (width, height) of one that was decoded to less.

    Returns uint8 (input_px, input_px, 3), C-contiguous, writable, channels R, G, B, range 0 .. 255. An image that is
    smaller than the crop stands in the middle of black, as in Hugging Face's `center_crop`.

    Raises ValueError if the image is not of mode RGB.
    """
    if image.mode != "RGB":
        raise ValueError(f"expected an image of mode RGB from decode, found {image.mode} of size {image.size}")
    width_px, height_px = _resized_size(full_size or image.size, spec)
    if _is_for_torch((width_px, height_px), spec):
        return _resize_by_torch(image, (width_px, height_px), spec)
    if _is_crop_exact(image.size, spec):
        return _resize_into_crop(image, (width_px, height_px), spec)
    if spec.crop_px is None:
        return np.array(image.resize((width_px, height_px), spec.resample))
    left, top = (_crop_offset(edge_px, spec.crop_px, spec.mode) for edge_px in (width_px, height_px))
    if spec.resize == "none":
        resized = image
    elif spec.resize == "shortest_edge" and width_px * height_px > _MAX_RESIZED_PX:
        resized, left, top = _resize_around_crop(image, (width_px, height_px), (left, top), spec.crop_px, spec.resample)
    else:
        resized = image.resize((width_px, height_px), spec.resample)
    return np.array(resized.crop((left, top, left + spec.crop_px, top + spec.crop_px)))


def warm_up(spec: PreprocessSpec) -> None:
    """Load what `preprocess` needs now, in mode `fast` torch, so that it is neither time nor memory of an image."""
    preprocess(Image.new("RGB", (1, 1)), replace(spec, resize="squash", resize_hw_px=(1, 1), crop_px=None))


def spec_from_config(config: Mapping[str, object], *, mode: PreprocessMode, input_px: int) -> PreprocessSpec:
    """How the checkpoint with this `preprocessor_config.json` wants its images.

    Reads the text of 2021 (`"size": 256`, `"feature_extractor_type"`) and what `save_pretrained` writes today
    (`"size": {"height": 256, "width": 256}`, `"image_processor_type"`). A bare size is a square in both processors of
    the family. Absent switches mean what the processor's class says (resize, rescale and normalize yes; centre crop
    only in DeiT's); absent numbers are an error, because the class defaults (mean 0.5) are wrong for every published
    DeiT.

    Mode `checkpoint` obeys the file. Mode `paper` takes only the rescale factor from it, and does the rest as the
    evaluation of facebookresearch/deit does: shortest edge to int(256/224 * input_px) bicubic (224 -> 256, 384 -> 438),
    ImageNet's mean and std. (The published files of the non-distilled models say 0.5 there.)

    Mode `fast` is mode `checkpoint` for pixels that need not be bit-identical.

    `input_px` is the edge of the model's input. Raises `ConfigError` if the file asks for something else or for
    something that is not done here.
    """
    config = {field: value for field, value in config.items() if value is not None}
    processor = _processor(config)
    for switch in ("do_resize", "do_center_crop", "do_normalize"):
        if not isinstance(config.get(switch, True), bool):
            _refuse(f'"{switch}": true or false', config[switch])
    for field, only in _ONLY.items():
        if config.get(field, only) != only:
            _refuse(f'"{field}": {json.dumps(only)}, which is all that is done here', config[field])

    rescale_factor = _positive(config.get("rescale_factor", 1 / 255), "rescale_factor")
    if config.get("do_normalize", True):
        mean, std = _per_channel(config, "image_mean"), _per_channel(config, "image_std")
        if min(std) <= 0:
            _refuse('"image_std" above 0', list(std))
    else:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

    resize: Literal["squash", "shortest_edge", "none"]
    crop_px: int | None
    if mode == "paper":
        mean, std = IMAGENET_MEAN, IMAGENET_STD
        edge_px = 256 * input_px // 224
        resize, resize_hw_px, resample, crop_px = "shortest_edge", (edge_px, edge_px), _BICUBIC, input_px
    else:
        resize, resize_hw_px, resample = _resize_rule(config, input_px)
        crop_px = _crop_rule(config) if config.get("do_center_crop", processor == "DeiT") else None
        output = crop_px if crop_px is not None else resize_hw_px if resize == "squash" else "images of any shape"
        if output not in (input_px, (input_px, input_px)):
            _refuse(f"images of {input_px}x{input_px} px, which is the model's input", output)
    return PreprocessSpec(
        mode=mode,
        resize=resize,
        resize_hw_px=resize_hw_px,
        resample=resample,
        crop_px=crop_px,
        input_px=input_px,
        rescale_factor=rescale_factor,
        image_mean=mean,
        image_std=std,
    )


def _resized_size(size: tuple[int, int], spec: PreprocessSpec) -> tuple[int, int]:
    """(width, height) after the resize; the long edge is cut off as torchvision's Resize and Hugging Face do."""
    if spec.resize == "none":
        return size
    if spec.resize == "squash":
        return spec.resize_hw_px[1], spec.resize_hw_px[0]
    edge_px, (width_px, height_px) = spec.resize_hw_px[0], size
    if width_px <= height_px:
        return edge_px, int(edge_px * height_px / width_px)
    return int(edge_px * width_px / height_px), edge_px


def _crop_offset(edge_px: int, crop_px: int, mode: PreprocessMode) -> int:
    """First row or column of a centre crop: rounded down by Hugging Face, half to even by torchvision."""
    return round((edge_px - crop_px) / 2) if mode == "paper" else (edge_px - crop_px) // 2


def _is_crop_exact(size: tuple[int, int], spec: PreprocessSpec) -> bool:
    """Whether `_resize_into_crop` gives every bit of a resize to all of the size and a crop after it.

    It does where the box's edges are float32 numbers without rounding, as Pillow takes them (a resize to a power of
    two), and where Pillow makes its horizontal pass first and then its vertical one in both: to a square, of an image
    that is not upright. Of taller ones it decides by the cost of the passes, which a box changes; and it leaves out the
    pass of an edge that has its length already. Saves a fifth of a resize to 256 and crop of 224 px.
    """
    height_px, width_px = spec.resize_hw_px
    return (
        spec.resize == "squash"
        and spec.crop_px is not None
        and spec.crop_px <= width_px == height_px
        and width_px.bit_count() == 1
        and size[0] * width_px < 2**24
        and size[0] >= size[1]
        and width_px not in size
    )


def _resize_into_crop(image: Image.Image, resized_size: tuple[int, int], spec: PreprocessSpec) -> npt.NDArray[np.uint8]:
    """Only the pixels that the crop keeps: resized by the same filter, from the same places, in one step."""
    crop_px = spec.crop_px
    assert crop_px is not None
    box: list[float] = []
    for edge_px, resized_px in zip(image.size, resized_size, strict=True):
        offset_px = _crop_offset(resized_px, crop_px, spec.mode)
        box += [offset_px * edge_px / resized_px, (offset_px + crop_px) * edge_px / resized_px]
    left, right, top, bottom = box
    return np.array(image.resize((crop_px, crop_px), spec.resample, box=(left, top, right, bottom)))


def _is_for_torch(resized_size: tuple[int, int], spec: PreprocessSpec) -> bool:
    """Whether `_resize_by_torch` can do it."""
    width_px, height_px = resized_size
    return (
        spec.mode == "fast"
        and spec.resize != "none"
        and spec.resample in _TORCH_FILTERS
        and (spec.crop_px or 0) <= min(resized_size)
        and width_px * height_px <= _MAX_RESIZED_PX
    )


def _resize_by_torch(image: Image.Image, resized_size: tuple[int, int], spec: PreprocessSpec) -> npt.NDArray[np.uint8]:
    """Nearly the pixels of Pillow's resize and crop, by the same filter, in a third of the time: torch's kernel for
    uint8 is vectorized on x86 and has weights of 16 bits instead of 32 (tests/benchmarks/preprocess_modes.md).
    """
    # Only here: it takes 1.2 s and 130 MB of heap, of which a process that resizes exactly is spared.
    import torch
    from torch.utils.dlpack import from_dlpack

    width_px, height_px = resized_size
    try:
        # As it lies in memory, which is a row of pixels of four bytes.
        stored = from_dlpack(pa.array(image).flatten()).view(image.height, image.width, 4)
    except ValueError:  # above 16 MiB it is in several pieces
        stored = torch.from_numpy(np.array(image))
    try:
        resized = torch.nn.functional.interpolate(
            stored.permute(2, 0, 1).unsqueeze(0),
            (height_px, width_px),
            mode=_TORCH_FILTERS[spec.resample],
            antialias=True,
        )
        kept = resized[0, :3]
        if spec.crop_px is not None:
            left, top = (_crop_offset(edge_px, spec.crop_px, spec.mode) for edge_px in resized_size)
            kept = kept[:, top : top + spec.crop_px, left : left + spec.crop_px]
        pixels: npt.NDArray[np.uint8] = kept.permute(1, 2, 0).contiguous().numpy()
    except RuntimeError as error:
        if "allocate memory" in str(error):  # torch has no MemoryError
            raise MemoryError(str(error)) from error
        raise
    return pixels


def _resize_around_crop(
    image: Image.Image,
    resized_size: tuple[int, int],
    crop_offset: tuple[int, int],
    crop_px: int,
    resample: int,
) -> tuple[Image.Image, int, int]:
    """The part of the resized image that the crop and the resampling filter can see, and the crop's left and top in it.

    The pixels of resizing everything, within 2; but where Pillow 13 runs its two passes in the other order, which it
    decides by their cost, overshoots beyond 0 or 255 are cut elsewhere: on noise 18 at most, 0.4 on average.
    """
    box: list[float] = [0.0, 0.0, *image.size]
    size, offset = list(resized_size), list(crop_offset)
    axis = 0 if resized_size[0] > resized_size[1] else 1
    scale = image.size[axis] / resized_size[axis]
    margin_px = math.ceil(_MAX_FILTER_SUPPORT_PX * max(1.0, 1 / scale)) + 1
    first = max(0, crop_offset[axis] - margin_px)
    last = min(resized_size[axis], crop_offset[axis] + crop_px + margin_px)
    box[axis], box[axis + 2] = first * scale, last * scale
    size[axis], offset[axis] = last - first, crop_offset[axis] - first
    part = image.resize((size[0], size[1]), resample, box=(box[0], box[1], box[2], box[3]))
    return part, offset[0], offset[1]


def _processor(config: Mapping[str, object]) -> str:
    name = config.get("image_processor_type") or config.get("feature_extractor_type")
    for family in _PROCESSORS:
        if name in [family + suffix for suffix in _PROCESSOR_SUFFIXES]:
            return family
    _refuse('"image_processor_type": "DeiTImageProcessor" or "ViTImageProcessor"', name)


def _resize_rule(
    config: Mapping[str, object], input_px: int
) -> tuple[Literal["squash", "shortest_edge", "none"], tuple[int, int], int]:
    if not config.get("do_resize", True):
        return "none", (input_px, input_px), _BICUBIC
    resample = config.get("resample")
    if isinstance(resample, bool) or resample not in list(Image.Resampling):
        _refuse(f'"resample": one of Pillow\'s filters 0 .. {max(Image.Resampling)}', resample)
    size = config.get("size")
    if isinstance(size, Mapping) and set(size) == {"shortest_edge"}:
        edge_px = _pixels(size["shortest_edge"], "size")
        return "shortest_edge", (edge_px, edge_px), int(str(resample))
    return "squash", _height_width(size, "size"), int(str(resample))


def _crop_rule(config: Mapping[str, object]) -> int:
    height_px, width_px = _height_width(config.get("crop_size"), "crop_size")
    if height_px != width_px:
        _refuse('a square "crop_size"', config["crop_size"])
    return height_px


def _height_width(size: object, field: str) -> tuple[int, int]:
    if isinstance(size, Mapping) and set(size) == {"height", "width"}:
        return _pixels(size["height"], field), _pixels(size["width"], field)
    if isinstance(size, list | tuple) and len(size) == 2:
        return _pixels(size[0], field), _pixels(size[1], field)
    return _pixels(size, field), _pixels(size, field)


def _pixels(value: object, field: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        _refuse(f'"{field}": 256 or {{"height": 256, "width": 256}}', value)
    return value


def _positive(value: object, field: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        _refuse(f'"{field}": a number above 0', value)
    return float(value)


def _per_channel(config: Mapping[str, object], field: str) -> tuple[float, float, float]:
    values = config.get(field)
    if (
        not isinstance(values, list | tuple)
        or len(values) != 3
        or not all(isinstance(value, int | float) and math.isfinite(value) for value in values)
    ):
        _refuse(f'"{field}": three numbers, one per channel', values)
    red, green, blue = map(float, values)
    return red, green, blue


def _refuse(expected: str, found: object) -> NoReturn:
    raise ConfigError(
        f"preprocessor_config.json: expected {expected}, found {'nothing' if found is None else repr(found)}; "
        "correct the file beside the checkpoint or choose another --model"
    )
