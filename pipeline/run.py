"""label_bucket(config): finish what is open -> plan -> label -> publish.

A module of its own because the order of these steps is the protocol: everything is checked before anything is written,
a run claims its place before it works, and whatever was left unfinished is finished first.
"""

import contextlib
import functools
import json
import logging
import os
import platform
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray
import ray.exceptions

from pipeline import checkpoint, dataset, decode, log, parts, plan, publish, storage
from pipeline.checkpoint import Checkpoint, PreprocessSpec
from pipeline.config import Config
from pipeline.errors import (
    STOPPED,
    AbsentError,
    ConfigError,
    ConflictError,
    ForbiddenError,
    LabelBucketError,
    SourceError,
)
from pipeline.faults import crash_point
from pipeline.label import compute_precision
from pipeline.listing import Scope
from pipeline.log import Claim, Entry, State
from pipeline.plan import Plan
from pipeline.preprocess import spec_from_config
from pipeline.progress import Heartbeat, Progress, Report
from pipeline.storage import ObjectInfo, Store

_log = logging.getLogger(__name__)

_PRECISION = "label_bucket.compute_dtype"


def label_bucket(config: Config, *, start_engine: Callable[[], None]) -> Report:
    """Label what `config` asks for and publish it; the report that also stands in the run's report.json.

    `start_engine` connects to Ray; it is called after everything that can be checked without it. Raises a
    LabelBucketError, whose `exit_code` is the process's; then nothing was published, and what was done is kept.
    """
    output = storage.connect_output(config.output)
    source = storage.connect(config.input)
    state = log.read(output)
    if state.open_claim is not None and publish.is_sealed(output, state.open_claim.run_id):
        start_engine()
        _roll_forward(output, state, state.open_claim)
        state = log.read(output)
    _check_scope(config, source, output, state)
    request = _resolve(config, source, output, state)
    start_engine()
    resources = dataset.resolve_resources(config.device, config.gpu_actors)
    precision = compute_precision(config.precision, resources.device)
    if request.base is None:
        # Wrong weights must be found before the claim, which would block the output; known weights were checked before.
        with _engine_errors():
            dataset.check_model(_task(config, request, "", precision), resources.device)
    if config.dry_run:
        return _dry_run(config, request, resources)
    if config.abandon_run and state.open_claim is not None:
        log.commit(output, log.abandoned(state.open_claim, _now()))
        _log.warning("abandoned run %s; nothing of it was published", state.open_claim.run_id)
        state = log.read(output)
    claim = log.claim(
        output,
        state,
        request.identity,
        run_date=str(config.run_date or datetime.now(UTC).date()),
        model_id=request.checkpoint.model_id,
        model_revision=request.checkpoint.revision,
        metadata=_footer_metadata(config, request, precision),
        now=_now(),
    )
    crash_point("claimed")
    report = Report(
        run_id=claim.run_id,
        config=config.model_dump(mode="json"),
        run_date=claim.run_date,
        model_id=claim.model_id,
        model_revision=claim.model_revision,
        space_id=request.space_id,
        device=resources.device,
        precision=claim.metadata[_PRECISION],
        num_actors=resources.num_actors,
        versions=_versions(),
        started_at=_now(),
    )
    with _reporting(report, output):
        entry = _run(config, request, resources, claim, state, report)
        report.counts, report.failures = entry.counts, entry.failures
        report.published = {
            kind: [asdict(file) for file in files]
            for kind, files in (
                ("labels", entry.labels),
                ("failures", entry.dead_letters),
                ("deletions", entry.deletions),
            )
        }
        report.message = f"published run {claim.run_id}: {_counts_text(entry)}"
    return report


@dataclass(frozen=True, kw_only=True)
class _Request:
    """What the command asks for, resolved against the source, the output's log and the model."""

    source: Store
    output: Store
    scope: Scope
    checkpoint: Checkpoint
    spec: PreprocessSpec
    space_id: str
    identity: dict[str, object]
    base: Entry | None
    """The newest published run of this space: its catalog says what need not be labeled again."""
    records_deletions: bool


# --- before anything is written -----------------------------------------------------------------------------------


def _check_scope(config: Config, source: Store, output: Store, state: State) -> None:
    """Refuse another source for this output, and an open run of another command, before any model is loaded."""
    known = next((each.identity["input"] for each in [*state.runs, state.open_claim] if each is not None), None)
    if known is not None and known != source.root and not (config.abandon_run and not state.runs):
        raise ConflictError(
            f"--output {output.root} holds labels of {known}, this command reads {source.root}: one output has one"
            " source; choose another --output"
        )


