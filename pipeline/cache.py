"""The folder on each node that keeps what is made there once: downloaded checkpoints, sorted manifests.

A module of its own because several processes of a node want the same thing at the same time, and any of them may be
killed while it makes it.
"""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import filelock

from pipeline.errors import ConfigError
from pipeline.store import describe

VARIABLE = "LABEL_BUCKET_CACHE"
KEPT_S = 14 * 24 * 3600
"""After its last use, as long as something else is made in the same folder."""


def default_dir() -> Path:
    """The folder in LABEL_BUCKET_CACHE, else label-bucket in the user's cache folder."""
    configured = os.environ.get(VARIABLE)
    return Path(configured or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "label-bucket")).expanduser()


def _remove_old(folder: Path) -> None:
    """What nothing has used for KEPT_S, so that a manifest of every night does not fill the disk."""
    for each in folder.iterdir():
        if each.is_dir() and time.time() - each.stat().st_mtime > KEPT_S:
            shutil.rmtree(each, ignore_errors=True)


def once(folder: Path, make: Callable[[Path], None], what: str) -> Path:
    """`folder`, filled by `make` unless it stands: one process does, the others wait for it; whole or not there.

    Raises ConfigError, with `what` it was for, where the disk does not take it.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{folder}.lock", mode=0o600):
            if not folder.is_dir():
                _remove_old(folder.parent)
                partial = folder.with_suffix(".partial")
                shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
                partial.mkdir()
                make(partial)
                partial.rename(folder)
            os.utime(folder)  # it is used
    except OSError as error:
        raise ConfigError(
            f"{what}: cannot write to the cache {folder.parent} ({describe(error)}); set {VARIABLE}"
        ) from error
    return folder
