"""What the comparison with other programs counts: the rate in a window, the CPU time of everything that was started."""

import subprocess
import sys
from pathlib import Path

import peers
import process_usage
import pytest

from pipeline.draw import draw_file

_BURN = "import time; end = time.process_time() + 0.6\nwhile time.process_time() < end: pass"
_BURN_IN_A_CHILD = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {_BURN!r}], check=True)"


def test_steady_images_are_those_from_the_first_fifth_to_the_last() -> None:
    done = [(100.0 + second, 10) for second in range(11)]
    begin_s, end_s, num_images = peers._window(done)
    assert (begin_s, end_s) == pytest.approx((101.2, 107.8))
    assert num_images == pytest.approx(66)


def test_images_that_arrive_at_once_count_as_if_they_had_come_one_by_one() -> None:
    begin_s, end_s, num_images = peers._window([(10.0, 20), (20.0, 80)])
    assert (begin_s, end_s) == pytest.approx((10.0, 17.5))
    assert num_images == pytest.approx(60)


def test_cpu_time_of_a_session_holds_that_of_children_which_have_ended() -> None:
    process = subprocess.Popen([sys.executable, "-c", _BURN_IN_A_CHILD], start_new_session=True)
    with process_usage.watched(process.pid) as usage:
        assert process.wait(30) == 0
    (begin_s, _), (end_s, by_pid) = usage.cpu_s[0], usage.cpu_s[-1]
    cpu_s = sum(by_pid.values())
    # The last sample of the child may be an interval old, longer on a machine that has other work.
    assert 0.2 < cpu_s < 2
    assert usage.cpu_by_pid_between(begin_s, end_s) == pytest.approx(by_pid)
    assert 0 < sum(usage.cpu_by_pid_between(begin_s, (begin_s + end_s) / 2).values()) < cpu_s
    assert {usage.kind(pid) for pid in by_pid} == {"driver", "others"}
    assert usage.driver().peak_rss_bytes > 1 << 20
    (child,) = usage.workers()
    assert "process_time" in child.command
    assert usage.peak_heap_bytes >= child.peak_heap_bytes > 0


@pytest.mark.slow
def test_the_bare_loops_are_run_and_compared(tmp_path: Path) -> None:
    photos, note = tmp_path / "photos", tmp_path / "note.md"
    photos.mkdir()
    for number in range(4):
        (photos / f"{number}.png").write_bytes(draw_file(3, number).data)
    none = ("--num-images-s3", "0", "--num-images-tiny", "0")
    what = ("--photos", str(photos), "--num-images", "64", "--rounds", "1", "--enlarge", "2", "--out", str(note))
    names = ("limit (bare Pillow)", "bare, our functions")
    only = [word for name in names for word in ("--only", name)]
    subprocess.run([sys.executable, peers.__file__, *what, *none, *only], check=True, capture_output=True, timeout=200)
    rows = [line.split(" | ") for line in note.read_text().splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[1:]] == [f"| {name}" for name in names]
    assert all(float(row[2].split()[0]) > 0 for row in rows[1:])
    assert str(tmp_path) not in note.read_text()
