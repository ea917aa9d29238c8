"""Metrics, alerts and dashboard: a real run on a real head, scraped as Prometheus does, says what its report says."""

import io
import json
import re
import time
import urllib.request
from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

import checkpoints
import monitoring
import published
import pytest
import yaml
from cluster import ROOT, Head, wait_until
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from servers import Fault, S3Server, put_quickly

from pipeline.dataset import Resources
from pipeline.draw import draw_file
from pipeline.progress import Progress
from pipeline.telemetry import METRICS, showing

ALERTS = (ROOT / "infra" / "prometheus" / "alerts.yaml").read_text()
DASHBOARD = (ROOT / "infra" / "grafana" / "label_bucket.json").read_text()
README = (ROOT / "README.md").read_text()
NUM_IMAGES = 200


class Scraped(NamedTuple):
    """What a head said of a run after it, and what that run left behind."""

    samples: dict[str, list[Sample]]
    """By name of the metric, those of this output."""
    types: dict[str, str]
    report: dict[str, object]
    output: str
    num_bytes: int
    """Of all objects."""

    def total(self, name: str, **labels: str) -> float:
        return sum(
            each.value for each in self.samples[f"ray_label_bucket_{name}"] if labels.items() <= each.labels.items()
        )

    def by(self, name: str, label: str, **labels: str) -> dict[str, float]:
        found: defaultdict[str, float] = defaultdict(float)
        for each in self.samples[f"ray_label_bucket_{name}"]:
            if labels.items() <= each.labels.items():
                found[each.labels[label]] += each.value
        return dict(found)


def scrape(head: Head, output: str) -> tuple[dict[str, list[Sample]], dict[str, str]]:
    """The job's samples of an output, by name, and the types of its metrics."""
    with urllib.request.urlopen(head.metrics_url, timeout=10) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    samples: dict[str, list[Sample]] = {}
    types = {}
    for family in families:
        for each in family.samples:
            if each.labels.get("output") == output:
                samples.setdefault(each.name, []).append(each)
                types[each.name] = family.type
    return samples, types


