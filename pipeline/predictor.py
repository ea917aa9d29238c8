"""A classifier for units: any number of images in micro-batches, copied while the device computes, compiled, fitted to
its memory.

A module of its own because `model` says what is computed, and this how a device is kept busy with it.
"""

import logging
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipeline.checkpoint import PreprocessSpec
from pipeline.errors import ConfigError
from pipeline.model import Classifier, Forward, Outputs, Prediction, as_prediction, computed, to_host
from pipeline.storage import describe

_log = logging.getLogger(__name__)

_NUM_TURNS = 4
"""Micro-batches that a predictor has memory for: two calls at once, of which each has one on the device and puts the
next one together."""
_IMAGES_PER_COPY = 64
_NUM_COPIERS = 4
"""Threads that fill pinned memory, so many images each, for a device whose forward pass alone does 33,000 to 80,000
images of 224 px a second. Fewer have not been measured (tests/benchmarks/gpu.md)."""
_NUM_TRIED = 8
"""Images of the forward pass that says how much memory one takes."""
_OUT_OF_MEMORY = (
    *("DefaultCPUAllocator", "could not create a primitive"),  # torch and oneDNN on CPU
    *("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED"),  # of pinned memory, of cuBLAS
)


class Predictor:
    """A classifier for any number of images, in micro-batches of one size, of which the last is padded with whatever
    was there: rows do not see each other.

    Micro-batches take turns: while the device computes one, the next is put together in pinned memory and copied by a
    stream of its own. Calls may come from several threads: while one waits for its last micro-batch, the device has the
    first of another. On CPU torch's streams and events are there and do nothing, so all of it is one code path.

    `is_compiled`: by `torch.compile` for this one shape, at once; without, and with a warning, where that fails.
    """

    def __init__(self, classifier: Classifier, shape_BHWC: tuple[int, int, int, int], *, is_compiled: bool) -> None:
        self.classifier, self._compiles = classifier, is_compiled
        self._device_module: Any = torch.get_device_module(classifier.device)
        self._copying = self._device_module.Stream()
        self._launching = threading.Lock()
        self._copiers = ThreadPoolExecutor(_NUM_COPIERS, thread_name_prefix="copy")
        self._turns = queue.SimpleQueue[_Turn]()
        for _ in range(_NUM_TURNS):
            self._turns.put(_Turn(shape_BHWC, classifier.device))
        self.shape_BHWC = shape_BHWC
        self._set_size(shape_BHWC[0])

    def with_spec(self, spec: PreprocessSpec) -> "Predictor":
        """The same weights behind the normalization of another preprocessing, in micro-batches of the same size."""
        return Predictor(self.classifier.with_spec(spec), self.shape_BHWC, is_compiled=self._compiles)

    @property
    def is_compiled(self) -> bool:
        """Whether what computes is compiled, and not only meant to be."""
        return self._forward is not self.classifier

    def __call__(self, images_NHWC: npt.NDArray[np.uint8], *, top_k: int) -> Iterator[tuple[slice, Prediction]]:
        """Micro-batch by micro-batch: which of the images, uint8 (N, H, W, 3), and their prediction, of whose rows only
        so many count.

        Where the device runs out of memory, the micro-batches are halved for good. ConfigError if not even one image
        fits.
        """
        start, under_way = 0, None
        while start < len(images_NHWC):
            size = self.shape_BHWC[0]
            turn, launched, failure = self._turns.get(), None, ""
            try:
                launched = self._launch(turn, images_NHWC[start : start + size], size, top_k)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                failure = describe(error)
            finally:
                self._turns.put(turn)
            if failure:  # only now, without the exception, are the activations free
                self._halve(size, failure)
            if launched is None:
                continue
            if under_way is not None:
                yield self._finish(*under_way)
            under_way = slice(start, start + size), *launched
            start += size
        if under_way is not None:
            yield self._finish(*under_way)

    def _launch(
        self, turn: "_Turn", images_NHWC: npt.NDArray[np.uint8], size: int, top_k: int
    ) -> tuple[Outputs, Any] | None:
        """What will have been predicted, in host memory, once the event has happened. None if micro-batches are no
        longer of this size.
        """
        turn.is_copied.synchronize()
        self._fill(turn, images_NHWC)
        with self._launching, torch.inference_mode():
            if size != self.shape_BHWC[0]:
                return None
            computing = self._device_module.current_stream()
            with self._device_module.stream(self._copying):
                self._copying.wait_event(turn.is_computed)
                if turn.on_device is not turn.host:
                    turn.on_device[:size].copy_(turn.host[:size], non_blocking=True)
                turn.is_copied.record(self._copying)
            computing.wait_event(turn.is_copied)
            on_device = computed(self._forward, turn.on_device[:size], top_k)
            turn.is_computed.record(computing)
            on_host = to_host(on_device, non_blocking=True)
            is_there = _event(self.classifier.device)
            is_there.record(computing)
        return on_host, is_there

    def _fill(self, turn: "_Turn", images_NHWC: npt.NDArray[np.uint8]) -> None:
        def copy(start: int) -> None:
            some = images_NHWC[start : start + _IMAGES_PER_COPY]
            turn.pixels_BHWC[start : start + len(some)] = some

        starts = range(0, len(images_NHWC), _IMAGES_PER_COPY)
        if len(starts) == 1:
            copy(0)
        else:
            list(self._copiers.map(copy, starts))  # which raises what one of them raises

    @staticmethod
    def _finish(batch: slice, on_host: Outputs, is_there: Any) -> tuple[slice, Prediction]:
        is_there.synchronize()
        return batch, as_prediction(on_host)

    def _halve(self, size: int, failure: str) -> None:
        with self._launching:
            if self.shape_BHWC[0] == size:  # or another call has
                self._set_size(self._half(failure))

    def _half(self, failure: str) -> int:
        """Half as many images per forward pass, said to whoever reads the log."""
        size = self.shape_BHWC[0]
        if size == 1:
            raise ConfigError(
                f"expected memory for one image of {self.shape_BHWC[1]} px on this node, found too little: {failure};"
                " use nodes or devices with more, or fewer --gpu-actors"
            )
        _log.warning("out of memory with %d images per forward pass: going on with %d", size, size // 2)
        return size // 2

    def _set_size(self, num_images: int) -> None:
        """Images of a forward pass, and fewer where the GPU's memory is too small for a compiled one."""
        self.shape_BHWC = (num_images, *self.shape_BHWC[1:])
        self._forward: Forward = self.classifier  # and not a graph, which has memory, before the other one is there
        if self.classifier.device.type == "cuda":
            torch.cuda.empty_cache()  # or small tensors would live in, and keep, what was held for large ones
        if not self._compiles:
            return
        failure = ""
        try:
            self._forward = compiled(self.classifier, self.shape_BHWC)
        except Exception as error:
            if not _is_out_of_gpu_memory(error):
                raise
            failure = describe(error)
        if failure and num_images == 1:
            _log.warning("torch.compile: %s; going on without, which is slower", failure)
        elif failure:
            self._set_size(self._half(failure))


class _Turn:
    """Memory of one micro-batch, of the largest size, on the host and on the device, on CPU the same, and when it is
    free again.
    """

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


def compiled(classifier: Classifier, shape_BHWC: tuple[int, ...]) -> Forward:
    """`classifier` compiled for pixels of this shape, and on a GPU launched as one graph; itself, with a warning, where
    that fails but for the GPU's memory. What it returns is overwritten by its next call.
    """
    try:
        # Not a tensor of inference mode, for which all would be compiled once more.
        given_BHWC = torch.zeros(shape_BHWC, dtype=torch.uint8, device=classifier.device)
        forward = classifier.compiled()
        # A process has few shapes, but after four the compiler would go on without compiling, and without a word.
        unlimited = torch._dynamo.config.patch(recompile_limit=256, fail_on_recompile_limit_hit=True)
        with torch.inference_mode(), unlimited:
            classifier(given_BHWC)  # or what only the first pass does would be compiled, and compiled again without
            forward(given_BHWC)
    except Exception as error:  # of a compiler, whichever it is and whatever it lacks
        if _is_out_of_gpu_memory(error):
            raise
        _log.warning("torch.compile: %s; going on without, which is slower", describe(error))
        return classifier
    return _as_graph(forward, given_BHWC) if given_BHWC.is_cuda else forward


def _as_graph(forward: Forward, given_BHWC: torch.Tensor) -> Forward:
    """`forward` as a CUDA graph: to launch its hundred kernels takes 4.7 ms of a core, of the 7.8 ms that 256 images
    take on an H200 with DeiT-small. Itself, with a warning, where that fails but for the GPU's memory.
    """
    try:
        graph = torch.cuda.CUDAGraph()
        # Other calls may be waiting for their copies meanwhile.
        with torch.inference_mode(), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            results = forward(given_BHWC)
    except Exception as error:  # of a driver, for whatever reason
        if _is_out_of_gpu_memory(error):
            raise
        _log.warning("CUDA graph: %s; going on without, which is slower", describe(error))
        return forward

    def replay(pixels_BHWC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        given_BHWC.copy_(pixels_BHWC)
        graph.replay()
        return results

    return replay


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


def _is_out_of_gpu_memory(error: Exception) -> bool:
    """Whether it was, also where the compiler wraps it. Fewer images do not help where the compiler itself runs out of
    the host's.
    """
    return isinstance(error, torch.OutOfMemoryError) or "CUDA out of memory" in str(error)


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out. Not everything that torch calls has an exception of its own for it."""
    has_said_so = isinstance(error, RuntimeError) and any(each in str(error) for each in _OUT_OF_MEMORY)
    return has_said_so or isinstance(error, (torch.OutOfMemoryError, MemoryError))
