"""What an operator can get wrong: one clear line, the documented exit code, no traceback, nothing written."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import published
import pytest
from cluster import JOB
from servers import Fault, S3Server

from pipeline import engine, log, schema, storage
from pipeline.draw import draw_file

Job = Callable[..., tuple[int, str]]


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Job:
    """The command in this process, up to the point where it would start Ray: exit code and what it printed."""
    spec = importlib.util.spec_from_file_location("label_bucket_job", JOB)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def start() -> None:
        raise AssertionError("the engine was started before the mistake was found")

    monkeypatch.setattr(engine, "start", start)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["label_bucket.py", *arguments])
        code = module.main()
        return code, capsys.readouterr().err

    return call


@pytest.fixture
def images(tmp_path: Path) -> str:
    """A folder with five pictures."""
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(5):
        (folder / f"{index}.png").write_bytes(draw_file(1, index).data)
    return str(folder)


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A model that computes in milliseconds."""
    return str(checkpoints.write_small(tmp_path / "model"))


def _assert_one_line(found: tuple[int, str], exit_code: int, *texts: str) -> None:
    code, printed = found
    assert code == exit_code, printed
    assert printed.count("\n") == 1
    assert "Traceback" not in printed
    for text in (f"exit code {exit_code}", *texts):
        assert text in printed


def test_a_bucket_that_does_not_exist(job: Job, s3: Any, model: str, tmp_path: Path) -> None:
    found = job("--input", "s3://nosuchbucket-x/in", "--output", str(tmp_path / "out"), "--model", model)
    _assert_one_line(found, 3, "s3://nosuchbucket-x/in", "no such bucket")
    assert not (tmp_path / "out").exists()


def test_an_output_bucket_that_does_not_exist(job: Job, s3: Any, images: str, model: str) -> None:
    found = job("--input", images, "--output", "s3://nosuchbucket-x/out", "--model", model)
    _assert_one_line(found, 3, "s3://nosuchbucket-x/out", "no such bucket")


def test_a_folder_that_does_not_exist(job: Job, model: str, tmp_path: Path) -> None:
    found = job("--input", str(tmp_path / "none"), "--output", str(tmp_path / "out"), "--model", model)
    _assert_one_line(found, 3, "--input", "expected a folder, found nothing")
    assert not (tmp_path / "out").exists()


def test_an_empty_prefix(job: Job, bucket: str, model: str) -> None:
    found = job("--input", f"{bucket}/in", "--output", f"{bucket}/out", "--model", model)
    _assert_one_line(found, 3, f"{bucket}/in", "expected objects, found none")
    assert not published.keys(f"{bucket}/out")


def test_filters_that_match_nothing(job: Job, images: str, model: str, tmp_path: Path) -> None:
    found = job("--input", images, "--output", str(tmp_path / "out"), "--model", model, "--include", "*.tiff")
    _assert_one_line(found, 2, "none of its objects match", "*.tiff")
    assert not (tmp_path / "out").exists()


def test_an_unknown_model(job: Job, images: str, tmp_path: Path) -> None:
    found = job("--input", images, "--output", str(tmp_path / "out"), "--model", "nobody/no-such-model")
    _assert_one_line(found, 2, "nobody/no-such-model")
    assert not (tmp_path / "out").exists()


def test_an_unknown_revision(job: Job, images: str, model: str, tmp_path: Path) -> None:
    options = ("--input", images, "--output", str(tmp_path / "out"), "--model", model)
    _assert_one_line(job(*options, "--revision", "v9"), 2, "expected revision v9")


def test_a_checkpoint_without_safetensors(job: Job, images: str, model: str, tmp_path: Path) -> None:
    (Path(model) / "model.safetensors").rename(Path(model) / "pytorch_model.bin")
    found = job("--input", images, "--output", str(tmp_path / "out"), "--model", model)
    _assert_one_line(found, 2, "expected model.safetensors", "pytorch_model.bin")


def test_a_checkpoint_without_label_names(job: Job, images: str, model: str, tmp_path: Path) -> None:
    checkpoints.edit_config(Path(model), id2label=None)
    found = job("--input", images, "--output", str(tmp_path / "out"), "--model", model)
    _assert_one_line(found, 2, "label names")


def test_more_labels_than_the_model_has(job: Job, images: str, model: str, tmp_path: Path) -> None:
    found = job("--input", images, "--output", str(tmp_path / "out"), "--model", model, "--top-k=8")
    _assert_one_line(found, 2, "--top-k: expected 1 to 7")


def test_an_output_inside_the_input(job: Job, images: str, model: str) -> None:
    found = job("--input", images, "--output", f"{images}/out", "--model", model)
    _assert_one_line(found, 2, "expected --output outside --input")


