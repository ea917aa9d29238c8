"""The page of a run and `show_run`: sums that are those of the log and the files, nothing but text, never too large."""

import dataclasses
import json
import logging
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import browser
import images
import nights
import numpy as np
import published
import pytest
from browser import LAPTOP, PHONE
from cluster import ROOT, Head
from nights import Nights
from PIL import Image
from servers import S3Server
from test_sheet import COLOURS, ODD, Page

from pipeline import drift, log, past_runs, report, samples, storage
from pipeline.log import Entry
from pipeline.progress import ADVICE, Report, Stage
from pipeline.storage import ObjectInfo

BAD_KEY = "odd/\"><img src=x onerror='alert(1)'>\u202e<script>.png"


def text_of(page: str) -> str:
    """What a person reads, without the style sheet, spaces as they are shown."""
    return " ".join(" ".join(Page(page.partition("</style>")[2]).text).split())


def show_run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "jobs" / "show_run.py"), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


# --- a real run ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def labeled(head: Head, s3: S3Server) -> str:
    """The output of a run over 240 drawn pictures on S3, some broken, one of an odd name, one left out."""
    source, output = f"{s3.create_bucket('drawn')}/in", f"{s3.create_bucket('told')}/labels"
    draw = [sys.executable, "jobs/draw_images.py", "--output", source, "--num-images=240", "--seed=5"]
    subprocess.run([*draw, "--broken-fraction=0.15"], cwd=ROOT, env=head.environment, check=True)
    picture = images.encode(images.texture(60, 40), "PNG")
    for key in (BAD_KEY, "left/out.png"):
        s3.client.put_object(Bucket=source.split("/")[2], Key=f"in/{key}", Body=picture)
    options = ("--input", source, "--output", output, "--model", "demo", "--exclude", "left/**")
    done = head.label_bucket(*options, "--max-failed-fraction=0.5", "--price-per-hour=3.6", "--gpu-actors=1")
    assert done.returncode == 0, done.stderr
    assert "report.html" not in done.stderr, "a warning"
    return output


def test_the_sums_of_the_page_are_those_of_report_json_of_the_log_and_of_the_files(labeled: str) -> None:
    (entry,), (told,) = published.entries(labeled), published.reports(labeled)
    labels, failures = published.table(labeled, "labels"), published.table(labeled, "failures")
    counts = entry["counts"]
    assert told["counts"] == counts
    assert counts == {
        "listed": 242,
        "filtered": 1,
        "unchanged": 0,
        "deleted": 0,
        "labeled": len(labels),
        "failed": len(failures),
    }
    assert len(failures) > 20
    assert len(labels) + len(failures) + 1 == 242
    text = text_of(published.read(labeled, f"_runs/{entry['run_id']}/report.html").decode())
    assert f"242 listed = {len(labels)} labeled + {len(failures)} failed + 0 unchanged + 1 filtered" in text
    assert f"labels/ 1 {len(labels)} " in text
    assert f"failures/ 1 {len(failures)} " in text
    for kind, number in Counter(failures["failure_kind"].to_pylist()).items():
        assert f"{kind} {number} {100 * number / len(failures):.1f} %" in text
    best = Counter(names[0] for names in labels["label_names"].to_pylist())
    for label, number in best.most_common(5):
        assert f"{label} {number} {100 * number / len(labels):.1f} %" in text
    scores = np.array([each[0] for each in labels["label_scores"].to_pylist()], dtype=float)
    bins = np.bincount(np.minimum(scores * 20, 19).astype(int), minlength=20).tolist()
    assert told["profile"]["confidence_counts"] == bins
    assert f"0.95 to 1.00 {bins[-1]} {100 * bins[-1] / len(labels):.1f} %" in text
    assert f"{scores.mean():.3f} on average" in text


def test_the_page_says_what_ran_how_fast_and_what_a_million_images_cost(labeled: str) -> None:
    (told,) = published.reports(labeled)
    page = published.read(labeled, f"_runs/{told['run_id']}/report.html").decode()
    text = text_of(page)
    assert told["points"][0] == [0, 0]
    assert told["points"][-1][1] == 241
    cost = 3.6 / 3600 * told["points"][-1][0] / 241 * 1e6
    assert f"${cost:,.2f} while labeling, at $3.60 per hour" in text
    assert (
        f"label_bucket.py --input {told['config']['input']} --output {labeled} --exclude 'left/**' --model demo"
        " --gpu-actors 1 --max-failed-fraction 0.5 --price-per-hour 3.6"
    ) in text
    for value in (told["model_revision"], told["space_id"], told["versions"]["ray"], told["bottleneck"]["stage"]):
        assert value in text.lower()
    failures = published.table(labeled, "failures").to_pylist()
    shown = [row for row in failures if f"{row['failure_kind']} : {row['failure_message']}" in text]
    assert {row["failure_kind"] for row in shown} == {row["failure_kind"] for row in failures}
    pictures = Page(page).all("img")
    assert len(pictures) >= samples.NUM_LABELS * 3 + samples.NUM_LEAST_CONFIDENT
    assert all((each["src"] or "").startswith("data:image/jpeg;base64,") and each["alt"] for each in pictures)
    assert len(page) < report.MAX_PAGE_BYTES


