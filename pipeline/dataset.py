"""Units -> parts on Ray Data: the only module that imports ray.data.

    units ──> prepare (CPU task) ──> label (actor pool) ──> commit (CPU task) ──> one summary row per unit

One unit is one row, one block, one task in each stage, one part. Three things keep it so. A unit travels as a single
row with its table nested in it, so no batching of the engine can split or join units. `target_max_block_size = None`,
or big blocks would be split. And every stage has another `num_cpus`, or the engine would fuse neighbours with equal
ones (there is no public switch, ray-project/ray#54433). A module of its own so that the wiring is one expression.
"""

import itertools
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
import ray.exceptions
from ray.data import ActorPoolStrategy, DataContext, Dataset, TaskPoolStrategy
from ray.data.exceptions import ExecutionTimeoutError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline import canary, engine, parts, plan, storage
from pipeline.actor_log import Clock, Warnings
from pipeline.checkpoint import Pooling
from pipeline.errors import ConfigError, LabelBucketError
from pipeline.label import CALLS_PER_ACTOR, Device, Labeler
from pipeline.picture import Recipe
from pipeline.prepare import prepare_unit
from pipeline.store import repeats

_log = logging.getLogger(__name__)

UNITS_PER_WAVE = 4096
"""Units in one Dataset, which keeps its input blocks for life (ray-project/ray#66016): 4.4 kB per unit, 18 MB per wave.

Every wave starts its actors again, about 6 s on 2 cores, and up to 8 s more to compile on a GPU: 10 % of a wave of full
units on one GPU at 30k images/s (137 s), 2 % on 64 cores that decode 100 images/s each (655 s). A longer wave would
start them less often, but hold more, and queueing it takes 0.8 ms per unit before its first task.
"""
STALL_TIMEOUT_S = 1800.0
"""Time in which nothing at all moves, after which a dataset is given up."""


class Work(NamedTuple):
    """One unit to do, and the file of the plan that holds its objects."""

    range_id: str
    unit_id: str
    chunk_key: str


