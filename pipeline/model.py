"""A checkpoint -> a torch module that turns uint8 pixels into logits and a unit-length embedding in one forward pass.

Shapes: B images, H = W = input size in px, C = 3 channels, T tokens, D embedding dimensions, K labels, k of them kept.

A module of its own because it is the only one that imports torch and transformers: 4 s and several hundred MB that only
the actors should pay.
"""

import logging
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from transformers import (
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    PreTrainedModel,
    ViTForImageClassification,
)
from transformers.utils import logging as transformers_logging

from pipeline.checkpoint import Checkpoint, Pooling, PreprocessSpec
from pipeline.errors import ConfigError
from pipeline.storage import describe

_log = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16"]
_Forward = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]

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

    _mean: torch.Tensor
    _std: torch.Tensor

    def __init__(self, network: PreTrainedModel, spec: PreprocessSpec, pooling: Pooling) -> None:
        super().__init__()
        self._network = network
        self.backbone = network.base_model
        # In the order of the tokens they read.
        names = _DISTILLED_HEADS if isinstance(network, DeiTForImageClassificationWithTeacher) else ["classifier"]
        self.heads = torch.nn.ModuleList([network.get_submodule(name) for name in names])
        self._num_special_tokens = 1 if isinstance(network, ViTForImageClassification) else 2
        self._pooling = pooling
        self._rescale_divisor = 1 / spec.rescale_factor
        self._input_BCHW: torch.Tensor | None = None
        for name, values in (("_mean", spec.image_mean), ("_std", spec.image_std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(-1, 1, 1), persistent=False)

    def forward(self, pixels_BHWC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See the class. The heads and the pooling work in float32 whatever the backbone computes in."""
        # Bit for bit the float32 values of the Hugging Face processors, which multiply by 1/255 in float64 and round:
        # dividing by 255 is rounded once, multiplying by a rounded 1/255 twice.
        # In place, in a tensor that is kept: new ones cost 0.3 to 1.4 ms per image on CPU instead of 0.1.
        pixels_BCHW = self._kept_input(pixels_BHWC).copy_(pixels_BHWC.permute(0, 3, 1, 2))
        pixels_BCHW.div_(self._rescale_divisor).sub_(self._mean).div_(self._std)
        # The backbone casts its input to its own dtype, and ends with the final layernorm.
        tokens_BTD = self.backbone(pixels_BCHW).last_hidden_state.float()
        per_head_BK = [head(tokens_BTD[:, token]) for token, head in enumerate(self.heads)]
        logits_BK = torch.stack(per_head_BK).mean(dim=0)
        if self._pooling == "none":
            return logits_BK, None
        pooled_BD = self._pool(tokens_BTD)
        return logits_BK, pooled_BD / torch.linalg.vector_norm(pooled_BD, dim=1, keepdim=True)

    def _kept_input(self, pixels_BHWC: torch.Tensor) -> torch.Tensor:
        num_images, height, width, channels = pixels_BHWC.shape
        shape = (num_images, channels, height, width)
        if pixels_BHWC.device.type != "cpu":  # whose allocator keeps memory itself
            return torch.empty(shape, dtype=torch.float32, device=pixels_BHWC.device)
        if self._input_BCHW is None or self._input_BCHW.shape != shape:
            self._input_BCHW = None  # before the other one is there
            self._input_BCHW = torch.empty(shape, dtype=torch.float32, device=pixels_BHWC.device)
        return self._input_BCHW

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self._mean.device

    def with_spec(self, spec: PreprocessSpec) -> "Classifier":
        """The same weights, which are in memory once, behind the normalization of another preprocessing."""
        return Classifier(self._network, spec, self._pooling).eval().to(self.device)

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


_NUM_TURNS = 4
"""Micro-batches that a predictor has memory for: two calls at once, of which each has one on the device and puts the
next one together."""
_NUM_TRIED = 8
"""Images of the forward pass that says how much memory one takes."""
_OUT_OF_MEMORY = (
    *("DefaultCPUAllocator", "could not create a primitive"),  # torch and oneDNN on CPU
    *("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED"),  # of pinned memory, of cuBLAS
)


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
    classifier = Classifier(network, spec, pooling).eval().requires_grad_(False)
    if precision == "bf16":
        classifier.backbone.to(torch.bfloat16)
    return classifier.to(device)


def predict(classifier: Classifier, pixels_BHWC: npt.NDArray[np.uint8], *, top_k: int) -> Prediction:
    """Label B images: uint8 (B, H, W, 3), a writable C-contiguous array."""
    with torch.inference_mode():
        outputs = _outputs(classifier, torch.from_numpy(pixels_BHWC).to(classifier.device), top_k)
        return _prediction(_to_host(outputs, non_blocking=False))


_Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]
"""A `Prediction`, of tensors."""


def _outputs(forward: _Forward, pixels_BHWC: torch.Tensor, top_k: int) -> _Outputs:
    logits_BK, embedding_BD = forward(pixels_BHWC)
    scores_Bk, ids_Bk = _best(torch.softmax(logits_BK, dim=1), top_k)
    is_finite_B = torch.isfinite(logits_BK).all(dim=1)
    if embedding_BD is not None:
        # One criterion for NaN, infinities, a zero vector and an overflowed norm: none has length 1.
        is_finite_B &= (torch.linalg.vector_norm(embedding_BD, dim=1) - 1).abs() < 1e-3
    return ids_Bk.to(torch.int32), scores_Bk, embedding_BD, is_finite_B


def _to_host(outputs: _Outputs, *, non_blocking: bool) -> _Outputs:
    ids_Bk, scores_Bk, embedding_BD, is_finite_B = outputs
    return (
        ids_Bk.to("cpu", non_blocking=non_blocking),
        scores_Bk.to("cpu", non_blocking=non_blocking),
        None if embedding_BD is None else embedding_BD.to("cpu", non_blocking=non_blocking),
        is_finite_B.to("cpu", non_blocking=non_blocking),
    )


def _prediction(outputs: _Outputs) -> Prediction:
    ids_Bk, scores_Bk, embedding_BD, is_finite_B = outputs
    embedding = None if embedding_BD is None else embedding_BD.numpy()
    return Prediction(ids_Bk.numpy(), scores_Bk.numpy(), embedding, is_finite_B.numpy())


class Predictor:
    """A classifier for any number of images, in micro-batches of one size, of which the last is padded with whatever
    was there: rows do not see each other.

    Micro-batches take turns: while the device computes one, the next is put together in pinned memory and copied by a
    stream of its own. Calls may come from several threads: while one waits for its last micro-batch, the device has the
    first of another. On CPU torch's streams and events are there and do nothing, so all of it is one code path.

    `is_compiled`: by `torch.compile` for this one shape, at once; without, and with a warning, where that fails.
    """

    def __init__(self, classifier: Classifier, shape_BHWC: tuple[int, int, int, int], *, is_compiled: bool) -> None:
        self.classifier, self._is_compiled = classifier, is_compiled
        self._device_module: Any = torch.get_device_module(classifier.device)
        self._copying = self._device_module.Stream()
        self._launching = threading.Lock()
        self._allocate(shape_BHWC)

    def with_spec(self, spec: PreprocessSpec) -> "Predictor":
        """The same weights behind the normalization of another preprocessing."""
        return Predictor(self.classifier.with_spec(spec), self.shape_BHWC, is_compiled=self._is_compiled)

    def __call__(self, images_NHWC: npt.NDArray[np.uint8], *, top_k: int) -> Iterator[tuple[slice, Prediction]]:
        """Micro-batch by micro-batch: which of the images, uint8 (N, H, W, 3), and their prediction, of whose rows only
        so many count.

        Where the device runs out of memory, the micro-batches are halved for good. ConfigError if not even one image
        fits.
        """
        start, under_way = 0, None
        while start < len(images_NHWC):
            turns = self._turns  # to which the turn goes back, even if another call halves meanwhile
            turn, failure = turns.get(), ""
            size = len(turn.host)
            try:
                launched = self._launch(turn, images_NHWC[start : start + size], top_k)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                failure = describe(error)
            finally:
                turns.put(turn)
                del turn, turns
            if failure:  # only now, without the exception, are the activations free
                self._halve(size, failure)
                continue
            if under_way is not None:
                yield self._finish(*under_way)
            under_way = slice(start, start + size), *launched
            start += size
        if under_way is not None:
            yield self._finish(*under_way)

    def _launch(self, turn: "_Turn", images_NHWC: npt.NDArray[np.uint8], top_k: int) -> tuple[_Outputs, Any]:
        """What will have been predicted, in host memory, once the event has happened."""
        turn.is_copied.synchronize()
        turn.pixels_BHWC[: len(images_NHWC)] = images_NHWC
        with self._launching, torch.inference_mode():
            computing = self._device_module.current_stream()
            with self._device_module.stream(self._copying):
                self._copying.wait_event(turn.is_computed)
                turn.on_device.copy_(turn.host, non_blocking=True)
                turn.is_copied.record(self._copying)
            computing.wait_event(turn.is_copied)
            outputs = _outputs(self._forward, turn.on_device, top_k)
            turn.is_computed.record(computing)
            on_host = _to_host(outputs, non_blocking=True)
            is_there = _event(self.classifier.device)
            is_there.record(computing)
        return on_host, is_there

    @staticmethod
    def _finish(batch: slice, on_host: _Outputs, is_there: Any) -> tuple[slice, Prediction]:
        is_there.synchronize()
        return batch, _prediction(on_host)

    def _halve(self, size: int, failure: str) -> None:
        with self._launching:
            if self.shape_BHWC[0] < size:
                return  # another call has
            if size == 1:
                raise ConfigError(
                    f"expected memory for one image of {self.shape_BHWC[1]} px on this node, found too little:"
                    f" {failure}; use nodes or devices with more, or fewer --gpu-actors"
                )
            _log.warning("out of memory with %d images per forward pass: going on with %d", size, size // 2)
            self._allocate((size // 2, *self.shape_BHWC[1:]))

    def _allocate(self, shape_BHWC: tuple[int, int, int, int]) -> None:
        self._turns = queue.SimpleQueue[_Turn]()  # before the others are there
        if self.classifier.device.type == "cuda":
            torch.cuda.empty_cache()  # or small tensors would live in, and keep, what was held for large ones
        self.shape_BHWC = shape_BHWC
        turns = [_Turn(shape_BHWC, self.classifier.device) for _ in range(_NUM_TURNS)]
        self._forward = _compiled(self.classifier, turns[0].on_device) if self._is_compiled else self.classifier
        for turn in turns:
            self._turns.put(turn)


class _Turn:
    """Memory of one micro-batch on the host and on the device, on CPU the same, and when it is free again."""

    def __init__(self, shape_BHWC: tuple[int, int, int, int], device: torch.device) -> None:
        self.host = torch.zeros(shape_BHWC, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self.pixels_BHWC: npt.NDArray[np.uint8] = self.host.numpy()
        self.on_device = self.host.to(device)
        self.is_copied, self.is_computed = _event(device), _event(device)
        # This may be memory of which what was launched before it still reads.
        self.is_computed.record()


def _event(device: torch.device) -> Any:
    device_module: Any = torch.get_device_module(device)
    # Without, who waits for it turns in circles on a core that decoding could use.
    return device_module.Event(**({"blocking": True} if device.type == "cuda" else {}))


def _compiled(classifier: Classifier, pixels_BHWC: torch.Tensor) -> _Forward:
    try:
        compiled: _Forward = torch.compile(classifier, dynamic=False)
        with torch.inference_mode():
            classifier(pixels_BHWC)  # or what only the first pass does would be compiled, and compiled again without
            compiled(pixels_BHWC)
    except Exception as error:  # noqa: BLE001  # of a compiler, whichever it is and whatever it lacks
        if is_out_of_memory(error):
            return classifier  # which will say so with its first images
        _log.warning("torch.compile: %s; going on without, which is slower", describe(error))
        return classifier
    return compiled


def fitting_batch_size(classifier: Classifier, input_px: int, most: int) -> int:
    """Images per forward pass, at most `most`, whose activations take half of the GPU memory that is free, by what a
    few of them take. On CPU `most`.
    """
    if classifier.device.type != "cuda":
        return most
    pixels_BHWC = torch.zeros((_NUM_TRIED, input_px, input_px, 3), dtype=torch.uint8, device=classifier.device)
    allocated_bytes = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode():
        classifier(pixels_BHWC)
    bytes_per_image = (torch.cuda.max_memory_allocated() - allocated_bytes) / _NUM_TRIED
    free_bytes, _ = torch.cuda.mem_get_info()
    return batch_size_for(free_bytes, bytes_per_image, most)


def batch_size_for(free_bytes: int, bytes_per_image: float, most: int) -> int:
    """The largest power of two, from 1 to `most`, whose images take half of the free memory."""
    num_fitting = int(free_bytes / 2 / bytes_per_image)
    return min(most, 1 << max(0, num_fitting.bit_length() - 1))


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


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out. Not everything that torch calls has an exception of its own for it."""
    has_said_so = isinstance(error, RuntimeError) and any(each in str(error) for each in _OUT_OF_MEMORY)
    return has_said_so or isinstance(error, (torch.OutOfMemoryError, MemoryError))


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
