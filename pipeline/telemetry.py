"""What a run tells Prometheus, through the exporter of Ray: every metric with its type, its tags and what it means.

All values are set in the driver, which is told of every committed unit: nothing is counted image by image, and each
number once, as in report.json. Ray exports a metric of a name below as `ray_<name>` at the metrics port of the
driver's node, with tags SessionName and WorkerId that together stand for the driver: one series per attempt of a run,
so a value is that attempt's own and begins at zero. A module of its own so that names are in one place, for the code,
the alerts of infra/prometheus and the dashboard of infra/grafana.

`run_id` is no tag of a counter: Ray keeps what it knows of a counter as long as the node lives, and its own tags tell
runs apart already. It stands in one gauge, `label_bucket_run_info`, which ends with the run.
"""

import contextlib
import threading
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Literal, NamedTuple

from ray.util.metrics import Counter, Gauge

from pipeline.dataset import Resources, UnitSummary
from pipeline.progress import Progress
from pipeline.store import REPEAT_CAUSES

SHOW_INTERVAL_S = 5.0
"""Between two settings of the gauges. Ray forgets what a gauge was set to with every export, each 10 s by default."""
_ANY: tuple[str, ...] = ()


class Metric(NamedTuple):
    """One metric: what Prometheus calls its type, its tags with their values (none where they are open), its help."""

    kind: Literal["counter", "gauge"]
    tags: Mapping[str, tuple[str, ...]]
    help: str


_OUTPUT = {"output": _ANY}
METRICS: dict[str, Metric] = {
    "label_bucket_images_total": Metric(
        "counter",
        {**_OUTPUT, "outcome": ("labeled", "failed"), "failure_kind": _ANY},
        "Images whose unit was committed, by outcome; failure_kind is empty for labeled ones.",
    ),
    "label_bucket_parts_total": Metric("counter", _OUTPUT, "Units that were committed as a part."),
    "label_bucket_fetched_bytes_total": Metric("counter", _OUTPUT, "Encoded bytes of the images that arrived."),
    "label_bucket_part_bytes_total": Metric("counter", _OUTPUT, "Bytes of the committed parts."),
    "label_bucket_stage_seconds_total": Metric(
        "counter",
        {**_OUTPUT, "stage": ("fetch", "decode", "label", "commit")},
        "Seconds of work, summed over workers; fetch is what preparing waits for bytes.",
    ),
    "label_bucket_model_wait_seconds_total": Metric(
        "counter", _OUTPUT, "Seconds that actors with a model waited for input, summed over actors."
    ),
    "label_bucket_queue_seconds_total": Metric(
        "counter",
        {**_OUTPUT, "queue": ("label", "commit")},
        "Seconds that units waited for the next stage, summed over units.",
    ),
    "label_bucket_retries_total": Metric(
        "counter",
        {**_OUTPUT, "cause": REPEAT_CAUSES},
        "Requests to storage that were asked again for units that were committed, by cause.",
    ),
    "label_bucket_runs_total": Metric(
        "counter",
        {**_OUTPUT, "exit_code": _ANY},
        "Runs that ended, by exit code; 0 is published.",
    ),
    "label_bucket_images_remaining": Metric("gauge", _OUTPUT, "Images of the run without an outcome yet."),
    "label_bucket_eta_seconds": Metric("gauge", _OUTPUT, "Seconds to the end of labeling at the rate so far."),
    "label_bucket_model_actors": Metric(
        "gauge", {**_OUTPUT, "device": ("cpu", "cuda")}, "Actors that hold the model, by device."
    ),
    "label_bucket_run_info": Metric(
        "gauge", {**_OUTPUT, "run_id": _ANY, "space_id": _ANY}, "1 while the run labels images."
    ),
}


@cache
def _counter(name: str) -> Counter:
    return Counter(name, METRICS[name].help, tuple(METRICS[name].tags))


@cache
def _gauge(name: str) -> Gauge:
    return Gauge(name, METRICS[name].help, tuple(METRICS[name].tags))


def _add(name: str, value: float, **tags: str) -> None:
    if value > 0:  # Ray refuses to add nothing
        _counter(name).inc(value, tags)


def count_unit(output_url: str, unit: UnitSummary) -> None:
    """Add one committed unit to the counters."""
    num_labeled = unit.num_rows - sum(unit.failures.values())
    _add("label_bucket_images_total", num_labeled, output=output_url, outcome="labeled", failure_kind="")
    for kind, number in unit.failures.items():
        _add("label_bucket_images_total", number, output=output_url, outcome="failed", failure_kind=kind)
    _add("label_bucket_parts_total", 1, output=output_url)
    _add("label_bucket_fetched_bytes_total", unit.fetched_bytes, output=output_url)
    _add("label_bucket_part_bytes_total", unit.part_bytes, output=output_url)
    stages = {
        "fetch": unit.prepare_s - unit.decode_s,
        "decode": unit.decode_s,
        "label": unit.label_s,
        "commit": unit.commit_s,
    }
    for stage, seconds in stages.items():
        _add("label_bucket_stage_seconds_total", seconds, output=output_url, stage=stage)
    _add("label_bucket_model_wait_seconds_total", unit.label_wait_s, output=output_url)
    for queue, seconds in (("label", unit.label_queue_s), ("commit", unit.commit_queue_s)):
        _add("label_bucket_queue_seconds_total", seconds, output=output_url, queue=queue)
    for cause, number in unit.retries.items():
        _add("label_bucket_retries_total", number, output=output_url, cause=cause)


def count_run(output_url: str, exit_code: int) -> None:
    """Add one run that ended."""
    _add("label_bucket_runs_total", 1, output=output_url, exit_code=str(exit_code))


@contextlib.contextmanager
def showing(output_url: str, run_id: str, space_id: str, resources: Resources, progress: Progress) -> Iterator[None]:
    """Keep the gauges at what `progress` says until the block ends; then Ray forgets them within half a minute."""
    ended = threading.Event()

    def show() -> None:
        output = {"output": output_url}
        _gauge("label_bucket_images_remaining").set(progress.num_images - progress.num_done, output)
        _gauge("label_bucket_eta_seconds").set(progress.eta_s, output)
        _gauge("label_bucket_model_actors").set(resources.num_actors, {**output, "device": resources.device})
        _gauge("label_bucket_run_info").set(1, {**output, "run_id": run_id, "space_id": space_id})

    def show_until_ended() -> None:
        show()
        while not ended.wait(SHOW_INTERVAL_S):
            show()

    thread = threading.Thread(target=show_until_ended, name="telemetry", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
