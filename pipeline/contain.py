"""The same picture, made in a child process that may crash, hang or grow: it takes only the guilty image with it.

In: encoded bytes of one or a few images. Out: what `picture.make_picture` gives, or an ImageError that says how the
child ended. A module of its own because a codec cannot be stopped from within: a segmentation fault or an endless loop
would end or block the worker, and the engine would try the same unit again for ever.

The child is a program of its own (no fork: locks and clients of the worker must not be copied), lives as long as the
worker does, and is told its limits by the kernel: address space, processor time per image, no core files. Bytes and
pixels go through memory that both have, and only their lengths and facts through a pipe.
"""

import contextlib
import fcntl
import functools
import itertools
import json
import mmap
import os
import pickle
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
from array import array
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from pipeline.checkpoint import PreprocessMode
from pipeline.decode import too_large
from pipeline.errors import FailureKind, ImageError, LabelBucketError
from pipeline.image_stats import ImageStats
from pipeline.picture import Facts, Recipe, make_picture
from pipeline.preprocess import warm_up

# A child for every core: one thread each, which also reserve address space of their own.
_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
MAX_IMAGES = 8
"""Handed over at once: saves a few wake-ups of both processes, and memory and work done twice stay small."""
MAX_START_S = 300
_MAX_ANSWER_BYTES = 2**20
_LENGTH = "Q"
_PROGRAM = "import sys; from pipeline import contain; contain.serve(*map(int, sys.argv[1:]))"


