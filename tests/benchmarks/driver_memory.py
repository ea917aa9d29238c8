"""How the driver's memory depends on the number of units: units of no-op work through the real pipeline.

Every unit is one archived object: nothing is fetched, decoded or put through the model, and one part is committed. So
what is left is the engine, the protocol and the driver. Prints a line per count of units.

    python tests/benchmarks/driver_memory.py --num-units 1000 --num-units 100000
"""

import argparse
import logging
import multiprocessing
import resource
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoints
import ray

from pipeline import checkpoint, dataset, decode, plan, storage
from pipeline.preprocess import spec_from_config
from pipeline.progress import Progress


def main() -> None:
    """Measure each count in a driver of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-units", type=int, action="append", required=True, help="may be repeated")
    for num_units in parser.parse_args().num_units:
        process = multiprocessing.get_context("spawn").Process(target=_measure, args=(num_units,))
        process.start()
        process.join()


def _measure(num_units: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "in").mkdir()
        output = storage.connect(str(root / "out"))
        sealed = _plan(output, num_units)
        found = checkpoint.resolve(str(checkpoints.write_small(root / "model")))
        task = dataset.Task(
            input_url=storage.connect(str(root / "in")).root,
            output_url=output.root,
            run_id="run",
            spec=spec_from_config(found.preprocessor_config, mode="checkpoint", input_px=found.input_px),
            limits=decode.DEFAULT_LIMITS,
            object_deadline_s=5,
            model=found.folder,
            model_revision=found.revision,
            weights_digest=found.weights_digest,
            pooling="none",
            top_k=1,
            precision="fp32",
            batch_size=1,
        )
        ray.init(address="local", logging_level=logging.ERROR, log_to_driver=False, include_dashboard=False)
        before_mb, started_s = _peak_mb(), time.monotonic()
        progress = Progress(num_units)
        work = (dataset.Work(unit_id, chunk.key) for chunk in sealed.chunks for unit_id in chunk.unit_ids)
        for unit in dataset.label_units(task, dataset.resolve_resources("cpu", 1), work):
            progress.add(unit)
            if progress.num_done % 5000 == 0:
                elapsed_s = time.monotonic() - started_s
                print(f"  {progress.num_done} units, {elapsed_s:.0f} s, peak RSS {_peak_mb():.0f} MB", flush=True)
        wall_s = time.monotonic() - started_s
        print(
            f"{num_units} units: driver's peak RSS {_peak_mb():.0f} MB ({before_mb:.0f} MB before the first),"
            f" {num_units / wall_s:.1f} units/s",
            flush=True,
        )
        ray.shutdown()


def _plan(output: storage.Store, num_units: int) -> plan.Plan:
    chunks = plan._Chunks(output.put_if_absent, "_runs/run/plan/0000", "file:///none", 1)
    for number in range(num_units):
        now = datetime.now(UTC)
        chunks.add(storage.ObjectInfo(f"{number:08d}", 1, str(number), now, storage_class="GLACIER"))
    chunks.close()
    return plan.seal(output, "run", [plan.Range(range_id="0000", chunks=chunks.units, deletions=[], counts={})])


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
