"""How often a checkpoint is right: the command on the project's own pictures, and every way in which pictures fail."""

import json
import re
import runpy
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pyarrow.parquet as pq
import pytest
from cluster import ROOT, Head
from test_packaging import section
from test_truth import write_parquet

from pipeline import evaluate, model
from pipeline.checkpoint import DEMO, PreprocessMode
from pipeline.draw import CLASSES, draw_file
from pipeline.errors import ConfigError, SourceError
from pipeline.evaluate import MODES, PRECISIONS, PUBLISHED, Evaluation, Options

NUM_HELD_OUT = 240
JOB = ROOT / "jobs" / "evaluate_checkpoint.py"


@pytest.fixture(scope="module")
def training() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "jobs" / "train_demo.py"))


@dataclass(frozen=True)
class Measured:
    """What the command leaves behind."""

    folder: Path
    content: dict[str, Any]
    predictions: Path
    printed: str


@pytest.fixture(scope="module")
def measured(head: Head, training: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """The command over the first of the pictures that the training script keeps for measuring, drawn as files."""
    folder = tmp_path_factory.mktemp("held-out")
    drawn = (
        "--output",
        str(folder / "in"),
        "--num-images",
        str(NUM_HELD_OUT),
        "--seed",
        str(training["HELD_OUT_SEED"]),
    )
    subprocess.run([sys.executable, str(ROOT / "jobs" / "draw_images.py"), *drawn], check=True, capture_output=True)
    ended = subprocess.run(
        [
            *(sys.executable, str(JOB), "--model", DEMO, "--dataset", str(folder / "in")),
            *("--json", str(folder / "found.json"), "--predictions", str(folder / "found.parquet")),
        ],
        env={**head.environment, "RAY_ADDRESS": head.address},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.splitlines()[-1].endswith(f"written {folder}/found.json and {folder}/found.parquet")
    content = json.loads((folder / "found.json").read_text())
    return Measured(folder / "in", content, folder / "found.parquet", ended.stdout)


def result(measured: Measured, preprocess: str, precision: str) -> dict[str, Any]:
    (found,) = [
        each
        for each in measured.content["results"]
        if (each["preprocess"], each["precision"]) == (preprocess, precision)
    ]
    metrics: dict[str, Any] = found["metrics"]
    return metrics


# --- the project's own checkpoint ---------------------------------------------------------------------------------


def test_the_accuracy_of_demo_is_that_of_its_training_script_to_the_last_digit(
    measured: Measured, training: dict[str, Any]
) -> None:
    expected = training["evaluate"](DEMO, NUM_HELD_OUT)
    found = result(measured, "checkpoint", "fp32")
    assert found["num_images"] == NUM_HELD_OUT
    assert (found["top_1"], found["top_5"]) == (expected.top_1, expected.top_5)
    assert min(each["top_1"] for each in found["classes"]) == expected.worst_class


def test_every_preprocessing_and_precision_is_measured_and_printed(measured: Measured) -> None:
    combinations = [(each["preprocess"], each["precision"]) for each in measured.content["results"]]
    assert combinations == [(mode, precision) for mode in MODES for precision in PRECISIONS]
    for preprocess, precision in combinations:
        top_1 = result(measured, preprocess, precision)["top_1"]
        assert top_1 > 0.9
        assert re.search(rf"^{preprocess} +{precision} +{100 * top_1:.2f} ", measured.printed, re.MULTILINE)
    assert measured.printed.startswith("model    demo (sha256:")
    assert f"pictures {NUM_HELD_OUT} of file://{measured.folder}\nclasses  20 by name\n" in measured.printed


def test_the_json_says_what_the_figures_depend_on(measured: Measured) -> None:
    content = measured.content
    assert content["data"]["root"] == f"file://{measured.folder}"
    assert {each["name"]: each["num_images"] for each in content["mapping"]} == Counter(
        draw_file(20261122, index).label for index in range(NUM_HELD_OUT)
    )
    assert {each["rule"] for each in content["mapping"]} == {"name"}
    assert set(content["specs"]) == set(MODES)
    assert {"torch", "pillow", "datasets", "ray"} <= set(content["versions"])
    assert content["options"]["model"] == DEMO
    assert len(result(measured, "paper", "bf16")["calibration"]) == 15


def test_there_is_a_row_for_every_picture_in_uri_order_from_which_the_figures_follow(measured: Measured) -> None:
    for mode in MODES:
        for precision in PRECISIONS:
            rows = pq.read_table(
                measured.predictions, filters=[("preprocess", "=", mode), ("precision", "=", precision)]
            ).to_pylist()
            assert [row["uri"] for row in rows] == sorted(row["uri"] for row in rows)
            assert len({row["uri"] for row in rows}) == NUM_HELD_OUT
            assert all(row["uri"].startswith(f"file://{measured.folder}/{row['true_name']}/") for row in rows)
            assert all(CLASSES[row["true_id"]] == row["true_name"] for row in rows)
            right = [row["label_names"][0] == row["true_name"] for row in rows]
            assert sum(right) / len(rows) == result(measured, mode, precision)["top_1"]


def test_predictions_are_compared_by_the_same_command(measured: Measured, tmp_path: Path) -> None:
    a, b = (f"{measured.predictions}#preprocess={mode},precision=fp32" for mode in ("checkpoint", "paper"))
    command = [sys.executable, str(JOB), "--compare", a, b, "--json", str(tmp_path / "changes.json")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 0, ended.stderr
    found = json.loads((tmp_path / "changes.json").read_text())
    assert found["num_both"] == NUM_HELD_OUT
    assert found["truth"]["top_1_a"] == result(measured, "checkpoint", "fp32")["top_1"]
    assert found["truth"]["top_1_b"] == result(measured, "paper", "fp32")["top_1"]
    assert f"same best label             {100 * found['top_1_agreement']:.2f} %" in ended.stdout


# --- other sets ---------------------------------------------------------------------------------------------------


def run(where: str, **options: Any) -> Evaluation:
    """An evaluation by this process, which is a driver already; demo, fp32 and mode `checkpoint` if not told."""
    values: dict[str, Any] = {
        "model": DEMO,
        "dataset": where,
        "modes": ("checkpoint",),
        "precisions": ("fp32",),
        "num_actors": 1,
    }
    return evaluate.evaluate(Options(**(values | options)), start_engine=lambda: None)


def test_pictures_out_of_parquet_are_answered_like_those_of_a_folder_and_broken_ones_are_wrong(
    driver: Head, measured: Measured, tmp_path: Path
) -> None:
    files = [draw_file(20261122, index) for index in range(80)]
    broken = [b"", b"hello", files[0].data[: len(files[0].data) // 2], None]
    where = write_parquet(
        tmp_path / "x.parquet",
        image=[{"bytes": data, "path": None} for data in [*(file.data for file in files), *broken, files[0].data]],
        label=[*(file.label for file in files), *["fish"] * 4, "unicorn"],
    )
    found = run(where, ignores_unmapped=True, predictions=tmp_path / "p.parquet")
    (each,) = found.results
    assert (found.num_images, found.num_ignored) == (84, 1)
    assert each.metrics.failures == {"empty": 2, "not_an_image": 1, "truncated": 1}
    answered = {row["uri"]: row for row in pq.read_table(tmp_path / "p.parquet").to_pylist()}
    of_folder = {
        row["uri"]: row
        for row in pq.read_table(
            measured.predictions, filters=[("preprocess", "=", "checkpoint"), ("precision", "=", "fp32")]
        ).to_pylist()
    }
    num_right = 0
    for number, file in enumerate(files):
        row, same = answered[f"file://{where}#data/{number:010d}"], of_folder[f"file://{measured.folder}/{file.path}"]
        assert (row["label_ids"], row["true_name"]) == (same["label_ids"], file.label)
        assert row["label_scores"] == pytest.approx(same["label_scores"], abs=1e-6)
        num_right += row["label_names"][0] == file.label
    assert each.metrics.top_1 == num_right / 84
    assert each.metrics.top_1_of_decoded == num_right / 80
    (empty,) = [row for uri, row in answered.items() if uri.endswith("0000000080")]
    assert (empty["failure_kind"], empty["label_ids"], empty["true_name"]) == ("empty", [], "fish")
    kinds = {each.name: each.rule for each in found.mapping}
    assert set(kinds) == {str(file.label) for file in files} | {"fish"}


def test_a_label_without_a_match_ends_the_job_from_where_it_is_read(driver: Head, tmp_path: Path) -> None:
    where = write_parquet(tmp_path / "x.parquet", label=["fish"] * 11 + ["unicorn"])
    with pytest.raises(ConfigError, match="found 1 that match none or several: unicorn; say what they are with"):
        run(where, predictions=tmp_path / "p.parquet")
    assert not (tmp_path / "p.parquet").exists()
    with pytest.raises(SourceError, match=r"expected labeled pictures, found none \(1 without a label of the model\)"):
        run(write_parquet(tmp_path / "y.parquet", label=["unicorn"] * 12), ignores_unmapped=True, limit=1)


# --- before Ray is needed -----------------------------------------------------------------------------------------


@pytest.fixture
def ends(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[Any, str]]:
    """Exit code and last line of the command, run in this process: none of these gets as far as Ray."""
    main = runpy.run_path(str(JOB))["main"]

    def run_command(*arguments: str) -> tuple[Any, str]:
        try:
            code = main(arguments)
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr().err.splitlines()[-1]

    return run_command


def test_classes_that_match_nothing_are_listed_before_anything_starts(
    ends: Callable[..., tuple[Any, str]], tmp_path: Path
) -> None:
    for name in ("fish", "unicorn", "Heart", "n01440764"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "a.jpg").write_bytes(b"x")
    code, line = ends("--model", DEMO, "--dataset", str(tmp_path / "in"))
    assert code == 2
    assert line == (
        f"evaluate_checkpoint: exit code 2: --dataset file://{tmp_path}/in: expected classes that are labels of the"
        " model (arrow, butterfly, checkerboard, …), found 2 that match none or several: n01440764, unicorn; say what"
        " they are with --label-map FILE, or leave them out with --ignore-unmapped"
    )
    (tmp_path / "map.json").write_text('{"unicorn": "horse"}')
    code, line = ends("--model", DEMO, "--dataset", str(tmp_path / "in"), "--label-map", str(tmp_path / "map.json"))
    assert (code, line.partition(": exit code 2: ")[2][:33]) == (2, "--label-map: unicorn = 'horse': e")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["--model", DEMO, "--compare", "a", "b"],
            2,
            "expected --model NAME and --predictions FILE only with --dataset",
        ),
        ([], 2, "expected --dataset WHERE with --model NAME, or --compare A B"),
        (["--model", "nope/x/y", "--dataset", "IN"], 2, "model nope/x/y: expected demo, a folder, a URL"),
        (["--model", DEMO, "--dataset", "IN/none"], 2, "IN/none: expected a folder, a URL, Parquet files or a hub id"),
        (["--model", DEMO, "--dataset", "IN"], 3, "IN: expected pictures as <class>/<file>, found 0 files"),
        (["--model", DEMO, "--dataset", "IN", "--json", "IN/none/x"], 2, "IN/none/x: expected a file in a folder that"),
        (["--compare", "IN", "IN"], 2, "IN: expected published runs, found none"),
        (["--compare", "a", "b", "--predictions", "c"], 2, "--predictions FILE only with --dataset"),
        (["--model", DEMO, "--dataset", "IN", "--fraction", "0"], 2, "expected a number above 0, at most 1, found '0'"),
    ],
)
def test_a_command_that_cannot_work_ends_in_one_line(
    ends: Callable[..., tuple[Any, str]], tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    found, line = ends(*(each.replace("IN", str(tmp_path)) for each in arguments))
    assert found == code
    assert message.replace("IN", str(tmp_path)) in line


def test_every_preprocessing_and_precision_that_there_is_is_evaluated() -> None:
    assert get_args(PreprocessMode) == MODES
    assert get_args(model.Precision) == PRECISIONS


def test_the_published_figures_are_those_of_the_readme() -> None:
    rows = re.findall(r"^\| `(facebook/[\w-]+)`[^|]*\| ([\d.]+) \| ([\d.]+) \|", section("Checkpoints"), re.MULTILINE)
    assert len(rows) == 8
    assert {name: (float(top_1), float(top_5)) for name, top_1, top_5 in rows} == PUBLISHED