def test_show_run_says_the_same_of_a_run_and_makes_its_page_again(labeled: str, tmp_path: Path) -> None:
    (entry,) = published.entries(labeled)
    listed = show_run("--output", labeled)
    assert (listed.returncode, listed.stderr) == (0, "")
    assert re.search(rf"\n{entry['run_id']}  published  \S+Z +242 +{entry['counts']['labeled']} ", listed.stdout)
    told = show_run("--output", labeled, "--run", "00000001", "--html", str(tmp_path / "page.html"))
    assert told.returncode == 0, told.stderr
    counts = entry["counts"]
    sums = f"242 listed = {counts['labeled']} labeled + {counts['failed']} failed + 0 unchanged + 1 filtered; 0 gone"
    assert sums in told.stdout
    assert "per million images" in told.stdout
    assert (tmp_path / "page.html").read_bytes() == published.read(labeled, f"_runs/{entry['run_id']}/report.html")
    values = json.loads(show_run("--output", labeled, "--run", entry["run_id"], "--json").stdout)
    assert (values["state"], values["counts"], values["report"]["counts"]) == ("published", counts, counts)


# --- runs without an engine ---------------------------------------------------------------------------------------


class Case:
    """An output of one night over files that are there, and the report of that night."""

    def __init__(self, folder: Path, pictures: Mapping[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
        source = storage.connect(str(folder / "in"))
        for key, data in pictures.items():
            source.put(key, data)
        self.infos = {info.key: info for page in source.list_pages() for info in page}
        monkeypatch.setattr(nights, "ROOT", source.root)
        self.nights = Nights(storage.connect(str(folder / "out")), rows_per_file=10_000)
        self.output = self.nights.output

    def publish(self, labels: Mapping[str, list[str]], failed: Mapping[str, str] | None = None) -> tuple[Report, Entry]:
        """Say of every picture that it is what `labels` names, first and second."""

        def change(row: dict[str, Any]) -> dict[str, Any]:
            info: ObjectInfo = self.infos[row["key"]]
            return {**row, "etag": info.etag, "size_bytes": info.size_bytes, "label_names": labels[row["key"]]}

        entry = self.nights.publish(labels, failed, change=change)
        counts = {"listed": len(labels) + len(failed or {}), "filtered": 0, "unchanged": 0, "deleted": 0}
        counts |= {"labeled": len(labels), "failed": len(failed or {})}
        entry = dataclasses.replace(entry, counts=counts, failures=dict(Counter((failed or {}).values())))
        told = Report(run_id=entry.run_id, exit_code=0, counts=counts, failures=entry.failures)
        rows = published.table(self.output.root.removeprefix("file://"), "labels")
        told.add_profile(self.output, drift.profile_of(rows), [])
        return told, entry


def many(number: int, picture: bytes) -> dict[str, bytes]:
    return {f"{place:04d}.jpg": picture for place in range(number)}


def test_keys_labels_and_reasons_of_any_kind_are_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = [name.removeprefix("s3://b/") for name in ODD]
    names = {f"{place}.png": [name, name] for place, name in enumerate(odd)}
    hostile_keys = {f"k {place} <script>alert(1)</script>\u202e'\"&amp;.png": ["a", "b"] for place in range(3)}
    labels = {**names, **hostile_keys}
    case = Case(tmp_path, dict.fromkeys(labels, images.encode(images.quadrants(), "PNG")), monkeypatch)
    told, entry = case.publish(labels, {"<i>bad</i>.jpg": "corrupt"})
    told.config = {"input": "<i>in</i>", "include": ["<u>*</u>"]}
    told.message = told.model_id = told.model_revision = "<s>&amp;"
    page = report.page(case.output, told, entry)
    tags = {tag for tag, _ in Page(page).tags}
    assert tags & {"script", "i", "u", "s", "link", "iframe"} == set()
    assert not [name for _, attributes in Page(page).tags for name in attributes if name.startswith("on")]
    text = text_of(page)
    assert "<script>alert(1)</script>\\u202e'\"&amp;.png" in text
    assert "<i>bad</i>.jpg" in text
    assert "{{ 7 * 7 }}{% raw %}" in text
    assert "<s>&amp;" in text
    assert "\u202e" not in page
    assert len(Page(page).all("img")) == 2 * len(labels)


@pytest.mark.parametrize("name", ["plain", "<&\u202e" * 60], ids=["plain", "odd"])
def test_a_page_of_two_thousand_pictures_of_noise_stays_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    noise = images.encode(Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)), "JPEG")
    case = Case(tmp_path, many(2000, noise), monkeypatch)
    labels = {key: [f"{name}{place % 300}", name] for place, key in enumerate(case.infos)}
    failed = {f"{name}/{place}": f"kind {place % 30}" for place in range(500)}
    told, entry = case.publish(labels, failed)
    page = report.page(case.output, told, entry)
    assert len(page.encode()) < report.MAX_PAGE_BYTES
    assert len(Page(page).all("img")) == samples.NUM_LABELS * samples.NUM_PER_LABEL + samples.NUM_LEAST_CONFIDENT
    assert "of 2,000 labeled images" in text_of(page)
    assert "40 of 500 objects without a label" in text_of(page)
    monkeypatch.setattr(report, "MAX_PAGE_BYTES", 500_000)
    without = report.page(case.output, told, entry)
    assert "no room" in text_of(without)
    assert not Page(without).all("img")


