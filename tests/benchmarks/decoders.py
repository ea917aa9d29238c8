"""What a JPEG costs Pillow, and what it would cost libjpeg-turbo without it: the decoder of mode `checkpoint`.

    pip install --target FOLDER --no-deps simplejpeg
    python tests/benchmarks/decoders.py --photos FOLDER --simplejpeg FOLDER

Pillow keeps a pixel in four bytes; simplejpeg can write three or four, and four become a Pillow image without a copy,
by way of Arrow. CPU time, everything in turn, medians of the rounds.
"""

import argparse
import importlib
import statistics
import sys
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image, features
from preprocess_modes import PUBLISHED

from pipeline.decode import decode
from pipeline.preprocess import preprocess, spec_from_config


def main() -> None:
    """Print a line for each way to decode, and for the resize."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="real JPEGs; those in gray are left out")
    parser.add_argument("--simplejpeg", type=Path, required=True, help="where simplejpeg is installed")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    sys.path.insert(0, str(options.simplejpeg))
    simplejpeg = importlib.import_module("simplejpeg")
    paths = sorted(path for path in options.photos.rglob("*") if path.is_file())
    photos = [data for path in paths if Image.open(BytesIO(data := path.read_bytes())).mode == "RGB"]
    spec = spec_from_config(PUBLISHED, mode="checkpoint", input_px=224)

    def by_pillow(data: bytes) -> Image.Image:
        image = Image.open(BytesIO(data), formats=["JPEG"])
        image.load()
        return image

    def by_simplejpeg(data: bytes) -> Image.Image:
        pixels = simplejpeg.decode_jpeg(data, "RGBA")
        height_px, width_px, _ = pixels.shape
        return Image.fromarrow(
            pa.FixedSizeListArray.from_arrays(pa.array(pixels.reshape(-1)), 4), "RGB", (width_px, height_px)
        )

    ways: dict[str, Callable[[bytes], object]] = {
        "Pillow": by_pillow,
        "simplejpeg, three bytes, no Pillow image": lambda data: simplejpeg.decode_jpeg(data, "RGB"),
        "simplejpeg, four bytes, a Pillow image": by_simplejpeg,
        "ours, with its checks": decode,
        "ours and the exact resize": lambda data: preprocess(decode(data), spec),
    }
    num_equal = sum(np.array_equal(np.asarray(by_pillow(data)), np.asarray(by_simplejpeg(data))) for data in photos)
    turbo = features.version("libjpeg_turbo")
    print(f"{len(photos)} photos, {num_equal} with equal pixels; Pillow's libjpeg-turbo {turbo}")
    times_ms: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, way in ways.items():
            started_s = time.process_time()
            for data in photos:
                way(data)
            times_ms[name].append((time.process_time() - started_s) / len(photos) * 1e3)
    for name, each_ms in times_ms.items():
        print(f"{name}: {statistics.median(each_ms):.3f} ms ({min(each_ms):.3f} to {max(each_ms):.3f})")


if __name__ == "__main__":
    main()
