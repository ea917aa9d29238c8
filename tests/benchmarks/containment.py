"""What the killable child costs: the same photos prepared in it, one by one and a few at once, and in this process, all
in turn.

python tests/benchmarks/containment.py --photos FOLDER --rounds 5
"""

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from checkpoints import squash_spec

from pipeline.contain import MAX_IMAGES, Child
from pipeline.decode import DEFAULT_LIMITS
from pipeline.picture import Recipe, make_picture

SPEC = replace(squash_spec(224), resize_hw_px=(256, 256), crop_px=224)


def main() -> None:
    """Print images/s and processor time per image of both, medians over the rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    photos = [path.read_bytes() for path in sorted(options.photos.rglob("*")) if path.is_file()]
    recipe = Recipe(spec=SPEC, limits=DEFAULT_LIMITS)
    walls_s: dict[str, list[float]] = {"in this process": [], "in a child": [], f"{MAX_IMAGES} at once to it": []}
    for _ in range(options.rounds + 1):  # the first one warms up
        child = Child(recipe)
        child.make_picture(photos[0])
        batches = [photos[begin : begin + MAX_IMAGES] for begin in range(0, len(photos), MAX_IMAGES)]
        ways: list[tuple[Callable[[Any], Any], Sequence[Any]]] = [
            (lambda data: make_picture(data, recipe), photos),
            (child.make_picture, photos),
            (child.make_pictures, batches),
        ]
        for each_s, (make, inputs) in zip(walls_s.values(), ways, strict=True):
            each_s.append(_wall_s(make, inputs))
        child.close()
    own_s = walls_s["in this process"]
    for name, values in walls_s.items():
        median_s = statistics.median(values[1:])
        ratios = [each_s / base_s for each_s, base_s in zip(values, own_s, strict=True)][1:]
        print(
            f"{name:16} {len(photos) / median_s:6.1f} images/s, {median_s / len(photos) * 1e3:.2f} ms per image,"
            f" ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        )
    print(f"peak of a child  {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024:.0f} MB")


def _wall_s(make: Callable[[Any], Any], inputs: Sequence[Any]) -> float:
    started_s = time.perf_counter()
    for each in inputs:
        make(each)
    return time.perf_counter() - started_s


if __name__ == "__main__":
    main()
