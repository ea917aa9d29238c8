"""Ours, Daft, Ray Data's documented example and the Hugging Face pipeline: the same photos, checkpoint and machine.

    python tests/benchmarks/peers.py --photos FOLDER --daft FOLDER --out tests/benchmarks/peers.md

Every contestant is a program of `peers/`, in processes of its own, begun anew for each run; rounds alternate. Two
models of random weights: one that costs next to nothing, which stands for a GPU that is never the limit, and DeiT-tiny.
Daft is no dependency: `pip install --target FOLDER --no-deps daft`, and without --daft it is left out.

What the figures are, the same for all:
  cold     all images / time from the start of the process to the last label (for ours: published), start-up included
  steady   images / time between the first fifth and the last fifth of all images, so without start-up and the end;
           a batch is done when its labels are there (for ours: when its part is committed), linear in between. Units
           of ours are small at first (plan.RAMP): of 5,120 images all, of 16,320 those of 19 % of the window
  CPU      of all processes of the contestant in that window, per image; a server's is not in it
  limit    Pillow's decode, the checkpoint's resize and crop, and transformers' network in a plain loop, a process per
           core; `bare, our functions` is the same loop around what the pipeline calls; both read S3 by our client
  memory   driver: peak RSS. Worker: the largest one's peak RSS, and the largest heap (anonymous memory) of any. All:
           heap at one time
  store    bytes of all objects that Ray's object store was given, per image
"""

import argparse
import json
import os
import platform
import secrets
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoints
import cluster
import machine
import preprocess_modes
import process_usage
import servers

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BATCH_SIZE = 8
"""Images per forward pass, as many as ours has on CPU: for DeiT-tiny within 3 % of the fastest (cpu_forward.md)."""
RAY_BATCH_SIZE = 32
"""Of Ray Data's example, whose actors are also given so many images at once, as are those of Daft."""
RESIZE_PX, INPUT_PX = 256, 224
WINDOW = (0.2, 0.8)
MIN_AGREEMENT = 0.5
"""Of the best labels with ours. Random weights tell nearly equal pixels apart less well than trained ones."""
PREPROCESSOR = checkpoints.PUBLISHED[3].preprocessor
"""Of the distilled models: squash to 256 pixels, bicubic, the middle 224."""


class Contestant(NamedTuple):
    """A program of `peers/` and its arguments behind the name of its result."""

    name: str
    program: str
    arguments: Sequence[str]
    num_cores: int
    environment: dict[str, str]


@dataclass
class Run:
    """What one run showed."""

    images_per_s_cold: float
    images_per_s: float
    cpu_ms_by_kind: Mapping[str, float]
    """By what a process is there for."""
    values: dict[str, Any]
    usage: process_usage.Usage
    num_images: int

    @property
    def cpu_ms(self) -> float:
        """Of all processes, per image in the window."""
        return sum(self.cpu_ms_by_kind.values())


