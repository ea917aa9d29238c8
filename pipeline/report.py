"""A run's report, its log entry and some of its rows -> `_runs/<run_id>/report.html`, one page that needs nothing else.

A module of its own because the page is for people: it may be late or missing, and nothing may fail because of it. What
it says is computed elsewhere (`progress`, `drift`, `outcomes`), so that its sums are those of report.json and the log.
"""

import logging
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from pydantic_core import to_jsonable_python

from pipeline import charts, samples, sheet
from pipeline.config import Config
from pipeline.drift import NUM_CONFIDENCE_BINS
from pipeline.errors import FailureKind, SourceError
from pipeline.log import Entry, FileRef
from pipeline.meter import clock_text
from pipeline.progress import Report
from pipeline.samples import Row, Samples
from pipeline.sheet import Tile
from pipeline.storage import Store

MAX_S = 20.0
"""For what a page reads. No further file or picture is begun after that, so a run ends at most so much later, and the
time of one request."""
MAX_PAGE_BYTES = 3_000_000
NUM_LABELS = 12
"""In the histogram of labels."""
MAX_TEXT = 300
"""Characters of a text from data; of the command ten times as many."""
_MAY_HAVE_PICTURES = frozenset({FailureKind.UNAVAILABLE, FailureKind.MODEL_NONFINITE})
"""Kinds of failure after which there may be the listed picture; the others mean that there is none."""
_STAGES = {
    "starting": "Starting workers and models",
    "model": "The model",
    "decoding": "Decoding",
    "storage": "Storage",
    "writing": "Writing parts",
}

_log = logging.getLogger(__name__)


class Term(NamedTuple):
    """A term of the sum of all listed objects."""

    name: str
    number: int
    share: float
    meaning: str


class Measure(NamedTuple):
    """One figure of the drift, as text."""

    name: str
    last: str
    tonight: str
    change: str
    bound: str
    is_beyond: bool


class DeadLetter(NamedTuple):
    """A row of failures/, and its picture where there is one."""

    row: Row
    key: str
    picture: bytes | None


def write(output: Store, report: Report, entry: Entry | None) -> None:
    """Write the page beside report.json. Whatever keeps it from that is a warning: the run is what it is."""
    try:
        output.put(f"_runs/{report.run_id}/report.html", page(output, report, entry).encode())
    except SourceError as error:
        _log.warning("report.html could not be written: %s", error)
    except Exception:  # noqa: BLE001 - a page for people: no defect of it may end a run that is published
        _log.warning("report.html could not be made", exc_info=True)


def page(output: Store, report: Report, entry: Entry | None) -> str:
    """The page of a run; `entry` is its commit, or None if nothing was published. At most MAX_PAGE_BYTES.

    Pictures are read from the run's input where that can still be read. Raises SourceError if the output cannot be.
    """
    until_s = time.monotonic() + MAX_S
    profile = report.profile or {}
    found = Samples()
    if entry is not None:
        found = samples.read(output, entry, profile.get("label_counts", {}), max_s=MAX_S / 2)
    tiles, pictures = _pictures(entry, found, until_s)
    text = _render(report, entry, found, tiles, pictures)
    if len(text.encode()) > MAX_PAGE_BYTES:  # pictures of noise, or names of a thousand characters that are all escaped
        text = _render(report, entry, found, [each._replace(picture=None, reason="no room") for each in tiles], {})
    return text


def _render(
    report: Report, entry: Entry | None, found: Samples, tiles: Sequence[Tile], pictures: Mapping[str, bytes | None]
) -> str:
    upcoming = iter(tiles)
    by_label = [(label, [next(upcoming) for _ in rows]) for label, rows in found.by_label.items()]
    return sheet.render(
        "report.html.j2",
        report=report,
        input=entry.identity["input"] if entry else report.config.get("input", ""),
        is_published=entry is not None,
        duration=_duration_text(report),
        terms=list(terms(report)),
        num_tried=num_tried(report),
        failures=charts.bars(charts.by_number(report.failures)),
        paces=charts.paces(report.points),
        clock_text=clock_text,
        stage=_STAGES.get((report.bottleneck or {}).get("stage", "")),
        cost=report.cost(),
        labels=_labels(report.profile),
        confidences=_confidences(report.profile),
        mean_confidence=mean_confidence(report.profile),
        num_seen=found.num_seen,
        by_label=by_label,
        least_confident=list(upcoming),
        dead_letters=[DeadLetter(row, _key(row, entry), pictures.get(row["uri"])) for row in found.failures if entry],
        measures=list(measures(report.drift)),
        command=command(report.config)[: 10 * MAX_TEXT],
        files=list(files(entry)),
        clipped=clipped,
    )


def clipped(text: str) -> str:
    """A text from data at a bounded length."""
    return text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT * 2 // 3]}…{text[-MAX_TEXT // 3 :]}"


# --- figures: the same for the page and for a terminal ------------------------------------------------------------


def num_tried(report: Report) -> int:
    """Objects that were new or changed, so labeled or failed: what was planned."""
    counts = report.counts
    return counts.get("planned", counts.get("labeled", 0) + counts.get("failed", 0))


