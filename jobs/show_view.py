#!/usr/bin/env python
"""Print the SQL of the current view: the newest label of every image that still exists."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# Also without the package installed: from a checkout, or as the working directory of a Ray job.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline import storage, view
from pipeline.errors import LabelBucketError


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, resolve, print; the process's exit code."""
    options = _parser().parse_args(arguments)
    try:
        output = storage.connect_output(options.output)
        if options.sql == "duckdb":
            text = view.duckdb_sql(output, options.space, options.name)
        else:
            current = view.resolve(output, options.space)
            text = view.glob_sql(current.space_id, options.name, has_embedding="embedding" in current.columns.names)
    except LabelBucketError as error:
        print(f"show_view: exit code {error.exit_code}: {error}", file=sys.stderr)
        return error.exit_code
    print(text, end="")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: show_view.py --output out | duckdb results.db\n"
        "duckdb names exactly the files that hold the view now (for s3:// it needs its extension httpfs): make it\n"
        "anew after each night. athena and spark are the same standard SQL over tables labels, snapshots, failures\n"
        "and deletions, made once over the folders of these names; the view then follows every night by itself.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", required=True, metavar="URL", help="the --output of the nights: s3:// or a folder")
    parser.add_argument("--space", metavar="ID", help="which embedding space; needed where the output has several")
    parser.add_argument("--sql", choices=("duckdb", "athena", "spark"), default="duckdb", help="default duckdb")
    parser.add_argument("--name", default="current_labels", help="of the view; default current_labels")
    return parser


if __name__ == "__main__":
    sys.exit(main())
