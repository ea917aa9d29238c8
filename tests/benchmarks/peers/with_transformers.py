"""The Hugging Face pipeline as its documentation streams a dataset through it, for `peers.py`.

The dataset gives paths, which the pipeline opens itself; `num_workers` processes preprocess, this one predicts.
"""

import argparse
import json
import os
import time
from pathlib import Path

from torch.utils.data import Dataset
from transformers import pipeline


class Photos(Dataset[str]):
    """Paths of a folder's files."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(map(str, folder.iterdir()))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> str:
        return self.paths[number]


def main() -> None:
    """Label a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("--photos", type=Path, required=True)
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
