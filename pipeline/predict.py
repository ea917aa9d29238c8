"""A plan and a sample of its objects -> how long the run will take, what will limit it, and what will fail.

The sample goes through the run's own code (fetch, decode, preprocess, model) where the run's tasks and actors would be,
one task and one actor at a time, so that what a core does is not disturbed by another. A module of its own because the
arithmetic from there to the whole cluster is a claim that tests hold against real runs.
"""

import itertools
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from pipeline import capability, dataset, fetch, outcomes, plan, storage
from pipeline.dataset import Resources, Task
from pipeline.errors import FailureKind
from pipeline.label import CALLS_PER_ACTOR, DEFAULT_BATCH_SIZE, Device
from pipeline.meter import clock_text
from pipeline.plan import Plan
from pipeline.prepare import prepare_unit
from pipeline.progress import ADVICE, Stage
from pipeline.storage import Store
from pipeline.survey import Survey

PREPARE_BUDGET_S = 6.0
"""Time for the sample in one prepare task: of large images, only so many are looked at."""
MODEL_BUDGET_S = 5.0
"""Likewise in one actor."""
MIN_ROUNDS = 4
"""Micro-batches to time, on a GPU as many units as it is given at once; the images once more where there are fewer."""
STARTS_PER_WAVE = 2.5
"""How much longer a wave starts than one actor alone: first a process of its own, then all actors at once, on cores on
which workers and decoders start, too. 10 s against 3.7 on two cores."""


class Prepared(NamedTuple):
    """What one prepare task did with a sample."""

    table: pa.Table
    """schema.DECODED, of the first so many objects of the sample."""
    prepare_s: float
    decode_s: float
    """Of it, in the child that decodes."""
    own_cpu_s: float
    """Beside it: processor time of the task's own process, which fetches and copies."""


