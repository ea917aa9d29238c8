#!/usr/bin/env python
"""Search an index of build_index.py: which images are most like a picture, one of its own images, or a vector?

A picture goes through the decoding, preprocessing and model that labeled the images of the index, which is looked for
where the nights found it, or under --model; another model is refused. Scores are cosines from -1 to 1. An index with
inverted lists approximates them, and may miss a neighbour (see recall_at_10 in its index.json); --exact then reads the
true vectors from the labels. A few filtered images are always scanned.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

# Also without the package installed: from a checkout, or as the working directory of a Ray job.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline import storage
from pipeline.arguments import add_log_level, count, positive
from pipeline.errors import STOPPED, ConfigError, ConflictError, LabelBucketError, SourceError


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, search, print; the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    is_dups = given[:1] == ["dups"]
    flags = _dups_parser().parse_args(given[1:]) if is_dups else _parser().parse_args(given)
    logging.basicConfig(level=flags.log_level, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    try:
        (_find_duplicates if is_dups else _search)(flags)
        return 0
    except LabelBucketError as error:
        print(f"search_images: exit code {error.exit_code}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"search_images: exit code {STOPPED}: stopped{'; run it again' if is_dups else ''}", file=sys.stderr)
        return STOPPED


def _search(flags: argparse.Namespace) -> None:
    from pipeline import search
    from pipeline.engine import quieten

    quieten()
    options = search.Options(
        **{name: value for name, value in vars(flags).items() if name not in ("json", "html", "log_level")}
    )
    result = search.search(options)
    if flags.html is not None:
        folder, _, name = storage.normalize(flags.html).rpartition("/")
        storage.connect(folder).put(name, search.as_page(result).encode())
        print(f"search_images: wrote {flags.html}", file=sys.stderr)
    if flags.json:
        print(search.as_json(result))
    elif flags.html is None:
        print(search.as_table(result))


def _find_duplicates(flags: argparse.Namespace) -> None:
    from pipeline import duplicates

    options = duplicates.Options(**{name: value for name, value in vars(flags).items() if name != "log_level"})
    print(f"search_images: exit code 0: {duplicates.find_duplicates(options)}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"""\
exit codes:
    0  answered, also where nothing scores enough
  {ConfigError.exit_code:3}  a question that makes no sense: no such index, uri or label, no picture, -k above its rows
  {SourceError.exit_code:3}  the index, the labels or the picture cannot be read
  {ConflictError.exit_code:3}  a damaged index, or another model than the index's
  {STOPPED:3}  stopped

examples:
  search_images.py --index s3://shop-search --image holiday.jpg
  search_images.py --index s3://shop-search --uri s3://shop/photos/1.jpg -k 50 --html like-this.html
  search_images.py --index s3://shop-search --image holiday.jpg --label 'seashore, coast' --json | jq '.answers[].uri'
  search_images.py --index s3://shop-search --text-label tabby --min-score 0.9
  search_images.py dups --index s3://shop-search --output s3://shop-search/duplicates    # see dups --help
""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_index(parser)
    question = parser.add_argument_group("what to search with").add_mutually_exclusive_group(required=True)
    question.add_argument("--image", metavar="FILE_OR_URL", help="a picture, which need not be in the index")
    question.add_argument("--uri", help="an image of the index; it is not its own answer")
    question.add_argument("--image-id", type=count, metavar="ID", help="the same by its image_id")
    question.add_argument("--vector", metavar="JSON_OR_FILE", help="numbers as JSON, or a file or URL of JSON or .npy")
    question.add_argument(
        "--text-label", metavar="NAME", help="no search: images with this best label, the surest first"
    )
    answers = parser.add_argument_group("which answers")
    answers.add_argument("-k", type=positive, default=10, metavar="NUM", help="how many; default 10")
    answers.add_argument("--label", metavar="NAME", help="only images with this best label")
    answers.add_argument(
        "--min-score",
        type=float,
        metavar="SCORE",
        help="least cosine, or with --text-label least probability; default: any",
    )
    answers.add_argument(
        "--exact", action="store_true", help="compare with every true vector, which lists have from the labels"
    )
    answers.add_argument(
        "--model", metavar="FOLDER_OR_URL", help="where the index's checkpoint lies; default: where the nights found it"
    )
    shown = parser.add_argument_group("how they are shown (default: as a table)")
    shown.add_argument("--json", action="store_true", help="as JSON")
    shown.add_argument("--html", metavar="FILE_OR_URL", help="as a page with thumbnails that needs nothing else")
    add_log_level(parser)
    return parser


def _dups_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{Path(sys.argv[0]).name} dups",
        description="""\
Find images that an index holds more than once.

  exact  equal SHA-256 (label with --image-stats), else equal etags that are MD5, and equal sizes
  near   a cosine of --min-cosine or more between their true vectors, among the 32 nearest of each image

A folder --output/VERSION of each version of the index, which the last line names, gets edges.parquet with the pairs,
groups.parquet with groups around the largest picture of each, to which all in the group are near, duplicates.html with
thumbnails of the largest groups, and duplicates.json with counts. So the same command runs after every night.
""",
        epilog=f"""\
exit codes:
    0  written, also where there are no duplicates
  {ConfigError.exit_code:3}  cannot work as given: no such index, a threshold that is none, or too many pairs
  {SourceError.exit_code:3}  the index or the labels cannot be read, or the output written
  {ConflictError.exit_code:3}  a damaged index, or a folder that holds the duplicates of another index or threshold
  {STOPPED:3}  stopped; run it again

examples:
  search_images.py dups --index s3://shop-search --output s3://shop-search/duplicates
  search_images.py dups --index search --output stricter --min-cosine 0.999 --sheet-groups 200
""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_index(parser)
    parser.add_argument(
        "--output", required=True, metavar="URL", help="where each version gets its folder: s3:// or local"
    )
    parser.add_argument(
        "--min-cosine",
        type=float,
        default=0.995,
        metavar="COSINE",
        help="least cosine of near-duplicates, up to 1; default 0.995",
    )
    parser.add_argument(
        "--sheet-groups", type=count, default=50, metavar="NUM", help="groups on the page; 0: no pictures; default 50"
    )
    add_log_level(parser)
    return parser


def _add_index(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--index", required=True, metavar="URL", help="the --output of build_index: s3:// or a folder")
    parser.add_argument("--space", metavar="ID", help="which embedding space; needed where the index has several")
    parser.add_argument("--version", metavar="NAME", help="an older version; default: the newest")


if __name__ == "__main__":
    sys.exit(main())
