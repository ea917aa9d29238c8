#!/usr/bin/env python
"""Label every image below --input and publish labels and embeddings below --output. See --help."""

import logging
import os
import signal
import sys
from pathlib import Path
from types import FrameType

# Also without the package installed: from a checkout, or as the working directory of a Ray job.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline.config import load_config
from pipeline.errors import STOPPED, LabelBucketError

_log = logging.getLogger("label_bucket")


def main() -> int:
    """Parse, connect, run; the exit code."""
    try:
        config = load_config(sys.argv[1:])
        logging.basicConfig(level=config.log_level, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
        _quieten()
        from pipeline.run import label_bucket

        report = label_bucket(config, start_engine=_start_ray)
        _log.info("exit code 0: %s", report.message)
        return 0
    except LabelBucketError as error:
        print(f"label_bucket: exit code {error.exit_code}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(f"label_bucket: exit code {STOPPED}: stopped; the same command resumes", file=sys.stderr)
        return STOPPED


def _start_ray() -> None:
    # The engine's core prints an error for every actor pool (ray-project/ray#53727) that means nothing here.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray
    import ray.data

    if not ray.is_initialized():
        # A bare ray.init() would join whatever cluster runs on this machine.
        address = os.environ.get("RAY_ADDRESS", "local")
        is_own = address == "local"
        ray.init(
            address=address,
            logging_level=logging.ERROR,
            log_to_driver=False,
            include_dashboard=False if is_own else None,
        )
    # What the engine says stays in its log folder; on the console only this job speaks. Also where a run ends with an
    # error of ours: the engine prints 100 lines of its own stack and asks to open an issue with its project.
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.CRITICAL)
    # After ray.init, which installs its own handler. `ray job stop` sends SIGTERM, and SIGKILL three seconds later.
    signal.signal(signal.SIGTERM, _stop)


def _stop(_signal: int, _frame: FrameType | None) -> None:
    # An exception that is raised while a destructor runs is swallowed, so it is raised again until it has arrived.
    signal.signal(signal.SIGALRM, _stop)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    handled = sys.exception()
    while handled is not None:
        if isinstance(handled, KeyboardInterrupt):
            return
        handled = handled.__context__
    raise KeyboardInterrupt


def _quieten() -> None:
    for name in ("botocore", "aiobotocore", "httpx", "huggingface_hub", "filelock", "fsspec", "s3fs"):
        logging.getLogger(name).setLevel(logging.WARNING)


if __name__ == "__main__":
    sys.exit(main())
