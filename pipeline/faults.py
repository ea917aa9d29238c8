"""Named points at which tests make the process die: LABEL_BUCKET_CRASH_AT=NAME, or NAME:N for the N-th pass.

A module of its own so that the protocol's code shows where a crash is tested and nothing else. Does nothing unless the
variable is set.
"""

import os
import signal
from collections import Counter

_passes: Counter[str] = Counter()


def crash_point(name: str) -> None:
    """Kill this process with SIGKILL if this is the chosen point: no handler runs, no buffer is flushed."""
    chosen, _, wanted_pass = os.environ.get("LABEL_BUCKET_CRASH_AT", "").partition(":")
    if name != chosen:
        return
    _passes[name] += 1
    if _passes[name] == int(wanted_pass or 1):
        os.kill(os.getpid(), signal.SIGKILL)
