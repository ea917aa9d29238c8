"""The shape of the pipeline on the engine: one unit is one part, and no stages fuse."""

import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cluster import Head, wait_until
from kills import WAVE

from pipeline import canary, catalog, checkpoint, dataset, decode, engine, label, parts, plan, schema, storage
from pipeline.diff import Rules
from pipeline.draw import draw_file
from pipeline.errors import ConfigError, ConflictError, LabelBucketError
from pipeline.listing import Scope
from pipeline.picture import Recipe
from pipeline.preprocess import spec_from_config


@pytest.fixture
def planned(tmp_path: Path) -> tuple[dataset.Task, plan.RangePlan]:
    """A plan of 5 units over 320 pictures, and what its workers have to know."""
    for index in range(40):
        file = draw_file(5, index, broken_fraction=0.1)
        for copy in range(8):
            path = tmp_path / "in" / str(copy) / file.path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.data)
    found = checkpoint.resolve(str(checkpoints.write_small(tmp_path / "model")))
    spec = spec_from_config(found.preprocessor_config, mode="checkpoint", input_px=found.input_px)
    source, output = storage.connect(str(tmp_path / "in")), storage.connect(str(tmp_path / "out"))
    planned_range = plan.plan_range(
        source,
        output,
        "run",
        catalog.between([])[0],
        Rules(scope=Scope(), limit=None, records_deletions=True),
        plan.UnitSizes.of(spec.input_px, 1),
    )
    task = dataset.Task(
        input_url=source.root,
        output_url=output.root,
        run_id="run",
        recipe=Recipe(spec=spec, limits=decode.DEFAULT_LIMITS),
        object_deadline_s=5,
        stall_timeout_s=1800,
        model=found.folder,
        model_revision=found.revision,
        weights_digest=found.weights_digest,
        pooling="pooled",
        top_k=3,
        precision="fp32",
        batch_size=None,
    )
    return task, planned_range


def _work(planned: plan.RangePlan) -> list[dataset.Work]:
    return [
        dataset.Work(planned.range_id, unit_id, chunk.key) for chunk in planned.chunks for unit_id in chunk.unit_ids
    ]


@pytest.mark.parametrize("num_gpus", [0, 2])
@pytest.mark.parametrize("num_cpus", [1, 2, 64])
def test_no_two_stages_are_fused_on_any_cluster(
    driver: Head,
    planned: tuple[dataset.Task, plan.RangePlan],
    capsys: pytest.CaptureFixture[str],
    num_cpus: int,
    num_gpus: int,
) -> None:
    task, sealed = planned
    resources = dataset.Resources(
        device="cuda" if num_gpus else "cpu", num_actors=1, cluster_cpus=num_cpus, cluster_gpus=num_gpus
    )
    dataset.build(task, resources, _work(sealed)).explain()  # type: ignore[no-untyped-call]
    physical = capsys.readouterr().out.split("Physical Plan (Optimized)")[1]
    operators = [line.strip(" |+-") for line in physical.splitlines() if "Operator[" in line]
    assert operators == [
        "TaskPoolMapOperator[MapBatches(_commit)]",
        "ActorPoolMapOperator[MapBatches(_Label)]",
        "TaskPoolMapOperator[MapBatches(_prepare)]",
    ]
    slots = resources.prepare_cpus + resources.actor_cpus * resources.num_actors + dataset.COMMIT_CPUS
    assert slots <= num_cpus, "one task of every stage must find room at once"


def test_one_unit_is_one_block_one_task_in_each_stage_and_one_part(
    driver: Head, planned: tuple[dataset.Task, plan.RangePlan]
) -> None:
    task, sealed = planned
    built = dataset.build(task, _one_actor(), _work(sealed)).materialize()
    rows = built.take_all()
    stats = built.stats()
    assert sealed.summary().num_units == len(rows) == 5
    for name in ("_prepare", "_Label", "_commit"):
        assert f"MapBatches({name}): 5 tasks executed, 5 blocks produced" in stats, stats
    output = storage.connect(task.output_url)
    assert parts.finished_units(output, "run", sealed.range_id) == {work.unit_id for work in _work(sealed)}
    assert sum(row["num_rows"] for row in rows) == 320


