#!/usr/bin/env python3
"""Train the checkpoint that `--model demo` names, a tiny distilled DeiT, on drawn pictures; or measure it.

As in the DeiT paper a small convolutional network learns first and teaches: the CLS head learns the drawn class, the
distillation head the teacher's answer. A transformer of this size learns little from 3e4 pictures, so two things
shorten the way. Inside, its patches learn to say what the teacher's layers say at the same place, through matrices that
are thrown away afterwards (the hints of FitNets, arXiv 1412.6550). And its weights start from what image models learn
first: the patch embedding is a cosine transform with almost no mean colour, the position embeddings are waves, and
every head looks at a neighbour.

Everything is seeded: the same versions and kind of processor, with --threads 1, give the same weights.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional
from tqdm import tqdm
from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher

from pipeline.arguments import positive
from pipeline.checkpoint import DEMO, resolve
from pipeline.decode import decode
from pipeline.draw import CLASSES, draw, draw_file
from pipeline.model import load, predict
from pipeline.preprocess import preprocess, spec_from_config

RESIZE_PX, INPUT_PX, PATCH_PX = 73, 64, 8
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TRAIN_SEED, HELD_OUT_SEED = 1, 20_261_122
LABEL_SMOOTHING = 0.05
TEACHER_CHANNELS = 96

DEMO_FOLDER = Path(__file__).parent.parent / "pipeline" / "demo"

HEAD_OFFSETS = (
    ((0, -1), (0, 1), (1, 0)),
    ((-1, 0), (1, 0), (0, 1)),
    ((0, -2), (0, 2), (-2, 0)),
    ((2, 0), (-2, 0), (0, 0)),
)
"""Where each head of each layer looks at first, in patches (down, right) from its own: what a convolution reads."""

HINTS = ((1, 2), (2, 3), (4, 4))
"""(number of layers of the student, index of the teacher's layer): where each patch says what the teacher says."""

PREPROCESSOR = {
    "crop_size": INPUT_PX,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "DeiTFeatureExtractor",
    "image_mean": MEAN,
    "image_std": STD,
    "resample": int(Image.Resampling.BICUBIC),
    "size": RESIZE_PX,
}
"""The text of the published DeiT checkpoints, which is of 2021, with other sizes."""

CONFIG_FIELDS = (
    *("architectures", "attention_probs_dropout_prob", "hidden_act", "hidden_dropout_prob", "hidden_size", "id2label"),
    *("image_size", "initializer_range", "intermediate_size", "label2id", "layer_norm_eps", "model_type"),
    *("num_attention_heads", "num_channels", "num_hidden_layers", "patch_size", "qkv_bias"),
)
"""What the published config files say; `save_pretrained` would add what today's transformers knows."""


class Pictures(NamedTuple):
    """Drawn pictures after the resize and before the crop."""

    pixels_NCHW: torch.Tensor
    """uint8 (N, 3, RESIZE_PX, RESIZE_PX)."""
    labels_N: torch.Tensor
    """int64, positions in CLASSES."""


def draw_pictures(seed: int, num_images: int) -> Pictures:
    """The first `num_images` pictures of the training set `seed`, drawn by all cores."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(mp_context=context) as pool:
        rows = pool.map(_draw_resized, itertools.repeat(seed), range(num_images), chunksize=100)
        drawn = list(tqdm(rows, total=num_images, desc="draw", unit="img", disable=None))
    pixels_NHWC = torch.from_numpy(np.stack([pixels for _, pixels in drawn]))
    return Pictures(pixels_NHWC.permute(0, 3, 1, 2).contiguous(), torch.tensor([label for label, _ in drawn]))


def _draw_resized(seed: int, index: int) -> tuple[int, npt.NDArray[np.uint8]]:
    label, image = draw(np.random.default_rng((seed, index)))
    resized = image.convert("RGB").resize((RESIZE_PX, RESIZE_PX), Image.Resampling.BICUBIC)
    return CLASSES.index(label), np.asarray(resized)


class Batch(NamedTuple):
    """Normalized float32 (B, 3, INPUT_PX, INPUT_PX) and their int64 labels."""

    pixels_BCHW: torch.Tensor
    labels_B: torch.Tensor


def batches(pictures: Pictures, num_epochs: int, batch_size: int, seed: int) -> Iterator[Batch]:
    """Shuffled, augmented batches: any crop, either side, any order of the colour channels, negative or not."""
    generator = torch.Generator().manual_seed(seed)
    channel_orders = list(itertools.permutations(range(3)))

    def chance(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=generator)

    for _ in range(num_epochs):
        order = torch.randperm(len(pictures.labels_N), generator=generator)
        for index_B in torch.split(order, batch_size)[: len(order) // batch_size]:
            top, left = chance(RESIZE_PX - INPUT_PX + 1, 2).tolist()
            pixels = pictures.pixels_NCHW[index_B, :, top : top + INPUT_PX, left : left + INPUT_PX]
            pixels = torch.where(chance(2, batch_size, 1, 1, 1) == 1, pixels.flip(3), pixels)
            pixels = pixels[:, channel_orders[int(chance(6))]]
            yield Batch(normalized(255 - pixels if chance(2) else pixels), pictures.labels_N[index_B])


def normalized(pixels_BCHW: torch.Tensor) -> torch.Tensor:
    """uint8 0 .. 255 -> float32, as the preprocessor config says."""
    return (pixels_BCHW.float() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


class Teacher(nn.Module):
    """Five convolutions; the last three have one place per patch of the student."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [(3, 24, 2), (24, 48, 2), (48, TEACHER_CHANNELS, 2), *[(TEACHER_CHANNELS, TEACHER_CHANNELS, 1)] * 2]
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs))
            for inputs, outputs, stride in sizes
        )
        self.head = nn.Linear(TEACHER_CHANNELS, len(CLASSES))

    def forward(self, pixels_BCHW: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Logits (B, K), and of each layer (B, C, H, W) of mean 0 and variance 1, as normalized before its ReLU."""
        outputs: list[torch.Tensor] = []
        for layer in self.layers:
            outputs.append(layer(outputs[-1].relu() if outputs else pixels_BCHW))
        return self.head(outputs[-1].relu().mean(dim=(2, 3))), outputs


def train_teacher(pictures: Pictures, num_epochs: int, batch_size: int) -> Teacher:
    """A teacher in evaluation mode."""
    teacher = Teacher()
    num_steps = num_epochs * (len(pictures.labels_N) // batch_size)
    optimizer = torch.optim.AdamW(teacher.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=num_steps, pct_start=0.2)
    steps = tqdm(batches(pictures, num_epochs, batch_size, TRAIN_SEED), total=num_steps, desc="teacher")
    for batch in steps:
        loss = functional.cross_entropy(teacher(batch.pixels_BCHW)[0], batch.labels_B, label_smoothing=LABEL_SMOOTHING)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        steps.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return teacher.eval().requires_grad_(False)


def new_student() -> DeiTForImageClassificationWithTeacher:
    """The model with its initial weights."""
    config = DeiTConfig(
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=3,
        intermediate_size=384,
        image_size=INPUT_PX,
        patch_size=PATCH_PX,
        # Some 1/sqrt(hidden_size). The default, 0.02, is for models eight times as wide.
        initializer_range=0.08,
        id2label=dict(enumerate(CLASSES)),
        label2id={label: position for position, label in enumerate(CLASSES)},
        architectures=[DeiTForImageClassificationWithTeacher.__name__],
    )
    student = DeiTForImageClassificationWithTeacher(config)
    side = INPUT_PX // PATCH_PX
    num_position_dims = config.hidden_size // config.num_attention_heads
    embeddings = student.deit.embeddings
    with torch.no_grad():
        embeddings.cls_token[..., num_position_dims:].normal_(0, 0.1)
        embeddings.distillation_token[..., num_position_dims:].normal_(0, 0.1)
        embeddings.position_embeddings[0, 2:, :num_position_dims] = _waves(_grid(side), num_position_dims)
        filters = embeddings.patch_embeddings.projection.weight
        filters[:num_position_dims] = 0
        filters[num_position_dims:] = _cosines(config.hidden_size - num_position_dims)
        for layer, offsets in zip(student.deit.layers, HEAD_OFFSETS, strict=True):
            _look_at_neighbours(layer, offsets, num_position_dims)
    return student


def _look_at_neighbours(layer: nn.Module, offsets: Sequence[tuple[int, int]], num_position_dims: int) -> None:
    """Make each head of the layer find the patch at its offset, by the positions in the first channels."""
    query, key = (layer.get_parameter(f"attention.{name}_proj.weight") for name in "qk")
    query.mul_(0.25)
    key.mul_(0.25)
    for head, offset in enumerate(offsets):
        rows = slice(head * num_position_dims, (head + 1) * num_position_dims)
        query[rows, :num_position_dims] += 1.3 * _shift(offset, num_position_dims)
        key[rows, :num_position_dims] += 1.3 * torch.eye(num_position_dims)
    # What the layer adds leaves the positions readable for the next one.
    for name in ("attention.o_proj.weight", "mlp.fc2.weight"):
        layer.get_parameter(name)[:num_position_dims] = 0


def _grid(side: int) -> torch.Tensor:
    """(row, column) of each patch: float32 (side * side, 2)."""
    return torch.cartesian_prod(torch.arange(side), torch.arange(side)).float()


def _frequencies(dim: int) -> torch.Tensor:
    """All that a row of patches can tell apart: the waves of two places agree there and nowhere else."""
    return math.pi / (INPUT_PX // PATCH_PX) * torch.arange(1, dim // 4 + 1)


def _waves(places_N2: torch.Tensor, dim: int) -> torch.Tensor:
    """Position embeddings (N, dim): for row, then column, the sines and then the cosines of each frequency."""
    angles_N2F = places_N2[:, :, None] * _frequencies(dim)
    return torch.stack([angles_N2F.sin(), angles_N2F.cos()], dim=2).flatten(1)


def _shift(offset: tuple[int, int], dim: int) -> torch.Tensor:
    """The rotation (dim, dim) with `_shift(offset) @ _waves(place) == _waves(place + offset)`."""
    blocks = []
    for step in offset:
        cos, sin = torch.diag((step * _frequencies(dim)).cos()), torch.diag((step * _frequencies(dim)).sin())
        blocks.append(torch.cat([torch.cat([cos, sin], dim=1), torch.cat([-sin, cos], dim=1)]))
    shift: torch.Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return shift


def _cosines(dim: int) -> torch.Tensor:
    """Patch filters (dim, 3, PATCH_PX, PATCH_PX): the lowest frequencies of brightness, and fewer of two colour axes.

    The mean gets a tenth of the weight, because the pictures' shapes, not their colours, tell them apart.
    """
    position = torch.arange(PATCH_PX)
    waves = functional.normalize(torch.cos(math.pi / PATCH_PX * (position[None] + 0.5) * position[:, None]), dim=1)
    by_frequency = sorted(itertools.product(range(PATCH_PX), repeat=2), key=sum)
    axes = functional.normalize(torch.tensor([[0.299, 0.587, 0.114], [0.5, 0, -0.5], [-0.25, 0.5, -0.25]]), dim=1)
    counts = (dim - 2 * (dim // 6), dim // 6, dim // 6)
    filters = [
        (0.5 if row + column else 0.05) * torch.einsum("c,y,x->cyx", axis, waves[row], waves[column])
        for axis, count in zip(axes, counts, strict=True)
        for row, column in by_frequency[:count]
    ]
    return torch.stack(filters)


def train_student(
    pictures: Pictures, teacher: Teacher, num_epochs: int, batch_size: int
) -> DeiTForImageClassificationWithTeacher:
    """A student in evaluation mode."""
    student = new_student()
    student.train()
    hints = nn.ModuleList(nn.Linear(student.config.hidden_size, TEACHER_CHANNELS) for _ in HINTS)
    parameters = [*student.parameters(), *hints.parameters()]
    num_steps = num_epochs * (len(pictures.labels_N) // batch_size)
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.02, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 3e-3, total_steps=num_steps, pct_start=0.1, cycle_momentum=False
    )
    steps = tqdm(batches(pictures, num_epochs, batch_size, TRAIN_SEED), total=num_steps, desc="student")
    for batch in steps:
        with torch.no_grad():
            teacher_logits_BK, features = teacher(batch.pixels_BCHW)
        output = student.deit(batch.pixels_BCHW, output_hidden_states=True)
        tokens_BTD = output.last_hidden_state
        losses = [
            functional.cross_entropy(head(tokens_BTD[:, token]), labels_B, label_smoothing=LABEL_SMOOTHING)
            for head, token, labels_B in (
                (student.cls_classifier, 0, batch.labels_B),
                (student.distillation_classifier, 1, teacher_logits_BK.argmax(dim=1)),
            )
        ]
        distances = [
            functional.mse_loss(hint(output.hidden_states[layer][:, 2:]), features[teacher_layer].flatten(2).mT)
            for hint, (layer, teacher_layer) in zip(hints, HINTS, strict=True)
        ]
        loss = torch.stack(losses).mean() + torch.stack(distances).sum()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        steps.set_postfix(cls=f"{losses[0].item():.3f}", hint=f"{distances[-1].item():.3f}", refresh=False)
    student.train(False)
    return student


def save(student: DeiTForImageClassificationWithTeacher, folder: Path) -> None:
    """Write config.json, preprocessor_config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = json.loads(student.config.to_json_string(use_diff=False))
    for name, content in (
        ("config.json", {field: config[field] for field in CONFIG_FIELDS}),
        ("preprocessor_config.json", PREPROCESSOR),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    save_file(student.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})


class Accuracy(NamedTuple):
    """Shares of held-out pictures, 0 .. 1."""

    top_1: float
    top_5: float
    worst_class: float
    nearest_is_same_class: float
    """Of the other pictures, the one with the closest embedding has the same class."""


def evaluate(model: str, num_images: int, seed: int = HELD_OUT_SEED) -> Accuracy:
    """Measure a checkpoint on drawn files that training never saw, through the pipeline's own stages."""
    checkpoint = resolve(model)
    spec = spec_from_config(checkpoint.preprocessor_config, mode="checkpoint", input_px=checkpoint.input_px)
    classifier = load(checkpoint, spec, pooling="pooled", device="cpu", precision="fp32")
    truths, predictions, embeddings = [], [], []
    for start in tqdm(range(0, num_images, 64), desc="evaluate", disable=None):
        files = [draw_file(seed, index) for index in range(start, min(start + 64, num_images))]
        prediction = predict(classifier, np.stack([preprocess(decode(file.data), spec) for file in files]), top_k=5)
        assert prediction.embedding_BD is not None
        truths += [checkpoint.label_names.index(str(file.label)) for file in files]
        predictions.append(prediction.label_ids_Bk)
        embeddings.append(prediction.embedding_BD)
    truth_N, predicted_Nk, embedding_ND = np.array(truths), np.vstack(predictions), np.vstack(embeddings)
    is_right_N = predicted_Nk[:, 0] == truth_N
    similarity_NN = embedding_ND @ embedding_ND.T
    np.fill_diagonal(similarity_NN, -1)
    return Accuracy(
        top_1=float(is_right_N.mean()),
        top_5=float((predicted_Nk == truth_N[:, None]).any(axis=1).mean()),
        worst_class=min(float(is_right_N[truth_N == label].mean()) for label in np.unique(truth_N)),
        nearest_is_same_class=float((truth_N[similarity_NN.argmax(axis=1)] == truth_N).mean()),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and measure, or with --evaluate only measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--evaluate", action="store_true", help="only measure the checkpoint in --folder, on held-out pictures")
    add("--folder", type=Path, default=DEMO_FOLDER, help="of the checkpoint; default: where --model demo finds it")
    add("--num-images", type=positive, default=32_000, help="drawn for training; default 32000")
    add("--teacher-epochs", type=positive, default=1, help="default 1")
    add("--epochs", type=positive, default=5, help="of the student; default 5")
    add("--batch-size", type=positive, default=64, help="default 64")
    add("--threads", type=positive, default=1, help="of torch; default 1")
    add("--num-held-out", type=positive, default=4000, help="pictures to measure on; default 4000")
    options = parser.parse_args(arguments)
    if options.num_images < options.batch_size:
        parser.error(f"expected --num-images of at least one batch ({options.batch_size}), found {options.num_images}")
    torch.set_num_threads(options.threads)
    started_s = time.monotonic()
    if not options.evaluate:
        torch.manual_seed(TRAIN_SEED)
        pictures = draw_pictures(TRAIN_SEED, options.num_images)
        teacher = train_teacher(pictures, options.teacher_epochs, options.batch_size)
        save(train_student(pictures, teacher, options.epochs, options.batch_size), options.folder)
    model = DEMO if options.folder == DEMO_FOLDER else str(options.folder)
    accuracy = evaluate(model, options.num_held_out)
    print(
        f"{options.folder}, {options.num_held_out} pictures of seed {HELD_OUT_SEED}: top-1 {accuracy.top_1:.4f}, top-5"
        f" {accuracy.top_5:.4f}, worst class {accuracy.worst_class:.3f}, nearest embedding of the same class"
        f" {accuracy.nearest_is_same_class:.4f}; {time.monotonic() - started_s:.0f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
