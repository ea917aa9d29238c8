#!/usr/bin/env python
"""Say how often a checkpoint is right about a labeled set, or what changes from one run to another.

The pictures go through the fetching, decoding, preprocessing and labeling of the nightly job, in every preprocessing
mode and precision side by side; of each: top-1 and top-5, accuracy per class, confusions, calibration. A picture that
cannot be decoded counts as wrong. Nothing is published.

  --dataset WHERE   what is at WHERE
  FOLDER or URL     pictures as <class>/<file>, in any place that label_bucket.py can read
  *.parquet         files here or at a URL: a column of images, bytes or {bytes, path}, and one of labels
  OWNER/NAME        a data set of the Hugging Face hub, streamed; HF_TOKEN or `hf auth login` for those that need one
  FOLDER            of data files that `datasets` can load

The set's classes are found among the model's labels by name, by their first synonym ("tench, Tinca tinca" is "tench"),
or as --label-map says; a set of as many classes as the model may also have them by number or by position. Which rule
was used is printed, and a class without a match ends the job.
"""

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

# Also without the package installed: from a checkout, or as the working directory of a Ray job.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline import argument_file, engine, tables
from pipeline.arguments import add_log_level, positive
from pipeline.compare import compare
from pipeline.errors import STOPPED, ConfigError, ConflictError, LabelBucketError, SourceError
from pipeline.evaluate import MODES, PRECISIONS, Options, evaluate


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, evaluate or compare, print; the exit code."""
    parser = _parser()
    flags = argument_file.parse(parser, arguments)
    if (flags.compare is None) == (flags.dataset is None):
        parser.error("expected --dataset WHERE with --model NAME, or --compare A B")
    if (flags.dataset is None) != (flags.model is None) or (flags.compare and flags.predictions):
        parser.error(
            "expected --model NAME and --predictions FILE only with --dataset, and --dataset only with --model"
        )
    logging.basicConfig(level=flags.log_level, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    engine.quieten()
    try:
        _check_writable(flags.json, flags.predictions)
        text, json_text = _compared(flags) if flags.compare else _evaluated(flags)
        if flags.json is not None:
            flags.json.write_text(json_text)
    except LabelBucketError as error:
        print(f"evaluate_checkpoint: exit code {error.exit_code}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(f"evaluate_checkpoint: exit code {STOPPED}: stopped; nothing was written", file=sys.stderr)
        return STOPPED
    print(text)
    written = [str(path) for path in (flags.json, flags.predictions) if path is not None]
    if written:
        print(f"evaluate_checkpoint: exit code 0: written {' and '.join(written)}", file=sys.stderr)
    return 0


def _evaluated(flags: argparse.Namespace) -> tuple[str, str]:
    options = Options(
        model=flags.model,
        dataset=flags.dataset,
        revision=flags.revision,
        split=flags.split,
        subset=flags.subset,
        image_column=flags.image_column,
        label_column=flags.label_column,
        label_map=flags.label_map,
        ignores_unmapped=flags.ignore_unmapped,
        modes=MODES if flags.preprocess == "all" else (flags.preprocess,),
        precisions=PRECISIONS if flags.precision == "all" else (flags.precision,),
        device=flags.device,
        num_actors=flags.gpu_actors,
        limit=flags.limit,
        fraction=flags.fraction,
        seed=flags.seed,
        predictions=flags.predictions,
    )
    evaluation = evaluate(options, start_engine=engine.start)
    return tables.evaluation_text(evaluation), evaluation.to_json()


def _compared(flags: argparse.Namespace) -> tuple[str, str]:
    comparison = compare(*flags.compare)
    return tables.comparison_text(comparison), comparison.to_json()


def _check_writable(*paths: Path | None) -> None:
    """Before hours of work, and not after them."""
    for path in paths:
        if path is not None and (not path.absolute().parent.is_dir() or path.is_dir()):
            raise ConfigError(f"{path}: expected a file in a folder that exists, found none such; make the folder")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"""\
what --compare takes, twice:
  URL#space=ID                                     a space of a labeling output; #space=… only where it has several
  FILE.parquet#preprocess=MODE,precision=FORMAT    of --predictions; #… only where the file has several
  Pictures are joined by uri. Vectors are compared where both runs have some of the same length.

exit codes:
    0  done
    2  this command cannot work as given: no such model, set, column or class
  {SourceError.exit_code:3}  the set cannot be read, or has no picture
  {ConflictError.exit_code:3}  a run of --compare is damaged
  {STOPPED:3}  stopped

examples:
  draw_images.py --output drawn --num-images 600 --seed 7 && evaluate_checkpoint.py --model demo --dataset drawn
  evaluate_checkpoint.py --model facebook/deit-small-distilled-patch16-224 --dataset imagenet-1k --split validation
  evaluate_checkpoint.py --config infra/config/evaluate.toml --precision all
  evaluate_checkpoint.py --compare 's3://shop-labels#space=demo-9cdf48b3' 's3://shop-labels#space=demo-1f0a7c55'
""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", metavar="NAME", help="hub id, folder, URL, or demo")
    add("--revision", metavar="COMMIT", help="of the model on the hub")
    add("--dataset", metavar="WHERE", help="the labeled set, see above")
    add("--subset", metavar="NAME", help="of a data set that has several (a configuration, as `datasets` calls it)")
    add("--split", metavar="NAME", help="needed where the data set has several")
    add("--image-column", metavar="NAME", help="needed where no column, or more than one, holds images")
    add("--label-column", metavar="NAME", help="needed where no column, or more than one, holds labels")
    add(
        "--label-map",
        type=Path,
        metavar="FILE",
        help="JSON or TOML: a name or number of the set -> a name or id of the model; null (JSON) to leave a class out",
    )
    add(
        "--ignore-unmapped",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="leave out pictures whose class is no label of the model",
    )
    add("--preprocess", choices=("all", *MODES), default="all", help="default all")
    add("--precision", choices=("all", *PRECISIONS), default="all", help="default all; bf16 is slow on most CPUs")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default auto: GPUs if the cluster has any")
    add("--gpu-actors", type=positive, metavar="ACTORS", help="copies of the model; default one per GPU or CPU")
    add("--limit", type=positive, metavar="N", help="the first N pictures; a folder's are of its first classes")
    add("--fraction", type=_fraction, default=1.0, metavar="F", help="a random share of the pictures, 0..1; default 1")
    add("--seed", type=int, default=0, metavar="S", help="chooses that share; default 0")
    add("--json", type=Path, metavar="FILE", help="write everything that was measured")
    add("--predictions", type=Path, metavar="FILE", help="write Parquet: a row per picture, mode and precision")
    add("--compare", nargs=2, metavar=("A", "B"), help="two runs; no model is needed")
    add_log_level(parser)
    argument_file.add_config(parser)
    return parser


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0, at most 1, found {text!r}")
    return value


if __name__ == "__main__":
    sys.exit(main())