def test_the_same_run_gives_the_same_rows_from_few_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(tmp_path, many(300, images.encode(images.quadrants(), "JPEG")), monkeypatch)
    case.nights.rows_per_file = 10
    told, entry = case.publish({key: [f"label {place % 10}", "none"] for place, key in enumerate(case.infos)})
    assert len(entry.labels) == 30
    assert told.profile is not None
    found = samples.read(case.output, entry, told.profile["label_counts"])
    assert found == samples.read(case.output, entry, told.profile["label_counts"])
    assert found.num_seen == samples.MAX_FILES * 10
    assert {int(row["uri"][-8:-4]) // 10 for row in found.labeled} == {0, 10, 19, 29}
    assert all(row["label_names"][0] == label for label, rows in found.by_label.items() for row in rows)
    assert samples.read(case.output, entry, {}).by_label.keys() == found.by_label.keys()
    late = samples.read(case.output, entry, {}, max_s=0)
    assert (late.num_seen, late.labeled, late.failures) == (0, [], [])


def test_what_moved_since_the_last_run_is_said_on_the_page_and_in_the_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(tmp_path, many(250, images.encode(images.quadrants(), "JPEG")), monkeypatch)
    last, _ = case.publish({key: ["fish", "none"] for key in case.infos})
    last.write(case.output)
    told, entry = case.publish({key: [("fish", "clock")[place % 2], "none"] for place, key in enumerate(case.infos)})
    rows = published.table(str(tmp_path / "out"), "labels").slice(250)
    assert told.add_profile(case.output, drift.profile_of(rows), [last.run_id])
    text = text_of(report.page(case.output, told, entry))
    assert f"250 images now, 250 in run {last.run_id}." in text
    assert re.search(r"Images with another label 0\.500 > 0\.\d{3} moved", text)
    assert re.search(r"Mean confidence 0\.750 → 0\.750 0\.000 ≤ 0\.\d{3} as usual", text)
    assert "clock 0.0 % 50.0 % fish 100.0 % 50.0 %" in text
    said = past_runs.summary_text(past_runs.find(case.output, told.run_id), told)
    assert f"against run {last.run_id}: Images with another label" in said


def test_what_keeps_a_page_from_being_made_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    case = Case(tmp_path, many(3, images.encode(images.quadrants(), "JPEG")), monkeypatch)
    told, entry = case.publish({key: ["a", "b"] for key in case.infos})
    for path in (tmp_path / "in").iterdir():
        path.unlink()
    page = report.page(case.output, told, entry)
    assert text_of(page).count("No picture: missing: ") == 6
    labels = tmp_path / "out" / entry.labels[0].key
    for data, expected in ((b"PAR1 damaged", "could not be made"), (None, "could not be written")):
        labels.write_bytes(data) if data else labels.unlink()
        caplog.clear()
        report.write(case.output, told, entry)
        assert [expected in record.message for record in caplog.records] == [True]
        assert caplog.records[0].levelno == logging.WARNING
    assert not list((tmp_path / "out").glob("_runs/*/report.html"))


def test_the_page_of_a_run_that_published_nothing_says_why(tmp_path: Path) -> None:
    output = storage.connect(str(tmp_path))
    told = Report(run_id="1-a", exit_code=4, message="too many <failed>", failures={"corrupt": 30})
    told.counts = {"listed": 100, "filtered": 5, "unchanged": 15, "planned": 80, "deleted": 0}
    report.write(output, told, None)
    text = text_of((tmp_path / "_runs/1-a/report.html").read_text())
    assert "not published: exit code 4" in text
    assert "too many <failed>" in text
    assert "100 listed = 80 planned + 15 unchanged + 5 filtered" in text
    assert "corrupt 30 100.0 %" in text
    report.write(output, Report(run_id="2-b", exit_code=3), None)
    assert "exit code 3" in text_of((tmp_path / "_runs/2-b/report.html").read_text())


@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("window", [LAPTOP, PHONE], ids=["laptop", "phone"])
def test_browser_shows_every_picture_and_nothing_is_wider_than_the_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: tuple[int, int], is_dark: bool
) -> None:
    pictures = {
        f"{place}.png": images.encode(Image.new("RGB", (300, 300), colour), "PNG")
        for place, colour in enumerate(COLOURS)
    }
    case = Case(tmp_path, pictures, monkeypatch)
    long = "a-label-of-many-letters" * 8
    told, entry = case.publish({key: [long, "b"] for key in pictures}, {"key" * 90: "not_an_image"})
    told.points = [(0.0, 0), (1.0, 2), (3.0, 7)]
    told.images_per_s = 2.3
    page = report.page(case.output, told, entry)
    shot = browser.screenshot(page, tmp_path, (window[0], 4500), is_dark=is_dark)
    pixels = np.asarray(shot, dtype=int)
    for colour in COLOURS:
        assert (abs(pixels - colour).max(axis=2) <= 6).sum() > 2 * 90 * 90, colour  # in both contact sheets
    edge = pixels[:, -5:]
    assert (edge == edge[0, 0]).all()
    assert (edge[0, 0].mean() < 60) == is_dark


