"""The Hugging Face pipeline as its documentation streams a dataset through it, for `peers.py`.

The dataset gives paths, which the pipeline opens itself, or pictures that it reads from S3 by fsspec; `num_workers`
processes preprocess, this one predicts.
"""

import argparse
import io
import json
import os
import time
from pathlib import Path

import fsspec
from PIL import Image
from torch.utils.data import Dataset
from transformers import pipeline


class Photos(Dataset[str | Image.Image]):
    """The files of a folder or bucket."""

    def __init__(self, url: str) -> None:
        self.protocol = "s3" if url.startswith("s3://") else "file"
        self.paths = sorted(fsspec.filesystem(self.protocol).ls(url, detail=False))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> str | Image.Image:
        if self.protocol == "file":
            return self.paths[number]
        # Of this worker's process; fsspec keeps it.
        return Image.open(io.BytesIO(fsspec.filesystem(self.protocol).cat_file(self.paths[number])))


def main() -> None:
    """Label a folder or bucket."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("--photos", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    options = parser.parse_args()
    classifier = pipeline("image-classification", model=options.model, device="cpu")
    photos = Photos(options.photos)
    done, labels = [], {}
    outputs = classifier(photos, top_k=5, batch_size=options.batch_size, num_workers=os.cpu_count())
    for path, output in zip(photos.paths, outputs, strict=True):
        done.append((time.time(), 1))
        labels[path.rpartition("/")[2]] = output[0]["label"]
    options.result.write_text(json.dumps({"ended_s": time.time(), "done": done, "labels": labels}))


if __name__ == "__main__":
    main()