def main() -> None:
    """Make the photos and models, run all contestants in turn, print the tables, write the note."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="real photos; repeated under new names")
    parser.add_argument("--daft", type=Path, help="where Daft is installed")
    parser.add_argument("--num-images", type=int, default=16320, help="for the model that costs nothing; 0: without")
    parser.add_argument("--num-images-tiny", type=int, default=5120, help="for DeiT-tiny; 0: without it")
    parser.add_argument("--num-images-s3", type=int, default=16320, help="for S3; 0: without it")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rounds-s3", type=int, default=2)
    parser.add_argument("--rounds-tiny", type=int, default=2)
    parser.add_argument("--only", action="append", metavar="NAME", help="only this contestant; may be repeated")
    parser.add_argument("--enlarge", type=int, default=1, help="width and height of the local photos times so much")
    parser.add_argument("--out", type=Path, help="write a note there")
    options = parser.parse_args()
    num_cores = os.cpu_count() or 1
    began_at = datetime.now(UTC)
    sections = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        root = Path(folder)
        zero, tiny = _write_models(root)
        if options.num_images:
            photos = _repeat(options.photos, root / "photos", options.num_images, options.enlarge)
            larger = f" of {options.enlarge} times the width and height" if options.enlarge > 1 else ""
            sections.append(
                _compare(
                    f"Model near zero, local photos{larger}, {options.num_images:,} images",
                    _contestants(str(photos), zero, options.daft, num_cores, is_full=True),
                    options.rounds,
                    options.num_images,
                    options.only,
                )
            )
        if options.num_images_s3:
            s3 = stack.enter_context(servers.serve_s3())
            bucket = s3.create_bucket()
            uploaded = _repeat(options.photos, root / "uploaded", options.num_images_s3).iterdir()
            servers.put_quickly(
                s3, bucket.removeprefix("s3://"), {f"in/{path.name}": path.read_bytes() for path in uploaded}
            )
            sections.append(
                _compare(
                    f"Model near zero, S3 over loopback, {options.num_images_s3:,} images",
                    _contestants(f"{bucket}/in", zero, options.daft, num_cores, s3.environment()),
                    options.rounds_s3,
                    options.num_images_s3,
                    options.only,
                )
            )
        if options.num_images_tiny:
            few = _repeat(options.photos, root / "few", options.num_images_tiny)
            sections.append(
                _compare(
                    f"DeiT-tiny, local photos, {options.num_images_tiny:,} images",
                    _contestants(str(few), tiny, options.daft, num_cores),
                    options.rounds_tiny,
                    options.num_images_tiny,
                    options.only,
                )
            )
    note = "\n\n".join([_head(began_at, options.daft), *sections]) + "\n"
    print(note)
    if options.out is not None:
        options.out.write_text(note)


def _write_models(root: Path) -> tuple[Path, Path]:
    zero = checkpoints.write_checkpoint(
        root / "zero",
        architecture="DeiTForImageClassification",
        hidden=8,
        num_heads=1,
        num_layers=1,
        input_px=INPUT_PX,
        preprocessor=PREPROCESSOR,
    )
    tiny = checkpoints.write_checkpoint(
        root / "tiny",
        architecture="DeiTForImageClassification",
        hidden=192,
        num_heads=3,
        input_px=INPUT_PX,
        preprocessor=PREPROCESSOR,
    )
    return zero, tiny


def _repeat(source: Path, target: Path, num_images: int, enlarge: int = 1) -> Path:
    """So many photos, again and again the same under other names."""
    target.mkdir()
    photos = sorted(path for path in source.rglob("*") if path.is_file())
    for number in range(num_images):
        photo = photos[number % len(photos)]
        copy = target / f"{number:06d}_{photo.stem}.jpg"
        if number >= len(photos):
            shutil.copyfile(target / f"{number % len(photos):06d}_{photo.stem}.jpg", copy)
        elif enlarge > 1:
            copy.write_bytes(preprocess_modes.enlarged(photo.read_bytes(), enlarge))
        else:
            shutil.copyfile(photo, copy)
    return target


# --- contestants --------------------------------------------------------------------------------------------------


def _contestants(
    url: str,
    model: Path,
    daft: Path | None,
    num_cores: int,
    environment: Mapping[str, str] | None = None,
    *,
    is_full: bool = False,
) -> list[Contestant]:
    both = ("--photos", url, "--model", str(model))
    found = [
        _bare("limit (bare Pillow)", both, "pillow", num_cores),
        _bare("bare, our functions", both, "pipeline", num_cores),
        _ours("ours", url, model, num_cores),
        Contestant(
            "Ray Data's example", "with_ray_data.py", (*both, "--batch-size", str(RAY_BATCH_SIZE)), num_cores, {}
        ),
        Contestant(
            "Hugging Face pipeline", "with_transformers.py", (*both, "--batch-size", str(BATCH_SIZE)), num_cores, {}
        ),
    ]
    if daft is not None:
        daft_only = {"PYTHONPATH": str(daft), "DAFT_ANALYTICS_ENABLED": "0", "DO_NOT_TRACK": "true"}
        edge = ("--edge-px", str(RESIZE_PX))
        found.append(Contestant("Daft", "with_daft.py", (*both, *edge), num_cores, daft_only))
    if is_full:
        found.append(_bare("bare, our functions, fast", both, "pipeline", num_cores, "--preprocess", "fast"))
        found.append(_ours("ours, fast", url, model, num_cores, "--preprocess", "fast"))
        found.append(_bare("limit, one core", both, "pillow", 1))
        found.append(_ours("ours, one core", url, model, 1))
    return [each._replace(environment={**each.environment, **(environment or {})}) for each in found]


def _bare(name: str, both: Sequence[str], by: str, num_cores: int, *flags: str) -> Contestant:
    arguments = (*both, "--batch-size", str(BATCH_SIZE), "--by", by, "--num-processes", str(num_cores), *flags)
    return Contestant(name, "bare.py", arguments, num_cores, {})


def _ours(name: str, url: str, model: Path, num_cores: int, *flags: str) -> Contestant:
    # On one core: Ray counts those of the machine, unless it is told.
    environment = {"RAY_OVERRIDE_RESOURCES": json.dumps({"CPU": 1})} if num_cores == 1 else {}
    return Contestant(name, "ours.py", ("--input", url, "--model", str(model), *flags), num_cores, environment)


# --- runs ---------------------------------------------------------------------------------------------------------


def _compare(
    title: str, contestants: list[Contestant], num_rounds: int, num_images: int, only: list[str] | None
) -> str:
    """All contestants in turn, so many rounds; a Markdown section."""
    names = [each.name for each in contestants]
    contestants = [each for each in contestants if only is None or each.name in only]
    if not contestants:
        raise SystemExit(f"--only: expected one of {names}, found {only}")
    runs: dict[str, list[Run]] = {each.name: [] for each in contestants}
    for number in range(num_rounds):
        for each in contestants:
            if number and each.num_cores == 1:
                continue  # for the scaling one round must do
            run = _run(each, num_images)
            runs[each.name].append(run)
            print(
                f"{title}, round {number + 1}: {each.name}: cold {run.images_per_s_cold:.1f}, steady"
                f" {run.images_per_s:.1f} images/s, {run.cpu_ms:.2f} ms of CPU per image",
                file=sys.stderr,
                flush=True,
            )
    return f"## {title}, {num_rounds} rounds\n\n{_table(contestants, runs)}"


def _run(contestant: Contestant, num_images: int) -> Run:
    """One run in a session of its own, which is empty afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        result, log = Path(folder) / "result.json", Path(folder) / "log"
        arguments = [str(result), *contestant.arguments]
        if contestant.program == "ours.py":
            arguments += ["--output", str(Path(folder) / "out"), "--batch-size", str(BATCH_SIZE)]
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        environment = {**os.environ, **token, **contestant.environment}
        paths = [str(ROOT), contestant.environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        command = [sys.executable, str(HERE / "peers" / contestant.program), *arguments]
        cores = sorted(os.sched_getaffinity(0))[: contestant.num_cores]
        started_s = time.time()
        with log.open("wb") as sink:
            process = subprocess.Popen(
                ["taskset", "-c", ",".join(map(str, cores)), *command],
                env=environment,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            with process_usage.watched(process.pid) as usage:
                code = process.wait()
        _empty(process.pid)
        if code:
            raise RuntimeError(f"{contestant.name} ended with {code}: {log.read_text(errors='replace')[-3000:]}")
        values = json.loads(result.read_text())
    assert len(values["labels"]) == num_images, f"{contestant.name}: {len(values['labels'])} of {num_images} labels"
    begin_s, end_s, num_in_window = _window(values["done"])
    cpu_ms_by_kind: dict[str, float] = {}
    for pid, cpu_s in usage.cpu_by_pid_between(begin_s, end_s).items():
        kind = usage.kind(pid)
        cpu_ms_by_kind[kind] = cpu_ms_by_kind.get(kind, 0.0) + cpu_s / num_in_window * 1e3
    return Run(
        images_per_s_cold=num_images / (values["ended_s"] - started_s),
        images_per_s=num_in_window / (end_s - begin_s),
        cpu_ms_by_kind=cpu_ms_by_kind,
        values=values,
        usage=usage,
        num_images=num_images,
    )


def _empty(session: int) -> None:
    """Wait for what the first process of a session leaves behind, then kill it."""
    deadline_s = time.monotonic() + 10
    while pids := cluster.processes(session, ""):
        if time.monotonic() > deadline_s:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.2)


def _window(done: list[tuple[float, int]]) -> tuple[float, float, float]:
    """From (time, images) of batches: when the window of all images begins and ends, and the images in it."""
    total = sum(number for _, number in done)
    times = []
    for share in WINDOW:
        count, last_s = 0, done[0][0]
        for at_s, number in done:
            if count + number >= share * total:
                times.append(last_s + (at_s - last_s) * (share * total - count) / number)
                break
            count, last_s = count + number, at_s
    return times[0], times[1], (WINDOW[1] - WINDOW[0]) * total


# --- the note -----------------------------------------------------------------------------------------------------


def _table(contestants: list[Contestant], runs: dict[str, list[Run]]) -> str:
    lines = [
        "| | cold, images/s | steady, images/s | per core | of the limit | CPU per image | driver"
        " | largest worker: RSS, heap | heap of all | object store per image | best label as ours |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for each in contestants:
        of = runs[each.name]
        # The limit of as many cores, round by round: what disturbs one disturbs the next.
        limit = next((runs[one.name] for one in contestants if one.num_cores == each.num_cores), None)
        assert limit is not None
        shares = [run.images_per_s / other.images_per_s for run, other in zip(of, limit, strict=True)]
        workers = [worker for run in of for worker in run.usage.workers()]
        rss_mb = max((worker.peak_rss_bytes for worker in workers), default=0) / 1e6
        heap_mb = max((worker.peak_heap_bytes for worker in workers), default=0) / 1e6
        driver_mb = max(run.usage.driver().peak_rss_bytes for run in of) / 1e6
        all_mb = max(run.usage.peak_heap_bytes for run in of) / 1e6
        cells = [
            each.name,
            _spread(of, lambda run: run.images_per_s_cold),
            _spread(of, lambda run: run.images_per_s),
            f"{statistics.median(run.images_per_s for run in of) / each.num_cores:.0f}",
            f"{statistics.median(shares):.0%} ({min(shares):.0%} to {max(shares):.0%})",
            f"{_spread(of, lambda run: run.cpu_ms, digits=2)} ms",
            f"{driver_mb:.0f} MB",
            f"{rss_mb:.0f} MB, {heap_mb:.0f} MB" if workers else "",
            f"{all_mb:.0f} MB",
            _object_store(of),
            _agreement(of, runs.get("ours")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + _stages(runs)


def _spread(runs: list[Run], of: Callable[[Run], float], digits: int = 1) -> str:
    values = [of(run) for run in runs]
    median, lowest, highest = (f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values)))
    return f"{median} ({lowest} to {highest})" if len(runs) > 1 else median


def _object_store(runs: list[Run]) -> str:
    found = [run.values["object_store_bytes"] / run.num_images for run in runs if "object_store_bytes" in run.values]
    return f"{statistics.median(found) / 1e3:.0f} kB" if found else ""


def _agreement(runs: list[Run], ours: list[Run] | None) -> str:
    if ours is None:
        return ""
    expected, found = ours[0].values["labels"], runs[0].values["labels"]
    share = sum(found[name] == label for name, label in expected.items()) / len(expected)
    assert share >= MIN_AGREEMENT, f"{share:.1%} of the best labels agree"
    return f"{share:.1%}"


def _stages(runs: dict[str, list[Run]]) -> str:
    """Where the time of those goes that tell."""
    lines = []
    for name, of in runs.items():
        if "stage_s" in of[0].values:
            stages = {
                stage: statistics.median(run.values["stage_s"][stage] / run.num_images * 1e3 for run in of)
                for stage in of[0].values["stage_s"]
            }
            text = ", ".join(f"{stage.removesuffix('_s')} {ms:.2f}" for stage, ms in stages.items())
            lines.append(f"* {name}: {text}{_by_kind(of)}")
    return "\n\nms per image in each stage, summed over workers, start-up and end included:\n\n" + "\n".join(lines)


def _by_kind(runs: list[Run]) -> str:
    """Of those with processes of several kinds."""
    kinds = sorted(set().union(*(run.cpu_ms_by_kind for run in runs)))
    by_round = {kind: [run.cpu_ms_by_kind.get(kind, 0.0) for run in runs] for kind in kinds}
    shown = ", ".join(
        f"{kind} {' '.join(f'{ms:.2f}' for ms in of)}" for kind, of in by_round.items() if max(of) >= 0.005
    )
    return f"; ms of CPU in the window, round by round: {shown}" if "the wave" in kinds else ""


def _head(began_at: datetime, daft: Path | None) -> str:
    memory_gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    versions = ", ".join(f"{name} {version(name)}" for name in ("ray", "torch", "transformers", "pillow"))
    if daft is not None:
        (info,) = daft.glob("daft-*.dist-info")
        versions += f", daft {info.name.removesuffix('.dist-info').removeprefix('daft-')}"
    command = " ".join(["python", "tests/benchmarks/peers.py", *_public(sys.argv[1:])])
    definitions = (__doc__ or "").partition("the same for all:\n")[2].rstrip()
    return (
        f"# Ours beside its peers\n\n    {command}\n\n{began_at:%Y-%m-%d}, commit {machine.commit()};"
        f" {machine.cpu_name()}, {os.cpu_count()} cores, {memory_gib:.0f} GiB; Python {platform.python_version()},"
        f" {versions}. Medians,"
        f" lowest and highest of the rounds, all contestants in turn.\n\n```\n{definitions}\n```"
    )


def _public(arguments: list[str]) -> list[str]:
    """Without the paths of this machine."""
    return ["FOLDER" if argument.startswith("/") else argument for argument in arguments]


if __name__ == "__main__":
    main()