@dataclass(frozen=True, kw_only=True)
class Task:
    """Everything a worker has to know; small, picklable, without secrets."""

    input_url: str
    output_url: str
    run_id: str
    recipe: Recipe
    object_deadline_s: float
    stall_timeout_s: float
    model: str
    model_revision: str
    weights_digest: str
    pooling: Pooling
    top_k: int
    precision: Literal["auto", "fp32", "bf16"]
    batch_size: int | None
    canaries: canary.Vectors | None = field(default=None, compare=False)
    """What the canary images must look like to every actor; None in a space's first run, until its own are known."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What the pool takes from the cluster."""

    device: Device
    num_actors: int
    cluster_cpus: float
    cluster_gpus: float

    @property
    def actor_cpus(self) -> float:
        """Beside a GPU an actor only feeds it. Without one the model shares the cores with decoding, whose tasks must
        always find a slot, so each takes half a core's slot and the operating system balances them."""
        return 0.1 if self.device == "cuda" else 0.5

    @property
    def prepare_cpus(self) -> float:
        """Slots of one prepare task; never equal to another stage's, see the module. Beside a GPU's actor it must fit
        on a node with one CPU."""
        return 0.8 if self.device == "cuda" else 0.4

    @property
    def max_prepares(self) -> int:
        """Prepare tasks at once, beside the actors."""
        return max(1, int((self.cluster_cpus - self.num_actors * self.actor_cpus) / self.prepare_cpus))

    @property
    def max_commits(self) -> int:
        """Commit tasks at once. They are short and take next to no slot, so without a bound every finished unit would
        start a worker process of its own."""
        return max(2, int(self.cluster_cpus) // 4)


COMMIT_CPUS = 0.05


class UnitSummary(NamedTuple):
    """What became of one unit, and the seconds its stages took: none, where only its part tells of it."""

    range_id: str
    unit_id: str
    num_rows: int
    failures: dict[str, int]
    part_bytes: int
    retries: dict[str, int]
    """Requests to storage that were asked again while it was prepared and committed, by cause, see `store`."""
    fetched_bytes: int = 0
    """Encoded bytes of the objects that arrived."""
    prepare_s: float = 0
    decode_s: float = 0
    """Of `prepare_s`: decoding and preprocessing; the rest is waiting for bytes."""
    label_s: float = 0
    """Work of its actor. Of several units at once, a second counts to one of them."""
    label_wait_s: float = 0
    """Its actor was idle before it."""
    label_queue_s: float = 0
    """It was ready, and no actor had taken it."""
    commit_queue_s: float = 0
    commit_s: float = 0
    warnings: Sequence[str] = ()
    """What its actor had to say since its last unit, and the name of its node."""


def resolve_resources(device: Literal["auto", "cpu", "cuda"], num_actors: int | None) -> Resources:
    """Where the model runs and how often, from what the cluster has now. Never falls back from a GPU asked for.

    Raises ConfigError for `cuda` without a GPU, and for more actors than there are devices.
    """
    cluster: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    cpus, gpus = cluster.get("CPU", 0.0), cluster.get("GPU", 0.0)
    chosen: Device = "cuda" if device == "cuda" or (device == "auto" and gpus >= 1) else "cpu"
    most = int(gpus) if chosen == "cuda" else max(1, int(cpus))
    if chosen == "cuda" and not most:
        raise ConfigError(
            f"--device cuda: expected GPUs, found a cluster with {cpus:g} CPUs and none; add GPU nodes, or use --device"
            " cpu"
        )
    if num_actors is not None and num_actors > most:
        unit = "GPUs" if chosen == "cuda" else "CPUs"
        raise ConfigError(f"--gpu-actors: expected at most {most}, the {unit} of this cluster; found {num_actors}")
    return Resources(device=chosen, num_actors=num_actors or most, cluster_cpus=cpus, cluster_gpus=gpus)


def check_model(task: Task, device: Device) -> canary.Vectors:
    """Build the model once where actors will run, before any of them starts; the vectors of the canary images.

    Raises ConfigError for weights that are not its architecture's, other weights than expected, a missing device or
    vectors that are not finite; ConflictError if they are not those of `task.canaries`.
    """
    options = {"num_cpus": 0.5, "num_gpus": 1 if device == "cuda" else 0}
    vectors: canary.Vectors = ray.get(_check_model.options(**options).remote(task, device))
    return vectors


@ray.remote(max_calls=1)  # or the process would keep memory of the GPU while actors measure what is free of it
def _check_model(task: Task, device: Device) -> canary.Vectors:
    return checked_labeler(task, device)[1]


def checked_labeler(task: Task, device: Device) -> tuple[Labeler, canary.Vectors]:
    """The model, and what it makes of the canary images, which is what it must if the task knows that."""
    labeler = Labeler(
        model=task.model,
        revision=task.model_revision,
        weights_digest=task.weights_digest,
        spec=task.recipe.spec,
        pooling=task.pooling,
        top_k=task.top_k,
        device=device,
        precision=task.precision,
        batch_size=task.batch_size,
        is_compiled=device == "cuda",  # on CPU it gains next to nothing, see tests/benchmarks/cpu_forward.md
    )
    vectors = labeler.canary_vectors()
    if task.canaries is not None:
        canary.check(vectors, task.canaries)
    return labeler, vectors


def label_units(task: Task, resources: Resources, work: Iterable[Work]) -> Iterator[UnitSummary]:
    """Do the work, in waves, and give a summary of each unit as its part is committed, in no order.

    A wave whose process dies, or in which nothing moves for `stall_timeout_s`, is begun again with the units that have
    no part, by new processes; LabelBucketError if that was all of it, the second time in a row.
    """
    for wave in _batched(work, UNITS_PER_WAVE):
        left = {each.unit_id: each for each in wave}
        was_in_vain = False
        while left:
            num_left = len(left)
            try:
                for unit in _wave_beside_this_process(task, resources, list(left.values())):
                    del left[unit.unit_id]
                    yield unit
            except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError, ExecutionTimeoutError) as error:
                for unit in _committed(task, list(left.values())):
                    del left[unit.unit_id]
                    yield unit
                is_stalled = isinstance(error, ExecutionTimeoutError)
                why = (
                    f"nothing moved for {task.stall_timeout_s:g} s"
                    if is_stalled
                    else "the process that looks after them died on this node"
                )
                is_in_vain = len(left) == num_left
                if was_in_vain and is_in_vain:
                    look_for = "hangs, or whether it has the nodes it needs" if is_stalled else "was killed, and why"
                    raise LabelBucketError(
                        f"expected some of {num_left:,} unit(s) to be done, found none, twice: {why}; look at the"
                        f" cluster for what {look_for}; the same command resumes"
                    ) from error
                was_in_vain = is_in_vain
                _log.warning("%s: %s of %s unit(s) are begun again", why, f"{len(left):,}", f"{num_left:,}")


