"""Counters of a run -> what the operator sees while it runs, and the report at its end.

On a terminal a progress bar, in a job's log one line per interval, both with the same figures. A module of its own so
that every number a person reads is computed in one place.
"""

import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from itertools import islice
from typing import Any, Literal, NamedTuple, TextIO

from tqdm import tqdm

from pipeline import schema, storage
from pipeline.dataset import UnitSummary
from pipeline.drift import MIN_IMAGES, Profile, compare
from pipeline.errors import SourceError
from pipeline.meter import LOG_INTERVAL_S, clock_text
from pipeline.storage import Store

MODEL_WAITS_SHARE = 0.2
"""The model's actors may wait so much of their time and still be the limit: units come in gusts."""
ACTORS_THERE_SHARE = 0.5
"""Of the time, in which the actors label or wait: with less, they were starting for most of it."""
BUSY_SHARE = 0.5
"""With fewer of their slots taken, neither prepare nor commit tasks are the limit: workers and models are being
started, or there is less work than machine."""
Stage = Literal["starting", "model", "decoding", "storage", "writing"]
ADVICE: dict[Stage, str] = {
    "starting": "most of the time workers and models were starting: larger runs are faster per image",
    "model": "the model is the limit: more GPUs, or without any more CPU nodes, shorten the run",
    "decoding": "decoding is the limit: more CPU cores shorten the run, more GPUs do not; an image takes less of them"
    " with --preprocess fast, whose vectors are a space of their own",
    "storage": "storage is the limit: more CPU nodes read more at once; look at region, endpoint and network",
    "writing": "writing parts is the limit: look at the output's region, endpoint and request limits",
}
_STAGE_S = ("prepare_s", "decode_s", "label_s", "label_wait_s", "label_queue_s", "commit_queue_s", "commit_s")
MAX_POINTS = 200
"""Of the series that says how many images were done when: 5 kB in the report of any run."""
MAX_REPORTS_READ = 20
"""How many runs back a night to compare with is looked for: small nights, and those whose driver died, have none."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Bottleneck:
    """Which stage the others wait for, the shares of time that show it, and what would help."""

    stage: Stage
    model_wait_share: float
    """Of the actors' time: waiting for input."""
    prepare_busy_share: float
    """Of the time of all slots for prepare tasks: one in it. Low where these wait until the model takes more."""
    commit_busy_share: float
    """Of the time of all slots for commit tasks: one in it."""
    storage_wait_share: float
    """Of the prepare tasks' time: neither decoding nor resizing, so waiting for bytes."""
    storage_bytes_per_s: float
    """Encoded bytes that arrived, all workers together."""
    advice: str
    """The knob to turn."""

    @classmethod
    def of(
        cls,
        stage_s: Mapping[str, float],
        fetched_bytes: int,
        elapsed_s: float,
        *,
        max_prepares: int,
        max_commits: int,
        num_actors: int,
    ) -> "Bottleneck":
        """From seconds summed over workers (`Report.stage_s`) of an attempt that has taken `elapsed_s`."""
        actors_s = stage_s.get("label_s", 0) + stage_s.get("label_wait_s", 0)
        prepare_s = stage_s.get("prepare_s", 0)
        model_wait = stage_s.get("label_wait_s", 0) / actors_s if actors_s else 1.0
        prepare_busy = min(1.0, prepare_s / (elapsed_s * max_prepares))
        commit_busy = min(1.0, stage_s.get("commit_s", 0) / (elapsed_s * max_commits))
        storage_wait = 1 - stage_s.get("decode_s", 0) / prepare_s if prepare_s else 0.0
        stage: Stage
        if actors_s < ACTORS_THERE_SHARE * elapsed_s * num_actors:
            stage = "starting"
        elif model_wait <= MODEL_WAITS_SHARE:
            stage = "model"
        elif prepare_busy < BUSY_SHARE:
            stage = "writing" if commit_busy >= BUSY_SHARE else "starting"
        else:
            stage = "storage" if storage_wait > 0.5 else "decoding"
        return cls(
            stage=stage,
            model_wait_share=round(model_wait, 3),
            prepare_busy_share=round(prepare_busy, 3),
            commit_busy_share=round(commit_busy, 3),
            storage_wait_share=round(storage_wait, 3),
            storage_bytes_per_s=round(fetched_bytes / elapsed_s),
            advice=ADVICE[stage],
        )

    def text(self) -> str:
        """`limit: decoding (model waits 71%, preparing waits 4%, storage 12% of preparing, 41.3 MB/s)`."""
        shares = (
            f"model waits {self.model_wait_share:.0%}, preparing waits {1 - self.prepare_busy_share:.0%},"
            f" storage {self.storage_wait_share:.0%} of preparing, {self.storage_bytes_per_s / 1e6:,.1f} MB/s"
        )
        return f"limit: {self.stage} ({shares})"