def _resolve(config: Config, source: Store, output: Store, state: State) -> _Request:
    scope = Scope(include=config.include, exclude=config.exclude)
    _check_source(source, scope, config.max_image_bytes)
    found = checkpoint.resolve(config.model, config.revision or _remembered_revision(config, state))
    spec = spec_from_config(found.preprocessor_config, mode=config.preprocess, input_px=found.input_px)
    if config.top_k > len(found.label_names):
        raise ConfigError(
            f"--top-k: expected 1 to {len(found.label_names)}, the labels of {config.model}; found {config.top_k}"
        )
    if config.embedding == "distillation" and "WithTeacher" not in found.architecture:
        raise ConfigError(
            f"--embedding distillation: expected a model with a distillation head, found {found.architecture} in"
            f" {config.model}; use pooled, cls or patch-mean"
        )
    space_id = checkpoint.space_id(found, spec, config.embedding, decode_rules_version=decode.DECODE_RULES_VERSION)
    dim = None if config.embedding == "none" else found.embedding_dim
    identity: dict[str, object] = {
        "input": source.root,
        "include": sorted(set(config.include)),
        "exclude": sorted(set(config.exclude)),
        "limit": config.limit,
        "space_id": space_id,
        "top_k": config.top_k,
        "embedding_dim": dim,
    }
    base = state.newest(space_id)
    if base is not None and base.identity["top_k"] != config.top_k:
        raise ConflictError(
            f"--output {output.root}: space {space_id} holds {base.identity['top_k']} labels per image, this command"
            f" asks for --top-k {config.top_k}; use --top-k {base.identity['top_k']} or another --output"
        )
    same_filters = base is None or all(base.identity[name] == identity[name] for name in ("include", "exclude"))
    return _Request(
        source=source,
        output=output,
        scope=scope,
        checkpoint=found,
        spec=spec,
        space_id=space_id,
        identity=identity,
        base=base,
        records_deletions=same_filters and config.limit is None,
    )


def _check_source(source: Store, scope: Scope, max_image_bytes: int) -> None:
    """Raise unless there is something to label and it may be read."""
    num_listed = 0
    try:
        for page in scope.pages(source):
            in_scope = [info for info, is_in_scope in page if is_in_scope]
            if in_scope:
                _check_readable(source, in_scope, max_image_bytes)
                return
            num_listed += len(page)
    except AbsentError as error:
        raise SourceError(f"--input {source.root}: {error}; check the name and the endpoint") from error
    if num_listed:
        raise ConfigError(
            f"--input {source.root}: none of its {num_listed:,} objects match --include {list(scope.include)}"
            f" --exclude {list(scope.exclude)}; nothing to label"
        )
    raise SourceError(f"--input {source.root}: expected objects, found none; check the prefix")


def _check_readable(source: Store, infos: list[ObjectInfo], max_image_bytes: int) -> None:
    """Raise ForbiddenError if none of the smallest few may be read: then the identity is wrong, not the objects."""
    candidates = [info for info in infos if 0 < info.size_bytes <= max_image_bytes and not info.is_archived]
    refusal: ForbiddenError | None = None
    for info in sorted(candidates, key=lambda info: info.size_bytes)[:3]:
        try:
            source.get(info.key)
            return
        except ForbiddenError as error:
            refusal = error
        except SourceError:
            return
    if refusal is not None:
        raise ForbiddenError(f"--input {source.root}: may be listed but not read: {refusal}") from refusal


def _remembered_revision(config: Config, state: State) -> str | None:
    # Only a hub's branch can move; a folder or a URL has the weights it has.
    is_hub_id = config.model != checkpoint.DEMO and "://" not in config.model and not Path(config.model).is_dir()
    return state.remembered_revision(config.model) if is_hub_id else None


def _footer_metadata(config: Config, request: _Request, precision: str) -> dict[str, str]:
    found, dim = request.checkpoint, request.identity["embedding_dim"]
    values: dict[str, object] = {
        "model_id": found.model_id,
        "model_revision": found.revision,
        "weights_digest": found.weights_digest,
        "label_set_digest": checkpoint.label_set_digest(found),
        "preprocess": json.dumps(asdict(request.spec), sort_keys=True),
        "decode_rules_version": decode.DECODE_RULES_VERSION,
        "space_id": request.space_id,
        "compute_dtype": precision,
        "versions": json.dumps(_versions(), sort_keys=True),
    }
    if dim is not None:
        values |= {
            "embedding_dim": dim,
            "embedding_dtype": "float32",
            "embedding_pooling": config.embedding,
            "embedding_normalization": "l2",
            "embedding_metric": "inner_product",
        }
    return {f"label_bucket.{name}": str(value) for name, value in values.items()}