def _committed(task: Task, work: Sequence[Work]) -> Iterator[UnitSummary]:
    """Those of the units that have a part: the summaries that were lost with their wave, without its timings."""
    output = storage.connect(task.output_url)
    for range_id, units in itertools.groupby(work, lambda each: each.range_id):
        finished = parts.finished_units(output, task.run_id, range_id)
        for unit_id in (each.unit_id for each in units if each.unit_id in finished):
            _, part = parts.read_part(output, task.run_id, range_id, unit_id)
            yield UnitSummary(range_id, unit_id, part.num_rows, part.failures, part.size_bytes, retries={})


def _wave_beside_this_process(task: Task, resources: Resources, work: Sequence[Work]) -> Iterator[UnitSummary]:
    """Run `_label_wave` on this node; it ends with this process, or when nobody asks for its summaries any more."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    started = _label_wave.options(scheduling_strategy=here).remote(task, resources, work)
    summaries = cast("ray.ObjectRefGenerator[UnitSummary]", started)  # of which the engine's types do not know
    try:
        for summary in summaries:
            yield ray.get(summary)
    finally:
        ray.cancel(summaries, force=True)


# Not retried by the engine, which would expect the same summaries in the same order.
@ray.remote(num_cpus=0, max_calls=1, max_retries=0)
def _label_wave(task: Task, resources: Resources, work: Sequence[Work]) -> Iterator[UnitSummary]:
    """One wave in a process that ends with it, because the engine keeps memory of every task of a process for life."""
    with engine.errors():
        # Not iter_rows, which keeps each unit's summary until the next one's is there.
        built = build(task, resources, work)
        for batch in built.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for row in cast("pa.Table", batch).to_pylist():
                parsed = {name: json.loads(row[name]) for name in ("failures", "retries", "warnings")}
                yield UnitSummary(**{**row, **parsed})


def build(task: Task, resources: Resources, work: Sequence[Work]) -> Dataset:
    """The pipeline over one wave of units."""
    set_context(max_block_bytes=None, preserve_order=False, stall_timeout_s=task.stall_timeout_s)
    # Not from_arrow with a table per unit: it runs a task per table for its metadata, 50 kB and 2.6 ms per unit.
    units = ray.data.from_items([each._asdict() for each in work], override_num_blocks=len(work))
    labeled = prepare_and_label(units, partial(_prepare, task), _Label, (task, resources.device), resources)
    return labeled.map_batches(
        partial(_commit, task),
        batch_size=1,
        batch_format="pyarrow",
        compute=TaskPoolStrategy(size=min(resources.max_commits, len(work))),  # the engine warns of a larger one
        num_cpus=COMMIT_CPUS,
    )


def set_context(*, max_block_bytes: int | None, preserve_order: bool, stall_timeout_s: float = STALL_TIMEOUT_S) -> None:
    """How this driver's datasets run: without a word, and with errors as they were raised."""
    context = DataContext.get_current()
    context.target_max_block_size = max_block_bytes
    context.enable_progress_bars = False
    context.execution_options.preserve_order = preserve_order
    context.execution_options.verbose_progress = False
    context.execution_no_progress_timeout_s = stall_timeout_s
    # Or the engine raises its own exception in the worker, and ours, its cause, is lost on the way to the driver.
    context.raise_original_map_exception = True


def prepare_and_label(
    units: Dataset,
    prepare: Callable[[pa.Table], pa.Table],
    label: type,
    label_arguments: tuple[Any, ...],
    resources: Resources,
) -> Dataset:
    """Units, one in a row and block, through CPU tasks and a pool of actors of class `label`."""
    return units.map_batches(
        prepare,
        batch_size=1,
        batch_format="pyarrow",
        compute=TaskPoolStrategy(),
        num_cpus=resources.prepare_cpus,
    ).map_batches(
        label,
        fn_constructor_args=label_arguments,
        batch_size=1,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(
            size=resources.num_actors,
            max_concurrent_calls_per_actor=CALLS_PER_ACTOR[resources.device],
            enable_true_multi_threading=True,
        ),
        num_cpus=resources.actor_cpus,
        num_gpus=1 if resources.device == "cuda" else None,
    )