def test_an_actor_that_is_given_two_units_at_once_as_on_a_gpu_labels_each_as_its_own(
    driver: Head, planned: tuple[dataset.Task, plan.RangePlan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, sealed = planned
    work = _work(sealed)

    def label_all(run_id: str) -> tuple[list[dict[str, Any]], list[list[dict[str, Any]]]]:
        # Units of another run's plan: only where their parts go is asked of it.
        rows = dataset.build(replace(task, run_id=run_id), _one_actor(), work).take_all()
        paths = sorted((tmp_path / "out" / "_runs" / run_id / "parts").rglob("*.parquet"))
        return rows, [pq.ParquetFile(path).read().to_pylist() for path in paths]

    _, one_by_one = label_all("one-by-one")
    monkeypatch.setitem(label.CALLS_PER_ACTOR, "cpu", 2)
    rows, two_at_once = label_all("two-at-once")
    assert len(one_by_one) == 5
    assert two_at_once == one_by_one
    assert any(row["label_wait_s"] == 0 for row in rows), "another unit was under way"


def test_a_gpu_that_the_cluster_does_not_have_is_refused(driver: Head) -> None:
    with pytest.raises(ConfigError, match=r"--device cuda: expected GPUs, found a cluster with 2 CPUs and none"):
        dataset.resolve_resources("cuda", None)
    with pytest.raises(ConfigError, match=r"--gpu-actors: expected at most 2, the CPUs of this cluster; found 9"):
        dataset.resolve_resources("auto", 9)
    assert dataset.resolve_resources("auto", None).device == "cpu"


def test_an_actor_whose_node_lacks_the_device_says_so_with_its_first_unit(
    driver: Head, planned: tuple[dataset.Task, plan.RangePlan]
) -> None:
    if Path("/dev/nvidia0").exists():
        pytest.skip("this machine has a GPU")
    task, _ = planned
    actor = dataset._Label(task, "cuda")
    with pytest.raises(ConfigError, match="expected a CUDA device in this actor"):
        actor(dataset.pack_unit(schema.DECODED.empty_table(), {"unit_id": "u"}))


@pytest.mark.slow
def test_a_model_that_computes_other_vectors_than_the_first_run_labels_nothing(
    driver: Head, planned: tuple[dataset.Task, plan.RangePlan]
) -> None:
    task, sealed = planned
    vectors = dataset.check_model(task, "cpu")
    assert vectors.shape == (canary.NUM_CANARIES, 24)
    spec = replace(task.recipe.spec, rescale_factor=1 / 127.5)
    rescaled = replace(task, recipe=replace(task.recipe, spec=spec), canaries=vectors)
    with pytest.raises(ConflictError, match=r"^canary image \w+\.\w+: .* found cosine -?0\.\d+"), engine.errors():
        dataset.check_model(rescaled, "cpu")
    # The same from the actors themselves, as from a node that is not the one that check_model ran on.
    # One actor: those of a dataset that failed hold their CPUs until the engine lets go of them; two pairs take all.
    resources = replace(dataset.resolve_resources("auto", None), num_actors=1)
    with pytest.raises(ConflictError, match=r"^canary image \w+\.\w+: .* found cosine -?0\.\d+"), engine.errors():
        list(dataset.label_units(rescaled, resources, _work(sealed)))
    written = storage.list_keys(storage.connect(task.output_url), "_runs/run/")
    assert [key for key in written if "/parts/" in key] == []
    unchanged = replace(task, canaries=dataset.check_model(replace(task, canaries=vectors), "cpu"))
    assert sum(unit.num_rows for unit in dataset.label_units(unchanged, resources, _work(sealed))) == 320


def _part(task: dataset.Task, work: dataset.Work) -> Path:
    return Path(task.output_url.removeprefix("file://"), parts.part_key("run", work.range_id, work.unit_id))


def _make_committing_hang(task: dataset.Task, work: dataset.Work) -> Path:
    """The part of this unit, at which whoever commits it waits: a pipe in its place that nobody writes into."""
    part = _part(task, work)
    part.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(part)
    return part


def _one_actor() -> dataset.Resources:
    return replace(dataset.resolve_resources("auto", None), num_actors=1)


def test_a_unit_is_told_of_while_the_next_one_takes_for_ever(
    driver: Head, planned: tuple[dataset.Task, plan.RangePlan]
) -> None:
    task, sealed = planned
    work = _work(sealed)[:2]
    hanging = _make_committing_hang(task, work[1])
    units = dataset.label_units(task, _one_actor(), work)
    assert next(units).unit_id == work[0].unit_id
    hanging.unlink()
    os.kill(driver.pid_of(WAVE), signal.SIGKILL)
    assert [unit.unit_id for unit in units] == [work[1].unit_id]


def test_a_wave_whose_process_is_killed_is_begun_again_with_what_was_left_of_it(
    driver: Head, planned: tuple[dataset.Task, plan.RangePlan], caplog: pytest.LogCaptureFixture
) -> None:
    task, sealed = planned
    work = _work(sealed)
    hanging = _make_committing_hang(task, work[-1])
    units = dataset.label_units(task, _one_actor(), work)
    done = [next(units)]
    hanging.unlink()
    os.kill(driver.pid_of(WAVE), signal.SIGKILL)
    done += units
    assert re.search(r"the process that looks after them died on this node: [1-4] of 5 unit\(s\) are", caplog.text)
    assert sorted(unit.unit_id for unit in done) == sorted(each.unit_id for each in work)
    assert sum(unit.num_rows for unit in done) == 320


def test_a_unit_that_has_its_part_when_its_wave_dies_is_counted_and_not_done_again(
    driver: Head, planned: tuple[dataset.Task, plan.RangePlan], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task, sealed = planned
    work = _work(sealed)[:2]
    before = {unit.unit_id: unit for unit in dataset.label_units(task, _one_actor(), work)}
    finished = _part(task, work[0]).rename(tmp_path / "finished")
    _part(task, work[1]).unlink()
    hanging = [_make_committing_hang(task, each) for each in work]
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(list, dataset.label_units(task, _one_actor(), work))
        wave = driver.pid_of(WAVE)
        finished.replace(hanging[0])
        hanging[1].unlink()
        os.kill(wave, signal.SIGKILL)
        after = {unit.unit_id: unit for unit in ended.result()}
    assert "died on this node: 1 of 2 unit(s) are begun again" in caplog.text
    for each in work:
        assert after[each.unit_id][:5] == before[each.unit_id][:5]  # all but retries and times
    assert [after[each.unit_id].prepare_s > 0 for each in work] == [False, True]


def test_a_wave_whose_process_is_killed_twice_before_a_unit_is_done_is_an_error(
    driver: Head, planned: tuple[dataset.Task, plan.RangePlan], caplog: pytest.LogCaptureFixture
) -> None:
    task, sealed = planned
    work = _work(sealed)[-1:]
    _make_committing_hang(task, work[0])
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(list, dataset.label_units(task, _one_actor(), work))
        os.kill(driver.pid_of(WAVE), signal.SIGKILL)
        wait_until(lambda: "1 of 1 unit(s) are begun again" in caplog.text)
        os.kill(driver.pid_of(WAVE), signal.SIGKILL)
        with pytest.raises(LabelBucketError, match=r"^expected some of 1 unit\(s\) .* found none, twice: the process"):
            ended.result()


def test_a_packed_unit_is_the_same_rows_and_shares_their_pixels() -> None:
    pixels = [b"\x01" * 48, None, b"\x02" * 48]
    rows = [{"key": str(row), "uri": str(row), "size_bytes": row, "pixels": each} for row, each in enumerate(pixels)]
    table = pa.Table.from_pylist(rows, schema.DECODED)
    packed = dataset.pack_unit(table, {"unit_id": "u", "decode_s": 0.5})
    assert packed.num_rows == 1
    unpacked, facts = dataset.unpack_unit(packed)
    assert facts == {"unit_id": "u", "decode_s": 0.5}
    assert unpacked.schema.equals(schema.DECODED)
    assert unpacked.equals(table)
    assert unpacked["pixels"].chunk(0).buffers()[2].address == table["pixels"].chunk(0).buffers()[2].address
    empty, _ = dataset.unpack_unit(dataset.pack_unit(schema.DECODED.empty_table(), {"unit_id": "e"}))
    assert empty.equals(schema.DECODED.empty_table())
    with pytest.raises(ValueError, match="expected one unit as one row, found 2 rows"):
        dataset.unpack_unit(pa.concat_tables([packed, packed]))
