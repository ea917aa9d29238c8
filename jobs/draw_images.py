#!/usr/bin/env python3
"""Draw labelled pictures into a folder or a bucket: `<class>/<class>-<seed>-<number>.<ext>`.

Broken files, on request, are `broken/<damage>-<seed>-<number>.<ext>`, with the extension of the picture that they were.
The same arguments write the same files; more images of the same seed only add to them; another seed gives other names.
"""

import argparse
import multiprocessing
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import fsspec
from botocore.exceptions import BotoCoreError
from tqdm import tqdm

from pipeline.arguments import count
from pipeline.draw import CLASSES, DAMAGES, EXTENSIONS, DrawnFile, draw_file
from pipeline.errors import LabelBucketError, SourceError
from pipeline.storage import describe, normalize

_BATCH_FILES = 256
"""Drawn by all cores, then written at once: bounds memory to some 10 MB, and s3fs sends them concurrently."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, draw, write; the process's exit code."""
    options = _parser().parse_args(arguments)
    try:
        counts = draw_images(options.output, options.num_images, options.seed, options.broken_fraction)
    except LabelBucketError as error:
        print(f"draw_images: {error}", file=sys.stderr)
        return error.exit_code
    print(
        f"{counts['intact']} pictures of {len(CLASSES)} classes and {counts['broken']} broken files,"
        f" {counts['bytes'] / 1e6:.1f} MB, are in {options.output}"
    )
    return 0


def draw_images(output: str, num_images: int, seed: int, broken_fraction: float = 0.0) -> Counter[str]:
    """Write the files 0 .. `num_images` - 1 of the data set `seed` below `output`, replacing those that exist.

    Returns how many are `intact` and `broken`, and their `bytes`. Raises ConfigError for a URL that fsspec cannot open,
    and SourceError if it cannot be written to.
    """
    url = normalize(output)
    draw = partial(draw_file, seed, broken_fraction=broken_fraction)
    counts: Counter[str] = Counter(intact=0, broken=0, bytes=0)
    # Not forked: s3fs runs a thread, and a forked copy of its locks can hang.
    context = multiprocessing.get_context("spawn")
    try:
        filesystem, root = fsspec.core.url_to_fs(url, **({"auto_mkdir": True} if url.startswith("file://") else {}))
        with (
            ProcessPoolExecutor(mp_context=context) as pool,
            tqdm(total=num_images, unit="img", disable=None) as progress,
        ):
            for start in range(0, num_images, _BATCH_FILES):
                batch = range(start, min(start + _BATCH_FILES, num_images))
                files: list[DrawnFile] = list(pool.map(draw, batch, chunksize=16))
                filesystem.pipe({f"{root}/{file.path}": file.data for file in files})
                counts.update("broken" if file.damage else "intact" for file in files)
                counts["bytes"] += sum(len(file.data) for file in files)
                progress.update(len(files))
    except (OSError, BotoCoreError, ImportError) as error:
        raise SourceError(f"cannot write to {url}: {describe(error)}; check the URL and your access to it") from error
    return counts


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nClasses: {', '.join(CLASSES)}.\nFormats: {', '.join(EXTENSIONS)}."
        f"\nKinds of damage: {', '.join(DAMAGES)}.",
        epilog="example: draw_images.py --output s3://bucket/pictures --num-images 3000 --broken-fraction 0.02\n"
        "S3 endpoint, region and credentials come from the standard AWS environment.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", required=True, metavar="URL", help="local folder, s3:// or other fsspec URL")
    parser.add_argument("--num-images", required=True, type=count, metavar="N", help="files in all, broken included")
    parser.add_argument("--seed", type=count, default=0, metavar="S", help="names the data set; default 0")
    parser.add_argument(
        "--broken-fraction",
        type=_fraction,
        default=0.0,
        metavar="F",
        help="expected share of broken files, 0..1; default 0",
    )
    return parser


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, found {text!r}")
    return value


if __name__ == "__main__":
    sys.exit(main())
