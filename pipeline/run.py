"""label_bucket(config): finish what is open -> plan -> label -> publish.

A module of its own because the order of these steps is the protocol: everything is checked before anything is written,
a run claims its place before it works, and whatever was left unfinished is finished first.
"""

import contextlib
import itertools
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta

from pipeline import (
    canary,
    capability,
    dataset,
    drift,
    engine,
    heartbeat,
    log,
    outcomes,
    parts,
    plan,
    planning,
    predict,
    publish,
    snapshot,
    storage,
    telemetry,
)
from pipeline import report as report_page
from pipeline.config import Config
from pipeline.errors import STOPPED, ConflictError, LabelBucketError, SourceError
from pipeline.faults import crash_point
from pipeline.label import compute_precision
from pipeline.log import Claim, Entry, State
from pipeline.plan import Plan
from pipeline.progress import Progress, Report
from pipeline.publish import Published
from pipeline.request import (
    IMAGE_STATS,
    PRECISION,
    Request,
    footer_metadata,
    nothing_to_label,
    resolve,
    versions,
    worker_task,
)
from pipeline.storage import Store
from pipeline.survey import Survey

_log = logging.getLogger(__name__)


MAX_PLAN_AGE = timedelta(hours=12)
"""A run that is resumed later than this was another night's: when it is published, tonight's is planned."""


def label_bucket(config: Config, *, start_engine: Callable[[], None]) -> Report:
    """Label what `config` asks for and publish it; the report that also stands in the run's report.json.

    `start_engine` connects to Ray; it is called after everything that can be checked without it. Raises a
    LabelBucketError, whose `exit_code` is the process's; then nothing was published, and what was done is kept.
    """
    report, claimed_at = _night(config, start_engine)
    if claimed_at is not None and datetime.now(UTC) - datetime.fromisoformat(claimed_at) > MAX_PLAN_AGE:
        _log.info("%s", report.message)
        _log.info("that run was begun at %s: planning anew", claimed_at)
        report, _ = _night(config, start_engine)
    return report


def _night(config: Config, start_engine: Callable[[], None]) -> tuple[Report, str | None]:
    """One run, and when it was claimed if that was before this command."""
    output = storage.connect_output(config.output)
    source = storage.connect_input(config.input, config.manifest)
    state = log.read(output)
    if not config.dry_run:
        state = _finish_what_is_open(output, state, start_engine)
    request = resolve(config, source, output, state)
    start_engine()
    resources = dataset.resolve_resources(config.device, config.gpu_actors)
    precision = compute_precision(config.precision, resources.device)
    if config.dry_run:
        return _dry_run(config, request, resources, precision, state), None
    vectors: canary.Vectors | None = None
    if request.base is None:
        # Wrong weights must be found before the claim, which would block the output; known weights were checked before.
        with engine.errors():
            vectors = dataset.check_model(worker_task(config, request, "", precision), resources.device)
    store_does = capability.check(output, is_single_writer=config.single_writer)
    if config.abandon_run and state.open_claim is not None:
        publish.abandon(output, state.open_claim, _now())
        _log.warning("abandoned run %s; nothing of it was published", state.open_claim.run_id)
        state = log.read(output)
    state = _with_snapshots(output, state)
    claim = log.claim(
        output,
        state,
        request.identity,
        run_date=str(config.run_date or datetime.now(UTC).date()),
        model_id=request.checkpoint.model_id,
        model_revision=request.checkpoint.revision,
        metadata=footer_metadata(config, request, precision),
        now=_now(),
    )
    crash_point("claimed")
    if heartbeat.wait_for_other(output, claim.run_id, lambda: log.read_entry(output, claim.run_seq) is not None):
        return _done_by_other(output, claim), None
    if state.runs:
        _settle_report(output, Published(state.runs[-1], drift.Profile()), state)
    report = Report(
        run_id=claim.run_id,
        config=config.model_dump(mode="json"),
        run_date=claim.run_date,
        model_id=claim.model_id,
        model_revision=claim.model_revision,
        space_id=request.space_id,
        device=resources.device,
        precision=claim.metadata[PRECISION],
        num_actors=resources.num_actors,
        versions=versions(),
        store=asdict(store_does),
        started_at=_now(),
    )
    with _reporting(report, output):
        published = _run(config, request, resources, claim, report, _reference_vectors(request, claim, vectors))
        _complete(report, published, output, state)
    report_page.write(output, report, published.entry)
    return report, claim.created_at if state.open_claim is not None else None


def _reference_vectors(request: Request, claim: Claim, first: canary.Vectors | None) -> canary.Vectors:
    """What every actor of this space compares itself with: of a first run, what its model gave before the claim."""
    output = request.output
    if first is None:
        assert request.base is not None
        assert request.base.canaries is not None
        return canary.read(output, request.base.canaries, request.space_id)
    reference = canary.read(output, canary.write(output, claim.run_id, request.space_id, first), request.space_id)
    canary.check(first, reference)  # another one where the first attempt ran with other libraries
    return reference