def test_an_input_that_the_output_keeps_its_results_in(job: Job, images: str, model: str) -> None:
    folder = Path(images) / "labels"
    folder.mkdir()
    (folder / "a.png").write_bytes(draw_file(1, 1).data)
    found = job("--input", str(folder), "--output", images, "--model", model)
    _assert_one_line(found, 2, "keeps its labels", "choose another --output")


def test_an_output_on_a_store_that_cannot_commit(job: Job, images: str, model: str) -> None:
    found = job("--input", images, "--output", "memory://out", "--model", model)
    _assert_one_line(found, 2, "--output must be an s3:// URL or a local folder")


def test_an_output_that_holds_labels_of_another_source(job: Job, images: str, model: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _publish(out, {"input": "s3://other/in", "space_id": "x-00000000", "include": [], "exclude": []})
    before = published.keys(str(out))
    found = job("--input", images, "--output", str(out), "--model", model)
    _assert_one_line(found, 5, "holds labels of s3://other/in", "choose another --output")
    assert published.keys(str(out)) == before


def test_another_schema_of_the_same_space(job: Job, images: str, model: str, tmp_path: Path) -> None:
    from pipeline import checkpoint, decode
    from pipeline.preprocess import spec_from_config

    found = checkpoint.resolve(model)
    spec = spec_from_config(found.preprocessor_config, mode="checkpoint", input_px=found.input_px)
    space = checkpoint.space_id(found, spec, "pooled", decode_rules_version=decode.DECODE_RULES_VERSION)
    out = tmp_path / "out"
    root = storage.connect(images).root
    _publish(out, {"input": root, "space_id": space, "include": [], "exclude": [], "top_k": 3})
    refused = job("--input", images, "--output", str(out), "--model", model)
    _assert_one_line(refused, 5, space, "holds 3 labels per image", "--top-k 5")


def test_a_log_of_a_newer_program(job: Job, images: str, model: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _publish(out, {"input": storage.connect(images).root, "space_id": "x"})
    entry = out / "_log" / "00000001.json"
    entry.write_text(
        entry.read_text().replace(f'version": {schema.SCHEMA_VERSION}', f'version": {schema.SCHEMA_VERSION + 1}')
    )
    found = job("--input", images, "--output", str(out), "--model", model)
    newer = f"found {schema.SCHEMA_VERSION + 1}"
    _assert_one_line(found, 5, "expected schema version", newer, "use the version of this program")


def test_an_unknown_flag_and_a_misspelt_variable(
    job: Job, images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--input", images, "--output", str(tmp_path / "out"))
    _assert_one_line(job(*options, "--top-kk=3"), 2, "--top-kk", "--top-k")
    monkeypatch.setenv("LABEL_BUCKET_TOPK", "3")
    _assert_one_line(job(*options), 2, "LABEL_BUCKET_TOPK", "LABEL_BUCKET_TOP_K")


def test_a_bucket_that_may_not_be_listed(
    job: Job, bucket: str, faults: list[Fault], model: str, tmp_path: Path
) -> None:
    faults.append(Fault.always(403, "GET", bucket.removeprefix("s3://")))
    found = job("--input", f"{bucket}/in", "--output", str(tmp_path / "out"), "--model", model)
    _assert_one_line(found, 3, f"{bucket}/in", "access denied", "policy")
    assert not (tmp_path / "out").exists()


def test_a_bucket_whose_objects_may_be_listed_but_not_read(
    job: Job, s3: S3Server, bucket: str, faults: list[Fault], model: str, tmp_path: Path
) -> None:
    for index in range(4):
        s3.client.put_object(Bucket=bucket.removeprefix("s3://"), Key=f"in/{index}.jpg", Body=b"x" * 99)
    faults.append(Fault.always(403, "GET", ".jpg"))
    found = job("--input", f"{bucket}/in", "--output", str(tmp_path / "out"), "--model", model)
    _assert_one_line(found, 3, f"{bucket}/in", "may be listed but not read", "access denied")
    assert not (tmp_path / "out").exists()


def test_a_file_in_place_of_a_folder(job: Job, model: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    found = job("--input", str(file), "--output", str(tmp_path / "out"), "--model", model)
    _assert_one_line(found, 3, "expected a folder, found a file")


def _publish(out: Path, identity: dict[str, Any], **changes: Any) -> None:
    """One run in the log of an output, written as the job writes it."""
    output = storage.connect(str(out))
    claim = log.claim(
        output,
        log.read(output),
        identity,
        run_date="2026-11-21",
        model_id="m",
        model_revision="r",
        metadata={},
        now="2026-11-21T00:00:00+00:00",
    )
    names = ("run_id", "run_seq", "identity", "run_date", "model_id", "model_revision")
    entry = log.Entry(kind="run", committed_at="", **{name: getattr(claim, name) for name in names}, **changes)
    log.commit(output, entry)
