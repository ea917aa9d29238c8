"""The model's input is, bit for bit, what the Hugging Face processor or the paper's evaluation gives, or nearly so."""

import json
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import images
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from PIL import Image
from transformers import AutoImageProcessor

from pipeline.checkpoint import PreprocessMode, PreprocessSpec
from pipeline.decode import DEFAULT_LIMITS, decode, decode_at_least
from pipeline.errors import ConfigError
from pipeline.picture import Recipe, make_picture
from pipeline.preprocess import _is_crop_exact, least_edge_px, preprocess, spec_from_config

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
# The text of facebook/deit-*'s files, and of fine-tunes made with ViT's feature extractor, as of 2021.
DEIT_2021: dict[str, Any] = {
    "crop_size": 224,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "DeiTFeatureExtractor",
    **IMAGENET,
    "resample": 3,
    "size": 256,
}
DEIT_384_2021 = DEIT_2021 | {"crop_size": 384, "size": 438}
VIT_2021: dict[str, Any] = {
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "ViTFeatureExtractor",
    **IMAGENET,
    "resample": 2,
    "size": 224,
}
DEIT_TODAY: dict[str, Any] = {
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    **IMAGENET,
    "image_processor_type": "DeiTImageProcessor",
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 256, "width": 256},
}
CONFIGS: dict[str, tuple[dict[str, Any], int]] = {
    "deit 2021": (DEIT_2021, 224),
    "deit 384 2021": (DEIT_384_2021, 384),
    "vit 2021": (VIT_2021, 224),
    "deit today": (DEIT_TODAY, 224),
    "deit today, nulls of the fast processor": (
        DEIT_TODAY
        | {"image_processor_type": "DeiTImageProcessorFast", "do_pad": None, "data_format": "channels_first"},
        224,
    ),
    "shortest edge": (DEIT_TODAY | {"size": {"shortest_edge": 235}, "resample": 1}, 224),
    "odd crop": (DEIT_TODAY | {"size": {"height": 256, "width": 301}, "crop_size": 231}, 231),
    "crop larger than the resize": (DEIT_TODAY | {"size": {"height": 101, "width": 300}}, 224),
    "crop without resize": (DEIT_TODAY | {"do_resize": False}, 224),
    "no normalization": (DEIT_TODAY | {"do_normalize": False}, 224),
}


def processor(config: dict[str, Any], folder: Path) -> Any:
    """Hugging Face's own, made from the same text as our spec."""
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    auto: Any = AutoImageProcessor
    return auto.from_pretrained(folder, backend="pil")


