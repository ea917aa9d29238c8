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
    parser.add_argument(
        "--factory", nargs="+", help="only build each of these, whatever its recall, and say what it is"
    )
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        output, source = storage.connect(f"{folder}/labels"), ("--input", f"{folder}/labels")
        synthetic_output.publish(output, np.arange(flags.num_rows), np.arange(0), flags.dim)
        for name in flags.factory or ():
            cost = run(JOB, *source, "--output", f"{folder}/{name}", f"--factory={name}", "--min-recall=0")
            print(f"{name}: {cost.wall_s:.2f} s, {cost.cpu_s:.2f} s of CPU, peak {cost.peak_mb:.0f} MB", flush=True)
        if flags.factory:
            return
        builds = [run(JOB, *source, "--output", f"{folder}/index{number}") for number in range(flags.rounds)]
        changed = np.arange(0, flags.num_rows, flags.num_rows // 500)[:500]
        new = np.arange(flags.num_rows, flags.num_rows + 500)
        gone = np.arange(7, flags.num_rows, flags.num_rows // 200)[:200]
        synthetic_output.publish(output, np.concatenate([changed, new]), np.setdiff1d(gone, changed), flags.dim)
        updates = [
            run(JOB, *source, "--output", f"{folder}/index{number}", "--update") for number in range(flags.rounds)
        ]
    for name, costs in (("build", builds), ("update", updates)):
        wall_s, cpu_s, peak_mb = (statistics.median(values) for values in zip(*costs, strict=True))
        print(f"{name}: median of {flags.rounds}: {wall_s:.2f} s, {cpu_s:.2f} s of CPU, peak {peak_mb:.0f} MB")


def run(job: Path, *arguments: str) -> Cost:
    """Run a command to its end, and stop if it fails."""
    started_s = time.perf_counter()
    process = subprocess.Popen([sys.executable, str(job), *arguments, "--log-level=WARNING"])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(process.returncode)
    return Cost(time.perf_counter() - started_s, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


if __name__ == "__main__":
    main()
