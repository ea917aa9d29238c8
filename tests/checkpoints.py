"""Checkpoint folders of the published shapes: random weights, and the files' text as it was published in 2021.

Written without transformers, so that the tensor names, the fields and their formatting are those of the hub's files and
not what the installed version's `save_pretrained` writes.
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load_file, save_file

from pipeline.checkpoint import Architecture, PreprocessSpec


class Published(NamedTuple):
    """One checkpoint of the family. The text fields are byte for byte those of its preprocessor_config.json."""

    name: str
    architecture: Architecture
    hidden: int
    input_px: int
    preprocessor: str


_VIT_TEXT = """{
  "do_normalize": true,
  "do_resize": true,
  "image_mean": [
    0.5,
    0.5,
    0.5
  ],
  "image_std": [
    0.5,
    0.5,
    0.5
  ],
  "size": %d
}
"""
"""160 bytes on the hub: a ViT feature extractor, so bilinear, without a crop, and with mean and std 0.5."""
_DEIT_TEXT = """{
  "crop_size": %d,
  "do_center_crop": true,
  "do_normalize": true,
  "do_resize": true,
  "feature_extractor_type": "DeiTFeatureExtractor",
  "image_mean": [
    0.485,
    0.456,
    0.406
  ],
  "image_std": [
    0.229,
    0.224,
    0.225
  ],
  "resample": 3,
  "size": %d
}
"""
"""287 bytes on the hub."""

_VIT: Architecture = "ViTForImageClassification"
_ONE_HEAD: Architecture = "DeiTForImageClassification"
_TWO_HEADS: Architecture = "DeiTForImageClassificationWithTeacher"

PUBLISHED = [
    Published("facebook/deit-tiny-patch16-224", _VIT, 192, 224, _VIT_TEXT % 224),
    Published("facebook/deit-small-patch16-224", _VIT, 384, 224, _VIT_TEXT % 224),
    Published("facebook/deit-base-patch16-224", _VIT, 768, 224, _VIT_TEXT % 224),
    Published("facebook/deit-tiny-distilled-patch16-224", _TWO_HEADS, 192, 224, _DEIT_TEXT % (224, 256)),
    Published("facebook/deit-small-distilled-patch16-224", _TWO_HEADS, 384, 224, _DEIT_TEXT % (224, 256)),
    Published("facebook/deit-base-distilled-patch16-224", _TWO_HEADS, 768, 224, _DEIT_TEXT % (224, 256)),
    Published("facebook/deit-base-patch16-384", _VIT, 768, 384, _VIT_TEXT % 384),
    Published("facebook/deit-base-distilled-patch16-384", _TWO_HEADS, 768, 384, _DEIT_TEXT % (384, 438)),
]


def write_published(folder: Path, published: Published) -> Path:
    """A folder as on the hub: 12 layers, 1000 labels."""
    return write_checkpoint(
        folder,
        architecture=published.architecture,
        hidden=published.hidden,
        num_heads=published.hidden // 64,
        input_px=published.input_px,
        preprocessor=published.preprocessor,
    )


def write_small(folder: Path, architecture: Architecture = _TWO_HEADS, *, seed: int = 0) -> Path:
    """A folder of a model that computes in milliseconds: 32 px, patches of 8, 2 layers, 7 labels."""
    return write_checkpoint(
        folder,
        architecture=architecture,
        hidden=24,
        num_heads=3,
        num_layers=2,
        input_px=32,
        patch_px=8,
        num_labels=7,
        preprocessor=_DEIT_TEXT % (32, 36),
        seed=seed,
    )


def write_checkpoint(
    folder: Path,
    *,
    architecture: Architecture,
    hidden: int,
    num_heads: int,
    input_px: int,
    preprocessor: str,
    num_layers: int = 12,
    patch_px: int = 16,
    num_labels: int = 1000,
    seed: int = 0,
) -> Path:
    """config.json, preprocessor_config.json and model.safetensors with random weights; gives `folder`."""
    labels = {str(number): f"thing {number}, also called {number:b}" for number in range(num_labels)}
    config = {
        "architectures": [architecture],
        "attention_probs_dropout_prob": 0.0,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "hidden_size": hidden,
        "id2label": labels,
        "image_size": input_px,
        "initializer_range": 0.02,
        "intermediate_size": 4 * hidden,
        "label2id": {name: int(number) for number, name in labels.items()},
        "layer_norm_eps": 1e-12,
        "model_type": "vit" if architecture == _VIT else "deit",
        "num_attention_heads": num_heads,
        "num_channels": 3,
        "num_hidden_layers": num_layers,
        "patch_size": patch_px,
        "transformers_version": "4.6.0.dev0",
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "preprocessor_config.json").write_text(preprocessor)
    save_weights(folder, random_tensors(config, seed))
    return folder


def random_tensors(config: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Tensors under the names of 2021. Scaled so that attention and logits are neither flat nor saturated."""
    hidden, patch_px, num_labels = config["hidden_size"], config["patch_size"], len(config["id2label"])
    prefix = config["model_type"]
    num_tokens = (config["image_size"] // patch_px) ** 2 + (1 if prefix == "vit" else 2)
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}.embeddings.cls_token": (1, 1, hidden),
        f"{prefix}.embeddings.position_embeddings": (1, num_tokens, hidden),
        f"{prefix}.embeddings.patch_embeddings.projection.weight": (hidden, 3, patch_px, patch_px),
        f"{prefix}.embeddings.patch_embeddings.projection.bias": (hidden,),
    }
    if prefix == "deit":
        shapes[f"{prefix}.embeddings.distillation_token"] = (1, 1, hidden)
    for number in range(config["num_hidden_layers"]):
        layer = f"{prefix}.encoder.layer.{number}"
        shapes |= _linear(f"{layer}.attention.attention.query", hidden, hidden)
        shapes |= _linear(f"{layer}.attention.attention.key", hidden, hidden)
        shapes |= _linear(f"{layer}.attention.attention.value", hidden, hidden)
        shapes |= _linear(f"{layer}.attention.output.dense", hidden, hidden)
        shapes |= _linear(f"{layer}.intermediate.dense", 4 * hidden, hidden)
        shapes |= _linear(f"{layer}.output.dense", hidden, 4 * hidden)
        shapes |= _norm(f"{layer}.layernorm_before", hidden) | _norm(f"{layer}.layernorm_after", hidden)
    shapes |= _norm(f"{prefix}.layernorm", hidden)
    two_heads = config["architectures"] == [_TWO_HEADS]
    for head in ("cls_classifier", "distillation_classifier") if two_heads else ("classifier",):
        shapes |= _linear(head, num_labels, hidden)
    rng = np.random.default_rng(seed)
    return {name: _random(rng, name, shape) for name, shape in shapes.items()}


