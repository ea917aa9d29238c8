#!/usr/bin/env python
"""Write the current view of an output as a snapshot of few, right-sized files, and remove what it replaced.

The current view is the newest label of every image that still exists. The snapshot is a commit in the output's log;
nights go on as before, and readers of the view read the snapshot and what came after it.
"""

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import get_args

# Also without the package installed: from a checkout, or as the working directory of a Ray job.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline import argument_file, engine
from pipeline.arguments import add_log_level, positive
from pipeline.compact import Options, PartitionBy, compact_labels
from pipeline.errors import STOPPED, ConflictError, LabelBucketError, SourceError


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, connect, compact; the exit code."""
    flags = argument_file.parse(_parser(), arguments)
    logging.basicConfig(level=flags.log_level, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    engine.quieten()
    options = Options(
        output=flags.output,
        space=flags.space,
        partition_by=flags.partition_by,
        keep_runs=flags.keep_runs,
        grace=timedelta(hours=flags.grace_hours),
        dry_run=flags.dry_run,
    )
    try:
        print(f"compact_labels: exit code 0: {compact_labels(options, start_engine=engine.start)}", file=sys.stderr)
        return 0
    except LabelBucketError as error:
        print(f"compact_labels: exit code {error.exit_code}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(f"compact_labels: exit code {STOPPED}: stopped; run it again", file=sys.stderr)
        return STOPPED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"""\
what is removed with --keep-runs, and only then:
  label files of runs and snapshots that a snapshot replaced at least --grace-hours ago, beyond the N newest runs, with
  their plans, staged parts and catalogs; and what was staged for runs that were given up. First a commit says that they
  are no longer named, then they go; nothing that the log names is ever removed. Reports, failures/ and deletions/ stay.
  Removing needs the right to delete objects, which nights do not need.

exit codes:
    0  done, or nothing to do
    2  this command cannot work as given
  {SourceError.exit_code:3}  the output cannot be read or written, or gave no answer: run it again
  {ConflictError.exit_code:3}  a run is open, or the output is damaged; nothing was committed
  {STOPPED:3}  stopped; run it again

examples:
  compact_labels.py --output s3://shop-labels --dry-run
  compact_labels.py --output s3://shop-labels --partition-by label --keep-runs 7
""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output", required=True, metavar="URL", help="the --output of the nights: s3:// or a folder")
    parser.add_argument("--space", metavar="ID", help="which embedding space; needed where the output has several")
    parser.add_argument(
        "--partition-by",
        choices=get_args(PartitionBy),
        default="none",
        help="folders of the snapshot: the date of the run that labeled an image, its best label, or the first part of"
        " its key; default none",
    )
    parser.add_argument(
        "--keep-runs",
        type=positive,
        metavar="N",
        help="remove what a snapshot replaced, except the N newest runs; default: remove nothing",
    )
    parser.add_argument(
        "--grace-hours",
        type=_hours,
        default=24.0,
        metavar="H",
        help="time that readers of replaced files have left after a snapshot; default 24",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, write and remove nothing")
    add_log_level(parser)
    argument_file.add_config(parser)
    return parser


def _hours(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e6:
        raise argparse.ArgumentTypeError(f"expected hours, 0 or more, found {text!r}")
    return value


if __name__ == "__main__":
    sys.exit(main())