class Labeled(NamedTuple):
    """What one actor did with it."""

    num_images: int
    """An image may count more than once."""
    label_s: float
    failures: dict[str, int]
    """Images, each once, for which the model gave no finite numbers."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Seconds per object of the sample; those of failed objects are in it."""

    num_objects: int
    encoded_bytes: int
    failures: dict[str, int]
    """Objects by kind of failure."""
    wait_s: float
    """A prepare task waits for bytes: neither decoding nor resizing, as in `Bottleneck.storage_wait_share`."""
    decode_s: float
    """It decodes, on one core."""
    own_cpu_s: float
    """Processor time that it takes beside that, while it waits."""
    label_s: float
    """One actor labels; 0 where no object of the sample got so far."""

    @classmethod
    def of(cls, prepared: Prepared, labeled: Labeled) -> "Measured":
        """From what both did with the same objects, at least one."""
        num_objects = len(prepared.table)
        kinds = prepared.table["failure_kind"].drop_null().to_pylist()
        image_s = labeled.label_s / labeled.num_images if labeled.num_images else 0.0
        return cls(
            num_objects=num_objects,
            encoded_bytes=pc.sum(prepared.table["size_bytes"]).as_py(),
            failures=dict((Counter(kinds) + Counter(labeled.failures)).most_common()),
            wait_s=max(0.0, prepared.prepare_s - prepared.decode_s) / num_objects,
            decode_s=prepared.decode_s / num_objects,
            own_cpu_s=prepared.own_cpu_s / num_objects,
            label_s=image_s * (num_objects - len(kinds)) / num_objects,
        )


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a run of this plan on this cluster would be like. Rates are objects per second."""

    num_images: int
    """To label."""
    encoded_bytes: int
    """To read."""
    sample: Measured
    num_prepares: int
    """Prepare tasks at once."""
    num_actors: int
    shares_cores: bool
    """Whether the model runs on the cores that decode."""
    storage_images_per_s: float
    """If waiting for bytes were all there is to do; likewise the next two."""
    decoding_images_per_s: float
    model_images_per_s: float
    images_per_s: float
    """All of it together, once workers and models have started."""
    limit: Stage
    advice: str
    planning_s: float
    """As long as it took for this prediction."""
    checking_s: float
    """Starting one model, before anything else."""
    starting_s: float
    """Starting workers and all models, in each wave."""
    labeling_s: float
    expected_s: float
    """All four: from the command to the last part. Connecting to Ray and publishing are not in it."""

    def failed_fraction(self, kind: str) -> float:
        """Share of the objects that will fail in this way, by the sample."""
        return self.sample.failures.get(kind, 0) / self.sample.num_objects


def predict(sample: Measured, planned: Plan, resources: Resources, *, planning_s: float, start_s: float) -> Prediction:
    """`start_s` is what it takes until a model is ready on a node that has none.

    Tasks and actors beyond the number of units have nothing to do. Cores are shared by all that decodes, and without
    GPUs by the model, too: there the seconds of both add up. What a task waits for takes its slot and no core.
    """
    num_images, num_units = planned.counts["planned"], planned.num_units
    num_prepares, num_actors = min(resources.max_prepares, num_units), min(resources.num_actors, num_units)
    num_cores = resources.cluster_cpus
    prepare_s = sample.wait_s + sample.decode_s
    shares_cores = resources.device == "cpu"
    core_s = sample.decode_s + sample.own_cpu_s + (sample.label_s if shares_cores else 0)
    seconds: dict[Stage, float] = {
        "storage": sample.wait_s / num_prepares,
        "decoding": sample.decode_s / min(num_cores, num_prepares),
        "model": sample.label_s / num_actors,
    }
    image_s = max(prepare_s / num_prepares, core_s / num_cores, *seconds.values())
    # The last units are in one stage when the other has nothing left to do.
    last_s = num_images / num_units * min(prepare_s, sample.label_s)
    labeling_s = num_images * image_s + last_s
    num_waves = -(-num_units // dataset.UNITS_PER_WAVE)
    waves_start_s = STARTS_PER_WAVE * start_s * num_waves
    limit = max(seconds, key=lambda stage: seconds[stage])
    if waves_start_s > labeling_s:
        limit = "starting"
    return Prediction(
        num_images=num_images,
        encoded_bytes=planned.encoded_bytes,
        sample=sample,
        num_prepares=num_prepares,
        num_actors=num_actors,
        shares_cores=shares_cores,
        storage_images_per_s=_per_second(seconds["storage"]),
        decoding_images_per_s=_per_second(seconds["decoding"]),
        model_images_per_s=_per_second(seconds["model"]),
        images_per_s=_per_second(image_s),
        limit=limit,
        advice=ADVICE[limit],
        planning_s=planning_s,
        checking_s=start_s,
        starting_s=waves_start_s,
        labeling_s=labeling_s,
        expected_s=planning_s + start_s + waves_start_s + labeling_s,
    )


def _per_second(seconds: float) -> float:
    return 1 / max(seconds, 1e-9)


# --- the sample through the stages --------------------------------------------------------------------------------


class Rehearsal:
    """One actor of the run, started; then a sample through a prepare task and that actor. Ends with `close`."""

    def __init__(self, task: Task, resources: Resources) -> None:
        """Start the model as `dataset.check_model` does, with the same errors, and take the time."""
        self._task, self._resources = task, resources
        started_s = time.monotonic()
        options = {"num_cpus": resources.actor_cpus, "num_gpus": 1 if resources.device == "cuda" else 0}
        # Of an actor's methods the engine's types know only what they are without it.
        self._actor = cast("Any", ray.remote(_Model).options(**options).remote(task, resources.device))
        try:
            ray.get(self._actor.start.remote())
        except BaseException:
            self.close()
            raise
        self.start_s = time.monotonic() - started_s

    def measure(self, survey: Survey) -> Measured:
        """The survey's sample, which has objects, through all stages."""
        objects = plan.objects_table(self._task.input_url, survey.sample())
        prepared = ray.get(_prepare.options(num_cpus=self._resources.prepare_cpus).remote(self._task, objects))
        return Measured.of(prepared, ray.get(self._actor.label.remote(prepared.table)))

    def close(self) -> None:
        """Let go of the actor and what it holds."""
        ray.kill(self._actor)


@ray.remote
def _prepare(task: Task, objects: pa.Table) -> Prepared:
    """The objects, or so many of them as there is time for, after a few that open connections and start the decoder."""
    source = storage.connect_input(task.input_url)

    def prepare(some: pa.Table) -> Prepared:
        started_s, cpu_started_s = time.perf_counter(), time.process_time()
        table, decode_s = prepare_unit(source, some, task.recipe, deadline_s=task.object_deadline_s)
        return Prepared(table, time.perf_counter() - started_s, decode_s, time.process_time() - cpu_started_s)

    first = prepare(objects[: fetch.CONCURRENCY])
    affordable = int(PREPARE_BUDGET_S / max(first.prepare_s / len(first.table), 1e-9))
    return first if affordable <= len(first.table) else prepare(objects[:affordable])


