"""Daft as its documentation reads, decodes and resizes images and runs a model on batches, for `peers.py`.

Decoding and resizing are Daft's own (in Rust; its only resize is another one than the checkpoint's bicubic), the rest
of the preprocessing and the model are a class of `daft.cls`, loaded once.
"""

import argparse
import json
import os
import time
from pathlib import Path

import daft
import numpy as np
import torch
from daft import DataType, Series, col
from daft.functions import decode_image, resize
from daft.io import IOConfig, S3Config
from transformers import AutoImageProcessor, AutoModelForImageClassification


@daft.cls
class ImageClassifier:
    """The checkpoint behind Daft's images."""

    def __init__(self, model: str) -> None:
        self.model = AutoModelForImageClassification.from_pretrained(model).eval()
        processor = AutoImageProcessor.from_pretrained(model)
        self.mean = torch.tensor(processor.image_mean).view(1, 3, 1, 1)
        self.std = torch.tensor(processor.image_std).view(1, 3, 1, 1)
        self.crop_px = processor.crop_size["height"]

    @daft.method.batch(return_dtype=DataType.list(DataType.string()), batch_size=32)
    def classify(self, images: Series) -> list[list[str]]:
        """The five best labels of each image."""
        pixels = np.stack([np.asarray(image) for image in images.to_pylist()])
        margin = (pixels.shape[1] - self.crop_px) // 2
        pixels = pixels[:, margin : margin + self.crop_px, margin : margin + self.crop_px]
        with torch.inference_mode():
            inputs = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / 255
            logits = self.model((inputs - self.mean) / self.std).logits
            ids = torch.softmax(logits, dim=1).topk(5).indices.tolist()
        return [[self.model.config.id2label[each] for each in five] for five in ids]


def main() -> None:
    """Label a folder or bucket."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("--photos", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--edge-px", type=int, required=True)
    options = parser.parse_args()
    classifier = ImageClassifier(options.model)
    io_config = None
    if options.photos.startswith("s3://"):
        s3 = S3Config.from_env().replace(endpoint_url=os.environ["AWS_ENDPOINT_URL"], use_ssl=False)
        io_config = IOConfig(s3=s3)
    frame = (
        daft.from_glob_path(f"{options.photos}/*", io_config=io_config)
        .with_column("image", decode_image(col("path").download(io_config=io_config), mode="RGB"))
        .with_column("image", resize(col("image"), options.edge_px, options.edge_px))
        .with_column("labels", classifier.classify(col("image")))
        .select("path", "labels")
    )
    done, labels = [], {}
    for partition in frame.to_arrow_iter():
        done.append((time.time(), partition.num_rows))
        for row in partition.to_pylist():
            labels[row["path"].rpartition("/")[2]] = row["labels"][0]
    options.result.write_text(json.dumps({"ended_s": time.time(), "done": done, "labels": labels}))


if __name__ == "__main__":
    main()