@functools.cache
def _versions() -> dict[str, str]:
    names = ("ray", "torch", "transformers", "pyarrow", "pillow", "numpy", "s3fs")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def _dry_run(config: Config, request: _Request, resources: dataset.Resources) -> Report:
    counts = plan.count(
        request.source.root,
        request.output.root,
        request.scope,
        request.base.catalog if request.base else [],
        limit=config.limit,
        records_deletions=request.records_deletions,
    )
    _announce(request, resources, counts, None)
    return Report(
        exit_code=0,
        counts=counts,
        message="dry run: nothing was written",
        model_id=request.checkpoint.model_id,
        model_revision=request.checkpoint.revision,
        space_id=request.space_id,
        device=resources.device,
    )


# --- the three phases ---------------------------------------------------------------------------------------------


def _run(
    config: Config, request: _Request, resources: dataset.Resources, claim: Claim, state: State, report: Report
) -> Entry:
    output = request.output
    heartbeat = Heartbeat(output, claim.run_id, f"{socket.gethostname()}/{os.getpid()}")
    twin = heartbeat.other()
    if twin is not None:
        _log.warning("another driver of this run may be alive (%s); both will end in the same result", twin)
    heartbeat.beat()
    with _engine_errors():
        sealed = _plan(config, request, claim)
        finished = parts.finished_units(output, claim.run_id)
        report.num_units = sealed.num_units
        report.counts = sealed.counts
        _announce(request, resources, sealed.counts, sealed)
        if finished:
            _log.info("resuming: %d of %d units have their part", len(finished), sealed.num_units)
        _label(config, request, resources, claim, sealed, finished, heartbeat, report)
        crash_point("labeled")
        _log.info("publishing: reading %d parts back", sealed.num_units)
        outcomes = publish.read_outcomes(output, claim, sealed)
        report.failures = dict(outcomes.failures)
        publish.check_budget(outcomes.failures, sealed.counts, config.max_failed_fraction)
        return publish.publish(output, claim, sealed, _base_of(claim, state), outcomes, _now())


def _plan(config: Config, request: _Request, claim: Claim) -> Plan:
    output = request.output
    sealed = plan.read(output, claim.run_id)
    if sealed is not None:
        return sealed
    _log.info("planning: listing %s", request.source.root)
    planned = ray.get(
        _plan_range.options(num_cpus=0.5).remote(
            {
                "input_url": request.source.root,
                "output_url": output.root,
                "run_id": claim.run_id,
                "scope": request.scope,
                "catalog": request.base.catalog if request.base else [],
                "max_unit_rows": plan.max_unit_rows(request.spec.input_px),
                "limit": config.limit,
                "records_deletions": request.records_deletions,
            }
        )
    )
    crash_point("planned")
    sealed = plan.seal(output, claim.run_id, [planned])
    crash_point("plan-sealed")
    return sealed


@ray.remote
def _plan_range(arguments: dict[str, Any]) -> plan.Range:
    return plan.plan_range(**arguments)


def _label(
    config: Config,
    request: _Request,
    resources: dataset.Resources,
    claim: Claim,
    sealed: Plan,
    finished: set[str],
    heartbeat: Heartbeat,
    report: Report,
) -> None:
    """Give every unit that has none its part."""
    work = [
        dataset.Work(unit_id, chunk.key)
        for chunk in sealed.chunks
        for unit_id in chunk.unit_ids
        if unit_id not in finished
    ]
    if not work:
        return
    # A run that is resumed on another device keeps the precision it began with: its files name one.
    task = _task(config, request, claim.run_id, claim.metadata[_PRECISION])
    progress = Progress(sealed.counts["planned"], plan.num_objects(request.output, sealed, finished))
    try:
        for unit in dataset.label_units(task, resources, work):
            progress.add(unit)
            heartbeat.beat()
            crash_point("part-committed")
    finally:
        progress.close()
        report.stage_s = {name: round(seconds, 3) for name, seconds in progress.stage_s.items()}
        report.images_per_s = round(progress.images_per_s, 2)


