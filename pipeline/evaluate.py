"""evaluate(options): a checkpoint and a labeled set -> how often it is right, for every preprocessing and precision.

In: a model's name, a set's place, and which combinations. Out: an `Evaluation` with everything that was counted and all
that it depends on. A module of its own because this is the order of it all: what is checked before Ray starts, what is
counted as answers come, and the published figures that stand beside them.
"""

import contextlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import answers, checkpoint, engine, label_map, predictions, request, truth
from pipeline.answers import Precision, Task
from pipeline.checkpoint import Checkpoint, PreprocessMode
from pipeline.dataset import Resources, resolve_resources
from pipeline.errors import SourceError
from pipeline.label_map import Given, Match
from pipeline.meter import metered
from pipeline.metrics import Metrics, Tally
from pipeline.predictions import Combination
from pipeline.preprocess import spec_from_config
from pipeline.truth import LabeledSet

MODES: tuple[PreprocessMode, ...] = get_args(PreprocessMode)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

PUBLISHED = {
    "facebook/deit-tiny-patch16-224": (72.2, 91.1),
    "facebook/deit-small-patch16-224": (79.9, 95.0),
    "facebook/deit-base-patch16-224": (81.8, 95.6),
    "facebook/deit-tiny-distilled-patch16-224": (74.5, 91.9),
    "facebook/deit-small-distilled-patch16-224": (81.2, 95.4),
    "facebook/deit-base-distilled-patch16-224": (83.4, 96.5),
    "facebook/deit-base-patch16-384": (82.9, 96.2),
    "facebook/deit-base-distilled-patch16-384": (85.2, 97.2),
}
"""Top-1 and top-5 in per cent on the validation set of ImageNet-1k, as the README of facebookresearch/deit publishes
them, measured with what mode `paper` does."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What an evaluation is asked for."""

    model: str
    dataset: str
    revision: str | None = None
    split: str | None = None
    subset: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    label_map: Path | None = None
    ignores_unmapped: bool = False
    modes: tuple[PreprocessMode, ...] = MODES
    precisions: tuple[Precision, ...] = PRECISIONS
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_actors: int | None = None
    limit: int | None = None
    fraction: float = 1.0
    seed: int = 0
    predictions: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Result:
    """One row of the table."""

    preprocess: str
    precision: str
    metrics: Metrics


@dataclass(frozen=True, kw_only=True)
class ClassMatch:
    """One class of the set."""

    name: str
    label_id: int | None
    label_name: str | None
    rule: label_map.Rule | None
    """None: it has no match and was left out."""
    num_images: int


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured, with everything that it depends on; the content of --json."""

    model_id: str
    model_revision: str
    weights_digest: str
    num_labels: int
    data: LabeledSet
    num_images: int
    num_ignored: int
    """Pictures without a label of the model."""
    mapping: list[ClassMatch]
    published: tuple[float, float] | None
    """Top-1 and top-5, 0 .. 1, of a model that has published ones."""
    results: list[Result]
    options: Options
    device: str
    specs: Mapping[str, Any]
    """What each preprocessing does."""
    versions: Mapping[str, str]
    seconds: float

    def to_json(self) -> str:
        """Indented JSON."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False, default=str) + "\n"


def evaluate(options: Options, *, start_engine: Callable[[], None]) -> Evaluation:
    """Measure. `start_engine` connects to Ray, and is called once everything that needs no cluster has been checked.

    Raises ConfigError for a model, set, column or split that is not there and for classes without a match; SourceError
    for a set that cannot be read or has no picture to count.
    """
    started_s = time.monotonic()
    found = checkpoint.resolve(options.model, options.revision)
    labeled = truth.open_set(
        options.dataset,
        split=options.split,
        subset=options.subset,
        image_column=options.image_column,
        label_column=options.label_column,
    )
    given = label_map.read_map(options.label_map) if options.label_map else {}
    matches = label_map.match_names(labeled.names or (), found.label_names, given)
    without = [name for name, match in matches.items() if match.rule is None]
    if without and not options.ignores_unmapped:
        raise answers.unmatched(labeled, without, found.label_names)
    task = _task(options, found, labeled, matches, given)
    start_engine()
    resources = resolve_resources(options.device, options.num_actors)
    _log.info("labeling %s with %s on %d %s actors", labeled, found.model_id, resources.num_actors, resources.device)
    counted = Counted(tallies={each: Tally(found.label_names) for each in task.combinations})
    with engine.errors(), _writer(options.predictions, task, found) as writer:
        units = answers.label_set(task, resources)
        for each in metered(units, "labeling pictures", _total(task), size=lambda each: each.num_new):
            counted.add(each)
            if writer is not None:
                writer.add(each.rows, each.combination)
        if not counted.num_images:
            ignored = f" ({counted.num_ignored} without a label of the model)" if counted.num_ignored else ""
            raise SourceError(f"--dataset {labeled}: expected labeled pictures, found none{ignored}")
    return _evaluation(options, found, task, resources, counted, time.monotonic() - started_s)


