"""What the killable child costs: the same photos prepared in it and in this process, one after the other, alternating.

python tests/benchmarks/containment.py --photos FOLDER --rounds 5
"""

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.checkpoint import PreprocessSpec
from pipeline.contain import Child
from pipeline.decode import DEFAULT_LIMITS
from pipeline.picture import Recipe, make_picture

SPEC = PreprocessSpec(
    mode="checkpoint",
    resize="squash",
    resize_hw_px=(256, 256),
    resample=3,
    crop_px=224,
    input_px=224,
    rescale_factor=1 / 255,
    image_mean=(0.5, 0.5, 0.5),
    image_std=(0.5, 0.5, 0.5),
)


def main() -> None:
    """Print images/s and processor time per image of both, medians over the rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    photos = [path.read_bytes() for path in sorted(options.photos.rglob("*")) if path.is_file()]
    recipe = Recipe(spec=SPEC, limits=DEFAULT_LIMITS)
    walls_s: dict[str, list[float]] = {"in this process": [], "in a child": []}
    for _ in range(options.rounds + 1):  # the first one warms up
        child = Child(recipe)
        child.make_picture(photos[0])
        walls_s["in this process"].append(_wall_s(lambda data: make_picture(data, recipe), photos))
        walls_s["in a child"].append(_wall_s(child.make_picture, photos))
        child.close()
    for name, values in walls_s.items():
        median_s = statistics.median(values[1:])
        print(f"{name:16} {len(photos) / median_s:6.1f} images/s, {median_s / len(photos) * 1e3:.2f} ms per image")
    ratios = [child_s / own_s for own_s, child_s in zip(*walls_s.values(), strict=True)][1:]
    print(f"ratio            {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    print(f"peak of a child  {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024:.0f} MB")


def _wall_s(make: Callable[[bytes], Any], photos: list[bytes]) -> float:
    started_s = time.perf_counter()
    for data in photos:
        make(data)
    return time.perf_counter() - started_s


if __name__ == "__main__":
    main()
