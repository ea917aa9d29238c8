"""A checkpoint -> a torch module that turns uint8 pixels into logits and a unit-length embedding in one forward pass.

Shapes: B images, H = W = input size in px, C = 3 channels, T tokens, D embedding dimensions, K labels, k of them kept.

A module of its own because it is the only one that imports transformers, and with `encoder` and `predictor` the only
one that imports torch: 4 s and several hundred MB that only the actors should pay.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    PreTrainedModel,
    ViTForImageClassification,
)
from transformers.utils import logging as transformers_logging

from pipeline import encoder
from pipeline.checkpoint import Checkpoint, Pooling, PreprocessSpec
from pipeline.errors import ConfigError

Precision = Literal["fp32", "bf16"]
Forward = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]

_CLASSES: dict[str, type[PreTrainedModel]] = {
    "ViTForImageClassification": ViTForImageClassification,
    "DeiTForImageClassification": DeiTForImageClassification,
    "DeiTForImageClassificationWithTeacher": DeiTForImageClassificationWithTeacher,
}
_DISTILLED_HEADS = ["cls_classifier", "distillation_classifier"]
_CLS, _DISTILLATION = 0, 1
"""Positions of the two special tokens; a ViT has only the first, and its patches start at 1."""


class Prediction(NamedTuple):
    """What the model says of B images, on the CPU."""

    label_ids_Bk: npt.NDArray[np.int32]
    """By score, descending; equal scores by id, ascending."""
    scores_Bk: npt.NDArray[np.float32]
    """Softmax probabilities over all K labels."""
    embedding_BD: npt.NDArray[np.float32] | None
    """Of length 1; None with pooling `none`."""
    is_finite_B: npt.NDArray[np.bool_]
    """False: the model gave NaN, infinities or no direction, and this row's other values mean nothing."""


