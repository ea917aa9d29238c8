#!/usr/bin/env python
"""Label every image below --input and publish labels and embeddings below --output. See --help."""

import logging
import signal
import sys
from pathlib import Path

# Also without the package installed: from a checkout, or as the working directory of a Ray job.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline.errors import STOPPED, LabelBucketError
from pipeline.options import load_config

_log = logging.getLogger("label_bucket")


def main() -> int:
    """Parse, connect, run; the exit code."""
    try:
        config = load_config(sys.argv[1:])
        logging.basicConfig(level=config.log_level, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
        from pipeline import engine
        from pipeline.run import label_bucket

        engine.quieten()
        report = label_bucket(config, start_engine=engine.start)
        _log.info("exit code 0: %s", report.message)
        return 0
    except LabelBucketError as error:
        print(f"label_bucket: exit code {error.exit_code}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(f"label_bucket: exit code {STOPPED}: stopped; the same command resumes", file=sys.stderr)
        return STOPPED


if __name__ == "__main__":
    sys.exit(main())
