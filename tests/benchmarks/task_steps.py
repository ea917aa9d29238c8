"""What a task that prepares a unit costs without Ray, step by step: CPU of its process per image, its child's apart.

    python tests/benchmarks/task_steps.py --photos FOLDER --rounds 5

The same photos from a local folder and from S3 over loopback, all steps in turn.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoints
import servers

from pipeline import contain, fetch, plan, prepare, storage
from pipeline.decode import DEFAULT_LIMITS
from pipeline.picture import Recipe

RECIPE = Recipe(spec=replace(checkpoints.squash_spec(224), resize_hw_px=(256, 256), crop_px=224), limits=DEFAULT_LIMITS)
DEADLINE_S = 30.0


def main() -> None:
    """Print medians, lowest and highest of the rounds, after one that does not count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    photos = {f"in/{path.name}": path.read_bytes() for path in sorted(options.photos.rglob("*")) if path.is_file()}
    with tempfile.TemporaryDirectory() as folder, servers.serve_s3() as s3:
        for name, data in photos.items():
            path = Path(folder, name)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
        bucket = s3.create_bucket()
        servers.put_quickly(s3, bucket.removeprefix("s3://"), photos)
        # In a process of its own: the server's proxy is in this one.
        with mock.patch.dict(os.environ, s3.environment()), multiprocessing.get_context("spawn").Pool(1) as pool:
            for what, url in (("a folder", f"{folder}/in"), ("S3", f"{bucket}/in")):
                pool.apply(_measure, (what, url, options.rounds))


def _measure(what: str, url: str, num_rounds: int) -> None:
    source = storage.connect_input(url)
    infos = [info for page in source.list_pages() for info in page]
    objects = plan.objects_table(source.root, infos)
    encoded = [source.get(info.key, listed=info) for info in infos]
    child = contain.child_of(RECIPE)
    child.make_picture(encoded[0])

    def fetched(num_threads: int) -> None:
        with mock.patch.object(fetch, "CONCURRENCY", num_threads):
            for _ in fetch.fetch(source, infos, max_image_bytes=RECIPE.limits.max_bytes, deadline_s=DEADLINE_S):
                pass

    steps: dict[str, Callable[[], object]] = {
        "read one after another": lambda: [source.get(info.key, listed=info) for info in infos],
        "read by 4 threads": lambda: fetched(4),
        "read by 16 threads, as a task does": lambda: fetched(16),
        "make pictures of what was read": lambda: prepare.prepare_encoded(objects, enumerate(encoded), RECIPE),
        "all a task does": lambda: prepare.prepare_unit(source, objects, RECIPE, deadline_s=DEADLINE_S),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(num_rounds + 1):
        for name, step in steps.items():
            before_s = time.process_time(), _cpu_s(child)
            step()
            after_s = time.process_time(), _cpu_s(child)
            own_s, child_s = (after - before for after, before in zip(after_s, before_s, strict=True))
            found[name].append((own_s / len(infos) * 1e3, child_s / len(infos) * 1e3))
    print(f"from {what}, ms of CPU per image")
    for name, values in found.items():
        own, of_child = ([value[index] for value in values[1:]] for index in (0, 1))
        print(
            f"  {name:36} {statistics.median(own):.3f} ({min(own):.3f} to {max(own):.3f}),"
            f" child {statistics.median(of_child):.2f}"
        )


def _cpu_s(child: contain.Child) -> float:
    assert child._process is not None
    fields = Path(f"/proc/{child._process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
