"""What mode `fast` saves and changes: the same photos in modes `checkpoint` and `fast`, alternating.

python tests/benchmarks/preprocess_modes.py --photos FOLDER --enlarge 4

Differences are those of the model's input (uint8, 0 to 255) and of what the checkpoint `demo` makes of it. A photo of
500 x 375 pixels is decoded to a half of that for its 64 pixels, and in full for the 224 of the published models, which
is why photos can be enlarged (bicubic, JPEG quality 90): a camera's are.
"""

import argparse
import statistics
import time
from importlib.metadata import version
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from pipeline import checkpoint, model
from pipeline.checkpoint import PreprocessMode, PreprocessSpec
from pipeline.decode import DEFAULT_LIMITS
from pipeline.picture import Recipe, make_picture
from pipeline.preprocess import spec_from_config

PUBLISHED = {
    "feature_extractor_type": "DeiTFeatureExtractor",
    "size": 256,
    "crop_size": 224,
    "resample": 3,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
MODES: tuple[PreprocessMode, ...] = ("checkpoint", "fast")


def main() -> None:
    """Print ms per image, differences of pixels, and agreement of labels and embeddings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--enlarge", type=int, default=1, help="width and height times so much")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)  # as in a child that decodes
    photos = [path.read_bytes() for path in sorted(options.photos.rglob("*")) if path.is_file()]
    if options.enlarge > 1:
        photos = [enlarged(data, options.enlarge) for data in photos]
    megapixels = statistics.median(np.prod(Image.open(BytesIO(data)).size) / 1e6 for data in photos)
    print(f"{len(photos)} photos, median {megapixels:.2f} megapixels, Pillow {version('pillow')}")

    found = checkpoint.resolve("demo", None)
    specs = {
        "published, 224 px": {mode: spec_from_config(PUBLISHED, mode=mode, input_px=224) for mode in MODES},
        "demo, 64 px": {
            mode: spec_from_config(found.preprocessor_config, mode=mode, input_px=found.input_px) for mode in MODES
        },
    }
    for name, of_mode in specs.items():
        exact, fast = _timed(photos, of_mode, options.rounds, name)
        difference = np.abs(exact.astype(np.int16) - fast)
        of_images = difference.mean(axis=(1, 2, 3))
        print(
            f"{name}: pixels differ by {difference.mean():.3f} on average, {np.percentile(difference, 99):.0f} at the"
            f" 99th percentile, {difference.max()} at most; the worst photo by {of_images.max():.2f} on average"
        )
    classifier = model.load(found, specs["demo, 64 px"]["checkpoint"], pooling="pooled", device="cpu", precision="fp32")
    a, b = (model.predict(classifier, pixels, top_k=5) for pixels in (exact, fast))
    assert a.embedding_BD is not None
    assert b.embedding_BD is not None
    cosines = (a.embedding_BD * b.embedding_BD).sum(axis=1)
    top_5 = [len(set(i) & set(j)) / 5 for i, j in zip(a.label_ids_Bk.tolist(), b.label_ids_Bk.tolist(), strict=True)]
    print(
        f"demo: top-1 agrees in {(a.label_ids_Bk[:, 0] == b.label_ids_Bk[:, 0]).mean():.2%}, {np.mean(top_5):.2%} of"
        f" the top 5 are shared; cosine {cosines.mean():.5f} on average, {np.percentile(cosines, 1):.4f} at the first"
        f" percentile, {cosines.min():.4f} at least"
    )


def enlarged(data: bytes, factor: int) -> bytes:
    """A JPEG of so many times the width and height."""
    image = Image.open(BytesIO(data)).convert("RGB")
    large = image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)
    sink = BytesIO()
    large.save(sink, "JPEG", quality=90)
    return sink.getvalue()


def _timed(
    photos: list[bytes], of_mode: dict[PreprocessMode, PreprocessSpec], rounds: int, name: str
) -> list[npt.NDArray[np.uint8]]:
    """The model inputs of every mode; prints medians of the rounds, of which the first one warms up."""
    walls_s: dict[PreprocessMode, list[float]] = {mode: [] for mode in of_mode}
    pixels: dict[PreprocessMode, npt.NDArray[np.uint8]] = {}
    for _ in range(rounds + 1):
        for mode, spec in of_mode.items():
            recipe = Recipe(spec=spec, limits=DEFAULT_LIMITS)
            started_s = time.process_time()
            made = [make_picture(data, recipe)[0] for data in photos]
            walls_s[mode].append(time.process_time() - started_s)
            pixels[mode] = np.stack(made)
    ms = {mode: statistics.median(values[1:]) / len(photos) * 1e3 for mode, values in walls_s.items()}
    ratios = [fast_s / exact_s for exact_s, fast_s in zip(*walls_s.values(), strict=True)][1:]
    print(
        f"{name}: "
        + ", ".join(f"{mode} {value:.2f} ms of CPU per image" for mode, value in ms.items())
        + f", ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
    )
    return [pixels[mode] for mode in of_mode]


if __name__ == "__main__":
    main()
