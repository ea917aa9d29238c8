"""What is left of memory is what the machine and the cgroups say, whichever is less."""

from pathlib import Path

import pytest

from pipeline import memory

GIB = 1 << 30


def files(folder: Path, cgroups: dict[str, dict[str, str]], own: str, available_kib: int = 8 << 20) -> tuple[Path, ...]:
    """meminfo, the cgroup of this process, and the tree of cgroups, as Linux writes them."""
    meminfo, own_file, root = folder / "meminfo", folder / "cgroup", folder / "cgroups"
    meminfo.write_text(
        f"MemTotal:  16777216 kB\nMemFree:   65536 kB\nMemAvailable:  {available_kib} kB\nBuffers: 1 kB\n"
    )
    own_file.write_text(own)
    root.mkdir()
    for name, values in cgroups.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for key, text in values.items():
            (root / name / key).write_text(text)
    return meminfo, own_file, root


def group(limit: str, current: int, inactive: int) -> dict[str, str]:
    return {
        "memory.max": f"{limit}\n",
        "memory.current": f"{current}\n",
        "memory.stat": f"anon 5\ninactive_anon 6\ninactive_file {inactive}\nactive_file 7\n",
    }


@pytest.mark.parametrize(
    ("cgroups", "own", "expected"),
    [
        ({}, "0::/\n", 8 * GIB),
        ({"": {"memory.stat": "anon 5\n"}}, "0::/\n", 8 * GIB),
        ({"": group(str(4 * GIB), 3 * GIB, GIB)}, "0::/\n", 2 * GIB),
        ({"": group(str(4 * GIB), 3 * GIB, GIB)}, "0::/kubepods/pod1\n", 2 * GIB),
        ({"a/b": group(str(4 * GIB), 3 * GIB, 0), "a": group(str(2 * GIB), GIB // 2, 0)}, "0::/a/b\n", GIB),
        ({"a": group(str(2 * GIB), GIB // 2, 0), "a/b": group("max", GIB // 2, 0)}, "0::/a/b\n", 3 * GIB // 2),
        ({"": group(str(400 * GIB), 3 * GIB, 0)}, "0::/\n", 8 * GIB),
        ({"": group(str(4 * GIB), 5 * GIB, 0)}, "0::/\n", 0),
        ({"": group(str(4 * GIB), 3 * GIB, GIB)}, "4:memory:/old\n", 8 * GIB),
    ],
    ids=[
        "none",
        "no limit",
        "limit",
        "a path from outside",
        "parent",
        "unlimited child",
        "more than there is",
        "full",
        "v1",
    ],
)
def test_what_is_left_is_the_least_that_the_machine_and_the_cgroups_have(
    tmp_path: Path, cgroups: dict[str, dict[str, str]], own: str, expected: int
) -> None:
    assert memory.available_bytes(*files(tmp_path, cgroups, own)) == expected
