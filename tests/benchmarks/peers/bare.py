"""The limit, for `peers.py`: what is unavoidable per image in a plain loop, one process per core, one thread each.

`--by pillow` is Pillow's decode, the checkpoint's resize and crop, and the network of transformers behind a
normalization in place; `--by pipeline` the pipeline's functions, which check every file first, give the same pixels,
and also embeddings. From S3, each object is fetched by the pipeline's client, its length and MD5 checked.
"""

import argparse
import io
import json
import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline import checkpoint, storage
from pipeline.checkpoint import Checkpoint, PreprocessSpec
from pipeline.decode import DEFAULT_LIMITS
from pipeline.picture import Recipe, make_picture
from pipeline.preprocess import spec_from_config


def main() -> None:
    """Label a folder or bucket."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("--photos", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--by", choices=("pillow", "pipeline"), required=True)
    parser.add_argument("--num-processes", type=int, required=True)
    parser.add_argument("--preprocess", choices=("checkpoint", "fast"), default="checkpoint", help="of the pipeline")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(options.num_processes)
    with context.Pool(options.num_processes, initializer=_keep, initargs=(barrier,)) as pool:
        found = pool.starmap(_label, [(options, number) for number in range(options.num_processes)], chunksize=1)
    values = {
        "ended_s": max(each["done"][-1][0] for each in found),
        "done": sorted(point for each in found for point in each["done"]),
        "labels": {name: label for each in found for name, label in each["labels"].items()},
        "stage_s": {name: sum(each["stage_s"][name] for each in found) for name in found[0]["stage_s"]},
    }
    options.result.write_text(json.dumps(values))


_BARRIERS: list[Barrier] = []
"""That of this process of the pool."""


def _keep(barrier: Barrier) -> None:
    _BARRIERS.append(barrier)


def _label(options: argparse.Namespace, number: int) -> dict[str, Any]:
    from pipeline import model

    model.prepare_process(1)
    found = checkpoint.resolve(options.model)
    spec = spec_from_config(found.preprocessor_config, mode=options.preprocess, input_px=found.input_px)
    if options.by == "pillow":
        make, predict = _pillow(spec), _transformers(found, spec, options.batch_size)
    else:
        make, predict = _pipeline(spec), _classifier(found, spec)
    pixels = np.zeros((options.batch_size, spec.input_px, spec.input_px, 3), np.uint8)
    store = storage.connect(options.photos)
    infos = [info for page in store.list_pages() for info in page][number :: options.num_processes]
    predict(pixels)
    _BARRIERS[0].wait()
    done, labels = [], {}
    stage_s = {"fetch_s": 0.0, "decode_s": 0.0, "label_s": 0.0}
    for start in range(0, len(infos), options.batch_size):
        batch = infos[start : start + options.batch_size]
        begun_s = time.perf_counter()
        encoded = [store.get(info.key, listed=info) for info in batch]
        fetched_s = time.perf_counter()
        for position, data in enumerate(encoded):
            pixels[position] = make(data)
        made_s = time.perf_counter()
        best = predict(pixels)
        ended_s = time.perf_counter()
        stage_s["fetch_s"] += fetched_s - begun_s
        stage_s["decode_s"] += made_s - fetched_s
        stage_s["label_s"] += ended_s - made_s
        done.append((time.time(), len(batch)))
        for info, label_id in zip(batch, best, strict=False):
            labels[info.key.rpartition("/")[2]] = found.label_names[label_id]
    return {"done": done, "labels": labels, "stage_s": stage_s}


def _pillow(spec: PreprocessSpec) -> Callable[[bytes], Any]:
    height_px, width_px = spec.resize_hw_px
    assert spec.resize == "squash"
    assert spec.crop_px is not None
    left, top = (width_px - spec.crop_px) // 2, (height_px - spec.crop_px) // 2
    box = (left, top, left + spec.crop_px, top + spec.crop_px)

    def make(data: bytes) -> Any:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        return np.asarray(image.resize((width_px, height_px), spec.resample).crop(box))

    return make


def _pipeline(spec: PreprocessSpec) -> Callable[[bytes], Any]:
    recipe = Recipe(spec=spec, limits=DEFAULT_LIMITS)
    return lambda data: make_picture(data, recipe)[0]


def _transformers(found: Checkpoint, spec: PreprocessSpec, batch_size: int) -> Callable[[Any], list[int]]:
    import torch
    from transformers import AutoModelForImageClassification

    network: Any = AutoModelForImageClassification.from_pretrained(found.folder).eval()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (spec.image_mean, spec.image_std))
    normalized_BCHW = torch.empty(batch_size, 3, spec.input_px, spec.input_px)

    def predict(pixels_BHWC: Any) -> list[int]:
        with torch.inference_mode():
            normalized_BCHW.copy_(torch.from_numpy(pixels_BHWC).permute(0, 3, 1, 2)).div_(255).sub_(mean).div_(std)
            scores_BK = torch.softmax(network(normalized_BCHW).logits, dim=1)
            ids: list[int] = scores_BK.topk(5).indices[:, 0].tolist()
            return ids

    return predict


def _classifier(found: Checkpoint, spec: PreprocessSpec) -> Callable[[Any], list[int]]:
    from pipeline import model

    classifier = model.load(found, spec, pooling="pooled", device="cpu", precision="fp32")

    def predict(pixels_BHWC: Any) -> list[int]:
        ids: list[int] = model.predict(classifier, pixels_BHWC, top_k=5).label_ids_Bk[:, 0].tolist()
        return ids

    return predict


if __name__ == "__main__":
    main()