def _dry_run(config: Config, request: Request, resources: dataset.Resources, precision: str, state: State) -> Report:
    """What the run would do and how long it would take, by its plan and a sample of it; the log keeps its places."""
    output, base, survey = request.output, request.base, Survey()
    if state.open_claim is not None:
        _log.warning(
            "run %s is open: the same command as its own would go on with its plan, any other needs --abandon-run",
            state.open_claim.run_id,
        )
    capability.check_folder(output)
    if config.probe_writes:
        capability.check(output, is_single_writer=config.single_writer, anew=True)
    task = worker_task(config, request, "", precision, has_stats=config.image_stats)
    if base is not None and base.canaries is not None:
        task = replace(task, canaries=canary.read(output, base.canaries, request.space_id))
    with engine.errors(), contextlib.closing(predict.Rehearsal(task, resources)) as rehearsal:
        started_s = time.monotonic()
        ranges = plan.find_ranges(request.source, request.base_files)
        preview = plan.total("", planning.plan_ranges(request, ranges, None, survey))
        planning_s = time.monotonic() - started_s
        _check_not_empty(config, request, preview.counts)
        planning.announce(request, resources, preview)
        found: predict.Prediction | None = None
        if preview.counts["planned"]:
            sample = rehearsal.measure(survey)
            found = predict.predict(sample, preview, resources, planning_s=planning_s, start_s=rehearsal.start_s)
            for line in [*predict.folder_lines(survey), *predict.lines(found, config.price_per_hour)]:
                _log.info("%s", line)
            num_in_scope = preview.counts["listed"] - preview.counts["filtered"]
            warning = predict.budget_warning(found, num_in_scope, config.max_failed_fraction)
            if warning is not None:
                _log.warning("%s", warning)
    _log.info("not checked: %s", predict.unchecked(output, has_probed=config.probe_writes))
    return Report(
        exit_code=0,
        counts=preview.counts,
        message="dry run: nothing was written" + (" but what --probe-writes tried out" if config.probe_writes else ""),
        model_id=request.checkpoint.model_id,
        model_revision=request.checkpoint.revision,
        space_id=request.space_id,
        device=resources.device,
        precision=precision,
        num_actors=resources.num_actors,
        num_units=preview.num_units,
        prediction=None if found is None else asdict(found),
    )


# --- the three phases ---------------------------------------------------------------------------------------------


def _run(
    config: Config,
    request: Request,
    resources: dataset.Resources,
    claim: Claim,
    report: Report,
    reference: canary.Vectors,
) -> Published:
    output = request.output
    with engine.errors(), heartbeat.beating(output, claim.run_id):
        sealed = _plan(config, request, claim)
        report.num_units = sealed.num_units
        report.counts = sealed.counts
        planning.announce(request, resources, sealed)
        _label(config, request, resources, claim, sealed, report, reference)
        crash_point("labeled")
        _log.info("checking: reading %s parts back", f"{sealed.num_units:,}")
        totals = publish.read_totals(output, claim, sealed)
        failures = outcomes.failures_of(totals)
        report.failures = dict(failures)
        outcomes.check_budget(failures, sealed.counts, config.max_failed_fraction)
        publish.seal(output, claim, sealed, totals)
        return publish.finish(output, claim, request.base, _now())


def _plan(config: Config, request: Request, claim: Claim) -> Plan:
    output = request.output
    sealed = plan.read(output, claim.run_id)
    if sealed is not None:
        return sealed
    ranges = plan.seal_ranges(output, claim.run_id, lambda: plan.find_ranges(request.source, request.base_files))
    crash_point("ranges-sealed")
    planned = planning.plan_ranges(request, ranges, claim.run_id)
    counts = plan.total(claim.run_id, planned).counts
    try:
        _check_not_empty(config, request, counts)
    except LabelBucketError:
        # What was planned of such a listing must not be resumed when the objects are there again.
        publish.abandon(output, claim, _now())
        raise
    crash_point("planned")
    sealed = plan.seal(output, claim.run_id, planned)
    crash_point("plan-sealed")
    return sealed


def _check_not_empty(config: Config, request: Request, counts: Mapping[str, int]) -> None:
    if counts["listed"] == counts["filtered"] and not (config.allow_empty and request.base is not None):
        raise nothing_to_label(request.source, request.rules.scope, request.base)


