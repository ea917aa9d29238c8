"""What an index costs: building it, and an update of 1,000 new or changed rows and 200 deletions, as a command each.

python tests/benchmarks/index.py --num-rows 100000 --rounds 3
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import synthetic_output

from pipeline import storage

JOB = Path(__file__).resolve().parents[2] / "jobs" / "build_index.py"


class Cost(NamedTuple):
    """Of one process, start-up included."""

    wall_s: float
    cpu_s: float
    peak_mb: float


def main() -> None:
    """Make an output, build and update an index of it, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-rows", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=3)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        output = storage.connect(f"{folder}/labels")
        synthetic_output.publish(output, np.arange(flags.num_rows), np.arange(0), flags.dim)
        builds = [_run(folder, f"{folder}/index{number}") for number in range(flags.rounds)]
        changed = np.arange(0, flags.num_rows, flags.num_rows // 500)[:500]
        new = np.arange(flags.num_rows, flags.num_rows + 500)
        gone = np.arange(7, flags.num_rows, flags.num_rows // 200)[:200]
        synthetic_output.publish(output, np.concatenate([changed, new]), np.setdiff1d(gone, changed), flags.dim)
        updates = [_run(folder, f"{folder}/index{number}", "--update") for number in range(flags.rounds)]
    for name, costs in (("build", builds), ("update", updates)):
        wall_s, cpu_s, peak_mb = (statistics.median(values) for values in zip(*costs, strict=True))
        print(f"{name}: median of {flags.rounds}: {wall_s:.2f} s, {cpu_s:.2f} s of CPU, peak {peak_mb:.0f} MB")


def _run(folder: str, place: str, *more: str) -> Cost:
    started_s = time.perf_counter()
    command = [sys.executable, str(JOB), "--input", f"{folder}/labels", "--output", place, "--log-level=WARNING", *more]
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(process.returncode)
    return Cost(time.perf_counter() - started_s, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


if __name__ == "__main__":
    main()
