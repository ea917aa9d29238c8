"""A labeled set -> the model's answers, on Ray Data: the pipeline of `dataset` with truth beside the pictures.

    read (one task) ──units──> prepare (CPU task) ──a row per preprocessing──> label (actor pool) ──> answers, in order

The same fetching, decoding, preprocessing and labeling code, units packed as single rows, stages that do not fuse. One
task reads, because a set is a stream; it waits while the stages after it are behind. Every picture is read once and
decoded once per preprocessing, and every actor loads the model once per precision.

A module of its own because, unlike `dataset`, it publishes nothing: no plan, no parts, no claim.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from typing import Literal, NamedTuple

import pyarrow as pa
import ray.data
from ray.data import Dataset, TaskPoolStrategy

from pipeline import decode, label_map, plan, predictions, storage, truth
from pipeline.checkpoint import PreprocessMode, PreprocessSpec
from pipeline.dataset import COMMIT_CPUS, Resources, pack_unit, prepare_and_label, set_context, unpack_unit
from pipeline.errors import ConfigError, ImageError, LabelBucketError
from pipeline.label import DEFAULT_BATCH_SIZE, Device, Labeler
from pipeline.label_map import Given, Match
from pipeline.metrics import TOP_K
from pipeline.predictions import Combination
from pipeline.prepare import fetched, prepare_encoded
from pipeline.truth import Item, LabeledSet

Precision = Literal["fp32", "bf16"]

MIN_UNIT_ROWS = 64
MAX_UNIT_BYTES = 64 * 2**20
"""Encoded bytes after which a unit is closed: what a prepare task holds beside its pixels."""
MAX_LOOKED_ON = 10_000
"""Rows that are read on after a label without a match, to name more of them."""
OBJECT_DEADLINE_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Task:
    """Everything a worker has to know."""

    labeled: LabeledSet
    matches: Mapping[str, Match]
    """Of the set's classes, where they are known before its rows are read."""
    given: Given
    ignores_unmapped: bool
    limit: int | None
    fraction: float
    seed: int
    specs: Mapping[PreprocessMode, PreprocessSpec]
    precisions: tuple[Precision, ...]
    model: str
    model_revision: str
    weights_digest: str
    label_names: tuple[str, ...]
    limits: decode.DecodeLimits = decode.DEFAULT_LIMITS

    @property
    def combinations(self) -> list[Combination]:
        """What is asked of every picture."""
        return [Combination(mode, precision) for mode in self.specs for precision in self.precisions]


class Answers(NamedTuple):
    """What the model said of a unit, in one combination."""

    combination: Combination
    rows: pa.Table
    """Columns of predictions.SCHEMA without those of the combination."""
    num_new: int
    """Pictures that no combination has answered for before: all or none of the rows."""
    num_ignored: int
    """Pictures that were left out on the way to these."""


def label_set(task: Task, resources: Resources) -> Iterator[Answers]:
    """Answers in order of the set. Raises what `truth.items` and `Labeler` raise, and ConfigError for a label without a
    match.
    """
    for packed in build(task, resources).iter_batches(batch_size=1, batch_format="pyarrow"):
        rows, facts = unpack_unit(packed)
        combination = Combination(facts["preprocess"], facts["precision"])
        is_new = combination == task.combinations[0]
        yield Answers(combination, rows, len(rows) * is_new, facts["num_ignored"] * is_new)


def build(task: Task, resources: Resources) -> Dataset:
    """The pipeline over a labeled set."""
    # Every row is a block of its own: a generator's blocks go on as they come, and its task waits while they pile up.
    set_context(max_block_bytes=1, preserve_order=True)
    units = ray.data.from_items([{"reader": 0}]).map_batches(
        partial(_read, task, max(MIN_UNIT_ROWS, DEFAULT_BATCH_SIZE[resources.device])),
        batch_size=1,
        batch_format="pyarrow",
        compute=TaskPoolStrategy(size=1),
        num_cpus=COMMIT_CPUS,
    )
    return prepare_and_label(units, partial(_prepare, task), _Label, (task, resources.device), resources)


def _read(task: Task, unit_rows: int, _: pa.Table) -> Iterator[pa.Table]:
    """The set as units: schema.OBJECTS, what each picture is, and the encoded picture where the set holds it itself."""
    found = truth.items(task.labeled, limit=task.limit, fraction=task.fraction, seed=task.seed)
    unit: list[tuple[Item, int]] = []
    num_ignored = num_bytes = 0
    for item, label_id in _with_truth(task, found):
        if label_id is None:
            num_ignored += 1
            continue
        unit.append((item, label_id))
        num_bytes += item.info.size_bytes
        if len(unit) == unit_rows or num_bytes >= MAX_UNIT_BYTES:
            yield _unit(task, unit, num_ignored)
            unit, num_ignored, num_bytes = [], 0, 0
    yield _unit(task, unit, num_ignored)


