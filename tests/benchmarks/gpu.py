"""What one CUDA device does with the eight checkpoints, and how many CPU cores it takes to feed it.

    python tests/benchmarks/gpu.py --photos FOLDER --out tests/benchmarks/gpu.md --json gpu.json

Needs a checkout, torch 2.11 or newer, transformers 5.17 or newer and what `pipeline.label` imports: no Ray. Per shape:

  ceiling   forward passes alone: uint8 pixels that are on the device already -> logits and embeddings that stay there,
            the fastest of the batch sizes tried, eager and compiled, which includes a CUDA graph
  actor     `pipeline.label.Labeler`, as a run uses it: units of uint8 pixels in host memory, as many at once as the
            engine gives it -> labels, scores and embeddings in host memory
  FLOP/s    matrix products of the forward pass, two per multiplication and addition, at the ceiling; beside a product
            of two square matrices of the same precision
  overlap   a pinned copy of a batch to the device while the one before it is computed: the share of the shorter of
            both that is hidden; only on a GPU
  cores     images/s of the actor by images/s of a core that decodes and resizes for this shape, all cores busy

With --ray-images, `jobs/label_bucket.py` labels so many JPEGs from a local folder, too, where Ray is installed. Random
weights unless --weights has real ones. It also runs on CPU, at small size, which is how the tests run it.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from io import BytesIO
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import checkpoints
import machine
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import transformers
from checkpoints import PUBLISHED, Published
from PIL import Image

from pipeline import checkpoint, model, plan, predictor, schema
from pipeline.checkpoint import Checkpoint, PreprocessSpec
from pipeline.decode import DEFAULT_LIMITS
from pipeline.label import CALLS_PER_ACTOR, Device, Labeler, compute_precision
from pipeline.model import Precision
from pipeline.picture import Recipe, make_picture
from pipeline.preprocess import spec_from_config

ROOT = Path(__file__).resolve().parent.parent.parent
NUM_LAYERS = 12
PHOTO_SIZE_PX = (500, 375)
BATCH_SIZES: dict[Device, list[int]] = {"cuda": [128, 256, 512, 1024], "cpu": [32]}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What was measured for one shape; None where it was not asked for or needs a GPU."""

    name: str
    gflop_per_image: float
    ceiling_images_per_s: float
    ceiling_batch_size: int
    is_ceiling_compiled: bool
    actor_images_per_s: float
    is_actor_compiled: bool
    actor_share_of_ceiling: float
    tflop_per_s: float
    share_of_matrix_product: float
    copy_images_per_s: float | None
    hidden_share_of_copy: float | None
    decode_images_per_s_per_core: float
    cores_per_device: float
    ray_images_per_s: float | None


def main() -> None:
    """Measure beside processes that decode, forked before this one computes anything or has a device."""
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        _measure_all(pool)