def _task(config: Config, request: _Request, run_id: str, precision: str) -> dataset.Task:
    return dataset.Task(
        input_url=request.source.root,
        output_url=request.output.root,
        run_id=run_id,
        spec=request.spec,
        limits=decode.DecodeLimits(max_bytes=config.max_image_bytes, max_pixels=config.max_image_px),
        object_deadline_s=config.object_deadline_s,
        model=_portable(config.model),
        model_revision=request.checkpoint.revision,
        weights_digest=request.checkpoint.weights_digest,
        pooling=config.embedding,
        top_k=config.top_k,
        precision="bf16" if precision == "bf16" else "fp32",
        batch_size=config.batch_size,
    )


def _portable(model: str) -> str:
    """`model` as workers with another working directory understand it."""
    return str(Path(model).resolve()) if "://" not in model and Path(model).is_dir() else model


def _roll_forward(output: Store, state: State, claim: Claim) -> None:
    """Finish a run whose files may already be where readers look; needs neither its command nor its model."""
    _log.warning("finishing run %s, which was interrupted while it published", claim.run_id)
    sealed = plan.read(output, claim.run_id)
    if sealed is None:
        raise ConflictError(f"{output.root}: run {claim.run_id} was publishing, but its plan.json is gone; restore it")
    with _engine_errors():
        outcomes = publish.read_outcomes(output, claim, sealed)
        entry = publish.publish(output, claim, sealed, _base_of(claim, state), outcomes, _now())
    _log.info("published run %s: %s", entry.run_id, _counts_text(entry))


def _base_of(claim: Claim, state: State) -> Entry | None:
    earlier = [
        each for each in state.runs if each.run_seq < claim.run_seq and each.space_id == claim.identity["space_id"]
    ]
    return earlier[-1] if earlier else None


# --- what the operator sees ---------------------------------------------------------------------------------------


def _announce(request: _Request, resources: dataset.Resources, counts: dict[str, int], sealed: Plan | None) -> None:
    size = f", {sealed.num_units:,} units, {sealed.encoded_bytes / 1e9:.3f} GB to read" if sealed else ""
    _log.info(
        "plan: %s listed, %s to label, %s unchanged, %s filtered, %s deleted%s",
        *(f"{counts[name]:,}" for name in ("listed", "planned", "unchanged", "filtered", "deleted")),
        size,
    )
    _log.info(
        "model: %s revision %s, space %s, on %d %s actor(s); the cluster has %g CPUs, %g GPUs",
        request.checkpoint.model_id,
        request.checkpoint.revision,
        request.space_id,
        resources.num_actors,
        resources.device,
        resources.cluster_cpus,
        resources.cluster_gpus,
    )


def _counts_text(entry: Entry) -> str:
    names = ("listed", "labeled", "failed", "unchanged", "filtered", "deleted")
    kinds = ", ".join(f"{number:,} {kind}" for kind, number in entry.failures.items())
    return ", ".join(f"{entry.counts[name]:,} {name}" for name in names) + (f" ({kinds})" if kinds else "")


@contextlib.contextmanager
def _reporting(report: Report, output: Store) -> Iterator[None]:
    """Leave a report.json however the run ends, and never let a failure to write it hide why it ended."""
    try:
        yield
        report.exit_code = 0
    except LabelBucketError as error:
        report.exit_code, report.message = error.exit_code, str(error)
        raise
    except KeyboardInterrupt:
        report.exit_code, report.message = STOPPED, "stopped; the same command resumes"
        raise
    finally:
        report.exit_code = 1 if report.exit_code is None else report.exit_code
        report.ended_at = _now()
        failure = sys.exception()
        try:
            report.write(output)
        except SourceError as error:
            if failure is None:
                raise
            _log.warning("report.json could not be written: %s", error)


@contextlib.contextmanager
def _engine_errors() -> Iterator[None]:
    """Our own errors as they were raised, out of the engine's wrapping."""
    try:
        yield
    except ray.exceptions.RayError as error:
        ours = _find_ours(error)
        if ours is None:
            raise
        raise ours from None


def _find_ours(error: BaseException | None) -> LabelBucketError | None:
    while error is not None:
        if isinstance(error, LabelBucketError) and not isinstance(error, ray.exceptions.RayError):
            return error
        error = getattr(error, "cause", None) or error.__cause__
    return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
