"""Ray Data's documented example of batch inference with a Vision Transformer of Hugging Face, for `peers.py`.

From "Image Classification Batch Inference with Huggingface Vision Transformer": read_images, and map_batches with a
class around `pipeline("image-classification")`. Differences: paths are kept so that labels can be compared, five labels
instead of one, as many replicas as cores but one, because without GPUs replicas and readers share the cores, and a Ray
of its own.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs
import ray
from ours import object_store_bytes
from PIL import Image


class ImageClassifier:
    """The example's class."""

    def __init__(self, model: str, batch_size: int) -> None:
        from transformers import pipeline

        self.classifier = pipeline("image-classification", model=model, device="cpu")
        self.batch_size = batch_size

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Convert the numpy arrays to PIL images, which the pipeline expects."""
        images = [Image.fromarray(image_array) for image_array in batch["image"]]
        outputs = self.classifier(images, top_k=5, batch_size=self.batch_size)
        batch["score"] = [[each["score"] for each in output] for output in outputs]
        batch["label"] = [[each["label"] for each in output] for output in outputs]
        # When the batch is done; the rows of many batches reach the driver at once.
        batch["done_s"] = np.full(len(outputs), time.time())
        return batch


def main() -> None:
    """Label a folder or bucket."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("--photos", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    options = parser.parse_args()
    ray.init(address="local")  # or it would join whatever cluster runs on this machine
    filesystem = None
    if options.photos.startswith("s3://"):
        scheme, _, host = os.environ["AWS_ENDPOINT_URL"].partition("://")
        filesystem = pyarrow.fs.S3FileSystem(endpoint_override=host, scheme=scheme)
    ds = ray.data.read_images(
        options.photos.removeprefix("s3://"), filesystem=filesystem, mode="RGB", include_paths=True
    )
    predictions = ds.map_batches(
        ImageClassifier,
        fn_constructor_args=(options.model, options.batch_size),
        compute=ray.data.ActorPoolStrategy(size=max(1, (os.cpu_count() or 1) - 1)),
        batch_size=options.batch_size,
    )
    done: list[tuple[float, int]] = []
    labels: dict[str, str] = {}
    for batch in predictions.drop_columns(["image"]).iter_batches(batch_size=None):
        done += [(done_s, 1) for done_s in batch["done_s"].tolist()]
        labels |= {
            str(path).rpartition("/")[2]: str(label[0])
            for path, label in zip(batch["path"], batch["label"], strict=True)
        }
    values = {
        "ended_s": time.time(),
        "done": sorted(done),
        "labels": labels,
        "object_store_bytes": object_store_bytes(),
    }
    options.result.write_text(json.dumps(values))


if __name__ == "__main__":
    main()