def _measure_all(pool: Pool) -> None:
    """Measure the shapes asked for, print the note, write it and its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", action="append", help="only shapes whose name holds this; may be repeated")
    parser.add_argument("--weights", type=Path, help="folder with checkpoints named as on the hub, without the owner")
    parser.add_argument("--photos", type=Path, help="real JPEGs to decode; otherwise made ones of 500 x 375 pixels")
    parser.add_argument("--num-photos", type=int, default=256)
    parser.add_argument("--batch-size", type=int, action="append", help="to look for the ceiling; may be repeated")
    parser.add_argument("--actor-batch-size", type=int, help="otherwise the actor's own")
    parser.add_argument("--unit-images", type=int, help="images in a unit of the actor; otherwise as a run has")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each measurement")
    parser.add_argument("--matrix-size", type=int, default=8192)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="unset: on a GPU")
    parser.add_argument("--ray-images", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write a Markdown note there")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    if options.compile is None:
        options.compile = options.device == "cuda"
    began_at = datetime.now(UTC)
    precision = compute_precision("auto", options.device)
    model.prepare_process(None)
    photos = _photos(options.photos, options.num_photos)
    product_flop_per_s = _matrix_product_flop_per_s(options, precision)
    shapes = [each for each in PUBLISHED if options.only is None or any(part in each.name for part in options.only)]
    found = []
    for shape in shapes:
        found.append(_measure(options, shape, precision, photos, product_flop_per_s, pool))
        print(found[-1], file=sys.stderr, flush=True)
    facts = {
        "measured_at": f"{began_at:%Y-%m-%d}",
        "commit": machine.commit(),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {machine.cpu_name()}",
        "num_cores": os.cpu_count(),
        "cpu": machine.cpu_name(),
        "precision": precision,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "photos": f"{len(photos)} {'real' if options.photos else 'made'}",
        "has_real_weights": options.weights is not None,
        "matrix_size": options.matrix_size,
        "matrix_product_tflop_per_s": product_flop_per_s / 1e12,
        "shapes": [asdict(each) for each in found],
    }
    note = _note(facts, found)
    print(note)
    if options.json is not None:
        options.json.write_text(json.dumps(facts, indent=1))
    if options.out is not None:
        options.out.write_text(note)


def _measure(
    options: argparse.Namespace,
    shape: Published,
    precision: Precision,
    photos: list[bytes],
    product_flop_per_s: float,
    pool: Pool,
) -> Figures:
    torch.compiler.reset()  # as in a process of its own
    with tempfile.TemporaryDirectory() as temporary:
        name = shape.name.rpartition("/")[2]
        folder = (
            options.weights / name if options.weights else checkpoints.write_published(Path(temporary) / name, shape)
        )
        found = checkpoint.resolve(str(folder))
        spec = spec_from_config(found.preprocessor_config, mode="checkpoint", input_px=found.input_px)
        gflop = gflop_per_image(shape, len(found.label_names))
        ceiling, batch_size, is_compiled = _ceiling(options, found, spec, precision)
        copy_images_per_s, hidden = _overlap(options, found, spec, precision, batch_size)
        actor, is_actor_compiled = _actor(options, found, spec)
        torch.cuda.empty_cache()  # of which the job below measures what is free
        decode = _decode_per_core(photos, spec, options.seconds, pool)
        by_ray = _by_ray(options, folder, photos, Path(temporary)) if options.ray_images else None
    return Figures(
        name=shape.name,
        gflop_per_image=gflop,
        ceiling_images_per_s=ceiling,
        ceiling_batch_size=batch_size,
        is_ceiling_compiled=is_compiled,
        actor_images_per_s=actor,
        is_actor_compiled=is_actor_compiled,
        actor_share_of_ceiling=actor / ceiling,
        tflop_per_s=ceiling * gflop / 1e3,
        share_of_matrix_product=ceiling * gflop * 1e9 / product_flop_per_s,
        copy_images_per_s=copy_images_per_s,
        hidden_share_of_copy=hidden,
        decode_images_per_s_per_core=decode,
        cores_per_device=actor / decode,
        ray_images_per_s=by_ray,
    )


def gflop_per_image(shape: Published, num_labels: int) -> float:
    """Of the matrix products: per layer 24 T D² in projections and MLP, 4 T² D in attention; the patches, the heads."""
    dim, num_patches = shape.hidden, (shape.input_px // 16) ** 2
    num_heads = 2 if shape.architecture == "DeiTForImageClassificationWithTeacher" else 1
    num_tokens = num_patches + (1 if shape.architecture == "ViTForImageClassification" else 2)
    per_layer = 24 * num_tokens * dim**2 + 4 * num_tokens**2 * dim
    patches, heads = 2 * num_patches * (16 * 16 * 3) * dim, 2 * num_heads * dim * num_labels
    return (NUM_LAYERS * per_layer + patches + heads) / 1e9


# --- on the device ------------------------------------------------------------------------------------------------


def _calls_per_s(call: Callable[[], Any], device: Device, seconds: float) -> float:
    """After two calls that do not count, and with everything done at the end."""
    for _ in range(2):
        call()
    _wait(device)
    num_calls, started_s = 0, time.perf_counter()
    while num_calls == 0 or time.perf_counter() - started_s < seconds:
        # Enough at once that waiting for the device does not keep it waiting.
        for _ in range(4):
            call()
        num_calls += 4
        _wait(device)
    return num_calls / (time.perf_counter() - started_s)


def _wait(device: Device) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _matrix_product_flop_per_s(options: argparse.Namespace, precision: Precision) -> float:
    edge: int = options.matrix_size
    left, right = (torch.randn(edge, edge, device=options.device, dtype=DTYPES[precision]) for _ in range(2))
    return 2.0 * edge**3 * _calls_per_s(lambda: left @ right, options.device, options.seconds)


def _ceiling(
    options: argparse.Namespace, found: Checkpoint, spec: PreprocessSpec, precision: Precision
) -> tuple[float, int, bool]:
    """Images per second of the fastest forward pass, its batch size, and whether it is compiled."""
    classifier = model.load(found, spec, pooling="pooled", device=options.device, precision=precision)
    best = (0.0, 0, False)
    for batch_size in options.batch_size or BATCH_SIZES[options.device]:
        pixels = torch.from_numpy(_pixels(batch_size, spec)).to(options.device)
        for is_compiled in (False, True) if options.compile else (False,):
            forward: Callable[..., Any] = predictor.compiled(classifier, pixels.shape) if is_compiled else classifier
            with torch.inference_mode():
                rate = batch_size * _calls_per_s(lambda: forward(pixels), options.device, options.seconds)  # noqa: B023
            best = max(best, (rate, batch_size, forward is not classifier))
    return best


def _overlap(
    options: argparse.Namespace, found: Checkpoint, spec: PreprocessSpec, precision: Precision, batch_size: int
) -> tuple[float | None, float | None]:
    """Images per second that a pinned copy brings to the device, and how much of the shorter of both is hidden."""
    if options.device != "cuda":
        return None, None
    classifier = model.load(found, spec, pooling="pooled", device="cuda", precision=precision)
    host = torch.from_numpy(_pixels(batch_size, spec)).pin_memory()
    ahead, current = torch.empty_like(host, device="cuda"), torch.zeros_like(host, device="cuda")
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def copy() -> None:
        with torch.cuda.stream(stream):
            ahead.copy_(host, non_blocking=True)

    def both() -> None:
        copy()
        classifier(current)

    with torch.inference_mode():
        copy_s, compute_s, both_s = (
            1 / _calls_per_s(call, "cuda", options.seconds) for call in (copy, lambda: classifier(current), both)
        )
    return batch_size / copy_s, (copy_s + compute_s - both_s) / min(copy_s, compute_s)


def _actor(options: argparse.Namespace, found: Checkpoint, spec: PreprocessSpec) -> tuple[float, bool]:
    """Images per second of the actor on units in host memory, and whether it computes compiled."""
    labeler = Labeler(
        model=found.source,
        revision=found.revision,
        weights_digest=found.weights_digest,
        spec=spec,
        pooling="pooled",
        top_k=5,
        device=options.device,
        batch_size=options.actor_batch_size,
        num_threads=torch.get_num_threads(),
        is_compiled=options.compile,
    )
    num_images = options.unit_images or plan.UnitSizes.of(spec.input_px, 2).max_unit_rows
    num_calls = CALLS_PER_ACTOR[options.device]
    # Several per call, so that no cache holds the pixels of the next.
    units = [[_unit(num_images, spec) for _ in range(3)] for _ in range(num_calls)]
    labeled = labeler(units[0][0])
    assert len(labeled) == num_images
    assert all(len(ids) == 5 for ids in labeled["label_ids"].to_pylist())

    def label_for(mine: list[pa.Table]) -> int:
        deadline_s = time.perf_counter() + options.seconds
        for number, unit in enumerate(itertools.cycle(mine), start=1):
            labeler(unit)
            if time.perf_counter() > deadline_s:
                return number
        raise AssertionError("unreachable")

    with ThreadPoolExecutor(num_calls) as threads:
        started_s = time.perf_counter()
        num_units = sum(threads.map(label_for, units))
        return num_images * num_units / (time.perf_counter() - started_s), labeler.is_compiled


def _pixels(num_images: int, spec: PreprocessSpec) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (num_images, spec.input_px, spec.input_px, 3), dtype=np.uint8)


def _unit(num_images: int, spec: PreprocessSpec) -> pa.Table:
    """A decoded unit (schema.DECODED) of noise."""
    pixels = _pixels(num_images, spec)
    columns = {
        "key": [f"{number}.jpg" for number in range(num_images)],
        "uri": [f"s3://bucket/{number}.jpg" for number in range(num_images)],
        "size_bytes": [100_000] * num_images,
        "width_px": [PHOTO_SIZE_PX[0]] * num_images,
        "height_px": [PHOTO_SIZE_PX[1]] * num_images,
        "pixels": [image.tobytes() for image in pixels],
    }
    return pa.table(
        [pa.array(columns.get(field.name, [None] * num_images), field.type) for field in schema.DECODED],
        schema=schema.DECODED,
    )


# --- beside it ----------------------------------------------------------------------------------------------------


def _photos(folder: Path | None, num_photos: int) -> list[bytes]:
    if folder is not None:
        return [path.read_bytes() for path in sorted(folder.rglob("*.[jJ]*[gG]"))[:num_photos]]
    return [_made_photo(number) for number in range(num_photos)]


def _made_photo(number: int) -> bytes:
    """Colours that change smoothly, and some grain: a JPEG of about 100 kB."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize(PHOTO_SIZE_PX, Image.Resampling.BICUBIC), np.float32)
    grainy = smooth + rng.normal(0, 12, smooth.shape)
    sink = BytesIO()
    Image.fromarray(np.clip(grainy, 0, 255).astype(np.uint8)).save(sink, "JPEG", quality=90)
    return sink.getvalue()


