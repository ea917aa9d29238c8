#!/usr/bin/env python
"""Flipped and cut images through the CPU task for some minutes: 10,000 a round, exactly one row each. See --help."""

import argparse
import random
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import hostile  # noqa: E402
from test_hostile import check_one_row_each, rows_of  # noqa: E402

ROUND = 10_000


def main() -> int:
    """Rounds until the time is over, at least one; the seed of each is printed before it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="no round begins later (default 10)")
    parser.add_argument("--seed", type=int, default=None, help="of the first round; unset: a random one")
    arguments = parser.parse_args()
    seed = random.randrange(2**32) if arguments.seed is None else arguments.seed
    ends_s = time.monotonic() + 60 * arguments.minutes
    while True:
        print(f"seed {seed}", flush=True)
        files = dict(hostile.damaged(seed, ROUND))
        rows = rows_of(files)
        check_one_row_each(files, rows)
        num_images = sum(row["failure_kind"] is None for row in rows)
        print(f"{len(rows):,} rows, {num_images:,} of them pictures", flush=True)
        if time.monotonic() >= ends_s:
            return 0
        seed += 1


if __name__ == "__main__":
    sys.exit(main())
