#!/usr/bin/env python
"""Make an index of the embeddings of a labeling output, for search_images.py, or bring one up to date.

The index holds what the current view of one space holds: every image that still exists, by its newest label. It is an
immutable folder below --output, index/<space>/<version>/, that readers see once the log beside it names it. What is
announced was measured first: the share of the ten nearest that it finds, against exact search.

Small views are compared vector by vector, larger ones through inverted lists of FAISS: 8 bits a dimension, or 6 where
--max-memory-gib asks for it.
"""

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

# Also without the package installed: from a checkout, or as the working directory of a Ray job.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline import argument_file, index_encode
from pipeline.arguments import add_log_level
from pipeline.errors import STOPPED, ConfigError, ConflictError, LabelBucketError, SourceError
from pipeline.index_build import Options
from pipeline.index_update import build_index


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, build, announce; the exit code."""
    flags = argument_file.parse(_parser(), arguments)
    logging.basicConfig(level=flags.log_level, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    options = Options(
        input=flags.input,
        output=flags.output,
        space=flags.space,
        update=flags.update,
        factory=flags.factory,
        min_recall=flags.min_recall,
        max_memory_bytes=None if flags.max_memory_gib is None else int(flags.max_memory_gib * 2**30),
    )
    try:
        done = _on_cluster(options) if flags.on_ray else build_index(options, index_encode.in_this_process)
        print(f"build_index: exit code 0: {done}", file=sys.stderr)
        return 0
    except LabelBucketError as error:
        print(f"build_index: exit code {error.exit_code}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(f"build_index: exit code {STOPPED}: stopped; nothing was announced, run it again", file=sys.stderr)
        return STOPPED


def _on_cluster(options: Options) -> str:
    from pipeline import engine, index_cluster

    engine.start()
    with engine.errors():
        return build_index(options, index_cluster.on_cluster)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"""\
exit codes:
    0  announced, or up to date already
  {ConfigError.exit_code:3}  this command cannot work as given: no such space, no embeddings, no memory, no FAISS
  {SourceError.exit_code:3}  the input cannot be read or the index written: run it again
  {ConflictError.exit_code:3}  damaged input or index, low recall, or another build came first: nothing was announced
  {STOPPED:3}  stopped; nothing was announced, run it again

examples:
  build_index.py --input s3://shop-labels --output s3://shop-search
  build_index.py --input s3://shop-labels --output s3://shop-search --update    # after every night
  build_index.py --input labels --output search --factory IVF1024,SQ8 --min-recall 0.9
""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--input", required=True, metavar="URL", help="the --output of the nights: s3:// or a folder")
    parser.add_argument("--output", required=True, metavar="URL", help="where the index is: s3:// or a folder")
    parser.add_argument("--space", metavar="ID", help="which embedding space; needed where the input has several")
    parser.add_argument(
        "--update",
        action="store_true",
        help="apply what the nights since the last version changed; builds anew where there is none, after 20 %% churn,"
        " and when recall fell",
    )
    parser.add_argument(
        "--factory",
        metavar="NAME",
        help="exact, or what FAISS calls inverted lists: IVF1024,SQ8 or IVF65536_HNSW32,SQ8; default auto, by the"
        " number of rows and --max-memory-gib, and with --update what the version before was asked for",
    )
    parser.add_argument(
        "--min-recall",
        type=_share,
        metavar="SHARE",
        help="announce nothing that finds less of the ten nearest; default 0.95, and with --update what the version"
        " before was asked for",
    )
    parser.add_argument(
        "--max-memory-gib",
        type=_positive,
        metavar="GIB",
        help="what building may take; default: what this machine, and a cgroup (v2) that limits it, have available",
    )
    parser.add_argument(
        "--on-ray",
        action="store_true",
        help="encode on all nodes of RAY_ADDRESS, else on a Ray of this machine's own: for more than some million rows",
    )
    add_log_level(parser)
    argument_file.add_config(parser)
    return parser


def _share(text: str) -> float:
    value = _number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, found {text!r}")
    return value


def _positive(text: str) -> float:
    value = _number(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text!r}")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a number, found {text!r}") from error


if __name__ == "__main__":
    sys.exit(main())