def _with_truth(task: Task, found: Iterator[Item]) -> Iterator[tuple[Item, int | None]]:
    """Each item with the model's label, None for one to leave out; ConfigError for one without a match."""
    match = cache(partial(match_of, task))
    for item in found:
        label_id, rule = match(item.label)
        if rule is None and not task.ignores_unmapped:
            labels = [item.label, *(each.label for each in islice(found, MAX_LOOKED_ON))]
            names = {_called(label) for label in labels if match(label).rule is None}
            more = f", and maybe more after {MAX_LOOKED_ON:,} rows" if len(labels) > MAX_LOOKED_ON else ""
            raise unmatched(task.labeled, sorted(names), task.label_names, more)
        yield item, label_id


def match_of(task: Task, label: str | None) -> Match:
    """The model's label for what the set calls a picture."""
    if label is None:
        return Match(None, None)
    return task.matches.get(label) or label_map.match_one(label, task.label_names, task.given)


def _called(label: str | None) -> str:
    return "no label" if label is None else label


def _unit(task: Task, unit: list[tuple[Item, int]], num_ignored: int) -> pa.Table:
    objects = plan.objects_table(task.labeled.uri_root, [item.info for item, _ in unit])
    columns = {
        "true_name": pa.array([_called(item.label) for item, _ in unit], pa.string()),
        "true_id": pa.array([label_id for _, label_id in unit], pa.int32()),
        "encoded": pa.array([item.data for item, _ in unit], pa.large_binary()),
    }
    for name, column in columns.items():
        objects = objects.append_column(name, column)
    return pack_unit(objects, {"num_ignored": num_ignored})


def _prepare(task: Task, packed: pa.Table) -> Iterator[pa.Table]:
    """The unit's model input, once per preprocessing."""
    objects, facts = unpack_unit(packed)
    encoded: dict[int, bytes | ImageError]
    if task.labeled.is_folder:
        source = storage.connect(task.labeled.root)
        encoded = dict(fetched(source, objects, task.limits, deadline_s=OBJECT_DEADLINE_S))
    else:
        encoded = dict(enumerate(objects["encoded"].to_pylist()))
    objects = objects.drop_columns(["encoded"])
    for mode, spec in task.specs.items():
        table, _ = prepare_encoded(objects, encoded.items(), spec, task.limits)
        yield pack_unit(table, {**facts, "preprocess": mode})


class _Label:
    """The actor: a `Labeler` per precision, each behind every preprocessing. Like that of `dataset` it keeps what is
    wrong with its node until there is somebody to tell.
    """

    def __init__(self, task: Task, device: Device) -> None:
        self._labelers: dict[tuple[str, Precision], Labeler] | LabelBucketError
        try:
            self._labelers = {
                (mode, precision): labeler.with_spec(spec)
                for precision in task.precisions
                for labeler in [_labeler(task, device, precision)]
                for mode, spec in task.specs.items()
            }
        except LabelBucketError as error:
            self._labelers = error
        self._precisions = task.precisions

    def __call__(self, packed: pa.Table) -> Iterator[pa.Table]:
        if isinstance(self._labelers, LabelBucketError):
            raise self._labelers
        table, facts = unpack_unit(packed)
        for precision in self._precisions:
            labeled = self._labelers[facts["preprocess"], precision](table)
            for name in ("true_name", "true_id"):
                labeled = labeled.append_column(name, table[name])
            wanted = [name for name in predictions.SCHEMA.names if name in labeled.column_names]
            yield pack_unit(labeled.select(wanted), {**facts, "precision": precision})


def _labeler(task: Task, device: Device, precision: Precision) -> Labeler:
    return Labeler(
        model=task.model,
        revision=task.model_revision,
        weights_digest=task.weights_digest,
        spec=next(iter(task.specs.values())),
        pooling="none",
        top_k=min(TOP_K, len(task.label_names)),
        device=device,
        precision=precision,
    )


def unmatched(labeled: LabeledSet, names: list[str], model_names: tuple[str, ...], more: str = "") -> ConfigError:
    """The error that lists classes without a match."""
    listed = ", ".join(names[:20]) + (f", … ({len(names):,} in all)" if len(names) > 20 else "")
    return ConfigError(
        f"--dataset {labeled}: expected classes that are labels of the model ({', '.join(model_names[:3])}, …), found"
        f" {len(names):,} that match none or several: {listed}{more}; say what they are with --label-map FILE, or leave"
        " them out with --ignore-unmapped"
    )
