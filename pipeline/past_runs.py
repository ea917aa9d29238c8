"""The log and its reports -> the runs of an output, and what there is to say of one of them.

A module of its own because it looks back: it needs neither Ray nor a model, and writes nothing.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pipeline import charts, log, report
from pipeline.columns import aligned
from pipeline.errors import ConfigError
from pipeline.log import Claim, Entry
from pipeline.meter import clock_text
from pipeline.progress import Report
from pipeline.sheet import shown
from pipeline.storage import Store

MAX_NAMES = 5
"""Labels and runs that a terminal gets in one line."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run as the log knows it. `entry` is its commit, None while it is open."""

    state: Literal["published", "abandoned", "open"]
    claim_or_entry: Claim | Entry

    @property
    def entry(self) -> Entry | None:
        """What it published; None if it did not."""
        found = self.claim_or_entry
        return found if isinstance(found, Entry) and self.state == "published" else None

    @property
    def since(self) -> str:
        """When it came into this state."""
        found = self.claim_or_entry
        return found.committed_at if isinstance(found, Entry) else found.created_at

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        found = self.claim_or_entry
        return {
            "run_id": found.run_id,
            "state": self.state,
            "since": self.since,
            "run_date": found.run_date,
            "model_id": found.model_id,
            "model_revision": found.model_revision,
            "space_id": found.identity["space_id"],
            "counts": self.entry.counts if self.entry else {},
            "failures": self.entry.failures if self.entry else {},
        }


def read(output: Store) -> list[Run]:
    """Every run of an output that was claimed, oldest first. Errors as `log.read`."""
    state = log.read(output)
    found = [
        Run(state="published" if each.kind == "run" else "abandoned", claim_or_entry=each)
        for each in state.entries
        if each.kind in ("run", "abandoned")
    ]
    if state.open_claim is not None and "kind" not in state.open_claim.identity:
        found.append(Run(state="open", claim_or_entry=state.open_claim))
    return found


def find(output: Store, run_id: str) -> Run:
    """The run of this id, or of the only one that begins so; ConfigError, naming what there is, for none or several."""
    runs = read(output)
    found = [each for each in runs if each.claim_or_entry.run_id.startswith(run_id)]
    if len(found) != 1:
        ids = [each.claim_or_entry.run_id for each in runs]
        some = ", ".join(ids[-MAX_NAMES:]) or "none"
        raise ConfigError(
            f"{output.root}: expected the id of one run, or how it begins, found {run_id!r}, which {len(found)} have;"
            f" its last runs: {some}"
        )
    return found[0]


def list_text(runs: list[Run]) -> str:
    """A line for each run, newest last."""
    rows = [("run", "state", "since", "listed", "labeled", "failed", "unchanged", "deleted", "model")]
    for each in runs:
        values = each.to_json()
        counts = [
            f"{values['counts'][name]:,}" if name in values["counts"] else ""
            for name in ("listed", "labeled", "failed", "unchanged", "deleted")
        ]
        since = values["since"].replace("+00:00", "Z")
        rows.append((values["run_id"], values["state"], since, *counts, shown(values["model_id"])))
    return aligned(rows)


def summary_text(run: Run, found: Report | None) -> str:
    """What there is to say of a run, a line for each subject; `found` is its report, if it left one."""
    return aligned((f"{name:<10}", value) for name, value in _lines(run, found or _without_report(run)) if value)


def _without_report(run: Run) -> Report:
    values = run.to_json()
    names = ("run_id", "run_date", "model_id", "model_revision", "space_id", "counts", "failures")
    return Report(**{name: values[name] for name in names})


def _lines(run: Run, found: Report) -> Iterator[tuple[str, str]]:
    yield "run", f"{run.claim_or_entry.run_id}, {run.state} {run.since}"
    yield "model", shown(f"{found.model_id} revision {found.model_revision}, space {found.space_id}")
    yield "input", shown(str(run.claim_or_entry.identity["input"]))
    if found.device:
        yield "ran on", f"{found.num_actors} {found.device} actor(s), {found.precision}"
    if found.exit_code not in (0, None):
        yield "ended", shown(f"exit code {found.exit_code}: {found.message}")
    terms = list(report.terms(found))
    if terms:
        sum_text = " + ".join(f"{each.number:,} {each.name}" for each in terms)
        yield "objects", f"{found.counts['listed']:,} listed = {sum_text}; {found.counts['deleted']:,} gone"
    yield "failed", ", ".join(f"{number:,} {kind}" for kind, number in charts.by_number(found.failures))
    if found.images_per_s:
        seconds = f", {clock_text(found.points[-1][0])} of labeling" if found.points else ""
        yield "speed", f"{found.images_per_s:,.1f} images/s{seconds}"
    if found.bottleneck is not None:
        yield "limit", found.bottleneck["advice"]
    if found.profile and found.profile["num_images"]:
        counts = charts.by_number(found.profile["label_counts"])
        names = ", ".join(f"{shown(name)} {number:,}" for name, number in counts[:MAX_NAMES])
        yield "labels", f"{names}{f', and {len(counts) - MAX_NAMES:,} more' if len(counts) > MAX_NAMES else ''}"
        yield "confidence", f"{report.mean_confidence(found.profile):.3f} on average"
    moved = [each.name for each in report.measures(found.drift) if each.is_beyond]
    if found.drift is not None:
        yield "drift", f"against run {found.drift['last_run_id']}: {', '.join(moved) or 'nothing moved'}"
    if (cost := found.cost()) is not None:
        yield (
            "cost",
            f"${cost.whole_per_million:,.2f} per million images, ${cost.labeling_per_million:,.2f} while labeling, at"
            f" ${cost.price_per_hour:,.2f} per hour",
        )
    for folder, num_files, num_rows, num_bytes in report.files(run.entry):
        if num_files:
            yield f"{folder}/", f"{num_rows:,} rows in {num_files:,} file(s), {num_bytes / 1e6:,.2f} MB"


def to_json(run: Run, found: Report | None) -> dict[str, Any]:
    """What the log says of a run, and its report, or None where it left none."""
    return {**run.to_json(), "report": None if found is None else asdict(found)}
