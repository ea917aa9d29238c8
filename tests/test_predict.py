"""What a dry run says before a run, held against what the run then does."""

import itertools
import logging
import random
import re
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import published
import pytest
from cluster import ROOT, Head

from pipeline import capability, plan, predict, storage
from pipeline.config import Config
from pipeline.dataset import Resources
from pipeline.diff import COUNTS
from pipeline.errors import ConfigError, ForbiddenError
from pipeline.plan import Plan, Range
from pipeline.predict import Measured
from pipeline.progress import Report
from pipeline.storage import ObjectInfo
from pipeline.survey import MAX_FOLDERS, SAMPLE_OBJECTS, Folder, Survey

CPUS = Resources(device="cpu", num_actors=4, cluster_cpus=4, cluster_gpus=0)
GPUS = Resources(device="cuda", num_actors=2, cluster_cpus=32, cluster_gpus=2)


def info(key: str, size_bytes: int = 10) -> ObjectInfo:
    return ObjectInfo(key, size_bytes, "e", None)


def surveyed(keys: list[str]) -> Survey:
    survey = Survey()
    for key in keys:
        survey.add(info(key))
    return survey


def sample(**changes: Any) -> Measured:
    values: dict[str, Any] = {
        "num_objects": 100,
        "encoded_bytes": 10_000_000,
        "failures": {"truncated": 2, "not_an_image": 1},
        "wait_s": 0.001,
        "decode_s": 0.004,
        "own_cpu_s": 0.0005,
        "label_s": 0.010,
    }
    return Measured(**{**values, **changes})


def planned(num_images: int, num_units: int) -> Plan:
    counts = {**dict.fromkeys(COUNTS, 0), "listed": num_images, "planned": num_images}
    each = Range(range_id="00000", counts=counts, num_units=num_units, encoded_bytes=100_000 * num_images)
    return plan.total("", [each])


# --- the survey ---------------------------------------------------------------------------------------------------


def test_a_sample_is_the_same_however_the_keys_are_cut_into_ranges() -> None:
    keys = sorted(f"{number % 7}/{number:05d}.jpg" for number in range(5000))
    whole, merged = surveyed(keys), Survey()
    for start in range(0, len(keys), 333):
        merged.merge(surveyed(keys[start : start + 333]))
    assert len(whole.sample()) == SAMPLE_OBJECTS
    assert merged.sample() == whole.sample()
    places = sorted(keys.index(each.key) for each in whole.sample())
    assert max(after - before for before, after in zip([0, *places], [*places, 5000], strict=True)) < 5000 * 0.1


def test_fewer_objects_than_a_sample_are_all_of_it_and_a_range_that_is_listed_again_counts_once() -> None:
    survey = surveyed(["a/1", "b"])
    survey.clear()
    for key in ("a/1", "a/2", "b"):
        survey.add(info(key))
    assert sorted(each.key for each in survey.sample()) == ["a/1", "a/2", "b"]
    assert survey.folders() == ([Folder("a/", 2, 20), Folder("", 1, 10)], None)


def test_the_largest_folders_are_exact_and_the_rest_is_summed_however_many_there_are() -> None:
    """3,500 folders of one to three objects, thirty of more, keys without a folder between them, cut anywhere."""
    numbers = random.Random(3)
    sizes = {f"{numbers.getrandbits(40):010x}/": numbers.randint(1, 3) for _ in range(3500)}
    large = {name: 10 + number for number, name in enumerate(numbers.sample(sorted(sizes), 30))}
    sizes |= large
    keys = [f"{name}{number:02d}" for name, size in sizes.items() for number in range(size)]
    keys = sorted([*keys, *(f"{numbers.getrandbits(40):010x}" for _ in range(50))])
    merged = Survey()
    cuts = [0, *sorted(numbers.sample(range(len(keys)), 5)), len(keys)]
    for start, end in itertools.pairwise(cuts):
        merged.merge(surveyed(keys[start:end]))
    assert len(merged._folders) < 1100
    shown, others = merged.folders()
    expected = sorted([*((size, name) for name, size in large.items()), (50, "")], key=lambda each: (-each[0], each[1]))
    assert [(each.num_objects, each.name) for each in shown] == expected[: MAX_FOLDERS - 1]
    assert others is not None
    assert others.name == f"{3501 - len(shown):,} others"
    assert sum(each.num_objects for each in [*shown, others]) == len(keys)
    assert sum(each.encoded_bytes for each in [*shown, others]) == 10 * len(keys)
    assert len(list(predict.folder_lines(merged))) == MAX_FOLDERS


# --- the arithmetic -----------------------------------------------------------------------------------------------


