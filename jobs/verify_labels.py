#!/usr/bin/env python
"""Check that an output of label_bucket.py is what its log says, and print a line for each check.

  log      no entry is missing, and listed = labeled + failed + unchanged + filtered in every run
  files    every file that the log names is the one that was written (SHA-256, columns, footer, order, bounds), and no
           other file is below labels/, failures/ and deletions/
  rows     no uri twice in a run; spaces, runs, ids, label lists, scores and unit vectors as the README says
  catalog  every key's last outcome has its row, and no row is unknown to the catalog; per space
  listing  the source as it is now against the catalog: new, changed and gone objects are counted, and no failure
  sample   some rows of the current view labeled again from the object's bytes, and the canary images; per space

Nothing is written. Every byte of the output is read: 1 task per file on the cluster of RAY_ADDRESS, else on a Ray of
this machine's own.
"""

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

# Also without the package installed: from a checkout, or as the working directory of a Ray job.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline import argument_file
from pipeline.arguments import add_log_level, count
from pipeline.errors import STOPPED, ConflictError, LabelBucketError

_DEFAULT_SAMPLE_ROWS = 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, connect, check, print; the exit code."""
    options = argument_file.parse(_parser(), arguments)
    logging.basicConfig(level=options.log_level, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    from pipeline import engine, verify

    engine.quieten()
    audit = verify.Audit(
        output_url=options.output,
        space_id=options.space,
        num_sample_rows=_DEFAULT_SAMPLE_ROWS if options.sample is None else options.sample,
        is_sample_required=options.sample is not None,
        seed=options.seed,
        lists_source=not options.no_listing,
        reads_files=not options.no_checksums,
    )
    try:
        engine.start()
        with engine.errors():
            checks = verify.verify(audit, engine.on_cluster)
    except LabelBucketError as error:
        print(f"verify_labels: exit code {error.exit_code}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(f"verify_labels: exit code {STOPPED}: stopped; nothing was written", file=sys.stderr)
        return STOPPED
    print(verify.summary(checks))
    return ConflictError.exit_code if any(check.status == "FAILED" for check in checks) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="exit codes:\n"
        "  0  no check failed\n"
        "  2  this command cannot work as given\n"
        "  3  the output or its source cannot be read\n"
        "  5  a check failed\n"
        "example: verify_labels.py --output s3://shop-labels --sample 100",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output", required=True, metavar="URL", help="what label_bucket.py had as its --output")
    parser.add_argument("--space", metavar="ID", help="only this embedding space; default: all of the output")
    parser.add_argument(
        "--sample",
        type=count,
        metavar="N",
        help=f"rows to label again, per space, 0 for none; default {_DEFAULT_SAMPLE_ROWS}, and skipped where the model"
        " is not to be had. If given, that is a failure",
    )
    parser.add_argument("--seed", type=count, default=0, metavar="S", help="chooses the sample; default 0")
    parser.add_argument("--no-listing", action="store_true", help="do not list the source")
    parser.add_argument(
        "--no-checksums",
        action="store_true",
        help="believe the sizes of the listing: files are read only for the catalog's sake, rows are not checked",
    )
    add_log_level(parser)
    argument_file.add_config(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
