"""How the driver's memory depends on the number of units: units of no-op work through the real pipeline.

Every unit is one archived object: nothing is fetched, decoded or put through the model, and one part is committed. So
what is left is the engine, the protocol and the driver. Prints the memory every 5000 units, and a last line per count
of units, also if it is stopped by SIGTERM. `now` must stay where it is after the first few waves.

    python tests/benchmarks/driver_memory.py --num-units 1000 --num-units 100000
"""

import argparse
import logging
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
from datetime import UTC, datetime
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoints
import ray

from pipeline import checkpoint, dataset, decode, plan, storage
from pipeline.picture import Recipe
from pipeline.preprocess import spec_from_config
from pipeline.progress import Progress

EVERY_UNITS = 5000


def main() -> None:
    """Measure each count in a driver of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-units", type=int, action="append", required=True, help="may be repeated")
    processes: list[BaseProcess] = []

    def stop(number: int, _: FrameType | None) -> None:
        if processes and processes[-1].is_alive():
            processes[-1].terminate()
            processes[-1].join()
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    for num_units in parser.parse_args().num_units:
        processes.append(multiprocessing.get_context("spawn").Process(target=_measure, args=(num_units,)))
        processes[-1].start()
        processes[-1].join()


def _measure(num_units: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "in").mkdir()
        output = storage.connect(str(root / "out"))
        planned = _plan(output, num_units)
        found = checkpoint.resolve(str(checkpoints.write_small(root / "model")))
        spec = spec_from_config(found.preprocessor_config, mode="checkpoint", input_px=found.input_px)
        task = dataset.Task(
            input_url=storage.connect(str(root / "in")).root,
            output_url=output.root,
            run_id="run",
            recipe=Recipe(spec=spec, limits=decode.DEFAULT_LIMITS),
            object_deadline_s=5,
            stall_timeout_s=1800,
            model=found.folder,
            model_revision=found.revision,
            weights_digest=found.weights_digest,
            pooling="none",
            top_k=1,
            precision="fp32",
            batch_size=1,
        )
        ray.init(address="local", logging_level=logging.ERROR, log_to_driver=False, include_dashboard=False)
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # after ray.init, which sets its own
        before_mb, started_s = _now_mb(), time.monotonic()
        progress = Progress(num_units, max_prepares=1, max_commits=1, num_actors=1)
        work = (
            dataset.Work(planned.range_id, unit_id, chunk.key) for chunk in planned.chunks for unit_id in chunk.unit_ids
        )
        try:
            for unit in dataset.label_units(task, dataset.resolve_resources("cpu", 1), work):
                progress.add(unit)
                if progress.num_done % EVERY_UNITS == 0:
                    print(f"  {progress.num_done} units, {time.monotonic() - started_s:.0f} s, {_memory()}", flush=True)
        finally:
            wall_s = time.monotonic() - started_s
            print(
                f"{progress.num_done} of {num_units} units: driver's RSS {_memory()} ({before_mb:.0f} MB before the"
                f" first), {progress.num_done / wall_s:.1f} units/s",
                flush=True,
            )
        ray.shutdown()


def _plan(output: storage.Store, num_units: int) -> plan.RangePlan:
    chunks = plan._Chunks(output.put_if_absent, "_runs/run/plan/0000", "file:///none", 1, has_ramp=False)
    for number in range(num_units):
        now = datetime.now(UTC)
        chunks.add(storage.ObjectInfo(f"{number:08d}", 1, str(number), now, storage_class="GLACIER"))
    chunks.close()
    return plan.RangePlan(range_id="00000", chunks=chunks.units, deletions=[], counts={})


def _memory() -> str:
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return f"{_now_mb():.0f} MB now, {peak_mb:.0f} MB at its peak"


def _now_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    main()