def test_without_gpus_the_seconds_of_decoding_and_model_add_up_on_the_cores() -> None:
    found = predict.predict(sample(), planned(100_000, 100), CPUS, planning_s=1, start_s=5)
    assert found.images_per_s == pytest.approx(4 / (0.004 + 0.0005 + 0.010))
    assert found.limit == "model"
    assert found.model_images_per_s == pytest.approx(400)
    assert (found.checking_s, found.starting_s) == (5, 5 * predict.STARTS_PER_WAVE)
    assert found.expected_s == pytest.approx(6 + found.starting_s + 100_000 / found.images_per_s + 1000 * 0.005)


def test_with_gpus_the_slowest_stage_is_the_limit() -> None:
    fast_model = sample(label_s=0.00005)
    found = predict.predict(fast_model, planned(10_000_000, 10_000), GPUS, planning_s=1, start_s=5)
    assert (found.limit, found.num_prepares) == ("decoding", GPUS.max_prepares)
    assert found.images_per_s == pytest.approx(32 / 0.0045)
    assert found.starting_s == 3 * 5 * predict.STARTS_PER_WAVE  # three waves
    slow_model = predict.predict(sample(label_s=0.001), planned(10_000_000, 10_000), GPUS, planning_s=1, start_s=5)
    assert slow_model.limit == "model"
    assert slow_model.images_per_s == pytest.approx(2000)
    far_away = replace(fast_model, wait_s=0.1)
    distant = predict.predict(far_away, planned(10_000_000, 10_000), GPUS, planning_s=1, start_s=5)
    assert distant.limit == "storage"
    assert distant.images_per_s == pytest.approx(GPUS.max_prepares / 0.104)


def test_one_unit_is_one_task_and_one_actor_and_a_small_run_is_limited_by_its_start() -> None:
    found = predict.predict(sample(), planned(60, 1), CPUS, planning_s=1, start_s=5)
    assert (found.num_prepares, found.num_actors, found.limit) == (1, 1, "starting")
    assert found.labeling_s == pytest.approx(60 * (0.010 + 0.005))


def test_more_failures_than_the_budget_are_warned_of_and_no_images_do_not_count() -> None:
    found = predict.predict(sample(), planned(10_000, 40), CPUS, planning_s=1, start_s=5)
    assert predict.budget_warning(found, 10_000, 0.02) is None
    warning = predict.budget_warning(found, 10_000, 0.019)
    assert warning is not None
    assert warning.startswith("about 200 objects will fail, 190 are allowed")
    said = "\n".join(predict.lines(found, 3600.0))
    assert f"cost: about ${found.expected_s:,.2f} at $3,600.00 per hour" in said
    assert "cost" not in "\n".join(predict.lines(found, None))
    assert "3 failed, which means about 300 of all (truncated 2.0%, not_an_image 1.0%)" in said
    assert "model: 100 images/s an actor, 400 in all 4" in said


def test_a_sample_without_a_single_image_says_that_the_model_was_not_measured() -> None:
    found = predict.predict(sample(label_s=0.0), planned(10_000, 40), CPUS, planning_s=1, start_s=5)
    assert "model: not measured, because no object of the sample could be decoded" in predict.lines(found, None)


# --- without writing ----------------------------------------------------------------------------------------------


