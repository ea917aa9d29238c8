"""What each kind of input costs beside loose objects: CPU of this process per image to list, and to read 100 kB.

The same bytes as loose objects, in tar shards of 250, in Parquet files of 250 (row groups of 50), and named by
manifests; below a local folder, and in a bucket of a moto server in a process of its own. Each kind in turn, `--rounds`
times, after a round that does not count. Nothing is decoded: that costs 3 ms and more, whatever the input.

    python tests/benchmarks/inputs.py --num-images 1000 --rounds 3

With `--clouds` loose objects only, in S3, Google Cloud Storage and Azure; tests/cloud_servers.py says what that needs.
"""

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import cloud_servers  # noqa: E402
import servers  # noqa: E402
from test_containers import rows, shard  # noqa: E402
from test_manifest import parquet  # noqa: E402

from pipeline import fetch, storage  # noqa: E402
from pipeline.errors import ImageError  # noqa: E402
from pipeline.storage import Source  # noqa: E402

PER_CONTAINER = 250
IMAGE_BYTES = 100_000


def main() -> None:
    """Print ms of CPU and images/s, median and range, for every kind and both places."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-images", type=int, default=1000, help=f"rounded down to {PER_CONTAINER} (default 1000)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clouds", action="store_true", help="compare S3, gs:// and az://")
    arguments = parser.parse_args()
    if arguments.clouds:
        _compare_clouds(arguments.num_images, arguments.rounds)
        return
    with tempfile.TemporaryDirectory() as folder, servers.serve_s3() as s3:
        os.environ.update({**s3.environment(), "LABEL_BUCKET_CACHE": f"{folder}/cache"})
        files = _files(arguments.num_images)
        for key, data in files.items():
            (Path(folder) / "in" / key).parent.mkdir(parents=True, exist_ok=True)
            (Path(folder) / "in" / key).write_bytes(data)
        s3.client.create_bucket(Bucket="inputs")
        servers.put_quickly(s3, "inputs", files)
        for place in (f"file://{folder}/in", "s3://inputs"):
            _compare(place, folder, arguments.rounds)


def _files(num_images: int) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for first in range(0, num_images - num_images % PER_CONTAINER, PER_CONTAINER):
        images = {f"{number:06d}.jpg": os.urandom(IMAGE_BYTES) for number in range(first, first + PER_CONTAINER)}
        files |= {f"loose/{name}": data for name, data in images.items()}
        files |= {f"tar/{first:06d}.tar": shard(images)}
        files |= {f"rows/{first:06d}.parquet": rows(list(images.values()), 50)}
    return files


def _compare(place: str, folder: str, num_rounds: int) -> None:
    loose = storage.connect(f"{place}/loose")
    infos = [info for page in loose.list_pages() for info in page]
    lists = Path(folder) / "lists"
    lists.mkdir(exist_ok=True)
    known = [{"uri": info.key, "etag": info.etag, "size_bytes": info.size_bytes} for info in infos]
    (lists / "known.parquet").write_bytes(parquet(known))
    (lists / "uris.parquet").write_bytes(parquet([{"uri": info.key} for info in infos]))
    kinds: dict[str, Callable[[], Source]] = {
        "loose objects": lambda: storage.connect_input(f"{place}/loose"),
        "tar shards": lambda: storage.connect_input(f"webdataset+{place}/tar"),
        "Parquet rows": lambda: storage.connect_input(f"parquet+{place}/rows"),
        "manifest with etags": lambda: storage.connect_input(f"{place}/loose", f"{lists}/known.parquet"),
        "manifest of uris": lambda: storage.connect_input(f"{place}/loose", f"{lists}/uris.parquet"),
    }
    print(f"\n{place.partition('://')[0]}: {len(infos):,} images of {IMAGE_BYTES:,} bytes\n")
    _print_rounds(kinds, len(infos), num_rounds)


def _compare_clouds(num_images: int, num_rounds: int) -> None:
    files = {f"loose/{number % 5}/{number:06d}.jpg": os.urandom(IMAGE_BYTES) for number in range(num_images)}
    with contextlib.ExitStack() as stack:
        s3 = stack.enter_context(servers.serve_s3())
        clouds = [stack.enter_context(serve()) for serve in (cloud_servers.serve_gs, cloud_servers.serve_az)]
        os.environ.update(s3.environment())
        s3.client.create_bucket(Bucket="inputs")
        servers.put_quickly(s3, "inputs", files)
        for cloud in clouds:
            os.environ.update(cloud.environment)
            cloud.create_bucket("inputs")
            for key, data in files.items():
                cloud.write("inputs", key, data)
        places = [f"{scheme}://inputs/loose" for scheme in ("s3", *(cloud.scheme for cloud in clouds))]
        print(f"\n{num_images:,} images of {IMAGE_BYTES:,} bytes\n")
        _print_rounds({place: partial(storage.connect_input, place) for place in places}, num_images, num_rounds)


def _print_rounds(kinds: Mapping[str, Callable[[], Source]], num_images: int, num_rounds: int) -> None:
    found: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    for number in range(num_rounds + 1):
        for kind, connect in kinds.items():
            measured = _measure(connect(), num_images)
            if number:
                found[kind].append(measured)
    print("| input | list, CPU ms | read, CPU ms | list, images/s | read, images/s |\n|---|---|---|---|---|")
    for kind, measurements in found.items():
        cells = [
            f"{statistics.median(values):,.3g} ({min(values):,.3g} to {max(values):,.3g})"
            for values in zip(*measurements, strict=True)
        ]
        print(f"| {kind} | {' | '.join(cells)} |")


def _measure(source: Source, num_images: int) -> tuple[float, ...]:
    cpu_s, wall_s = [time.process_time()], [time.perf_counter()]
    infos = [info for page in source.list_pages() for info in page]
    cpu_s.append(time.process_time())
    wall_s.append(time.perf_counter())
    for outcome in fetch.fetch(source, infos, max_image_bytes=2 * IMAGE_BYTES, deadline_s=30):
        assert not isinstance(outcome, ImageError), outcome
    cpu_s.append(time.process_time())
    wall_s.append(time.perf_counter())
    assert len(infos) == num_images
    costs = [(after - before) * 1e3 / num_images for before, after in pairwise(cpu_s)]
    return (*costs, *(num_images / (after - before) for before, after in pairwise(wall_s)))


if __name__ == "__main__":
    main()