def save_weights(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    """model.safetensors as the hub's converter writes it."""
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def load_weights(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of a folder by name."""
    return load_file(folder / "model.safetensors")


def edit_config(folder: Path, **changes: Any) -> None:
    """Set fields of config.json; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}, indent=2))


def squash_spec(input_px: int, *, mean: float = 0.5, std: float = 0.5) -> PreprocessSpec:
    """A spec whose resize and crop do not matter, for pixels that already have the model's size."""
    return PreprocessSpec(
        mode="checkpoint",
        resize="squash",
        resize_hw_px=(input_px, input_px),
        resample=3,
        crop_px=None,
        input_px=input_px,
        rescale_factor=1 / 255,
        image_mean=(mean, mean, mean),
        image_std=(std, std, std),
    )


def _linear(name: str, num_out: int, num_in: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (num_out, num_in), f"{name}.bias": (num_out,)}


def _norm(name: str, size: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def _random(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    values = rng.standard_normal(shape, dtype=np.float32)
    if "layernorm" in name and name.endswith("weight"):
        return (1 + np.float32(0.1) * values).astype(np.float32)
    if len(shape) in (2, 4):
        # Variance-preserving by fan-in.
        return (values / np.float32(math.sqrt(math.prod(shape[1:])))).astype(np.float32)
    return (np.float32(0.1) * values).astype(np.float32)
