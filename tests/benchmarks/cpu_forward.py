"""How actors on CPU should compute: images/s of the whole machine by threads per actor, micro-batch, eager or compiled.

    python tests/benchmarks/cpu_forward.py --out tests/benchmarks/cpu_forward.md

As many processes as make use of all cores run the pipeline's own forward pass (fp32, random weights) at the same time.
Rounds alternate: every setting once, then all again. Compiled means `torch.compile` with static shapes, which needs a
C++ compiler; its time is given beside, because every actor of every wave would pay for it.
"""

import argparse
import itertools
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoints
import machine
import numpy as np
import torch
from checkpoints import PUBLISHED

from pipeline import checkpoint, model
from pipeline.preprocess import spec_from_config

MAX_WAIT_S = 600


class Setting(NamedTuple):
    """One way to compute."""

    num_threads: int
    batch_size: int
    is_compiled: bool


def main() -> None:
    """Print images/s of every setting, write the note."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="part of a published name; otherwise tiny and small distilled")
    parser.add_argument("--threads", type=int, action="append", help="otherwise 1 and all cores")
    parser.add_argument("--batch-size", type=int, action="append", help="otherwise 8, 16, 32 and 64")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write a Markdown note there")
    options = parser.parse_args()
    num_cores = os.cpu_count() or 1
    settings = [
        Setting(*values)
        for values in itertools.product(
            options.threads or sorted({1, num_cores}),
            options.batch_size or [8, 16, 32, 64],
            [False, True] if options.compile else [False],
        )
    ]
    parts = options.model or ["deit-tiny-distilled", "deit-small-distilled"]
    lines = ["| checkpoint | threads per actor, actors | images at once | how | images/s | until the first images |"]
    lines.append("|---|---|---|---|---|---|")
    for shape in [each for each in PUBLISHED if any(part in each.name for part in parts)]:
        with tempfile.TemporaryDirectory() as folder:
            checkpoints.write_published(Path(folder), shape)
            rates = _measure(folder, settings, options.rounds, options.seconds, num_cores)
        for setting, (found, first_s) in rates.items():
            lines.append(
                f"| {shape.name} | {setting.num_threads}, {num_cores // setting.num_threads} | {setting.batch_size} |"
                f" {'compiled' if setting.is_compiled else 'eager'} | {statistics.median(found):.1f}"
                f" ({min(found):.1f} to {max(found):.1f}) | {first_s:.1f} s |"
            )
    note = "\n".join([*_head(options.rounds, num_cores), *lines]) + "\n"
    print(note)
    if options.out is not None:
        options.out.write_text(note)


def _measure(
    folder: str, settings: list[Setting], num_rounds: int, seconds: float, num_cores: int
) -> dict[Setting, tuple[list[float], float]]:
    """Of each setting: images/s of all processes together, a value per round, and the longest first call."""
    context = multiprocessing.get_context("spawn")
    found: dict[Setting, tuple[list[float], float]] = {}
    for num_threads in sorted({each.num_threads for each in settings}):
        mine = [each for each in settings if each.num_threads == num_threads]
        num_processes = max(1, num_cores // num_threads)
        barrier = context.Barrier(num_processes, timeout=MAX_WAIT_S)
        with context.Pool(num_processes, initializer=_keep, initargs=(barrier,)) as pool:
            arguments = [(folder, mine, num_rounds, seconds)] * num_processes
            by_process = pool.starmap(_forward, arguments, chunksize=1)
        for number, setting in enumerate(mine):
            rates = [sum(values) for values in zip(*(process[number][0] for process in by_process), strict=True)]
            found[setting] = (rates, max(process[number][1] for process in by_process))
    return found


_BARRIERS: list[Barrier] = []
"""That of this process of the pool."""


def _keep(barrier: Barrier) -> None:
    _BARRIERS.append(barrier)


def _forward(folder: str, settings: list[Setting], num_rounds: int, seconds: float) -> list[tuple[list[float], float]]:
    model.prepare_process(settings[0].num_threads)
    found = checkpoint.resolve(folder)
    spec = spec_from_config(found.preprocessor_config, mode="checkpoint", input_px=found.input_px)
    classifier = model.load(found, spec, pooling="pooled", device="cpu", precision="fp32")
    compiled = classifier.compiled()
    rng = np.random.default_rng(0)
    pixels = {
        each.batch_size: torch.from_numpy(
            rng.integers(0, 256, (each.batch_size, found.input_px, found.input_px, 3), np.uint8)
        )
        for each in settings
    }
    results: list[tuple[list[float], float]] = []
    with torch.inference_mode():
        for setting in settings:
            started_s = time.perf_counter()
            (compiled if setting.is_compiled else classifier)(pixels[setting.batch_size])
            results.append(([], time.perf_counter() - started_s))
        for _, (setting, result) in itertools.product(range(num_rounds), zip(settings, results, strict=True)):
            forward = compiled if setting.is_compiled else classifier
            _BARRIERS[0].wait()
            num_images, started_s = 0, time.perf_counter()
            while time.perf_counter() - started_s < seconds:
                forward(pixels[setting.batch_size])
                num_images += setting.batch_size
            result[0].append(num_images / (time.perf_counter() - started_s))
    return results


def _head(num_rounds: int, num_cores: int) -> list[str]:
    return [
        "# Forward passes on CPU: threads, images at once, compiled or not",
        "",
        f"    python tests/benchmarks/cpu_forward.py {' '.join(sys.argv[1:])}".rstrip(),
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, commit {machine.commit()}; {machine.cpu_name()}, {num_cores} cores, torch"
        f" {torch.__version__}, fp32; medians, lowest and highest of {num_rounds} rounds.",
        "",
    ]


if __name__ == "__main__":
    main()