def _decode_per_core(photos: list[bytes], spec: PreprocessSpec, seconds: float, pool: Pool) -> float:
    """Images per second of one core that decodes and resizes, all cores busy."""
    num_cores = os.cpu_count() or 1
    pool.starmap(_decode_for, [(photos, spec, 0.0)] * num_cores, chunksize=1)
    return sum(pool.starmap(_decode_for, [(photos, spec, seconds)] * num_cores, chunksize=1)) / num_cores


def _decode_for(photos: list[bytes], spec: PreprocessSpec, seconds: float) -> float:
    recipe = Recipe(spec=spec, limits=DEFAULT_LIMITS)
    number, started_s = 0, time.perf_counter()
    while number == 0 or time.perf_counter() - started_s < seconds:
        make_picture(photos[number % len(photos)], recipe)
        number += 1
    return number / (time.perf_counter() - started_s)


def _by_ray(options: argparse.Namespace, folder: Path, photos: list[bytes], temporary: Path) -> float:
    """Images per second while labeling, as the job's report says."""
    source, output = temporary / "in", temporary / "out"
    source.mkdir()
    for number in range(options.ray_images):
        (source / f"{number:07d}.jpg").write_bytes(photos[number % len(photos)])
    job = [sys.executable, str(ROOT / "jobs" / "label_bucket.py"), "--input", str(source), "--output", str(output)]
    subprocess.run([*job, "--model", str(folder), "--device", options.device], check=True, stdout=sys.stderr)
    (report,) = output.glob("_runs/*/report.json")
    return float(json.loads(report.read_text())["images_per_s"])


