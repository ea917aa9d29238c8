"""A child that crashes, hangs or grows takes only the guilty image with it."""

import errno
import fcntl
import io
import itertools
import os
import re
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import images
import numpy as np
import pytest
from checkpoints import squash_spec
from cluster import wait_until
from PIL import Image

from pipeline import contain, decode
from pipeline.checkpoint import PreprocessMode
from pipeline.contain import Child
from pipeline.decode import DEFAULT_LIMITS, DecodeLimits
from pipeline.errors import FailureKind, ImageError, LabelBucketError
from pipeline.picture import Facts, Recipe, make_picture

RECIPE = Recipe(spec=squash_spec(24), limits=DEFAULT_LIMITS, has_stats=True)
GOOD = next(iter(images.samples().values()))


@pytest.fixture
def child() -> Iterator[Child]:
    child = Child(RECIPE)
    yield child
    child.close()


def child_with(limits: DecodeLimits) -> Child:
    return Child(replace(RECIPE, limits=limits))


def large(edge_px: int) -> bytes:
    """A picture that takes long to decode, in few bytes."""
    sink = io.BytesIO()
    Image.new("RGB", (edge_px, edge_px)).save(sink, "PNG", compress_level=1)
    return sink.getvalue()


SLOW = large(7000)


def kind_of(child: Child, data: bytes) -> FailureKind:
    with pytest.raises(ImageError) as caught:
        child.make_picture(data)
    assert caught.value.stage == "decode"
    return caught.value.kind


def check_it_still_works(child: Child) -> None:
    pixels, facts = child.make_picture(GOOD)
    expected, expected_facts = make_picture(GOOD, child._recipe)
    np.testing.assert_array_equal(pixels, expected)
    assert facts == expected_facts


def _has_read_all(child: Child) -> bool:
    """Whether it is there and has read what was sent to it."""
    pipe = child._pipe
    return pipe is not None and fcntl.ioctl(pipe.fileno(), termios.TIOCOUTQ, bytes(4)) == bytes(4)


def pid_of(child: Child) -> int:
    assert child._process is not None
    return child._process.pid


def test_every_sample_gives_what_it_gives_without_a_child(child: Child) -> None:
    for name, data in {**images.samples(), "broken.jpg": b"\xff\xd8\xff", "empty": b"", "text": b"text"}.items():
        refused: ImageError | None = None
        try:
            expected = make_picture(data, RECIPE)
        except ImageError as error:
            refused = error
        if refused is not None:
            with pytest.raises(ImageError, match=f"^{re.escape(str(refused))}$") as caught:
                child.make_picture(data)
            assert caught.value.kind is refused.kind, name
            continue
        pixels, facts = child.make_picture(data)
        np.testing.assert_array_equal(pixels, expected[0], err_msg=name)
        assert facts == expected[1], name


Outcome = tuple[bytes | None, Facts | str]
"""Pixels and facts, or no pixels and the failure's text."""


def outcome(make: Callable[[], tuple[Any, Facts]]) -> Outcome:
    try:
        pixels, facts = make()
        return pixels.tobytes(), facts
    except ImageError as error:
        return None, f"{error.kind}: {error}"


def check_together(
    child: Child, samples: Sequence[bytes], expected: Sequence[tuple[bytes | None, Facts | str]]
) -> None:
    """What it makes of all of them at once."""
    pixels, results = child.make_pictures(samples)
    assert [
        (None, f"{result.kind}: {result}") if isinstance(result, ImageError) else (pixels[index].tobytes(), result)
        for index, result in enumerate(results)
    ] == list(expected)