def _label(
    config: Config,
    request: Request,
    resources: dataset.Resources,
    claim: Claim,
    sealed: Plan,
    report: Report,
    reference: canary.Vectors,
) -> None:
    """Give every unit that has none its part."""
    progress = Progress(
        sealed.counts["planned"],
        max_prepares=resources.max_prepares,
        max_commits=resources.max_commits,
        num_actors=resources.num_actors,
    )
    work = _unfinished(request.output, sealed, progress)
    first = next(work, None)
    if progress.num_done:
        _log.info("resuming: %s of %s images have their part", f"{progress.num_done:,}", f"{progress.num_images:,}")
    if first is None:
        return
    # A run that is resumed keeps the precision and the columns it began with, on whatever device: its files name one.
    has_stats = claim.metadata[IMAGE_STATS] == str(True)
    task = worker_task(config, request, claim.run_id, claim.metadata[PRECISION], has_stats=has_stats)
    task = replace(task, canaries=reference)
    if request.base is not None:  # otherwise it was checked before the claim
        dataset.check_model(task, resources.device)
    output_url = request.output.root
    try:
        with telemetry.showing(output_url, claim.run_id, request.space_id, resources, progress):
            told: set[str] = set()
            for unit in dataset.label_units(task, resources, itertools.chain([first], work)):
                for text in unit.warnings:
                    if text not in told:
                        told.add(text)
                        _log.warning("%s", text)
                progress.add(unit)
                telemetry.count_unit(output_url, unit)
                crash_point("part-committed")
    finally:
        progress.close()
        report.add_progress(progress)
        _log.info("%s", progress.bottleneck().advice)


def _unfinished(output: Store, sealed: Plan, progress: Progress) -> Iterator[dataset.Work]:
    """The units without a part, in order, a range in memory; those with one are told to `progress`."""
    for each in sealed.ranges:
        if not each.num_units:
            continue
        finished = parts.finished_units(output, sealed.run_id, each.range_id)
        for chunk in plan.read_range(output, sealed.run_id, each.range_id).chunks:
            for unit_id, num_rows in zip(chunk.unit_ids, chunk.unit_rows, strict=True):
                if unit_id in finished:
                    progress.skip(num_rows)
                else:
                    yield dataset.Work(each.range_id, unit_id, chunk.key)


def _with_snapshots(output: Store, state: State) -> State:
    """The log with what compaction added since it was read, while this run started its engine and checked its model."""
    now = snapshot.settle(output, log.read(output), _now())
    return now if now.runs == state.runs else state


def _finish_what_is_open(output: Store, state: State, start_engine: Callable[[], None]) -> State:
    """Finish what an earlier command had decided and could not complete; needs neither its flags nor its model."""
    state = snapshot.settle(output, state, _now())
    claim = state.open_claim
    fate = "open" if claim is None else publish.fate(output, claim.run_id)
    if claim is not None and fate == "abandoned":
        publish.abandon(output, claim, _now())
        state = log.read(output)
    elif claim is not None and fate == "sealed":
        start_engine()
        _log.warning("finishing run %s, which was interrupted while it published", claim.run_id)
        with engine.errors():
            published = publish.finish(output, claim, state.newest(claim.identity["space_id"]), _now())
        telemetry.count_run(output.root, 0)
        _log.info("published run %s: %s", claim.run_id, _counts_text(published.entry))
        _settle_report(output, published, state)
        state = log.read(output)
    return state


def _done_by_other(output: Store, claim: Claim) -> Report:
    """What to say of a run that its other driver brought to an end while this one waited."""
    entry = log.read_entry(output, claim.run_seq)
    if entry is None or entry.kind != "run":
        raise ConflictError(
            f"{output.root}: run {claim.run_id} was abandoned by another command; nothing was published"
        )
    report = Report(run_id=entry.run_id, exit_code=0)
    _describe(report, entry, output)
    return report


def _settle_report(output: Store, published: Published, state: State) -> None:
    """Make the report of a published run say so, where its own driver died before it could."""
    entry = published.entry
    report = Report.read(output, entry.run_id) or Report(run_id=entry.run_id)
    if report.exit_code != 0:
        _complete(report, published, output, state)
        report.exit_code, report.ended_at = 0, entry.committed_at
        report.write(output)
        report_page.write(output, report, entry)


def _complete(report: Report, published: Published, output: Store, state: State) -> None:
    entry, profile = published
    earlier = [each.run_id for each in reversed(state.runs) if each.space_id == entry.space_id]
    if profile.num_images:
        for line in report.add_profile(output, profile, (each for each in earlier if each != entry.run_id)):
            _log.warning("drift: %s", line)
    _describe(report, entry, output)


def _describe(report: Report, entry: Entry, output: Store) -> None:
    report.run_date, report.model_id, report.model_revision = entry.run_date, entry.model_id, entry.model_revision
    report.space_id, report.counts, report.failures = entry.space_id, entry.counts, entry.failures
    files = {"labels": entry.labels, "failures": entry.dead_letters, "deletions": entry.deletions}
    report.published = {kind: [asdict(file) for file in each] for kind, each in files.items()}
    where = f"{output.root}/labels/space={entry.space_id}/"
    report.message = f"published run {entry.run_id}: {_counts_text(entry)}; the labels are in {where}"


# --- what the operator sees ---------------------------------------------------------------------------------------


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
    except Exception as error:
        report.message = storage.describe(error)
        raise
    finally:
        report.exit_code = 1 if report.exit_code is None else report.exit_code
        report.ended_at = _now()
        telemetry.count_run(output.root, report.exit_code)
        failure = sys.exception()
        try:
            report.write(output)
            if isinstance(failure, LabelBucketError):
                report_page.write(output, report, None)
        except SourceError as error:
            if failure is None:
                raise
            _log.warning("report.json could not be written: %s", error)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