def _note(facts: dict[str, Any], found: list[Figures]) -> str:
    lines = [
        "# One device, all checkpoints",
        "",
        f"    python tests/benchmarks/gpu.py {' '.join(_public(sys.argv[1:]))}",
        "",
        f"{facts['measured_at']}, commit {facts['commit']}; {facts['device']}, {facts['precision']}, torch"
        f" {facts['torch']}, transformers {facts['transformers']}; {facts['num_cores']} cores of {facts['cpu']},"
        f" {facts['photos']} photos; {'real' if facts['has_real_weights'] else 'random'} weights. A product of two"
        f" matrices of {facts['matrix_size']}² does {facts['matrix_product_tflop_per_s']:.2f} TFLOP/s.",
        "",
        "| checkpoint | ceiling, images/s | actor, images/s | of the ceiling | TFLOP/s | of the matrix product"
        " | copies, images/s | hidden | decoding, images/s per core | cores per device | with Ray, images/s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for each in found:
        how = f"{each.ceiling_batch_size} at once, {_compiled_or_eager(each.is_ceiling_compiled)}"
        cells = [
            each.name,
            f"{each.ceiling_images_per_s:,.0f} ({how})",
            f"{each.actor_images_per_s:,.0f} ({_compiled_or_eager(each.is_actor_compiled)})",
            f"{each.actor_share_of_ceiling:.0%}",
            f"{each.tflop_per_s:.2f}",
            f"{each.share_of_matrix_product:.0%}",
            "" if each.copy_images_per_s is None else f"{each.copy_images_per_s:,.0f}",
            "" if each.hidden_share_of_copy is None else f"{each.hidden_share_of_copy:.0%}",
            f"{each.decode_images_per_s_per_core:.0f}",
            f"{each.cores_per_device:.1f}",
            "" if each.ray_images_per_s is None else f"{each.ray_images_per_s:,.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _compiled_or_eager(is_compiled: bool) -> str:
    return "compiled" if is_compiled else "eager"


def _public(arguments: list[str]) -> list[str]:
    """Without the paths of this machine."""
    return ["FOLDER" if argument.startswith("/") else argument for argument in arguments]


if __name__ == "__main__":
    main()