def test_images_that_are_handed_over_together_give_what_each_gives_alone(child: Child) -> None:
    samples = [*images.samples().values(), b"\xff\xd8\xff", b"", b"text", GOOD]
    expected = [outcome(partial(make_picture, data, RECIPE)) for data in samples]
    check_together(child, [GOOD], [expected[-1]])
    first = pid_of(child)
    for begin in range(0, len(samples), contain.MAX_IMAGES):
        window = slice(begin, begin + contain.MAX_IMAGES)
        check_together(child, samples[window], expected[window])
    assert pid_of(child) == first
    assert child._num_sent == 1 + -(-len(samples) // contain.MAX_IMAGES)


def test_images_with_which_a_child_was_killed_are_made_one_by_one(child: Child) -> None:
    expected = [outcome(partial(make_picture, data, RECIPE)) for data in (GOOD, SLOW, b"text")]
    check_it_still_works(child)
    with ThreadPoolExecutor(1) as threads:
        checked = threads.submit(check_together, child, [GOOD, SLOW, b"text"], expected)
        victim = _kill_decoding(child, signal.SIGKILL, 2)
        checked.result()
    assert pid_of(child) != victim
    assert child._num_sent == 3


def test_of_images_that_are_handed_over_together_only_the_guilty_one_fails() -> None:
    child = child_with(replace(DEFAULT_LIMITS, max_wall_s=0.5, max_pixels=400_000_000))
    good = outcome(partial(make_picture, GOOD, RECIPE))[0]
    pixels, results = child.make_pictures([GOOD, large(16_000), GOOD])
    assert [result.kind if isinstance(result, ImageError) else "made" for result in results] == [
        "made",
        FailureKind.DECODE_TIMEOUT,
        "made",
    ]
    assert [pixels[0].tobytes(), pixels[2].tobytes()] == [good, good]
    child.close()


def test_images_that_do_not_fit_together_are_made_one_by_one() -> None:
    child = child_with(replace(DEFAULT_LIMITS, max_bytes=len(GOOD)))
    good = outcome(partial(make_picture, GOOD, RECIPE))
    too_large = f"{FailureKind.TOO_LARGE}: {decode.too_large(len(GOOD) + 1, child._recipe.limits)}"
    check_together(child, [GOOD, GOOD + b"1", GOOD], [good, (None, too_large), good])
    child.close()


def test_one_child_makes_many_pictures(child: Child) -> None:
    check_it_still_works(child)
    first = pid_of(child)
    for _ in range(20):
        check_it_still_works(child)
    assert pid_of(child) == first


def test_going_through_every_preprocessing_starts_a_child_for_each_once() -> None:
    recipes = [replace(RECIPE, spec=replace(RECIPE.spec, mode=mode)) for mode in get_args(PreprocessMode)]
    contain.child_of.cache_clear()
    pids = []
    for recipe in [*recipes, *recipes]:
        check_it_still_works(contain.child_of(recipe))
        pids.append(pid_of(contain.child_of(recipe)))
    contain.child_of.cache_clear()
    assert pids[: len(recipes)] == pids[len(recipes) :]
    assert len(set(pids)) == len(recipes) > 1


def _kill_idle(child: Child) -> int:
    process = child._process
    assert process is not None
    process.kill()
    process.wait(timeout=30)
    return process.pid


def _kill_decoding(child: Child, number: signal.Signals, num_sent: int, *others: int) -> int:
    """The child that is none of `others`, once it has its `num_sent`-th question, which takes it most of a second."""
    wait_until(lambda: (process := child._process) is not None and process.pid not in others)
    wait_until(lambda: child._num_sent == num_sent and _has_read_all(child))
    victim = pid_of(child)
    os.kill(victim, number)
    return victim


def test_a_child_that_was_killed_while_it_had_no_image_costs_none(child: Child) -> None:
    check_it_still_works(child)
    victim = _kill_idle(child)
    check_it_still_works(child)
    assert pid_of(child) != victim


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
def test_an_image_that_a_killed_child_had_is_made_by_another(child: Child, number: signal.Signals) -> None:
    check_it_still_works(child)
    idle = _kill_idle(child)  # which is another matter
    with ThreadPoolExecutor(1) as threads:
        made = threads.submit(child.make_picture, SLOW)
        victim = _kill_decoding(child, number, 1, idle)
        pixels, facts = made.result()
    expected, expected_facts = make_picture(SLOW, RECIPE)
    np.testing.assert_array_equal(pixels, expected)
    assert facts == expected_facts
    assert pid_of(child) not in (idle, victim)


@pytest.mark.parametrize(
    ("number", "kind"), [(signal.SIGSEGV, FailureKind.DECODE_CRASH), (signal.SIGKILL, FailureKind.DECODE_KILLED)]
)
def test_an_image_with_which_two_children_die_is_a_failure(
    child: Child, number: signal.Signals, kind: FailureKind
) -> None:
    check_it_still_works(child)
    with ThreadPoolExecutor(1) as threads:
        failed = threads.submit(kind_of, child, SLOW)
        first = _kill_decoding(child, number, 2)
        second = _kill_decoding(child, number, 1, first)
        assert failed.result() is kind
    check_it_still_works(child)
    assert pid_of(child) not in (first, second)


@pytest.mark.parametrize("num_failures", [1, 2])
def test_a_child_that_cannot_start_is_started_again_and_is_no_failure_of_an_image(
    child: Child, monkeypatch: pytest.MonkeyPatch, num_failures: int
) -> None:
    popen, num_forks = subprocess.Popen, itertools.count(1)

    def short_of_processes(*arguments: Any, **options: Any) -> "subprocess.Popen[bytes]":
        if next(num_forks) <= num_failures:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return popen(*arguments, **options)

    monkeypatch.setattr(subprocess, "Popen", short_of_processes)
    if num_failures == 2:
        with pytest.raises(
            LabelBucketError, match=r"found none that starts: .* Resource temporarily unavailable; look"
        ):
            child.make_picture(GOOD)
    check_it_still_works(child)


def test_a_child_that_ends_while_it_starts_is_no_failure_of_an_image(
    child: Child, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(LabelBucketError, match="found none that starts: it ended with exit code 1; look"):
        child.make_picture(GOOD)
    monkeypatch.undo()
    check_it_still_works(child)


def test_a_child_that_is_never_ready_is_no_failure_of_an_image(child: Child, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contain, "MAX_START_S", 0.01)
    with pytest.raises(LabelBucketError, match=r"found none that starts: it was not ready in 0\.01 s; look"):
        child.make_picture(GOOD)
    monkeypatch.undo()
    check_it_still_works(child)


def test_a_child_that_hangs_and_does_not_even_read_is_ended_at_the_wall_clock() -> None:
    child = child_with(replace(DEFAULT_LIMITS, max_wall_s=0.5))
    with pytest.raises(ImageError, match="found 0 bytes"):  # which starts it
        child.make_picture(b"")
    os.kill(pid_of(child), signal.SIGSTOP)
    started_s = time.monotonic()
    assert kind_of(child, GOOD) is FailureKind.DECODE_TIMEOUT
    assert time.monotonic() - started_s < 10
    child._recipe = RECIPE
    check_it_still_works(child)
    child.close()


def test_an_image_that_takes_too_much_processor_time_is_ended_by_the_kernel() -> None:
    child = child_with(replace(DEFAULT_LIMITS, max_cpu_s=0, max_pixels=200_000_000))
    slow = large(12_000)
    assert kind_of(child, slow) is FailureKind.DECODE_TIMEOUT
    check_it_still_works(child)
    child.close()


@pytest.mark.parametrize("mode", get_args(PreprocessMode))
def test_an_image_that_takes_too_much_memory_is_its_own_failure(mode: PreprocessMode) -> None:
    limits = replace(DEFAULT_LIMITS, max_address_bytes=2**27)
    child = Child(replace(RECIPE, limits=limits, spec=replace(RECIPE.spec, mode=mode)))
    check_it_still_works(child)
    first = pid_of(child)
    assert kind_of(child, large(6500)) is FailureKind.DECODE_OOM
    check_it_still_works(child)
    assert pid_of(child) == first  # it said so itself, and went on
    child.close()


def test_an_image_for_whose_resize_memory_runs_out_is_its_own_failure() -> None:
    spec = replace(squash_spec(512), mode="fast")  # 65,535 rows of 512 pixels, 134 MB, between its two passes
    child = Child(Recipe(spec=spec, limits=replace(DEFAULT_LIMITS, max_address_bytes=2**26)))
    check_it_still_works(child)
    first = pid_of(child)
    sink = io.BytesIO()
    Image.new("RGB", (1, 65_535)).save(sink, "PNG")
    assert kind_of(child, sink.getvalue()) is FailureKind.DECODE_OOM
    check_it_still_works(child)
    assert pid_of(child) == first
    child.close()


def test_only_a_child_of_mode_fast_loads_torch() -> None:
    for mode in get_args(PreprocessMode):
        child = Child(replace(RECIPE, spec=replace(RECIPE.spec, mode=mode)))
        check_it_still_works(child)
        assert ("libtorch" in Path(f"/proc/{pid_of(child)}/maps").read_text()) == (mode == "fast")
        child.close()


def test_a_child_ends_when_its_worker_does(child: Child) -> None:
    check_it_still_works(child)
    pid = pid_of(child)
    process = child._process
    assert process is not None
    assert child._pipe is not None
    child._pipe.close()
    process.wait(timeout=30)
    assert not Path(f"/proc/{pid}").exists()


def test_an_answer_to_another_question_is_never_taken_and_another_child_is_asked(child: Child) -> None:
    check_it_still_works(child)
    first = pid_of(child)
    child._num_sent += 1
    check_it_still_works(child)
    assert pid_of(child) != first


@pytest.mark.parametrize(
    "answer",
    [
        b"no json",
        b"[]",
        b'{"number": 1}',
        b'{"number": 1, "results": []}',
        b'{"number": 1, "results": [{}]}',
        b"1" * 2**21,
    ],
)
def test_an_image_that_takes_over_its_decoder_and_answers_nonsense_is_a_failure(
    child: Child, monkeypatch: pytest.MonkeyPatch, answer: bytes
) -> None:
    taken_over = f"""
import sys
from multiprocessing.connection import Connection
pipe = Connection(int(sys.argv[1]))
pipe.recv_bytes()
pipe.send_bytes(b"ready")
pipe.recv_bytes()
pipe.send_bytes({answer[:100]!r} * {-(-len(answer) // 100)})
"""
    monkeypatch.setattr(contain, "_PROGRAM", taken_over)
    assert kind_of(child, GOOD) is FailureKind.DECODE_CRASH
    monkeypatch.undo()
    check_it_still_works(child)


def test_a_child_cannot_take_away_the_memory_that_it_shares_with_its_worker(child: Child) -> None:
    check_it_still_works(child)
    folder = Path(f"/proc/{pid_of(child)}/fd")
    shared = next(path for path in folder.iterdir() if "memfd:image" in str(path.readlink()))
    with shared.open("r+b") as file, pytest.raises(PermissionError):
        file.truncate(0)
    check_it_still_works(child)
