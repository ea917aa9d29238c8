#!/usr/bin/env python
"""Say what became of a past run; without --run, list the runs of an output."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

# Also without the package installed: from a checkout, or as the working directory of a Ray job.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline import past_runs, report, storage
from pipeline.errors import ConfigError, LabelBucketError
from pipeline.progress import Report


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, read, print; the process's exit code."""
    options = _parser().parse_args(arguments)
    try:
        print(_answer(options))
    except LabelBucketError as error:
        print(f"show_run: exit code {error.exit_code}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _answer(options: argparse.Namespace) -> str:
    output = storage.connect_output(options.output)
    if options.run is None:
        if options.html is not None:
            raise ConfigError("--html is the page of one run: expected --run RUN_ID with it, found none")
        runs = past_runs.read(output)
        if options.json:
            return json.dumps([each.to_json() for each in runs], indent=1)
        return past_runs.list_text(runs) if runs else f"no runs in {output.root}"
    run = past_runs.find(output, options.run)
    found = Report.read(output, run.claim_or_entry.run_id)
    if options.html is not None:
        if found is None:
            raise ConfigError(f"{output.root}: run {run.claim_or_entry.run_id} left no report.json to make a page of")
        try:
            options.html.write_text(report.page(output, found, run.entry), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--html: expected a file that can be written, found {error}") from error
    if options.json:
        return json.dumps(past_runs.to_json(run, found), indent=1)
    return past_runs.summary_text(run, found)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: show_run.py --output s3://shop-labels --run 00000007 --html night.html",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", required=True, metavar="URL", help="the --output of the nights: s3:// or a folder")
    parser.add_argument("--run", metavar="RUN_ID", help="the run's id, or how it begins; unset: list all runs")
    parser.add_argument("--json", action="store_true", help="everything that is known, for programs")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also make the run's page again, with new thumbnails")
    return parser


if __name__ == "__main__":
    sys.exit(main())
