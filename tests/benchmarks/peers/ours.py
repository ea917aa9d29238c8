"""One run of `jobs/label_bucket.py` in this process, for `peers.py`: its flags stand after those below.

When a part is committed is when its images are done. What the object store was given is asked of the node before Ray
ends with this process.
"""

import json
import runpy
import sys
import time
from pathlib import Path

import pyarrow.dataset
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent.parent.parent
JOB = ROOT / "jobs" / "label_bucket.py"


def main() -> None:
    """`ours.py RESULT --input URL --output FOLDER …`: run the job, then write RESULT."""
    result, *flags = sys.argv[1:]
    sys.argv = [str(JOB), *flags]
    try:
        runpy.run_path(str(JOB), run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            raise
    ended_s = time.time()
    created_bytes = object_store_bytes()
    output = Path(flags[flags.index("--output") + 1])
    parts = [
        (path.stat().st_mtime_ns / 1e9, pq.ParquetFile(path).metadata.num_rows)
        for path in output.glob("_runs/*/parts/*/*.parquet")
    ]
    labels = pyarrow.dataset.dataset(output / "labels", partitioning="hive").to_table(columns=["uri", "label_names"])
    (report,) = [json.loads(path.read_text()) for path in output.glob("_runs/*/report.json")]
    values = {
        "ended_s": ended_s,
        "done": sorted(parts),
        "labels": {row["uri"].rpartition("/")[2]: row["label_names"][0] for row in labels.to_pylist()},
        "object_store_bytes": created_bytes,
        "stage_s": report["stage_s"],
        "bottleneck": report["bottleneck"],
    }
    Path(result).write_text(json.dumps(values))


def object_store_bytes() -> int:
    """Bytes that all objects of this node's store were created with so far, including what is freed again."""
    import ray
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    address = ray.get_runtime_context().gcs_address
    return int(get_memory_info_reply(get_state_from_address(address)).store_stats.cumulative_created_bytes)


if __name__ == "__main__":
    main()