class Classifier(torch.nn.Module):
    """uint8 (B, H, W, 3) -> float32 logits (B, K) and float32 unit vectors (B, D), or None with pooling `none`."""

    def __init__(
        self,
        embedding: encoder.Embedding,
        layers: torch.nn.ModuleList,
        norm: torch.nn.Module,
        heads: torch.nn.ModuleList,
        pooling: Pooling,
    ) -> None:
        super().__init__()
        self.embedding, self.layers, self.norm, self._pooling = embedding, layers, norm, pooling
        self.heads = heads
        """In the order of the tokens they read."""

    @classmethod
    def of(cls, network: PreTrainedModel, spec: PreprocessSpec, pooling: Pooling) -> "Classifier":
        """From the weights of one of transformers' models."""
        backbone: Any = network.base_model
        names = _DISTILLED_HEADS if isinstance(network, DeiTForImageClassificationWithTeacher) else ["classifier"]
        return cls(
            encoder.Embedding.of(backbone.embeddings, spec),
            torch.nn.ModuleList([encoder.Layer(each) for each in backbone.layers]),
            backbone.layernorm,
            torch.nn.ModuleList([network.get_submodule(name) for name in names]),
            pooling,
        )

    def forward(
        self, pixels_BHWC: torch.Tensor, run: Callable[..., torch.Tensor] = encoder.run
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See the class. The heads and the pooling work in float32 whatever the layers compute in. `run` is
        `encoder.run`, perhaps compiled.
        """
        tokens_BTD = run(self.embedding, pixels_BHWC)
        for layer in self.layers:
            tokens_BTD = run(layer, tokens_BTD)
        if self._pooling != "patch-mean":
            tokens_BTD = tokens_BTD[:, : self._num_special_tokens]
        tokens_BTD = self.norm(tokens_BTD).float()
        per_head_BK = [head(tokens_BTD[:, token]) for token, head in enumerate(self.heads)]
        logits_BK = torch.stack(per_head_BK).mean(dim=0)
        if self._pooling == "none":
            return logits_BK, None
        pooled_BD = self._pool(tokens_BTD)
        return logits_BK, pooled_BD / torch.linalg.vector_norm(pooled_BD, dim=1, keepdim=True)

    def compiled(self) -> Forward:
        """`forward` for one shape of its input, which its first call compiles."""
        return partial(self, run=torch.compile(encoder.run, dynamic=False))

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.embedding.positions_TD.device

    def with_spec(self, spec: PreprocessSpec) -> "Classifier":
        """The same weights, which are in memory once, behind the normalization of another preprocessing."""
        embedding = self.embedding.with_spec(spec)
        return Classifier(embedding, self.layers, self.norm, self.heads, self._pooling).eval()

    @property
    def _num_special_tokens(self) -> int:
        return self.embedding.special_SD.shape[0]

    def _pool(self, tokens_BTD: torch.Tensor) -> torch.Tensor:
        match self._pooling:
            case "pooled":
                return tokens_BTD[:, : len(self.heads)].mean(dim=1)
            case "cls":
                return tokens_BTD[:, _CLS]
            case "distillation":
                return tokens_BTD[:, _DISTILLATION]
            case _:
                return tokens_BTD[:, self._num_special_tokens :].mean(dim=1)


def load(
    checkpoint: Checkpoint, spec: PreprocessSpec, *, pooling: Pooling, device: str, precision: Precision
) -> Classifier:
    """A `Classifier` in evaluation mode on `device` (`cpu` or `cuda`).

    `pooling` says what the embedding is made of, always after the final layernorm: `pooled` is the mean of the tokens
    that a head reads (CLS; for a distilled model CLS and the distillation token), `patch-mean` that of the patches.
    `precision` is what the backbone computes in; its weights are stored as float32.

    Raises ConfigError for a device that is not there, for `distillation` on a model whose heads do not read that token,
    and for a checkpoint whose tensors are not exactly those of its architecture.
    """
    _check_device(device)
    network = _load_network(checkpoint)
    if pooling == "distillation" and not isinstance(network, DeiTForImageClassificationWithTeacher):
        raise ConfigError(
            f"model {checkpoint.source}: --embedding distillation needs a model with a distillation head, found"
            f" {checkpoint.architecture}; use pooled, cls or patch-mean"
        )
    if precision == "bf16":
        network.base_model.to(torch.bfloat16)
    try:
        classifier = Classifier.of(network, spec, pooling)
    except AttributeError as error:
        raise ConfigError(
            f"transformers {transformers.__version__}: expected a model arranged as in 5.17 to 5.23, found {error};"
            " install a version of these"
        ) from error
    return classifier.eval().requires_grad_(False).to(device)


def predict(classifier: Classifier, pixels_BHWC: npt.NDArray[np.uint8], *, top_k: int) -> Prediction:
    """Label B images: uint8 (B, H, W, 3), a writable C-contiguous array."""
    with torch.inference_mode():
        outputs = computed(classifier, torch.from_numpy(pixels_BHWC).to(classifier.device), top_k)
        return as_prediction(to_host(outputs, non_blocking=False))


Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]
"""A `Prediction`, of tensors."""


def computed(forward: Forward, pixels_BHWC: torch.Tensor, top_k: int) -> Outputs:
    """What a `Prediction` holds, on the device."""
    logits_BK, embedding_BD = forward(pixels_BHWC)
    scores_Bk, ids_Bk = _best(torch.softmax(logits_BK, dim=1), top_k)
    is_finite_B = torch.isfinite(logits_BK).all(dim=1)
    if embedding_BD is not None:
        # One criterion for NaN, infinities, a zero vector and an overflowed norm: none has length 1.
        is_finite_B &= (torch.linalg.vector_norm(embedding_BD, dim=1) - 1).abs() < 1e-3
    return ids_Bk.to(torch.int32), scores_Bk, embedding_BD, is_finite_B


def to_host(outputs: Outputs, *, non_blocking: bool) -> Outputs:
    """On the CPU; with `non_blocking` once the device has come that far, in pinned memory."""
    ids_Bk, scores_Bk, embedding_BD, is_finite_B = outputs
    return (
        ids_Bk.to("cpu", non_blocking=non_blocking),
        scores_Bk.to("cpu", non_blocking=non_blocking),
        None if embedding_BD is None else embedding_BD.to("cpu", non_blocking=non_blocking),
        is_finite_B.to("cpu", non_blocking=non_blocking),
    )


def as_prediction(outputs: Outputs) -> Prediction:
    """Of outputs on the CPU, whose memory it shares."""
    ids_Bk, scores_Bk, embedding_BD, is_finite_B = outputs
    embedding = None if embedding_BD is None else embedding_BD.numpy()
    return Prediction(ids_Bk.numpy(), scores_Bk.numpy(), embedding, is_finite_B.numpy())


def _best(scores_BK: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k highest scores, which are not negative, and their ids; among equal ones the lower id first.

    torch.topk promises no order among equal values, so there are none: a float32 that is not negative orders as its
    bits do, and the id follows. 2 µs of CPU per image instead of the 45 of a stable sort of 1,000 scores, to
    the same result.
    """
    last_id = scores_BK.shape[1] - 1
    ids_K = torch.arange(last_id + 1, device=scores_BK.device)
    keys_BK = (scores_BK.view(torch.int32).long() << 32) | (last_id - ids_K)
    ids_Bk = last_id - (keys_BK.topk(top_k, dim=1).values & 0xFFFFFFFF)
    return scores_BK.gather(1, ids_Bk), ids_Bk


def prepare_process(num_threads: int | None) -> None:
    """Fix what a forward pass here depends on besides its input: CPU threads, and no TF32 in place of float32."""
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    torch.backends.fp32_precision = "ieee"  # type: ignore[attr-defined]  # torch's modules lack it in their types
    # torch before 2.13 does not inherit it (pytorch/pytorch#179445).
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]  # nor has it this one


def _check_device(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"expected a CUDA device in this actor, found none (torch {torch.__version__}, built for CUDA"
            f" {torch.version.cuda}); install a CUDA build where the actors run, give them GPUs, or use --device cpu"
        )


def _load_network(checkpoint: Checkpoint) -> PreTrainedModel:
    where = f"model {checkpoint.source}"
    # A bar over 10 ms of loading and a table of what the errors below say would only be lines in a job's log.
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        # With output_loading_info it gives a pair, which its annotation does not say.
        loaded: Any = _CLASSES[checkpoint.architecture].from_pretrained(
            checkpoint.folder,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that the check below names them
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise ConfigError(f"{where}: cannot be loaded as {checkpoint.architecture}: {first_line}") from error
    network: PreTrainedModel
    network, info = loaded
    for problem in ("missing", "unexpected", "mismatched"):
        # A mismatched one comes with its two shapes.
        names = sorted(key if isinstance(key, str) else key[0] for key in info[f"{problem}_keys"])
        if names:
            raise ConfigError(
                f"{where}: expected exactly the tensors of {checkpoint.architecture}, found {len(names)} {problem}:"
                f" {', '.join(names[:3])}{', …' if len(names) > 3 else ''}; is `architectures` in config.json right?"
            )
    return network