def _prepare(task: Task, work: pa.Table) -> pa.Table:
    (row,) = work.to_pylist()
    started_s, repeated = time.perf_counter(), repeats.counted()
    objects = plan.read_unit(storage.connect(task.output_url), row["chunk_key"], row["unit_id"])
    source = storage.connect_input(task.input_url)
    table, decode_s = prepare_unit(source, objects, task.recipe, deadline_s=task.object_deadline_s)
    prepare_s = time.perf_counter() - started_s
    facts = {
        "range_id": row["range_id"],
        "unit_id": row["unit_id"],
        "fetched_bytes": _fetched_bytes(table),
        "prepare_s": prepare_s,
        "decode_s": decode_s,
        "retries": json.dumps(repeats.counted() - repeated),
        "prepared_at_s": time.time(),
    }
    return pack_unit(table, facts)


def _fetched_bytes(table: pa.Table) -> int:
    """Encoded bytes of the objects that arrived."""
    has_arrived = pc.fill_null(pc.not_equal(table.column("failure_stage"), "fetch"), True)
    return pc.sum(table.column("size_bytes").filter(has_arrived)).as_py() or 0


class _Label:
    """The actor: `Labeler` with a clock.

    The engine starts an actor anew whose constructor raises, and nobody sees why: so it keeps what is wrong with its
    node, and the first unit that it is given says it.
    """

    def __init__(self, task: Task, device: Device) -> None:
        self._labeler: Labeler | LabelBucketError
        self._warnings = Warnings()
        logging.getLogger("pipeline").addHandler(self._warnings)
        try:
            self._labeler, _ = checked_labeler(task, device)
        except LabelBucketError as error:
            self._labeler = error
        self._clock = Clock()

    def __call__(self, packed: pa.Table) -> pa.Table:
        if isinstance(self._labeler, LabelBucketError):
            raise self._labeler
        with self._clock.call() as timings:
            table, facts = unpack_unit(packed)
            queue_s = _seconds_since(facts.pop("prepared_at_s"))
            labeled = self._labeler(table)
        became = {
            "label_wait_s": timings.wait_s,
            "label_s": timings.busy_s,
            "label_queue_s": queue_s,
            "labeled_at_s": time.time(),
            "warnings": json.dumps(self._warnings.take()),
        }
        return pack_unit(labeled, facts | became)


def _commit(task: Task, packed: pa.Table) -> pa.Table:
    started_s, repeated = time.perf_counter(), repeats.counted()
    table, facts = unpack_unit(packed)
    queue_s = _seconds_since(facts.pop("labeled_at_s"))
    output = storage.connect(task.output_url)
    part = parts.write_part(output, task.run_id, facts["range_id"], facts["unit_id"], table)
    retries = Counter(json.loads(facts["retries"])) + (repeats.counted() - repeated)
    became = {
        "num_rows": part.num_rows,
        "failures": json.dumps(part.failures),
        "part_bytes": part.size_bytes,
        "retries": json.dumps(retries),
        "commit_queue_s": queue_s,
        "commit_s": time.perf_counter() - started_s,
    }
    return pa.Table.from_pylist([facts | became])


def _seconds_since(time_s: float) -> float:
    # Maybe by the clocks of two machines: off by milliseconds, which is little for a queue, but may be below zero.
    return max(0.0, time.time() - time_s)


def pack_unit(table: pa.Table, facts: Mapping[str, Any]) -> pa.Table:
    """A unit's rows as one row: the columns of `facts`, and `rows` with the table. Copies nothing but offsets."""
    rows = table.combine_chunks().to_struct_array()
    rows = rows.chunk(0) if rows.num_chunks else pa.array([], rows.type)
    nested = pa.ListArray.from_arrays(pa.array([0, len(rows)], pa.int32()), rows)
    return pa.table({**{name: [value] for name, value in facts.items()}, "rows": nested})


def unpack_unit(packed: pa.Table) -> tuple[pa.Table, dict[str, Any]]:
    """The table and the facts that `pack_unit` was given. Raises ValueError for anything but one unit."""
    if len(packed) != 1:
        raise ValueError(f"expected one unit as one row, found {len(packed)} rows")
    (facts,) = packed.drop_columns(["rows"]).to_pylist()
    return pa.Table.from_struct_array(packed.column("rows").chunk(0).flatten()), facts


def _batched(items: Iterable[Work], size: int) -> Iterator[list[Work]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