class _Model:
    """`Labeler` in an actor as those of a run, with a clock."""

    def __init__(self, task: Task, device: Device) -> None:
        self._task, self._device = task, device

    def start(self) -> None:
        # Not in the constructor, whose error would be the engine's.
        self._labeler, _ = dataset.checked_labeler(self._task, self._device)

    def label(self, table: pa.Table) -> Labeled:
        images = table.filter(pc.is_null(table["failure_kind"]))
        num_images, label_s, failures = 0, 0.0, Counter[str]()
        if not len(images):
            return Labeled(0, 0.0, {})
        num_calls, num_rows = CALLS_PER_ACTOR[self._device], self._task.batch_size or DEFAULT_BATCH_SIZE[self._device]
        if self._device == "cuda":  # which waits between calls
            num_rows = plan.UnitSizes.of(self._task.recipe.spec.input_px, 2).max_unit_rows
        with ThreadPoolExecutor(num_calls) as threads:
            for number in itertools.count():
                if label_s > MODEL_BUDGET_S or (number >= MIN_ROUNDS and num_images >= len(images)):
                    break
                starts = num_images + num_rows * np.arange(num_calls)
                units = [images.take((start + np.arange(num_rows)) % len(images)) for start in starts]
                started_s = time.perf_counter()
                labeled = list(threads.map(self._labeler, units))
                label_s += time.perf_counter() - started_s
                for start, unit in zip(starts, labeled, strict=True):
                    failures.update(unit["failure_kind"][: max(0, len(images) - start)].drop_null().to_pylist())
                num_images += num_rows * num_calls
        return Labeled(num_images, label_s, dict(failures))


# --- what the operator sees ---------------------------------------------------------------------------------------


def folder_lines(survey: Survey) -> Iterator[str]:
    """How much is to label in each folder below the input, the largest first, the rest in the last line."""
    shown, others = survey.folders()
    for each in [*shown, *([] if others is None else [others])]:
        name = each.name or "(in no folder)"
        yield f"folder: {each.num_objects:,} to label, {each.encoded_bytes / 1e9:,.3f} GB: {name}"


def lines(found: Prediction, price_per_hour: float | None) -> Iterator[str]:
    """What the sample showed, a line for each stage, and what follows for the whole."""
    sample = found.sample
    kinds = ", ".join(f"{kind} {found.failed_fraction(kind):.1%}" for kind in sample.failures)
    num_failed = sum(sample.failures.values())
    about = f"about {num_failed / sample.num_objects * found.num_images:,.0f} of all ({kinds})" if kinds else "0 of all"
    yield (
        f"sample: {sample.num_objects:,} of {found.num_images:,} objects,"
        f" {sample.encoded_bytes / sample.num_objects / 1e3:,.1f} kB each (all:"
        f" {found.encoded_bytes / found.num_images / 1e3:,.1f} kB); {num_failed:,} failed, which means {about}"
    )
    yield f"storage: {_rate(sample.wait_s)} a task, {found.storage_images_per_s:,.0f} in all {found.num_prepares:,}"
    yield f"decoding: {_rate(sample.decode_s)} a core, {found.decoding_images_per_s:,.0f} on the cluster"
    if sample.label_s:
        yield f"model: {_rate(sample.label_s)} an actor, {found.model_images_per_s:,.0f} in all {found.num_actors:,}"
    else:
        yield "model: not measured, because no object of the sample could be decoded"
    shares = "decoding and model share the cores" if found.shares_cores else "the stages work side by side"
    yield f"together: {found.images_per_s:,.0f} images/s, because {shares}"
    yield found.advice
    yield (
        f"expected: {clock_text(found.expected_s)} = {found.checking_s:,.1f} s checking the model +"
        f" {found.planning_s:,.1f} s planning + {found.starting_s:,.1f} s starting workers and models +"
        f" {found.labeling_s:,.1f} s labeling; connecting to Ray and publishing come on top"
    )
    if price_per_hour is not None:
        yield f"cost: about ${price_per_hour * found.expected_s / 3600:,.2f} at ${price_per_hour:,.2f} per hour"


def budget_warning(found: Prediction, num_in_scope: int, max_failed_fraction: float) -> str | None:
    """What to warn of if as many fail as in the sample, and that is more than the run may publish with."""
    kinds = [kind for kind in found.sample.failures if kind != FailureKind.NOT_AN_IMAGE]
    expected = round(sum(found.failed_fraction(kind) for kind in kinds) * found.num_images)
    allowed = max(outcomes.BUDGET_FLOOR, int(max_failed_fraction * num_in_scope))
    if expected <= allowed:
        return None
    return (
        f"about {expected:,} objects will fail, {allowed:,} are allowed (--max-failed-fraction): nothing would be"
        " published"
    )


def unchecked(output: Store, *, has_probed: bool) -> str:
    """What a run may still stumble over, although its dry run went through."""
    rest = "objects that are not in the sample; nodes that it did not run on"
    if has_probed:
        return rest
    before = "" if capability.recorded(output) is None else ", where a run has written before"
    return f"whether {output.root} can be written{before} (--probe-writes tries it); {rest}"


def _rate(seconds: float) -> str:
    return f"{_per_second(seconds):,.0f} images/s"