class Progress:
    """Counts units as they are committed and shows it."""

    def __init__(
        self,
        num_images: int,
        *,
        max_prepares: int,
        max_commits: int,
        num_actors: int,
        stream: TextIO = sys.stderr,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.num_images = num_images
        self.num_done = 0
        self.num_parts = 0
        self.fetched_bytes = 0
        self.part_bytes = 0
        self.failures: Counter[str] = Counter()
        self.retries: Counter[str] = Counter()
        self.stage_s: Counter[str] = Counter()
        self._num_skipped = 0
        self._max_prepares, self._max_commits, self._num_actors = max_prepares, max_commits, num_actors
        self._clock_s = clock_s
        self._started_s = self._next_line_s = clock_s()
        self._points: list[tuple[float, int]] = []
        self._num_units = 0
        self._units_per_point = 1
        self._bar: Any = None
        if stream.isatty():
            self._bar = tqdm(total=num_images, unit="img", file=stream, dynamic_ncols=True)

    def skip(self, num_images: int) -> None:
        """Count images whose unit was committed by an earlier attempt."""
        self.num_done += num_images
        self._num_skipped += num_images
        if self._bar is not None:
            self._bar.initial += num_images
            self._bar.update(num_images)

    def add(self, unit: UnitSummary) -> None:
        """Count one committed unit, and show the state if it is time to."""
        self.num_done += unit.num_rows
        self.num_parts += 1
        self.fetched_bytes += unit.fetched_bytes
        self.part_bytes += unit.part_bytes
        self.failures.update(unit.failures)
        self.retries.update(unit.retries)
        for name in _STAGE_S:
            self.stage_s[name] += getattr(unit, name)
        self._remember_point()
        if self._bar is not None:
            self._bar.set_postfix_str(f"{self._failures_text()}, {self.bottleneck().text()}", refresh=False)
            self._bar.update(unit.num_rows)
        elif self._clock_s() >= self._next_line_s or self.num_done == self.num_images:
            self._next_line_s = self._clock_s() + LOG_INTERVAL_S
            _log.info("%s", self.line())

    def _remember_point(self) -> None:
        self._num_units += 1
        if self._num_units % self._units_per_point == 0:
            self._points.append((self._elapsed_s, self.num_done))
        if len(self._points) == MAX_POINTS - 2:  # room for where it began and where it is
            self._points = self._points[1::2]
            self._units_per_point *= 2

    def points(self) -> list[tuple[float, int]]:
        """Seconds since this attempt began to label, and images done by then; at most MAX_POINTS, evenly by units."""
        begin, now = (0.0, self._num_skipped), (self._elapsed_s, self.num_done)
        kept = self._points if self._points[-1:] != [now] else self._points[:-1]
        return [(round(seconds, 2), number) for seconds, number in (begin, *kept, now)]

    def close(self) -> None:
        """Leave the terminal with the bar's last state."""
        if self._bar is not None:
            self._bar.close()

    @property
    def images_per_s(self) -> float:
        """Images of this attempt per second since it began to label."""
        return (self.num_done - self._num_skipped) / self._elapsed_s

    @property
    def eta_s(self) -> float:
        """Seconds to the end at the rate of this attempt; 0 before the first unit."""
        return (self.num_images - self.num_done) / self.images_per_s if self.images_per_s else 0.0

    def line(self) -> str:
        """`1,024/3,000 images, 210 images/s, 3 failed (2 truncated, 1 empty), ETA 0:00:09, limit: …: more CPU …`."""
        found = self.bottleneck()
        _, _, knob = found.advice.partition(": ")
        return (
            f"{self.num_done:,}/{self.num_images:,} images, {self.images_per_s:,.0f} images/s, {self._failures_text()},"
            f" ETA {clock_text(self.eta_s)}, {found.text()}: {knob}"
        )

    def bottleneck(self) -> "Bottleneck":
        """What limits this attempt so far."""
        return Bottleneck.of(
            self.stage_s,
            self.fetched_bytes,
            self._elapsed_s,
            max_prepares=self._max_prepares,
            max_commits=self._max_commits,
            num_actors=self._num_actors,
        )

    @property
    def _elapsed_s(self) -> float:
        return max(self._clock_s() - self._started_s, 1e-9)

    def _failures_text(self) -> str:
        if not self.failures:
            return "0 failed"
        kinds = ", ".join(f"{number} {kind}" for kind, number in self.failures.most_common())
        return f"{self.failures.total():,} failed ({kinds})"


class Cost(NamedTuple):
    """Dollars."""

    price_per_hour: float
    """Of the whole cluster, as the run was told."""
    labeling_per_million: float
    """A million images at the pace of this attempt while it labeled."""
    whole_per_million: float
    """The same with planning, starting and publishing."""


@dataclass(kw_only=True)
class Report:
    """One run as a whole: `_runs/<run_id>/report.json`."""

    schema_version: int = schema.SCHEMA_VERSION
    run_id: str = ""
    exit_code: int | None = None
    """None while the run goes on."""
    message: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    run_date: str = ""
    model_id: str = ""
    model_revision: str = ""
    space_id: str = ""
    device: str = ""
    precision: str = ""
    num_actors: int = 0
    num_units: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)
    stage_s: dict[str, float] = field(default_factory=dict)
    """Seconds summed over workers in this attempt: prepare (of it decode), label, label waiting for input, commit; and
    summed over units: waiting for label, waiting for commit."""
    num_parts: int = 0
    """Units that this attempt committed."""
    fetched_bytes: int = 0
    """Encoded bytes that arrived for them."""
    part_bytes: int = 0
    """Bytes of their parts."""
    retries: dict[str, int] = field(default_factory=dict)
    """Requests to storage that were asked again for them, by cause, see `store.RepeatCause`."""
    images_per_s: float = 0.0
    """While labeling, in this attempt."""
    points: list[tuple[float, int]] = field(default_factory=list)
    """How it went on, see `Progress.points`; empty where nothing was labeled."""
    bottleneck: dict[str, Any] | None = None
    """What limited it, see `Bottleneck`; None where nothing was labeled."""
    prediction: dict[str, Any] | None = None
    """What a dry run expects, see `predict.Prediction`; None of a run."""
    published: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    profile: dict[str, Any] | None = None
    """What tonight's labeled images look like, see `drift.Profile`; None until they are published."""
    drift: dict[str, Any] | None = None
    """Tonight against the last run of this space that is large enough, see `drift.Drift`; None if there is none."""
    versions: dict[str, str] = field(default_factory=dict)
    store: dict[str, bool] = field(default_factory=dict)
    """What the output's store does and does not, see `capability.Capabilities`."""
    started_at: str = ""
    ended_at: str = ""

    def add_progress(self, progress: Progress) -> None:
        """Put what this attempt did into this report."""
        self.stage_s = {name: round(seconds, 3) for name, seconds in progress.stage_s.items()}
        self.num_parts, self.fetched_bytes = progress.num_parts, progress.fetched_bytes
        self.part_bytes, self.retries = progress.part_bytes, dict(progress.retries)
        self.images_per_s = round(progress.images_per_s, 2)
        self.points = progress.points()
        self.bottleneck = asdict(progress.bottleneck())

    def add_profile(self, output: Store, tonight: Profile, earlier_run_ids: Iterable[str]) -> list[str]:
        """Put `profile` and `drift` into this report; the lines to warn with, none in an ordinary night.

        `earlier_run_ids` are published runs of the same space, newest first.
        """
        self.profile = tonight.to_json()
        last = _last_profile(output, earlier_run_ids)
        if last is None:
            return []
        found = compare(tonight, last[1], last_run_id=last[0])
        self.drift = found.to_json()
        return found.warnings()

    def cost(self) -> Cost | None:
        """What a million images of this attempt cost; None without a price or without labeled images."""
        price = self.config.get("price_per_hour")
        num_images = self.points[-1][1] - self.points[0][1] if self.points else 0
        if not price or not num_images or not self.ended_at:
            return None
        wall_s = (datetime.fromisoformat(self.ended_at) - datetime.fromisoformat(self.started_at)).total_seconds()
        labeling_s = self.points[-1][0]
        return Cost(
            price_per_hour=price,
            labeling_per_million=price / 3600 * labeling_s / num_images * 1e6,
            whole_per_million=price / 3600 * max(wall_s, labeling_s) / num_images * 1e6,
        )

    def write(self, output: Store) -> None:
        """Overwrite the report of this run."""
        data = json.dumps(asdict(self), indent=1, ensure_ascii=False).encode()
        output.put(f"_runs/{self.run_id}/report.json", data)

    @classmethod
    def read(cls, output: Store, run_id: str) -> "Report | None":
        """The report of a run, or None if it has none that can be read: the log says what counts."""
        try:
            values = json.loads(storage.get_or_none(output, f"_runs/{run_id}/report.json") or b"{}")
            if values["run_id"] != run_id:
                return None
            # Fields that an earlier version did not know have their defaults.
            known = {each.name: values[each.name] for each in fields(cls) if each.name in values}
            return cls(**{**known, "points": [(seconds, done) for seconds, done in known.get("points", [])]})
        except (ValueError, KeyError, TypeError):
            return None


def _last_profile(output: Store, run_ids: Iterable[str]) -> tuple[str, Profile] | None:
    """The first of these runs that has a profile worth comparing with. A report that cannot be read is one without."""
    for run_id in islice(run_ids, MAX_REPORTS_READ):
        try:
            data = storage.get_or_none(output, f"_runs/{run_id}/report.json")
            profile = Profile.from_json(json.loads(data or b"{}")["profile"])
        except (ValueError, KeyError, TypeError, SourceError):
            continue
        if profile.num_images >= MIN_IMAGES:
            return run_id, profile
    return None