@pytest.fixture(scope="module")
def scraped(head: Head, s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Scraped:
    """A run over pictures, some of them broken, one of which storage at first does not give."""
    bucket, output = s3.create_bucket(), s3.create_bucket() + "/labels"
    files = [draw_file(11, number, broken_fraction=0.1) for number in range(NUM_IMAGES)]
    put_quickly(s3, bucket.removeprefix("s3://"), {file.path: file.data for file in files})
    fault = Fault(503, "GET", next(file.path for file in files if "broken" not in file.path))
    s3.faults.append(fault)
    model = str(checkpoints.write_small(tmp_path_factory.mktemp("model")))
    done = head.label_bucket("--input", bucket, "--output", output, "--model", model, "--max-failed-fraction=1")
    s3.faults.remove(fault)
    assert done.returncode == 0, done.stderr
    assert fault.num_hits
    (report,) = published.reports(output)
    wanted = {f"ray_{name}" for name in METRICS}
    found: tuple[dict[str, list[Sample]], dict[str, str]] = ({}, {})

    def has_all() -> bool:
        nonlocal found
        found = scrape(head, output)
        return wanted <= found[0].keys()

    try:
        wait_until(has_all, 25)
    except TimeoutError:
        raise AssertionError(f"never exported: {wanted - found[0].keys()}") from None
    num_bytes = sum(len(file.data) for file in {file.path: file for file in files}.values())
    return Scraped(*found, report, output, num_bytes)


@pytest.mark.slow
def test_a_scrape_after_a_run_has_every_metric_with_its_type_and_tags_and_no_other(scraped: Scraped) -> None:
    assert {name.removeprefix("ray_") for name in scraped.samples} == METRICS.keys()
    for name, metric in METRICS.items():
        samples = scraped.samples[f"ray_{name}"]
        assert scraped.types[f"ray_{name}"] == metric.kind
        assert all(metric.tags.keys() | monitoring.RAY_LABELS <= each.labels.keys() for each in samples), samples
        assert len({each.labels["WorkerId"] for each in samples}) == 1
        for tag, values in metric.tags.items():
            assert not values or {each.labels[tag] for each in samples} <= set(values)


@pytest.mark.slow
def test_the_sums_of_a_scrape_are_those_of_the_report(scraped: Scraped) -> None:
    report = scraped.report
    counts, failures = report["counts"], report["failures"]
    assert isinstance(counts, dict)
    assert isinstance(failures, dict)
    assert failures
    assert scraped.by("images_total", "outcome") == {"labeled": counts["labeled"], "failed": counts["failed"]}
    assert scraped.by("images_total", "failure_kind", outcome="failed") == failures
    assert scraped.total("parts_total") == report["num_parts"] == report["num_units"]
    assert scraped.total("fetched_bytes_total") == report["fetched_bytes"] == scraped.num_bytes
    parts = list(published.parts(scraped.output))
    assert len(parts) == report["num_parts"]
    assert (
        scraped.total("part_bytes_total")
        == report["part_bytes"]
        == sum(len(published.read(scraped.output, key)) for key in parts)
    )
    assert scraped.by("retries_total", "cause") == report["retries"] == {"throttled": 1}
    assert scraped.by("runs_total", "exit_code") == {"0": 1}


@pytest.mark.slow
def test_the_seconds_of_a_scrape_are_those_of_the_report_and_nothing_remains(scraped: Scraped) -> None:
    seconds = scraped.report["stage_s"]
    assert isinstance(seconds, dict)
    wanted = {
        "fetch": seconds["prepare_s"] - seconds["decode_s"],
        "decode": seconds["decode_s"],
        "label": seconds["label_s"],
        "commit": seconds["commit_s"],
    }
    assert scraped.by("stage_seconds_total", "stage") == pytest.approx(wanted, abs=0.01)
    assert scraped.total("model_wait_seconds_total") == pytest.approx(seconds["label_wait_s"], abs=0.01)
    waited = {"label": seconds["label_queue_s"], "commit": seconds["commit_queue_s"]}
    assert scraped.by("queue_seconds_total", "queue") == pytest.approx(waited, abs=0.01)
    assert all(wanted.values())
    (info,) = scraped.samples["ray_label_bucket_run_info"]
    assert (info.labels["run_id"], info.labels["space_id"]) == (scraped.report["run_id"], scraped.report["space_id"])
    assert scraped.by("model_actors", "device") == {"cpu": scraped.report["num_actors"]}


@pytest.mark.slow
def test_alerts_and_dashboard_name_only_what_a_run_exports(scraped: Scraped) -> None:
    rules = [rule["expr"] for group in yaml.safe_load(ALERTS)["groups"] for rule in group["rules"]]
    panels = [each for panel in json.loads(DASHBOARD)["panels"] for each in monitoring.expressions_of(panel)]
    named = {name for each in [*rules, *panels] for name in monitoring.metrics_in(each)}
    assert named <= scraped.samples.keys()
    assert len(rules) == 6


@pytest.mark.slow
def test_gauges_stay_while_nothing_moves(driver: Head) -> None:
    output = "s3://stalled/labels"
    progress = Progress(300, max_prepares=2, max_commits=2, num_actors=1, stream=io.StringIO())
    resources = Resources(device="cpu", num_actors=2, cluster_cpus=2, cluster_gpus=0)
    since_s: list[float] = []

    def outlives_what_ray_remembers() -> bool:
        remaining = scrape(driver, output)[0].get("ray_label_bucket_images_remaining", [])
        assert bool(remaining) >= bool(since_s), "it went away"
        if remaining:
            assert [each.value for each in remaining] == [300]
            since_s.append(time.monotonic())
        return bool(since_s) and since_s[-1] - since_s[0] > 22  # two exports: what was set once is gone by then

    with showing(output, "run", "space", resources, progress):
        wait_until(outlives_what_ray_remembers)


def test_counters_end_in_total_and_every_name_says_its_unit() -> None:
    for name, metric in METRICS.items():
        assert re.fullmatch(r"label_bucket_[a-z]+(_[a-z]+)*", name)
        assert name.endswith("_total") == (metric.kind == "counter")
        assert "_s_" not in name
        assert metric.help.endswith(".")
        assert "run_id" not in metric.tags or metric.kind == "gauge"


def test_alerts_and_dashboard_are_right_by_themselves() -> None:
    assert monitoring.problems_of_rules(ALERTS) == []
    assert monitoring.problems_of_dashboard(DASHBOARD) == []
    panels = json.loads(DASHBOARD)["panels"]
    shown = {
        name for panel in panels for each in monitoring.expressions_of(panel) for name in monitoring.metrics_in(each)
    }
    assert shown == {f"ray_{name}" for name in METRICS}
    variables = {each["name"] for each in json.loads(DASHBOARD)["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)", DASHBOARD)) - {"__rate_interval"} == variables


@pytest.mark.parametrize(
    ("right", "wrong", "problem"),
    [
        ("ray_label_bucket_images_total[15m]", "ray_label_bucket_image_total[15m]", "which nobody exports"),
        ("ray_label_bucket_images_remaining", "label_bucket_images_remaining", "which nobody exports"),
        ('{stage="label"}', '{stage="model"}', "stage model"),
        ('{device="cuda"}', '{gpu="cuda"}', "a label gpu"),
        ("max by (output) (ray_label_bucket_images", "max by (job) (ray_label_bucket_images", "groups by job"),
        ("[15m])) > 0", "[15m]) > 0", "no PromQL"),
        ("increase(ray_label_bucket_retries_total[15m])", "increase(ray_label_bucket_retries_total)", "no PromQL"),
        ("for: 30m", "for: 30 minutes", "for 30 minutes"),
        ("severity: critical", "severity: loud", "severity loud"),
        ("{{ $labels.exit_code }}", "{{ $labels.code }}", "a label code"),
        ("alert: LabelBucketRunFailed", "alert: LabelBucketStalled", "twice"),
        ("          summary: Many", "          title: Many", "lacks"),
        ("        expr: |\n          1 -", "        expression: |\n          1 -", "expression"),
        ("groups:\n", "groups:\n\t", "no rules"),
    ],
)
def test_a_broken_rule_is_found(right: str, wrong: str, problem: str) -> None:
    assert right in ALERTS
    assert problem in "\n".join(monitoring.problems_of_rules(ALERTS.replace(right, wrong, 1)))


@pytest.mark.parametrize(
    ("right", "wrong", "problem"),
    [
        ("ray_label_bucket_eta_seconds", "ray_label_bucket_eta", "which nobody exports"),
        ("sum by (cause)", "sum by (reason)", "groups by reason"),
        ('outcome=\\"failed\\"', 'outcome=\\"broken\\"', "outcome broken"),
        ("[$__rate_interval]))", "[$__rate_interval])", "no PromQL"),
        ('"id": 2,', '"id": 1,', "twice"),
        ('"x": 8,', '"x": 4,', "lies over another"),
        ('"unit": "percentunit"', '"unit": ""', "without a unit"),
        ('"panels": [', '"panels": ', "no dashboard"),
        ('"gridPos"', '"gridPosition"', "panel 1: lacks ['gridPos']"),
        (
            "label_values(ray_label_bucket_parts_total, output)",
            "label_values(ray_label_bucket_parts_total, out)",
            "by out",
        ),
    ],
)
def test_a_broken_dashboard_is_found(right: str, wrong: str, problem: str) -> None:
    assert right in DASHBOARD
    assert problem in "\n".join(monitoring.problems_of_dashboard(DASHBOARD.replace(right, wrong, 1)))


def test_prometheus_may_reach_the_pods_that_its_monitor_selects() -> None:
    monitor = yaml.safe_load((ROOT / "infra" / "prometheus" / "podmonitor.yaml").read_text())
    common = list(yaml.safe_load_all((ROOT / "infra" / "kubernetes" / "common.yaml").read_text()))
    (policy,) = [each["spec"] for each in common if each["kind"] == "NetworkPolicy"]
    assert monitor["spec"]["selector"] == policy["podSelector"]
    ports: list[Mapping[str, object]] = [
        port
        for rule in policy["ingress"]
        for source in rule["from"]
        if source["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": "prometheus"}
        for port in rule["ports"]
    ]
    assert ports == [{"port": 8080, "protocol": "TCP"}]
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] == "metrics"
    (relabeling,) = endpoint["metricRelabelings"]
    assert all(re.fullmatch(relabeling["regex"], f"ray_{name}") for name in METRICS)


def test_the_nodes_of_virtual_machines_serve_metrics_where_those_of_kubernetes_do() -> None:
    machines = yaml.safe_load((ROOT / "infra" / "ray" / "cluster.yaml").read_text())
    commands = [each for name in ("head", "worker") for each in machines[f"{name}_start_ray_commands"]]
    starts = [each for each in commands if each.startswith("ray start")]
    assert len(starts) == 2
    assert all("--metrics-export-port=8080" in each.split() for each in starts)


def test_the_readme_lists_every_metric_with_its_type_tags_and_meaning() -> None:
    rows = re.findall(r"^\| `(label_bucket_\w+)` \| (.+?) \| (.*?) ?\| (.+) \|$", README, re.MULTILINE)
    wanted = [
        (
            name,
            metric.kind,
            ", ".join(
                f"`{tag}`" + (f" ({', '.join(values)})" if values else "")
                for tag, values in metric.tags.items()
                if tag != "output"
            ),
            metric.help,
        )
        for name, metric in METRICS.items()
    ]
    assert rows == wanted