def test_a_place_that_can_be_no_folder_is_refused_without_writing(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    capability.check_folder(storage.connect(str(tmp_path / "new" / "out")))
    with pytest.raises(ForbiddenError, match=r"^--output file://.*/file/out: expected a folder to write into"):
        capability.check_folder(storage.connect(str(tmp_path / "file" / "out")))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# --- the command --------------------------------------------------------------------------------------------------

NUM_IMAGES = 1500


def draw(folder: Path, num_images: int) -> Path:
    """A folder of drawn pictures, some of them broken, and one file that is out of scope."""
    command = [sys.executable, "jobs/draw_images.py", "--output", str(folder), f"--num-images={num_images}"]
    subprocess.run([*command, "--seed=9", "--broken-fraction=0.03"], cwd=ROOT, check=True)
    (folder / "notes.txt").write_text("not an image")
    return folder


def label(pictures: Path | str, output: Path, **options: Any) -> Report:
    """The command in this process, which is a driver already."""
    from pipeline.run import label_bucket

    places = {"input": str(pictures), "output": str(output), "model": "demo", "exclude": ("*.txt",)}
    config = Config(**{**places, **options})
    return label_bucket(config, start_engine=lambda: None)


@pytest.mark.slow
def test_a_run_takes_about_as_long_as_its_dry_run_said(
    driver: Head, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Within a factor of three either way. The head has two cores, which others may keep busy for one of both and not
    for the other; the sample has each stage alone, and a run of seconds is mostly the start of processes.
    """
    caplog.set_level(logging.INFO)
    pictures = draw(tmp_path / "in", NUM_IMAGES)
    dry = label(pictures, tmp_path / "out", dry_run=True)
    assert not (tmp_path / "out").exists()
    assert dry.prediction is not None
    assert dry.counts["planned"] == dry.prediction["num_images"] == NUM_IMAGES
    assert dry.counts["filtered"] == 1
    assert dry.prediction["sample"]["num_objects"] == SAMPLE_OBJECTS
    said = [record.getMessage() for record in caplog.records]
    for start in ("plan: ", "folder: ", "sample: 100 of 1,500", "storage: ", "decoding: ", "model: ", "expected: "):
        assert any(line.startswith(start) for line in said), start
    folders = {path.name: len(list(path.iterdir())) for path in pictures.iterdir() if path.is_dir()}
    told = [re.fullmatch(r"folder: (\d+) to label, .* GB: (.*)", line) for line in said if line.startswith("folder: ")]
    counts = {each[2].rstrip("/"): int(each[1]) for each in told if each is not None}
    assert counts.pop(f"{len(folders) - MAX_FOLDERS + 1} others") == NUM_IMAGES - sum(counts.values())
    assert counts.items() <= folders.items()

    run = label(pictures, tmp_path / "out")
    assert run.prediction is None
    assert dry.num_units == run.num_units
    assert all(dry.counts[name] == run.counts[name] for name in ("listed", "filtered", "unchanged", "deleted"))
    took_s = NUM_IMAGES / run.images_per_s
    expected_s = dry.prediction["starting_s"] + dry.prediction["labeling_s"]
    assert took_s / 3 < expected_s < took_s * 3
    share = sum(dry.prediction["sample"]["failures"].values()) / SAMPLE_OBJECTS
    assert share == pytest.approx(sum(run.failures.values()) / NUM_IMAGES, abs=0.06)
    assert set(dry.prediction["sample"]["failures"]) <= set(run.failures)

    before = published.keys(str(tmp_path / "out"))
    idle = label(pictures, tmp_path / "out", dry_run=True)
    assert (idle.prediction, idle.counts["unchanged"]) == (None, NUM_IMAGES)
    assert published.keys(str(tmp_path / "out")) == before
    assert "where a run has written before (--probe-writes tries it)" in caplog.messages[-1]


def test_a_dry_run_of_a_manifest_samples_what_it_names_and_probes_the_output_if_asked(
    driver: Head, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    pictures = draw(tmp_path / "in", 80)
    keys = sorted(str(path.relative_to(pictures)) for path in pictures.rglob("*.jpg"))[:20]
    named = tmp_path / "named.csv"
    named.write_text("\n".join(["uri", *keys, "broken/gone.jpg", "s3://elsewhere/x.jpg"]) + "\n")
    output = tmp_path / "out"
    dry = label(pictures, output, dry_run=True, manifest=str(named), probe_writes=True)
    assert dry.prediction is not None
    assert dry.prediction["sample"]["num_objects"] == dry.counts["planned"] == len(keys) + 2
    assert {"missing", "bad_uri"} <= set(dry.prediction["sample"]["failures"])
    assert dry.prediction["limit"] == "starting"
    left = sorted(re.sub("-[0-9a-f]{8}", "", key) for key in published.keys(str(output)))
    assert left == ["_runs/store.json", "_runs/store.txt"]
    assert "--probe-writes" not in caplog.messages[-1]


def test_a_dry_run_reads_its_sample_out_of_containers(driver: Head, tmp_path: Path) -> None:
    pictures = draw(tmp_path / "pictures", 20)
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in" / "x.tar", "w") as tar:
        tar.add(pictures, ".")
    dry = label(f"webdataset+{tmp_path / 'in'}", tmp_path / "out", dry_run=True)
    assert dry.prediction is not None
    assert dry.prediction["sample"]["num_objects"] == dry.counts["planned"] == 20


def test_a_dry_run_with_weights_that_are_not_the_architectures_ends_as_its_run_would(
    driver: Head, tmp_path: Path
) -> None:
    pictures = draw(tmp_path / "in", 3)
    model = checkpoints.write_small(tmp_path / "model")
    checkpoints.edit_config(model, num_hidden_layers=5)
    with pytest.raises(ConfigError, match=r"expected exactly the tensors of \w+, found \d+ missing"):
        label(pictures, tmp_path / "out", dry_run=True, model=str(model))
    assert not (tmp_path / "out").exists()
