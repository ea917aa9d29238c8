"""Counters of a run -> what the operator sees while it runs, and the report at its end.

On a terminal a progress bar, in a job's log one line per interval, both with the same figures. A module of its own so
that every number a person reads is computed in one place.
"""

import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from itertools import islice
from typing import Any, TextIO

from tqdm import tqdm

from pipeline import schema, storage
from pipeline.dataset import UnitSummary
from pipeline.drift import MIN_IMAGES, Profile, compare
from pipeline.errors import SourceError
from pipeline.meter import LOG_INTERVAL_S, clock_text
from pipeline.storage import Store

MAX_REPORTS_READ = 20
"""How many runs back a night to compare with is looked for: small nights, and those whose driver died, have none."""

_log = logging.getLogger(__name__)


class Progress:
    """Counts units as they are committed and shows it."""

    def __init__(
        self,
        num_images: int,
        *,
        stream: TextIO = sys.stderr,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.num_images = num_images
        self.num_done = 0
        self.failures: Counter[str] = Counter()
        self.stage_s: Counter[str] = Counter()
        self._num_skipped = 0
        self._clock_s = clock_s
        self._started_s = self._next_line_s = clock_s()
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
        self.failures.update(unit.failures)
        for name in ("prepare_s", "decode_s", "label_s", "label_wait_s"):
            self.stage_s[name] += getattr(unit, name)
        if self._bar is not None:
            self._bar.set_postfix_str(f"{self._failures_text()}, {self.bottleneck()}", refresh=False)
            self._bar.update(unit.num_rows)
        elif self._clock_s() >= self._next_line_s or self.num_done == self.num_images:
            self._next_line_s = self._clock_s() + LOG_INTERVAL_S
            _log.info("%s", self.line())

    def close(self) -> None:
        """Leave the terminal with the bar's last state."""
        if self._bar is not None:
            self._bar.close()

    @property
    def images_per_s(self) -> float:
        """Images of this attempt per second since it began to label."""
        return (self.num_done - self._num_skipped) / max(self._clock_s() - self._started_s, 1e-9)

    def line(self) -> str:
        """`1,024/3,000 images, 210 images/s, 3 failed (2 truncated, 1 empty), ETA 0:00:09, …`."""
        left_s = (self.num_images - self.num_done) / self.images_per_s if self.images_per_s else 0
        return (
            f"{self.num_done:,}/{self.num_images:,} images, {self.images_per_s:,.0f} images/s, {self._failures_text()},"
            f" ETA {clock_text(left_s)}, {self.bottleneck()}"
        )

    def bottleneck(self) -> str:
        """Which stage waits for which: the share of their time that the model's actors waited for input."""
        total_s = self.stage_s["label_s"] + self.stage_s["label_wait_s"]
        if not total_s:
            return "starting"
        share = self.stage_s["label_wait_s"] / total_s
        return (
            f"model waits {share:.0%} of the time for images"
            if share > 0.2
            else f"images wait, model busy {1 - share:.0%}"
        )

    def _failures_text(self) -> str:
        if not self.failures:
            return "0 failed"
        kinds = ", ".join(f"{number} {kind}" for kind, number in self.failures.most_common())
        return f"{self.failures.total():,} failed ({kinds})"


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
    """Seconds summed over workers in this attempt: prepare (of it decode), label, and label waiting for input."""
    images_per_s: float = 0.0
    """While labeling, in this attempt."""
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

    def write(self, output: Store) -> None:
        """Overwrite the report of this run."""
        data = json.dumps(asdict(self), indent=1, ensure_ascii=False).encode()
        output.put(f"_runs/{self.run_id}/report.json", data)

    @classmethod
    def read(cls, output: Store, run_id: str) -> "Report | None":
        """The report of a run, or None if it has none that can be read: the log says what counts."""
        try:
            values = json.loads(storage.get_or_none(output, f"_runs/{run_id}/report.json") or b"null")
            return None if values is None else cls(**{each.name: values[each.name] for each in fields(cls)})
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