def reference_pixels(huggingface: Any, image: Image.Image) -> npt.NDArray[np.uint8]:
    """uint8 (h, w, 3) of the processor with the arithmetic after resize and crop switched off."""
    pixels = huggingface(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
    return np.moveaxis(pixels, 0, -1)


def upright_photos() -> list[tuple[str, Image.Image]]:
    """Photos in every orientation and mode, through the real decoder."""
    decoded = []
    for index, (name, path) in enumerate(images.bundled_photos().items()):
        photo = decode(path.read_bytes())
        photo.thumbnail((520, 520))
        decoded.append((name, photo))
        for orientation in range(1, 9):
            stored_as = images.ORIENTED_FORMATS[(index + orientation) % len(images.ORIENTED_FORMATS)]
            options = {"speed": 10} if stored_as == "AVIF" else {}
            data = images.encode_oriented(photo, orientation, stored_as, **options)
            decoded.append((f"{name} {stored_as} orientation {orientation}", decode(data)))
    decoded += [(name, decode(data)) for name, data in images.samples().items()]
    shapes = ((1, 1), (1, 300), (300, 1), (2, 3), (224, 224), (256, 256), (225, 223), (256, 438), (640, 257))
    decoded += [(f"texture {width}x{height}", images.texture(width, height)) for width, height in shapes]
    return decoded


@pytest.fixture(scope="module")
def photos() -> list[tuple[str, Image.Image]]:
    return upright_photos()


@pytest.mark.parametrize("name", CONFIGS)
def test_checkpoint_mode_gives_the_bits_of_the_hugging_face_processor(
    name: str, photos: list[tuple[str, Image.Image]], tmp_path: Path
) -> None:
    config, input_px = CONFIGS[name]
    huggingface = processor(config, tmp_path)
    assert type(huggingface).__name__.endswith("Pil")
    spec = spec_from_config(config, mode="checkpoint", input_px=input_px)
    for photo_name, photo in photos:
        pixels = preprocess(photo, spec)
        assert pixels.dtype == np.uint8
        assert pixels.shape == (input_px, input_px, 3)
        assert pixels.flags.c_contiguous
        assert np.array_equal(pixels, reference_pixels(huggingface, photo)), photo_name


@pytest.mark.parametrize("path", images.operator_photos(), ids=lambda path: path.name)
def test_checkpoint_mode_gives_the_bits_of_the_hugging_face_processor_on_the_operators_photos(
    path: Path, tmp_path: Path
) -> None:
    photo = decode(path.read_bytes())
    spec = spec_from_config(DEIT_2021, mode="checkpoint", input_px=224)
    assert np.array_equal(preprocess(photo, spec), reference_pixels(processor(DEIT_2021, tmp_path), photo))
    paper = spec_from_config(DEIT_384_2021, mode="paper", input_px=384)
    assert np.array_equal(preprocess(photo, paper), torchvision_formula(photo, 438, 384))


@pytest.mark.parametrize("name", ["deit 2021", "deit 384 2021", "no normalization"])
def test_rescale_and_normalize_of_the_spec_give_the_values_of_the_hugging_face_processor(
    name: str, photos: list[tuple[str, Image.Image]], tmp_path: Path
) -> None:
    config, input_px = CONFIGS[name]
    huggingface = processor(config, tmp_path)
    spec = spec_from_config(config, mode="checkpoint", input_px=input_px)
    for photo_name, photo in photos[:20]:
        rescaled = (preprocess(photo, spec).astype(np.float64) * spec.rescale_factor).astype(np.float32)
        values = (rescaled - np.array(spec.image_mean, np.float32)) / np.array(spec.image_std, np.float32)
        expected = huggingface(photo, return_tensors="np")["pixel_values"][0]
        difference = np.abs(np.moveaxis(values, -1, 0) - expected).max()
        assert difference == 0, photo_name


def torchvision_formula(image: Image.Image, edge_px: int, crop_px: int) -> npt.NDArray[np.uint8]:
    """Resize(edge_px, BICUBIC) and CenterCrop(crop_px) of torchvision on a Pillow image, written out."""
    width, height = image.size
    short, long = sorted(image.size)
    new_long = int(edge_px * long / short)
    new_width, new_height = (edge_px, new_long) if width <= height else (new_long, edge_px)
    resized = np.asarray(image.resize((new_width, new_height), Image.Resampling.BICUBIC))
    top, left = round((new_height - crop_px) / 2.0), round((new_width - crop_px) / 2.0)
    return resized[top : top + crop_px, left : left + crop_px]


@pytest.mark.parametrize(("config", "input_px", "edge_px"), [(DEIT_2021, 224, 256), (DEIT_384_2021, 384, 438)])
def test_paper_mode_gives_the_bits_of_the_evaluation_transform(
    config: dict[str, Any], input_px: int, edge_px: int, photos: list[tuple[str, Image.Image]]
) -> None:
    spec = spec_from_config(config, mode="paper", input_px=input_px)
    assert spec.resize_hw_px == (edge_px, edge_px)
    for photo_name, photo in photos:
        if photo.size in ((1, 300), (300, 1)):
            continue  # has its own test
        expected = torchvision_formula(photo, edge_px, input_px)
        assert np.array_equal(preprocess(photo, spec), expected), photo_name


def test_paper_mode_rounds_the_crop_as_torchvision_and_checkpoint_mode_as_hugging_face() -> None:
    photo = images.texture(343, 256)
    paper = spec_from_config(DEIT_2021, mode="paper", input_px=224)
    checkpoint = spec_from_config(DEIT_TODAY | {"size": {"shortest_edge": 256}}, mode="checkpoint", input_px=224)
    pixels = np.asarray(photo)
    assert np.array_equal(preprocess(photo, paper), pixels[16:240, 60:284])  # (343 - 224) / 2 = 59.5
    assert np.array_equal(preprocess(photo, checkpoint), pixels[16:240, 59:283])


def test_paper_mode_keeps_the_aspect_ratio_and_checkpoint_mode_does_not() -> None:
    wide = Image.new("RGB", (800, 200), images.BLUE)
    wide.paste(images.RED, (0, 0, 250, 200))
    paper = preprocess(wide, spec_from_config(DEIT_2021, mode="paper", input_px=224))
    squashed = preprocess(wide, spec_from_config(DEIT_2021, mode="checkpoint", input_px=224))
    assert (paper == images.BLUE).all()
    assert tuple(squashed[100, 10]) == images.RED
    assert tuple(squashed[100, 200]) == images.BLUE


@pytest.mark.parametrize(
    "name",
    ["deit 2021", "deit 384 2021", "vit 2021", "shortest edge", "crop larger than the resize", "crop without resize"],
)
def test_fast_mode_gives_nearly_the_pixels_of_checkpoint_mode(name: str) -> None:
    config, input_px = CONFIGS[name]
    exact, fast = (
        Recipe(spec=spec_from_config(config, mode=mode, input_px=input_px), limits=DEFAULT_LIMITS)
        for mode in ("checkpoint", "fast")
    )
    num_scaled = 0
    for index, path in enumerate(list(images.bundled_photos().values())[:4]):
        photo = decode(path.read_bytes())
        photo = photo.resize((photo.width * 4, photo.height * 4))
        stored_as = ("JPEG", "JPEG", "PNG")[index % 3]
        data = images.encode_oriented(photo, 1 + index % 8, stored_as)
        expected, facts = make_picture(data, exact)
        pixels, fast_facts = make_picture(data, fast)
        assert fast_facts.size_px == facts.size_px == photo.size
        assert pixels.shape == expected.shape
        assert np.abs(pixels.astype(int) - expected).mean() < 1.5
        num_scaled += decode_at_least(data, least_edge_px(fast.spec))[0].size != photo.size
    assert num_scaled > 0 or fast.spec.resize == "none"


@pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
@pytest.mark.parametrize("name", ["deit 2021", "vit 2021", "shortest edge"])
def test_fast_mode_resizes_as_pillow_does_but_for_rounding(
    name: str, resample: Image.Resampling, photos: list[tuple[str, Image.Image]]
) -> None:
    config, input_px = CONFIGS[name]
    exact, fast = (
        spec_from_config(config | {"resample": int(resample)}, mode=mode, input_px=input_px)
        for mode in ("checkpoint", "fast")
    )
    num_different = 0
    for photo_name, photo in photos:
        difference = np.abs(preprocess(photo, fast).astype(int) - preprocess(photo, exact))
        assert difference.max() <= 2, photo_name
        assert difference.mean() < 0.3, photo_name
        num_different += bool(difference.any())
    assert num_different > len(photos) / 4  # or it would be Pillow's, at Pillow's price


def test_fast_mode_resizes_an_image_that_lies_in_memory_in_several_pieces() -> None:
    exact, fast = (spec_from_config(DEIT_2021, mode=mode, input_px=224) for mode in ("checkpoint", "fast"))
    photo = images.texture(320, 240).resize((2200, 2000))
    with pytest.raises(ValueError, match="not contiguous"):
        pa.array(photo)
    pixels = preprocess(photo, fast)
    assert np.abs(pixels.astype(int) - preprocess(photo, exact)).max() <= 2
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable


@pytest.mark.parametrize("size", [(1, 30_000), (30_000, 1)])
@pytest.mark.parametrize("mode", ["checkpoint", "paper", "fast"])
def test_an_extremely_narrow_image_costs_little(size: tuple[int, int], mode: PreprocessMode) -> None:
    spec = spec_from_config(DEIT_384_2021, mode=mode, input_px=384)
    started = time.process_time()
    pixels = preprocess(images.texture(*size), spec)
    assert time.process_time() - started < 2
    assert pixels.shape == (384, 384, 3)
    assert pixels.std() > 1


@pytest.mark.parametrize("size", [(5, 1500), (1500, 5), (40, 12_000), (300, 80_000)])
def test_a_narrow_image_is_resized_around_the_crop_as_if_it_were_resized_whole(size: tuple[int, int]) -> None:
    assert 256 * int(256 * max(size) / min(size)) > 2**24  # or this would compare a thing with itself
    # Not the full range: where the filter overshoots 0 or 255, the order of Pillow's two passes shows.
    noise = np.random.default_rng(3).integers(64, 192, (size[1], size[0], 3), dtype=np.uint8)
    photo = Image.fromarray(noise)
    spec = spec_from_config(DEIT_2021, mode="paper", input_px=224)
    expected = torchvision_formula(photo, 256, 224).astype(int)
    assert np.abs(preprocess(photo, spec) - expected).max() <= 2


@pytest.mark.parametrize("resample", Image.Resampling)
def test_resizing_only_what_the_crop_keeps_changes_no_bit(resample: Image.Resampling) -> None:
    spec = spec_from_config(DEIT_2021 | {"resample": int(resample)}, mode="checkpoint", input_px=224)
    random = np.random.default_rng(int(resample))
    edges_px = random.integers(1, 600, (60, 2)).tolist() + [
        [1, 1],
        [404, 256],
        [256, 200],
        [9000, 30],
        [65535, 2],
        [800, 799],
    ]
    num_exact = 0
    for edge_px, other_px in edges_px:
        for size in ((edge_px, other_px), (other_px, edge_px)):
            # Of extreme values only, whose overshoots are cut: then the order of the passes matters most.
            black_or_white = random.integers(0, 2, (size[1], size[0], 3), np.uint8) * 255
            image = Image.fromarray(black_or_white)
            whole = np.array(image.resize((256, 256), resample).crop((16, 16, 240, 240)))
            np.testing.assert_array_equal(preprocess(image, spec), whole, err_msg=str(size))
            num_exact += _is_crop_exact(size, spec)
    assert num_exact >= len(edges_px) - 2


def test_an_image_that_is_not_rgb_is_refused() -> None:
    spec = spec_from_config(DEIT_2021, mode="checkpoint", input_px=224)
    with pytest.raises(ValueError, match="expected an image of mode RGB from decode, found L"):
        preprocess(Image.new("L", (8, 8)), spec)


def test_the_text_of_2021_and_of_today_mean_the_same_spec() -> None:
    old = spec_from_config(DEIT_2021, mode="checkpoint", input_px=224)
    assert old == spec_from_config(DEIT_TODAY, mode="checkpoint", input_px=224)
    assert old == PreprocessSpec(
        mode="checkpoint",
        resize="squash",
        resize_hw_px=(256, 256),
        resample=3,
        crop_px=224,
        input_px=224,
        rescale_factor=1 / 255,
        image_mean=(0.485, 0.456, 0.406),
        image_std=(0.229, 0.224, 0.225),
    )


@pytest.mark.parametrize("kind", ["DeiT", "ViT"])
def test_what_save_pretrained_writes_today_is_read(kind: str, tmp_path: Path) -> None:
    config = DEIT_2021 if kind == "DeiT" else VIT_2021
    processor(config, tmp_path).save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "preprocessor_config.json").read_text())
    assert "image_processor_type" in saved
    read, original = (spec_from_config(text, mode="checkpoint", input_px=224) for text in (saved, config))
    assert read == original


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feature_extractor_type": None}, '"image_processor_type": "DeiTImageProcessor" or .* found nothing'),
        ({"feature_extractor_type": "CLIPFeatureExtractor"}, "found 'CLIPFeatureExtractor'"),
        ({"size": None}, '"size": 256 or .*, found nothing'),
        ({"size": {"shortest_edge": 256, "longest_edge": 300}}, '"size": 256 or .*longest_edge'),
        ({"size": 256.5}, '"size": 256 or .*256.5'),
        ({"crop_size": None}, '"crop_size": 256 or .*, found nothing'),
        ({"crop_size": {"height": 224, "width": 200}}, 'a square "crop_size"'),
        ({"crop_size": 192}, "images of 224x224 px, which is the model's input, found 192"),
        ({"do_center_crop": False}, r"224x224 px.*found \(256, 256\)"),
        ({"resample": None}, '"resample": one of Pillow\'s filters 0 .. [0-9], found nothing'),
        ({"resample": 9}, "found 9"),
        ({"image_mean": None}, '"image_mean": three numbers, one per channel, found nothing'),
        ({"image_std": [0.5]}, r'"image_std": three numbers, one per channel, found \[0.5\]'),
        ({"image_std": [0.5, 0.5, 0]}, '"image_std" above 0'),
        ({"rescale_factor": 0}, '"rescale_factor": a number above 0'),
        ({"do_rescale": False}, '"do_rescale": true'),
        ({"do_resize": "yes"}, '"do_resize": true or false'),
        ({"do_pad": True}, '"do_pad": false'),
        ({"data_format": "channels_last"}, '"data_format": "channels_first"'),
        ({"default_to_square": False}, '"default_to_square": true'),
    ],
    ids=str,
)
def test_a_file_that_cannot_be_obeyed_is_refused_in_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        spec_from_config(DEIT_2021 | change, mode="checkpoint", input_px=224)
    assert "\n" not in str(caught.value)
    assert "preprocessor_config.json: expected" in str(caught.value)


def test_the_golden_pixels_of_a_drawn_picture() -> None:
    """Numbers that no change of code or library may move unnoticed."""
    data = BytesIO()
    images.texture(300, 200, seed=7).save(data, "PNG")
    picture = decode(data.getvalue())
    pixels = preprocess(picture, spec_from_config(DEIT_2021, mode="checkpoint", input_px=224))
    paper = preprocess(picture, spec_from_config(DEIT_2021, mode="paper", input_px=224))
    places = ((0, 0), (111, 17), (223, 223))
    assert [pixels[place].tolist() for place in places] == [[19, 30, 33], [109, 94, 97], [215, 216, 216]]
    assert [paper[place].tolist() for place in places] == [[49, 43, 36], [115, 114, 119], [226, 208, 217]]
