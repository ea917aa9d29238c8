#!/usr/bin/env python
"""Hand the embeddings of the current view to another search engine, with their labels; or only what changed.

  lance       a dataset in a folder or on S3, searched where it is stored. Run it after each night: the rows that are
              new or changed are merged in by uri, what left the view is deleted. Needs the package pylance
  qdrant      files of points, one JSON object per line, of 8 MiB at most
  opensearch  files of bulk requests, of 8 MiB at most, and the index's mapping

Every image of the view is in it once, by its uri; no other is. Neither Ray nor the model is needed.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

# Also without the package installed: from a checkout, or as the working directory of a Ray job.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline.arguments import add_log_level
from pipeline.errors import STOPPED, ConflictError, LabelBucketError, SourceError
from pipeline.export import Options, Target, export_embeddings


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, export; the exit code."""
    flags = _parser().parse_args(arguments)
    logging.basicConfig(level=flags.log_level, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    options = Options(input=flags.input, to=flags.to, output=flags.output, space=flags.space, since=flags.since)
    try:
        print(f"export_embeddings: exit code 0: {export_embeddings(options)}", file=sys.stderr)
        return 0
    except LabelBucketError as error:
        print(f"export_embeddings: exit code {error.exit_code}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"export_embeddings: exit code {STOPPED}: stopped; run it again", file=sys.stderr)
        return STOPPED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"""\
ids:
  lance has the uri; qdrant and opensearch get uuid5(NAMESPACE_URL, uri), which any language can compute, fits where a
  key of 1024 bytes does not, and differs where two images share an image_id

exit codes:
    0  exported, or the target has it already
    2  this command cannot work as given: no such space, no embeddings, a package that is not installed
  {SourceError.exit_code:3}  the input cannot be read or the target written: run it again
  {ConflictError.exit_code:3}  the target holds something else, or the input is damaged
  {STOPPED:3}  stopped; run it again

examples:
  export_embeddings.py --input s3://shop-labels --to lance --output s3://shop-search/photos.lance
  export_embeddings.py --input s3://shop-labels --to qdrant --output exports
  export_embeddings.py --input s3://shop-labels --to opensearch --output exports --since 7
""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--input", required=True, metavar="URL", help="the --output of the nights: s3:// or a folder")
    parser.add_argument("--to", required=True, choices=get_args(Target), help="which search engine")
    parser.add_argument(
        "--output", required=True, metavar="URL", help="the dataset, or the folder of files: s3:// or a folder"
    )
    parser.add_argument("--space", metavar="ID", help="which embedding space; needed where the input has several")
    parser.add_argument(
        "--since",
        type=_place,
        metavar="RUN_SEQ",
        help="only what changed after this run; default: everything. Not for lance, which knows",
    )
    add_log_level(parser)
    return parser


def _place(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a place in the log, 1 or more, found {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
