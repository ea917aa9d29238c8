"""What finding duplicates costs, and how many it finds: planted near-duplicates, and all near pairs by brute force.

python tests/benchmarks/duplicates.py --num-rows 100000 --planted 1000
"""

import argparse
import tempfile

import numpy as np
import pyarrow.parquet as pq
import synthetic_output
from index import JOB, run

from pipeline import storage

MIN_COSINE = 0.995


def main() -> None:
    """Make an output, index it, find its duplicates with the command, and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-rows", type=int, default=100_000)
    parser.add_argument("--planted", type=int, default=1000)
    parser.add_argument("--dim", type=int, default=384)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        output = storage.connect(f"{folder}/labels")
        starts = range(0, flags.num_rows, synthetic_output.ROWS_PER_FILE)
        numbers = np.arange(flags.num_rows)
        vectors_ND = np.concatenate(
            [
                synthetic_output.vectors(numbers[start : start + synthetic_output.ROWS_PER_FILE], flags.dim, (1, start))
                for start in starts
            ]
        )
        synthetic_output.publish(output, numbers, np.arange(0), flags.dim)
        originals = np.linspace(0, flags.num_rows - 1, flags.planted).astype(int)
        turned = vectors_ND[originals] + np.linspace(0.02, 0.12, flags.planted)[:, None] * _directions(
            flags.planted, flags.dim
        )
        turned = (turned / np.linalg.norm(turned, axis=1, keepdims=True)).astype(np.float32)
        planted = np.arange(flags.num_rows, flags.num_rows + flags.planted)
        synthetic_output.publish(output, planted, np.arange(0), flags.dim, turned)
        run(JOB, "--input", f"{folder}/labels", "--output", f"{folder}/index")
        job = JOB.with_name("search_images.py")
        cost = run(job, "dups", "--index", f"{folder}/index", "--output", f"{folder}/found", "--sheet-groups=0")
        print(f"dups: {cost.wall_s:.2f} s, {cost.cpu_s:.2f} s of CPU, peak {cost.peak_mb:.0f} MB", flush=True)
        found = _edges(f"{folder}/found")
        truth = _near_pairs(np.concatenate([vectors_ND, turned]))
        pairs = {(int(a), int(b)) for a, b in zip(originals, planted, strict=True)}
        print(f"planted: {len(pairs):,}, of which near {len(pairs & truth):,}, found {len(pairs & truth & found):,}")
        print(f"near pairs: {len(truth):,} by brute force, found {len(truth & found):,}, wrong {len(found - truth):,}")


def _directions(count: int, dim: int) -> np.ndarray:
    made = np.random.default_rng(9).normal(size=(count, dim))
    return np.asarray(made / np.linalg.norm(made, axis=1, keepdims=True))


def _edges(folder: str) -> set[tuple[int, int]]:
    """The numbers of what is said to be a pair."""
    store = storage.connect(folder)
    names = [key for key in storage.list_keys(store, "") if key.rpartition("/")[2].startswith("edges")]
    found = set()
    for name in names:
        table = pq.read_table(f"{folder}/{name}")
        a, b = ([int(uri[-13:-4]) for uri in table[side].to_pylist()] for side in ("uri_a", "uri_b"))
        found |= set(zip(a, b, strict=True))
    return found


def _near_pairs(vectors_ND: np.ndarray) -> set[tuple[int, int]]:
    """Every pair of rows above the threshold, by brute force."""
    found, step = set(), 2000
    for begin in range(0, len(vectors_ND), step):
        cosines = vectors_ND[begin : begin + step] @ vectors_ND[begin:].T
        a, b = np.nonzero(cosines >= MIN_COSINE)
        found |= {(begin + int(i), begin + int(j)) for i, j in zip(a, b, strict=True) if i < j}
    return found


if __name__ == "__main__":
    main()
