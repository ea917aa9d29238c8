"""Key ranges -> their plans, a Ray task each, and what the operator is told of the sum.

A module of its own because a run and a dry run plan by the same tasks and say it in the same words: what a dry run
promises is what the run does.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace

import ray

from pipeline import dataset, plan, storage
from pipeline.catalog import KeyRange
from pipeline.diff import Rules
from pipeline.meter import metered
from pipeline.plan import Plan
from pipeline.request import Request
from pipeline.survey import Survey
from pipeline.tasks import in_order

_log = logging.getLogger(__name__)


def plan_ranges(
    request: Request, ranges: Sequence[KeyRange], run_id: str | None, survey: Survey | None = None
) -> list[plan.Range]:
    """Plan every range, one task each; with a limit one after the other, until it is reached.

    Without a run it is a preview: nothing is written, and what it passes by is added to `survey`.
    """
    _log.info("planning: listing %s in %s range(s)", request.source.root, f"{len(ranges):,}")
    sizes = plan.UnitSizes.of(request.spec.input_px, len(ranges))

    def start(key_range: KeyRange, rules: Rules) -> ray.ObjectRef[tuple[plan.Range, Survey]]:
        return _plan_range.options(num_cpus=0.5, memory=3 << 27).remote(
            request.source.url, request.output.root, run_id, key_range, rules, sizes
        )

    def look(found: tuple[plan.Range, Survey]) -> plan.Range:
        if survey is not None:
            survey.merge(found[1])
        return found[0]

    rules = request.rules
    if rules.limit is None:
        all_planned = in_order(lambda each: start(each, rules), ranges)
        return [look(each) for each in metered(all_planned, "planning ranges", len(ranges))]
    planned: list[plan.Range] = []
    left = rules.limit
    for each in ranges:
        found = look(ray.get(start(each, replace(rules, limit=left)))) if left else plan.not_looked_at(each)
        left -= found.counts["unchanged"] + found.counts["planned"]
        planned.append(found)
    return planned


@ray.remote
def _plan_range(
    input_url: str, output_url: str, run_id: str | None, key_range: KeyRange, rules: Rules, sizes: plan.UnitSizes
) -> tuple[plan.Range, Survey]:
    source, output = storage.connect_input(input_url), storage.connect(output_url)
    survey = Survey()
    if run_id is None:
        return plan.preview_range(source, output, key_range, rules, sizes, survey).summary(), survey
    return plan.plan_range(source, output, run_id, key_range, rules, sizes).summary(), survey


def announce(request: Request, resources: dataset.Resources, planned: Plan) -> None:
    """Say what will be done, by which model, on what."""
    _log.info(
        "plan: %s listed, %s to label in %s units of %s range(s), %.3f GB to read, %s unchanged, %s filtered, %s"
        " deleted",
        f"{planned.counts['listed']:,}",
        f"{planned.counts['planned']:,}",
        f"{planned.num_units:,}",
        f"{len(planned.ranges):,}",
        planned.encoded_bytes / 1e9,
        *(f"{planned.counts[name]:,}" for name in ("unchanged", "filtered", "deleted")),
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