def terms(report: Report) -> Iterator[Term]:
    """What all listed objects are made of; of a run that was not published, what was planned of them."""
    meanings = {
        "labeled": "have a row in labels/",
        "failed": "have a row in failures/, with the reason",
        "planned": "are new or changed; nothing was published of them",
        "unchanged": "have the outcome of an earlier run",
        "filtered": "are out of scope, see --include and --exclude",
    }
    counts = report.counts
    for name, meaning in meanings.items():
        if name in counts:
            yield Term(name, counts[name], counts[name] / counts["listed"] if counts["listed"] else 0.0, meaning)


def mean_confidence(profile: Mapping[str, Any] | None) -> float | None:
    """Mean score of the first labels, 0 .. 1."""
    return profile["confidence_sum"] / profile["num_images"] if profile and profile["num_images"] else None


def measures(drift: Mapping[str, Any] | None) -> Iterator[Measure]:
    """What moved since the last run that could be compared, as far as it was: a line for each change of `Drift`."""
    if drift is None:
        return

    for key, name, both, digits in (
        ("labels", "Images with another label", "", ".3f"),
        ("confidence", "Mean confidence", "mean_confidence", ".3f"),
        ("centroid", "Mean vector: 1 − cosine; its length", "centroid_norm", ".4f"),
        ("norm", "Vectors: length, off from 1", "", ".4f"),
    ):
        if drift[key] is not None:
            value, bound = drift[key]["value"], drift[key]["bound"]
            last, tonight = (f"{drift[each]:.3f}" for each in (f"last_{both}", both)) if both else ("", "")
            yield Measure(name, last, tonight, f"{value:{digits}}", f"{bound:{digits}}", not value <= bound)


def files(entry: Entry | None) -> Iterator[tuple[str, int, int, int]]:
    """Folder, files, rows and bytes of what a run published."""
    if entry is not None:
        folders: dict[str, list[FileRef]] = {
            "labels": entry.labels,
            "failures": entry.dead_letters,
            "deletions": entry.deletions,
        }
        for folder, refs in folders.items():
            yield folder, len(refs), sum(each.num_rows for each in refs), sum(each.size_bytes for each in refs)


def command(config: Mapping[str, Any]) -> str:
    """The command line that asks for this config, defaults left out; empty for an empty one."""
    words = []
    for name, field in Config.model_fields.items():
        value, default = config.get(name), to_jsonable_python(field.get_default(), serialize_unknown=True)
        if value is None or value == default:
            continue
        flag = "--" + name.replace("_", "-")
        if isinstance(value, list):
            words += [f"{flag} {shlex.quote(each)}" for each in value]
        else:
            words.append(flag if value is True else f"{flag} {shlex.quote(str(value))}")
    return " ".join(["label_bucket.py", *words]) if words else ""


def _duration_text(report: Report) -> str:
    if not report.started_at or not report.ended_at:
        return ""
    begin, end = datetime.fromisoformat(report.started_at), datetime.fromisoformat(report.ended_at)
    return clock_text((end - begin).total_seconds())


def _labels(profile: Mapping[str, Any] | None) -> tuple[list[charts.Bar], int, int]:
    """The most frequent labels, how many more there are, and the images of these."""
    if profile is None:
        return [], 0, 0
    counts = charts.by_number(profile["label_counts"])
    shown, rest = counts[:NUM_LABELS], counts[NUM_LABELS:]
    return charts.bars(shown, profile["num_images"]), len(rest), sum(number for _, number in rest)


def _confidences(profile: Mapping[str, Any] | None) -> list[charts.Bar]:
    counts = (profile or {}).get("confidence_counts", ())
    if not any(counts):
        return []
    width = 1 / NUM_CONFIDENCE_BINS
    return charts.bars((f"{place * width:.2f} to {(place + 1) * width:.2f}", each) for place, each in enumerate(counts))


# --- pictures -----------------------------------------------------------------------------------------------------


def _pictures(entry: Entry | None, found: Samples, until_s: float) -> tuple[list[Tile], dict[str, bytes | None]]:
    """Tiles of the labeled rows in their order, and pictures of dead letters by their uri."""
    letters = [row for row in found.failures if row["failure_kind"] in _MAY_HAVE_PICTURES]
    labeled = found.labeled
    if entry is None or not labeled + letters:
        return [], {}
    max_s = max(0.0, until_s - time.monotonic())
    pictures = sheet.thumbnails(entry.identity["input"], [*labeled, *letters], max_s=max_s)
    least_from = len(labeled) - len(found.least_confident)
    tiles = [
        Tile(
            _key(row, entry),
            picture,
            clipped(reason),
            [_labels_text(row, is_known=place < least_from)],
            score=row["confidence"],
        )
        for place, (row, (picture, reason)) in enumerate(zip(labeled, pictures, strict=False))
    ]
    of_letters = (picture for picture, _ in pictures[len(labeled) :])
    return tiles, {row["uri"]: picture for row, picture in zip(letters, of_letters, strict=True)}


def _key(row: Row, entry: Entry) -> str:
    """The key below the input, which the page names at its head."""
    return str(row["uri"]).removeprefix(f"{entry.identity['input']}/")


def _labels_text(row: Row, *, is_known: bool) -> str:
    """`cat, then dog 0.020`: the first label, unless it is known, and the one it was nearly."""
    first, *others = map(clipped, row["label_names"])
    nearly = f"then {others[0]} {row['label_scores'][1]:.3f}" if others else ""
    return ", ".join(each for each in ("" if is_known else first, nearly) if each)