@dataclass(kw_only=True)
class Counted:
    """What has been counted so far."""

    tallies: dict[Combination, Tally]
    names: Counter[str] = field(default_factory=Counter)
    """What the set calls its pictures -> how many, each once."""
    num_ignored: int = 0

    @property
    def num_images(self) -> int:
        """Pictures, each once."""
        return self.names.total()

    def add(self, each: answers.Answers) -> None:
        """Count the answers to a unit."""
        self.num_ignored += each.num_ignored
        if each.num_new:
            self.names.update(each.rows["true_name"].to_pylist())
        tally = self.tallies[each.combination]
        failed = each.rows.filter(pc.is_valid(each.rows["failure_kind"]))
        tally.add_failures(failed["true_id"].to_numpy(), failed["failure_kind"].to_pylist())
        answered = each.rows.filter(pc.is_null(each.rows["failure_kind"]))
        if len(answered):
            ids_Nk, scores_Nk = (_rectangle(answered[name]) for name in ("label_ids", "label_scores"))
            tally.add(answered["true_id"].to_numpy(), ids_Nk, scores_Nk[:, 0])


def _rectangle(lists: pa.ChunkedArray) -> Any:
    """Lists of equal length as a numpy array (rows, length)."""
    return lists.combine_chunks().flatten().to_numpy().reshape(len(lists), -1)


def _task(options: Options, found: Checkpoint, labeled: LabeledSet, matches: Mapping[str, Match], given: Given) -> Task:
    return Task(
        labeled=labeled,
        matches=matches,
        given=given,
        ignores_unmapped=options.ignores_unmapped,
        limit=options.limit,
        fraction=options.fraction,
        seed=options.seed,
        specs={
            mode: spec_from_config(found.preprocessor_config, mode=mode, input_px=found.input_px)
            for mode in options.modes
        },
        precisions=options.precisions,
        model=request.portable(options.model),
        model_revision=found.revision,
        weights_digest=found.weights_digest,
        label_names=found.label_names,
    )


def _writer(
    path: Path | None, task: Task, found: Checkpoint
) -> contextlib.AbstractContextManager[predictions.Writer | None]:
    if path is None:
        return contextlib.nullcontext()
    about = {"model_id": found.model_id, "weights_digest": found.weights_digest, "data": task.labeled.uri_root}
    return predictions.writer(path, task.combinations, about)


def _total(task: Task) -> int | None:
    if task.labeled.num_images is None:
        return task.limit
    wanted = round(task.labeled.num_images * task.fraction)
    return wanted if task.limit is None else min(wanted, task.limit)


def _evaluation(
    options: Options, found: Checkpoint, task: Task, resources: Resources, counted: Counted, seconds: float
) -> Evaluation:
    figures = PUBLISHED.get(found.model_id)
    return Evaluation(
        model_id=found.model_id,
        model_revision=found.revision,
        weights_digest=found.weights_digest,
        num_labels=len(found.label_names),
        data=task.labeled,
        num_images=counted.num_images,
        num_ignored=counted.num_ignored,
        mapping=_mapping(task, counted.names),
        published=figures and (figures[0] / 100, figures[1] / 100),
        results=[
            Result(preprocess=each.preprocess, precision=each.precision, metrics=tally.metrics())
            for each, tally in counted.tallies.items()
        ],
        options=options,
        device=resources.device,
        specs={mode: asdict(spec) for mode, spec in task.specs.items()},
        versions={**request.versions(), "datasets": version("datasets")},
        seconds=seconds,
    )


def _mapping(task: Task, seen: Counter[str]) -> list[ClassMatch]:
    matches = {**task.matches, **{name: answers.match_of(task, name) for name in seen}}
    return [
        ClassMatch(
            name=name,
            label_id=match.label_id,
            label_name=None if match.label_id is None else task.label_names[match.label_id],
            rule=match.rule,
            num_images=seen[name],
        )
        for name, match in matches.items()
    ]
