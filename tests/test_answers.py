"""Truth beside the pictures on the engine: stages that do not fuse, and labels that match nothing."""

from pathlib import Path
from typing import Any

import checkpoints
import pyarrow as pa
import pytest
from cluster import Head
from test_truth import write_folder, write_parquet

from pipeline import answers, checkpoint, dataset, label_map, truth
from pipeline.answers import Task
from pipeline.errors import ConfigError
from pipeline.preprocess import spec_from_config


def make_task(where: str, folder: Path, **changes: Any) -> Task:
    found = checkpoint.resolve(str(checkpoints.write_small(folder / "model")))
    spec = spec_from_config(found.preprocessor_config, mode="checkpoint", input_px=found.input_px)
    labeled = truth.open_set(where)
    given = changes.get("given", {})
    values: dict[str, Any] = {
        "labeled": labeled,
        "matches": label_map.match_names(labeled.names or (), found.label_names, given),
        "given": given,
        "ignores_unmapped": False,
        "limit": None,
        "fraction": 1.0,
        "seed": 0,
        "specs": {"checkpoint": spec},
        "precisions": ("fp32",),
        "model": found.folder,
        "model_revision": found.revision,
        "weights_digest": found.weights_digest,
        "label_names": found.label_names,
    }
    return Task(**(values | changes))


def units(task: Task, unit_rows: int = 5) -> list[tuple[pa.Table, int]]:
    """The rows of each unit that is read, and how many pictures were left out before it."""
    unpacked = [dataset.unpack_unit(packed) for packed in answers._read(task, unit_rows, pa.table({}))]
    return [(table, facts["num_ignored"]) for table, facts in unpacked]


@pytest.mark.parametrize("num_gpus", [0, 2])
@pytest.mark.parametrize("num_cpus", [1, 2, 64])
def test_no_two_stages_are_fused_on_any_cluster(
    driver: Head, tmp_path: Path, capsys: pytest.CaptureFixture[str], num_cpus: int, num_gpus: int
) -> None:
    task = make_task(write_parquet(tmp_path / "x.parquet"), tmp_path)
    resources = dataset.Resources(
        device="cuda" if num_gpus else "cpu", num_actors=1, cluster_cpus=num_cpus, cluster_gpus=num_gpus
    )
    answers.build(task, resources).explain()  # type: ignore[no-untyped-call]
    physical = capsys.readouterr().out.split("Physical Plan (Optimized)")[1]
    operators = [line.strip(" |+-") for line in physical.splitlines() if "Operator[" in line]
    assert operators == [
        "ActorPoolMapOperator[MapBatches(_Label)]",
        "TaskPoolMapOperator[MapBatches(_prepare)]",
        "TaskPoolMapOperator[MapBatches(_read)]",
    ]
    slots = resources.prepare_cpus + resources.actor_cpus * resources.num_actors + dataset.COMMIT_CPUS
    assert slots <= num_cpus, "one task of every stage must find room at once"


# --- units --------------------------------------------------------------------------------------------------------


def test_a_set_is_cut_into_units_by_rows_and_by_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task(write_parquet(tmp_path / "x.parquet", label=list(range(7)) + [0] * 5), tmp_path)
    assert [len(table) for table, _ in units(task)] == [5, 5, 2]
    whole = pa.concat_tables([table for table, _ in units(task)])
    assert whole["uri"].to_pylist() == [f"file://{tmp_path}/x.parquet#data/{number:010d}" for number in range(12)]
    assert whole["true_id"].to_pylist() == list(range(7)) + [0] * 5
    sizes = [len(data) for data in whole["encoded"].to_pylist()]
    assert whole["size_bytes"].to_pylist() == sizes
    monkeypatch.setattr(answers, "MAX_UNIT_BYTES", max(sizes))
    cut = [table for table, _ in units(task) if len(table)]
    assert max(len(table) for table in cut) < 5 or len(cut) > 3
    assert all(sum(table["size_bytes"].to_pylist()[:-1]) < max(sizes) for table in cut)


def test_pictures_of_a_folder_are_fetched_by_who_decodes_them(tmp_path: Path) -> None:
    write_folder(tmp_path / "in")
    names = truth.open_set(str(tmp_path / "in")).names or ()
    task = make_task(str(tmp_path / "in"), tmp_path, given={name: place % 7 for place, name in enumerate(names)})
    whole = pa.concat_tables([table for table, _ in units(task)])
    assert whole["encoded"].null_count == len(whole) == 12
    assert [uri.split("/")[-2] for uri in whole["uri"].to_pylist()] == whole["true_name"].to_pylist()


# --- labels without a match ---------------------------------------------------------------------------------------


def test_labels_that_only_rows_tell_are_listed_when_one_matches_nothing(tmp_path: Path) -> None:
    labels = ["thing 0", "thing 1", "cat", None, "dog", "thing 2", "cat", "6", "7", "thing 3", "thing 4", "thing 5"]
    task = make_task(write_parquet(tmp_path / "x.parquet", label=labels), tmp_path)
    with pytest.raises(
        ConfigError,
        match=r"expected classes that are labels of the model \(thing 0, also called 0, .*\), found 4 that match none"
        r" or several: 7, cat, dog, no label; say what they are with --label-map FILE, or leave them out with --ignore",
    ):
        units(task)


def test_how_far_more_labels_without_a_match_are_looked_for_is_bounded_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "MAX_LOOKED_ON", 3)
    where = write_parquet(tmp_path / "x.parquet", label=[f"cat {number}" for number in range(12)])
    with pytest.raises(ConfigError, match=r"found 4 .*: cat 0, cat 1, cat 2, cat 3, and maybe more after 3 rows; say"):
        units(make_task(where, tmp_path))


def test_pictures_to_leave_out_are_counted_also_after_the_last_unit(tmp_path: Path) -> None:
    labels = ["cat", *["thing 0"] * 5, None, "dog", "thing 1", "mouse", "none", "none"]
    where = write_parquet(tmp_path / "x.parquet", label=labels)
    task = make_task(where, tmp_path, ignores_unmapped=True, given={"none": None, "mouse": 3})
    found = units(task)
    assert [(table["true_id"].to_pylist(), num_ignored) for table, num_ignored in found] == [([0] * 5, 1), ([1, 3], 4)]
    given_only = make_task(where, tmp_path, given={"none": None, "cat": None, "dog": None, "mouse": 3})
    with pytest.raises(ConfigError, match="found 1 that match none or several: no label;"):
        units(given_only)