class Child:
    """A process that makes pictures of one recipe, started anew whenever it has ended.

    Not for several threads at once. Ends with the worker: at the end of its input, or, in the middle of its images, at
    the limit of processor time of one of them.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._shared: _Shared | None = None
        self._num_sent = 0

    def make_picture(self, data: bytes) -> tuple[npt.NDArray[np.uint8], Facts]:
        """As `picture.make_picture`; also raises ImageError of kind decode_crash, decode_killed or decode_timeout, and
        LabelBucketError if no child can be started.

        An image with which a child dies is given to another one: when a machine is short of memory its system kills
        whom it likes, whatever image that had.
        """
        if len(data) > self._recipe.limits.max_bytes:
            raise too_large(len(data), self._recipe.limits)
        try:
            pixels, (result,) = self._ask(*self._started(), [data])
        except _DiedError:
            try:
                pixels, (result,) = self._ask(*self._started(), [data])
            except _DiedError as death:
                raise ImageError(death.kind, str(death), stage="decode") from None
        if isinstance(result, ImageError):
            raise result
        return pixels[0].copy(), result

    def make_pictures(self, images: Sequence[bytes]) -> tuple[npt.NDArray[np.uint8], list[Facts | ImageError]]:
        """Pixels, uint8 (len(images), input_px, input_px, 3), and facts or failure of each of at most MAX_IMAGES
        images. Pixels hold until the next call, and are anything where there is a failure.

        Handed over together, which is cheaper, and made again one by one, as `make_picture` does, if that child dies or
        takes too long, because nobody knows with which of them.
        """
        if sum(map(len, images)) <= self._recipe.limits.max_bytes:
            with contextlib.suppress(_DiedError, ImageError):
                return self._ask(*self._started(), images)
        edge_px = self._recipe.spec.input_px
        pixels = np.empty((len(images), edge_px, edge_px, 3), np.uint8)
        results: list[Facts | ImageError] = []
        for index, data in enumerate(images):
            try:
                pixels[index], facts = self.make_picture(data)
                results.append(facts)
            except ImageError as error:
                results.append(error)
        return pixels, results

    def _ask(
        self, pipe: Connection, shared: "_Shared", images: Sequence[bytes]
    ) -> tuple[npt.NDArray[np.uint8], list[Facts | ImageError]]:
        """As `make_pictures`, by this child. Raises ImageError if it took too long, and is ended."""
        try:
            self._num_sent += 1
            end = 0
            for data in images:
                begin, end = end, end + len(data)
                shared.encoded[begin:end] = data
            pipe.send_bytes(array(_LENGTH, map(len, images)).tobytes())
            answer = pipe.recv_bytes(_MAX_ANSWER_BYTES)
            return shared.pixels[: len(images)], _results(answer, self._num_sent, len(images))
        except BlockingIOError:
            self.close()
            message = f"decoding took longer than {self._recipe.limits.max_wall_s:g} s"
            raise ImageError(FailureKind.DECODE_TIMEOUT, message, stage="decode") from None
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise self._ending() from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            self.close()
            message = f"the decoder gave an answer that is none ({type(error).__name__}: {error})"
            raise _DiedError(message, FailureKind.DECODE_CRASH) from None
        except BaseException:
            self.close()  # what is left of this answer must not be read as that of the next images
            raise

    def close(self) -> None:
        """End the child at once; the next image starts another."""
        if self._pipe is not None:
            self._pipe.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = self._pipe = self._shared = None
        self._num_sent = 0

    __del__ = close

    def _started(self) -> tuple[Connection, "_Shared"]:
        if self._process is not None and self._process.poll() is not None:
            self.close()  # it died while it had no image
        if self._pipe is None or self._shared is None:
            try:
                return self._start()
            except (OSError, EOFError):
                self.close()
            try:
                return self._start()
            except (OSError, EOFError) as error:
                if self._process is None:
                    how = str(error)
                elif isinstance(error, BlockingIOError):
                    how = f"it was not ready in {MAX_START_S:g} s"
                else:
                    how = f"it ended with {self._ending_text()}"
                self.close()
                raise LabelBucketError(
                    f"expected a process that decodes, found none that starts: {how}; look at memory and limits of"
                    " processes of this worker's node, and at the worker's log; the same command resumes"
                ) from error
        return self._pipe, self._shared

    def _start(self) -> tuple[Connection, "_Shared"]:
        ours, theirs = socket.socketpair()
        memory = os.memfd_create("image", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        with ours:
            try:
                shared = _Shared(memory, self._recipe)
                # Or a child could end the worker by taking memory away from under it.
                fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
                with theirs:
                    fds = [theirs.fileno(), memory]
                    self._process = subprocess.Popen(
                        [sys.executable, "-c", _PROGRAM, *map(str, fds)],
                        env={**os.environ, **_ONE_THREAD, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                        pass_fds=fds,
                        stdin=subprocess.DEVNULL,
                    )
            finally:
                os.close(memory)
            pipe = Connection(os.dup(ours.fileno()))
            pipe.send_bytes(pickle.dumps(self._recipe))
            _limit_wait(ours, MAX_START_S)
            pipe.recv_bytes()  # it is ready: how long that takes is no property of an image
            _limit_wait(ours, self._recipe.limits.max_wall_s)
        self._pipe, self._shared = pipe, shared
        return pipe, shared

    def _ending(self) -> "ImageError | _DiedError":
        """How the child ended: of itself, or at its limit of processor time, which is the failure of its image."""
        how = self._ending_text()
        self.close()
        if how == "SIGXCPU":
            message = f"decoding took longer than {self._recipe.limits.max_cpu_s} s of processor time"
            return ImageError(FailureKind.DECODE_TIMEOUT, message, stage="decode")
        if how == "SIGKILL":
            return _DiedError("decoding was killed, as a machine without memory does", FailureKind.DECODE_KILLED)
        return _DiedError(f"the decoder crashed ({how})", FailureKind.DECODE_CRASH)

    def _ending_text(self) -> str:
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)
        code = self._process.poll()
        return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"


class _DiedError(Exception):
    """A child died, and `kind` is the failure of its image, should that be guilty of it."""

    def __init__(self, message: str, kind: FailureKind) -> None:
        super().__init__(message)
        self.kind = kind


class _Shared:
    """Memory of the worker and its child: images back to back on their way there, and pixels on their way back. Its
    pages are real once they are written: room for the largest image allowed costs nothing."""

    def __init__(self, fileno: int, recipe: Recipe) -> None:
        edge_px, max_bytes = recipe.spec.input_px, recipe.limits.max_bytes
        num_bytes = max_bytes + MAX_IMAGES * edge_px * edge_px * 3
        os.ftruncate(fileno, num_bytes)
        memory = memoryview(mmap.mmap(fileno, num_bytes))
        self.encoded = memory[:max_bytes]
        self.pixels = np.frombuffer(memory[max_bytes:], np.uint8).reshape(MAX_IMAGES, edge_px, edge_px, 3)


@functools.lru_cache(maxsize=len(get_args(PreprocessMode)))
def child_of(recipe: Recipe) -> Child:
    """This worker's child for a recipe, kept because starting one takes half a second, in mode `fast` two. A night has
    one recipe; an evaluation goes through every preprocessing in each unit.
    """
    return Child(recipe)


def serve(fileno: int, memory_fileno: int) -> None:
    """The child's program: pictures until the end of input."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with Connection(fileno) as pipe, contextlib.suppress(EOFError):
        recipe: Recipe = pickle.loads(pipe.recv_bytes())
        warm_up(recipe.spec)
        shared = _Shared(memory_fileno, recipe)
        _limit_address_space(recipe.limits.max_address_bytes)
        pipe.send_bytes(b"ready")
        for number in itertools.count(1):
            results: list[dict[str, Any]] = []
            end = 0
            for index, num_bytes in enumerate(array(_LENGTH, pipe.recv_bytes())):
                begin, end = end, end + num_bytes
                _limit_cpu_time(recipe.limits.max_cpu_s)
                try:
                    shared.pixels[index], facts = make_picture(bytes(shared.encoded[begin:end]), recipe)
                    results.append({"size_px": facts.size_px, "stats": facts.stats})
                except ImageError as error:
                    results.append({"kind": error.kind, "message": str(error)})
            pipe.send_bytes(json.dumps({"number": number, "results": results}).encode())


def _results(answer: bytes, number: int, num_images: int) -> list[Facts | ImageError]:
    """What the child says of pictures. JSON: a child that an image has taken over must not reach the worker."""
    values = json.loads(answer)
    if values["number"] != number:
        raise ValueError(f"expected the decoder's answer to question {number}, found that to {values['number']}")
    if len(values["results"]) != num_images:
        raise ValueError(f"expected {num_images} results of the decoder, found {len(values['results'])}")
    return [_result(each) for each in values["results"]]


def _result(values: dict[str, Any]) -> Facts | ImageError:
    if "kind" in values:
        return ImageError(FailureKind(values["kind"]), str(values["message"]), stage="decode")
    width_px, height_px = map(int, values["size_px"])
    return Facts((width_px, height_px), values["stats"] and ImageStats(*values["stats"]))


def _limit_address_space(max_bytes: int) -> None:
    used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (used_bytes + max_bytes, hard))


def _limit_wait(socket_: socket.socket, max_s: float) -> None:
    """For what comes next through this socket; then BlockingIOError."""
    socket_.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", int(max_s), int(max_s % 1 * 1e6)))


def _limit_cpu_time(max_s: int) -> None:
    # The limit is on the process's whole time, so it moves. At the soft one the kernel sends SIGXCPU, which ends it.
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + 1 + max_s, hard))
