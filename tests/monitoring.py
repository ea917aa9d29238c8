"""What is wrong with a file of alert rules or a dashboard: names, labels, PromQL, shape; nothing if all is right."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import promql_parser
import yaml
from promql_parser import AggregateExpr, BinaryExpr, MatchOp, VectorSelector

from pipeline.telemetry import METRICS

RAY_PREFIX = "ray_"
RAY_LABELS = {"SessionName", "WorkerId"}
"""Of those that Ray adds to every metric, the ones that expressions may rely on; see the scrape test."""
_SEVERITIES = {"info", "warning", "critical"}
_WIDTH = 24
_OF_A_PANEL = {"id", "title", "gridPos", "targets", "fieldConfig"}


def metrics_in(expression: str) -> set[str]:
    """Metrics that a PromQL expression names. ValueError if it is none."""
    return {str(each.name) for each in _selectors(promql_parser.parse(expression))}


def problems_of_expression(expression: str) -> Iterator[str]:
    """Of PromQL over the job's metrics."""
    try:
        parsed = promql_parser.parse(expression)
    except ValueError as error:
        yield f"no PromQL: {error}"
        return
    known_labels = set(RAY_LABELS)
    selectors = _selectors(parsed)
    if not selectors:
        yield "names no metric"
    for each in selectors:
        metric = METRICS.get(str(each.name).removeprefix(RAY_PREFIX))
        if metric is None or not str(each.name).startswith(RAY_PREFIX):
            yield f"names {each.name}, which nobody exports"
            continue
        known_labels |= metric.tags.keys()
        for matcher in each.matchers.matchers:
            if matcher.name not in RAY_LABELS | metric.tags.keys():
                yield f"asks {each.name} for a label {matcher.name}"
            elif matcher.op == MatchOp.Equal and (values := metric.tags[matcher.name]) and matcher.value not in values:
                yield f"asks {each.name} for {matcher.name} {matcher.value}"
    for label in _grouped_by(parsed) - known_labels:
        yield f"groups by {label}"


def problems_of_rules(text: str) -> list[str]:
    """Of a file of alert rules."""
    try:
        groups = yaml.safe_load(text)["groups"]
    except (yaml.YAMLError, TypeError, KeyError) as error:
        return [f"no rules: {error!r}"]
    rules = [rule for group in groups for rule in group["rules"]]
    found = [f"{name}: twice" for name, number in Counter(rule.get("alert") for rule in rules).items() if number > 1]
    for rule in rules:
        found += [f"{rule.get('alert')}: {problem}" for problem in _problems_of_rule(rule)]
    return found


def _problems_of_rule(rule: dict[str, Any]) -> Iterator[str]:
    if unknown := rule.keys() - {"alert", "expr", "for", "labels", "annotations"}:
        yield f"has {unknown}"
    if missing := {"alert", "expr", "labels", "annotations"} - rule.keys():
        yield f"lacks {missing}"
        return
    yield from problems_of_expression(rule["expr"])
    if "for" in rule:
        try:
            promql_parser.parse_duration(rule["for"])
        except ValueError as error:
            yield f"for {rule['for']}: {error}"
    if rule["labels"].get("severity") not in _SEVERITIES:
        yield f"has severity {rule['labels'].get('severity')}"
    if missing := {"summary", "description"} - rule["annotations"].keys():
        yield f"lacks {missing}"
    tags = {tag for metric in METRICS.values() for tag in metric.tags}
    for label in re.findall(r"\$labels\.(\w+)", " ".join(rule["annotations"].values())):
        if label not in tags:
            yield f"tells a label {label}"


def problems_of_dashboard(text: str) -> list[str]:
    """Of a dashboard."""
    try:
        dashboard = json.loads(text)
        panels, variables = dashboard["panels"], dashboard["templating"]["list"]
    except (ValueError, TypeError, KeyError) as error:
        return [f"no dashboard: {error!r}"]
    if incomplete := [panel for panel in panels if not panel.keys() >= _OF_A_PANEL]:
        return [f"panel {panel.get('id')}: lacks {sorted(_OF_A_PANEL - panel.keys())}" for panel in incomplete]
    ids = Counter(panel["id"] for panel in panels)
    found = [f"panel {number}: twice" for number, times in ids.items() if times > 1]
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        where = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(where["x"], where["x"] + where["w"])
            for y in range(where["y"], where["y"] + where["h"])
        }
        if cells & taken or max(x for x, _ in cells) >= _WIDTH:
            found.append(f"{panel['title']}: lies over another or beside the page")
        taken |= cells
        found += [
            f"{panel['title']}: {problem}" for each in expressions_of(panel) for problem in problems_of_expression(each)
        ]
        if not panel["targets"] or not panel["fieldConfig"]["defaults"].get("unit"):
            found.append(f"{panel['title']}: shows nothing, or without a unit")
    for variable in variables:
        if variable["type"] == "query":
            # label_values(metric, label) asks for the values of a label, as this does.
            expression = re.sub(r"^label_values\((.+), (\w+)\)$", r"group by (\2) (\1)", variable["query"]["query"])
            found += [f"${variable['name']}: {problem}" for problem in problems_of_expression(expression)]
    return found


def expressions_of(panel: dict[str, Any]) -> list[str]:
    """The PromQL of a panel, with a value for what Grafana fills in."""
    return [target["expr"].replace("$__rate_interval", "1m").replace("$output", ".*") for target in panel["targets"]]


def _selectors(parsed: promql_parser.Expr) -> list[VectorSelector]:
    found: list[VectorSelector] = []

    def visit(node: Any) -> None:
        if isinstance(node, VectorSelector):
            found.append(node)
        elif isinstance(node, promql_parser.MatrixSelector):
            found.append(node.vector_selector)

    promql_parser.walk(parsed, visit)
    return found


def _grouped_by(parsed: promql_parser.Expr) -> set[str]:
    found: set[str] = set()

    def visit(node: Any) -> None:
        if isinstance(node, AggregateExpr) and node.modifier is not None:
            found.update(node.modifier.labels)
        elif isinstance(node, BinaryExpr) and node.modifier is not None and node.modifier.matching is not None:
            found.update(node.modifier.matching.labels)

    promql_parser.walk(parsed, visit)
    return found
