"""What this process may still take of memory: of the machine, and of the cgroup that a container is.

A module of its own because free memory is not it: the page cache, which fills most of a machine that reads files, goes
when memory is asked for. Linux tells in files, and so this reads files.
"""

import os
import re
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_CGROUP_OF_SELF = Path("/proc/self/cgroup")
_CGROUPS = Path("/sys/fs/cgroup")


def available_bytes(meminfo: Path = _MEMINFO, cgroup_of_self: Path = _CGROUP_OF_SELF, cgroups: Path = _CGROUPS) -> int:
    """The least of what the machine (MemAvailable) and every cgroup (v2) above this process have left."""
    return min([_of_machine(meminfo), *_of_cgroups(cgroup_of_self, cgroups)])


def _of_machine(meminfo: Path) -> int:
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", _text(meminfo), re.MULTILINE)
    return int(found[1]) << 10 if found else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _of_cgroups(cgroup_of_self: Path, cgroups: Path) -> list[int]:
    """For each cgroup that has a limit: the limit without what is used, of which inactive pages of files may go."""
    found = re.search(r"^0::/(.*)$", _text(cgroup_of_self), re.MULTILINE)
    if found is None:
        return []
    # A container may see its own cgroup as the root, and yet be told a path from outside, which is not there then.
    own = cgroups / found[1]
    folders = [folder for folder in (own, *own.parents) if folder.is_relative_to(cgroups)]
    left = []
    for folder in folders:
        limit, used = _text(folder / "memory.max").strip(), _text(folder / "memory.current").strip()
        if limit.isdigit() and used.isdigit():
            inactive = re.search(r"^inactive_file (\d+)$", _text(folder / "memory.stat"), re.MULTILINE)
            left.append(max(0, int(limit) - int(used) + (int(inactive[1]) if inactive else 0)))
    return left


def _text(path: Path) -> str:
    """What a file says; nothing if it is not there."""
    try:
        return path.read_text()
    except OSError:
        return ""