# --- show_run -----------------------------------------------------------------------------------------------------


def test_show_run_lists_published_open_and_abandoned_runs(tmp_path: Path) -> None:
    output = storage.connect(str(tmp_path))
    several = Nights(output)
    several.publish(["a", "b"], {"c": "corrupt"})
    log.commit(output, log.abandoned(several.claim(), "2026-11-23T04:00:00+00:00"))
    several.snapshot()
    several.claim()
    done = show_run("--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert [line.split()[1] for line in done.stdout.splitlines()] == ["state", "published", "abandoned", "open"]
    listed = json.loads(show_run("--output", str(tmp_path), "--json").stdout)
    assert [each["run_id"][:8] for each in listed] == ["00000001", "00000002", "00000004"]
    told = show_run("--output", str(tmp_path), "--run", listed[2]["run_id"])
    assert told.returncode == 0, told.stderr
    assert re.search(r"run +00000004-\w+, open 2026-11-22T03:00:00", told.stdout)
    assert json.loads(show_run("--output", str(tmp_path), "--run", "00000002", "--json").stdout)["report"] is None


def test_show_run_names_the_runs_there_are_where_none_is_meant(tmp_path: Path) -> None:
    assert show_run("--output", str(tmp_path)).stdout == f"no runs in file://{tmp_path}\n"
    several = Nights(storage.connect(str(tmp_path)))
    run_ids = [several.publish(["a"]).run_id, several.publish(["b"]).run_id]
    for asked, number in (("3", 0), ("0000000", 2)):
        done = show_run("--output", str(tmp_path), "--run", asked)
        assert done.returncode == 2
        assert f"found '{asked}', which {number} have; its last runs: {', '.join(run_ids)}" in done.stderr
    done = show_run("--output", str(tmp_path), "--html", "x.html")
    assert (done.returncode, "expected --run RUN_ID" in done.stderr) == (2, True)
    done = show_run("--output", str(tmp_path), "--run", run_ids[0], "--html", str(tmp_path / "none" / "x.html"))
    assert (done.returncode, "left no report.json" in done.stderr) == (2, True)


def test_each_stage_that_can_be_the_limit_has_its_advice_and_its_name_on_the_page() -> None:
    assert ADVICE.keys() == report._STAGES.keys() == {*get_args(Stage)}
