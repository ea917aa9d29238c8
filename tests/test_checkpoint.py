"""Where a checkpoint comes from, what is refused, and what its space is called."""

import dataclasses
import json
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, get_args

import checkpoints
import fsspec
import pytest
from hub_server import Repository, serve_hub
from servers import S3Server

from pipeline import checkpoint
from pipeline.checkpoint import Checkpoint, Pooling, PreprocessMode
from pipeline.errors import ConfigError, LabelBucketError

_RESOLVE = """
import json, sys
from pathlib import Path
from pipeline import checkpoint
from pipeline.errors import LabelBucketError
model, revision, cache_dir = json.loads(sys.argv[1])
try:
    found = checkpoint.resolve(model, revision, cache_dir=Path(cache_dir))
except LabelBucketError as error:
    sys.exit(f"{type(error).__name__}: {error}")
print(json.dumps([found.revision, found.weights_digest, found.folder, "torch" in sys.modules]))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return checkpoints.write_small(tmp_path / "My Model")


def _start(model: str, revision: str | None, cache_dir: Path, **environment: str) -> subprocess.Popen[str]:
    """`resolve` in a process of its own, because the hub's client reads its environment once, at import."""
    return subprocess.Popen(
        [sys.executable, "-c", _RESOLVE, json.dumps([model, revision, str(cache_dir)])],
        env={**os.environ, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _finish(process: subprocess.Popen[str]) -> tuple[str, str, str, bool]:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    revision, weights_digest, folder, imported_torch = json.loads(out)
    return revision, weights_digest, folder, imported_torch


def _failure(process: subprocess.Popen[str]) -> str:
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    return err.strip()


# --- folders ------------------------------------------------------------------------------------------------------


def test_a_folder_says_everything_that_the_stages_need(folder: Path) -> None:
    found = checkpoint.resolve(str(folder))
    assert found.model_id == "My Model"
    assert found.architecture == "DeiTForImageClassificationWithTeacher"
    assert (found.input_px, found.embedding_dim, len(found.label_names)) == (32, 24, 7)
    assert found.label_names[5] == "thing 5, also called 101"
    assert found.revision == f"sha256:{found.weights_digest[:12]}"
    assert found.preprocessor_config == json.loads((folder / "preprocessor_config.json").read_text())


def test_the_weights_digest_is_that_of_the_file(folder: Path) -> None:
    shown = subprocess.run(["sha256sum", folder / "model.safetensors"], capture_output=True, text=True, check=True)
    assert checkpoint.resolve(str(folder)).weights_digest == shown.stdout.split()[0]


def test_label_names_are_in_the_order_of_their_ids_and_not_of_the_text(folder: Path) -> None:
    checkpoints.edit_config(folder, id2label={str(number): f"n{number}" for number in (10, 2, 0, 1, *range(3, 10))})
    assert checkpoint.resolve(str(folder)).label_names == tuple(f"n{number}" for number in range(11))


def test_a_checkpoint_is_picklable_and_small(folder: Path) -> None:
    found = checkpoint.resolve(str(folder))
    data = pickle.dumps(found)
    assert pickle.loads(data) == found
    assert len(data) < 2000


def test_what_was_recorded_finds_the_same_checkpoint_again(folder: Path) -> None:
    found = checkpoint.resolve(str(folder))
    assert checkpoint.resolve(found.source, found.revision) == found


def test_a_folder_whose_weights_changed_is_not_the_recorded_revision(folder: Path) -> None:
    found = checkpoint.resolve(str(folder))
    checkpoints.write_small(folder, seed=1)
    with pytest.raises(ConfigError, match=f"expected revision {found.revision}, found sha256:"):
        checkpoint.resolve(str(folder), found.revision)


def test_a_sharded_checkpoint_is_one_digest_over_its_files(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}})
    )
    found = checkpoint.resolve(str(folder))
    (folder / "model-00001-of-00001.safetensors").rename(folder / "model.safetensors")
    assert checkpoint.resolve(str(folder)).weights_digest == found.weights_digest


def test_an_index_cannot_name_files_outside_the_folder(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    with pytest.raises(ConfigError, match=r"weight files that are not there: \.\./model\.safetensors"):
        checkpoint.resolve(str(folder))


def test_a_file_url_is_the_folder(folder: Path) -> None:
    assert checkpoint.resolve(f"file://{folder}").weights_digest == checkpoint.resolve(str(folder)).weights_digest


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id2label": None}, "expected label names as id2label in config.json, found none"),
        ({"id2label": {}}, "expected label names as id2label in config.json, found none"),
        ({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, r"found placeholders \(LABEL_0, …\)"),
        ({"id2label": {"1": "cat", "2": "dog"}}, "expected the ids 0 to 1 in id2label, found 1, 2"),
        (
            {"architectures": ["BeitForImageClassification"]},
            "expected one architecture out of ViTForImageClassification, DeiTForImageClassification,"
            r" DeiTForImageClassificationWithTeacher; found \['BeitForImageClassification'\]",
        ),
        ({"architectures": None}, "found None"),
        ({"image_size": [32, 48]}, r"expected a positive whole number as image_size in config.json, found \[32, 48\]"),
        ({"image_size": None}, "expected a positive whole number as image_size"),
        ({"hidden_size": None}, "expected a positive whole number as hidden_size"),
        ({"num_channels": 1}, "expected num_channels 3, found 1"),
    ],
)
def test_a_config_without_what_a_run_needs_is_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    checkpoints.edit_config(folder, **changes)
    with pytest.raises(ConfigError, match=message) as raised:
        checkpoint.resolve(str(folder))
    assert str(folder) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"expected model\.safetensors, found .*pytorch_model\.bin; pickled"):
        checkpoint.resolve(str(folder))


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ConfigError, match=f"expected a file {name}, found .*model.safetensors"):
        checkpoint.resolve(str(folder))


def test_a_damaged_config_is_one_line(folder: Path) -> None:
    (folder / "config.json").write_text('{"architectures": ')
    with pytest.raises(ConfigError, match=r"cannot read .*config\.json: Expecting value"):
        checkpoint.resolve(str(folder))


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected demo, a folder, a URL of one, or a hub id"):
        checkpoint.resolve(str(tmp_path / "nothing"))


# --- the hub ------------------------------------------------------------------------------------------------------


def test_a_hub_that_cannot_be_reached_is_one_clear_line_within_seconds(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        started_s = time.monotonic()
        process = _start(
            "facebook/deit-tiny-patch16-224",
            None,
            tmp_path,
            HF_HOME=str(tmp_path),
            HF_ENDPOINT=f"http://127.0.0.1:{port}",
            HF_HUB_OFFLINE="0",
        )
        message = _failure(process)
    assert message.startswith("ConfigError: model facebook/deit-tiny-patch16-224: ")
    assert "hub cannot be reached" in message
    assert "hf download facebook/deit-tiny-patch16-224" in message
    assert "\n" not in message
    assert time.monotonic() - started_s < 10


def test_offline_mode_is_one_clear_line(tmp_path: Path) -> None:
    message = _failure(_start("facebook/no-such", None, tmp_path, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1"))
    assert message.startswith("ConfigError: model facebook/no-such: ")
    assert "HF_HUB_OFFLINE" in message
    assert "\n" not in message


def test_a_hub_model_is_recorded_by_commit_and_then_needs_no_hub(folder: Path, tmp_path: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"never downloaded")
    repository = Repository({"main": folder})
    home = {"HF_HOME": str(tmp_path / "hub")}
    with serve_hub({"me/small": repository}) as hub:
        online = _finish(_start("me/small", None, tmp_path, HF_ENDPOINT=hub.url, **home))
        assert not [request for request in hub.requests if "pytorch_model" in request]
    commit = repository.commit("main")
    assert commit is not None
    assert online[0] == commit
    assert online[1] == checkpoint.resolve(str(folder)).weights_digest
    assert not online[3], "resolving imported torch"
    offline = _finish(_start("me/small", commit, tmp_path, HF_HUB_OFFLINE="1", **home))
    by_name = _finish(_start("me/small", None, tmp_path, HF_HUB_OFFLINE="1", **home))
    assert offline == by_name == online


def test_pickled_weights_on_main_are_replaced_by_the_hubs_own_conversion(folder: Path, tmp_path: Path) -> None:
    pickled = _pickled_copy(folder)
    repository = Repository({"main": pickled, "refs/pr/3": folder})
    with serve_hub({"me/small": repository}) as hub:
        found = _finish(_start("me/small", None, tmp_path, HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "hub")))
    assert found[0] == repository.commit("refs/pr/3")


def test_a_conversion_by_anybody_else_is_not_used(folder: Path, tmp_path: Path) -> None:
    repository = Repository({"main": _pickled_copy(folder), "refs/pr/3": folder}, conversion_author="mallory")
    with serve_hub({"me/small": repository}) as hub:
        message = _failure(_start("me/small", None, tmp_path, HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "hub")))
    assert message.startswith("ConfigError: model me/small: expected model.safetensors, found ")


def test_a_revision_that_was_asked_for_is_never_replaced(folder: Path, tmp_path: Path) -> None:
    repository = Repository({"main": _pickled_copy(folder), "refs/pr/3": folder})
    with serve_hub({"me/small": repository}) as hub:
        message = _failure(_start("me/small", "main", tmp_path, HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "hub")))
    assert message.startswith("ConfigError: model me/small: expected model.safetensors, found ")


@pytest.mark.parametrize(
    ("model", "revision", "message"),
    [
        ("me/typo", None, "model me/typo: no such folder here and no such model on the hub"),
        ("me/small", "v9", "model me/small: the hub has no revision v9 of it"),
        ("me/small", "0" * 40, f"model me/small: the hub has no revision {'0' * 40} of it"),
    ],
)
def test_an_unknown_model_or_revision_is_one_clear_line(
    folder: Path, tmp_path: Path, model: str, revision: str | None, message: str
) -> None:
    with serve_hub({"me/small": Repository({"main": folder})}) as hub:
        found = _failure(_start(model, revision, tmp_path, HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "hub")))
    assert found.startswith(f"ConfigError: {message}")
    assert "\n" not in found


def _pickled_copy(folder: Path) -> Path:
    copy = folder.with_name("pickled")
    shutil.copytree(folder, copy)
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    return copy


# --- object storage -----------------------------------------------------------------------------------------------


def _upload(s3: S3Server, bucket: str, folder: Path) -> str:
    """Copy a folder into a bucket, given by its URL; gives the URL of the copy."""
    for file in folder.iterdir():
        key = f"models/small/{file.name}"
        s3.client.put_object(Bucket=bucket.removeprefix("s3://"), Key=key, Body=file.read_bytes())
    return f"{bucket}/models/small"


def test_two_processes_on_a_node_download_a_checkpoint_once(
    s3: S3Server, bucket: str, folder: Path, tmp_path: Path
) -> None:
    (folder / "optimizer.bin").write_bytes(b"never downloaded")
    url, cache_dir = _upload(s3, bucket, folder), tmp_path / "cache"
    environment = {**s3.environment(), "AWS_ENDPOINT_URL": s3.url}
    both = [_start(f"{url}/", None, cache_dir, **environment) for _ in range(2)]
    first, second = (_finish(process) for process in both)
    requests = [(method, path) for method, path in s3.requests if bucket.removeprefix("s3://") in path]
    assert len([path for _, path in requests if "list-type=2" in path]) == 2, "each lists, one downloads"
    assert sorted(path.rpartition("/")[2] for _, path in requests if "list-type=2" not in path) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    assert first == second
    assert first[1] == checkpoint.resolve(str(folder)).weights_digest
    downloaded = Path(first[2])
    assert [entry for entry in (cache_dir / "checkpoints").iterdir() if entry.is_dir()] == [downloaded]
    inode = (downloaded / "model.safetensors").stat().st_ino
    assert _finish(_start(url, first[0], cache_dir, **environment)) == first
    assert (downloaded / "model.safetensors").stat().st_ino == inode


def test_an_overwritten_checkpoint_in_a_bucket_is_another_folder(
    s3: S3Server, bucket: str, folder: Path, tmp_path: Path
) -> None:
    url = _upload(s3, bucket, folder)
    old = _finish(_start(url, None, tmp_path, **s3.environment()))
    _upload(s3, bucket, checkpoints.write_small(tmp_path / "new", seed=1))
    new = _finish(_start(url, None, tmp_path, **s3.environment()))
    assert new[1] != old[1]
    assert new[2] != old[2]
    refused = _failure(_start(url, old[0], tmp_path, **s3.environment()))
    assert refused.startswith(f"ConfigError: model {url}: expected revision {old[0]}, found ")


@pytest.mark.parametrize(
    ("present", "message"),
    [
        ([], "expected a folder with config.json, found nothing"),
        (["config.json", "pytorch_model.bin"], "expected model.safetensors, found config.json, pytorch_model.bin"),
    ],
)
def test_a_url_without_a_checkpoint_is_refused(tmp_path: Path, present: list[str], message: str) -> None:
    memory = fsspec.filesystem("memory")
    memory.makedirs("/models/empty", exist_ok=True)
    for name in present:
        memory.pipe_file(f"/models/empty/{name}", b"{}")
    try:
        with pytest.raises(ConfigError, match=message):
            checkpoint.resolve("memory://models/empty", cache_dir=tmp_path)
    finally:
        memory.rm("/models", recursive=True)


def test_a_url_that_does_not_exist_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(LabelBucketError, match="memory://no-such") as raised:
        checkpoint.resolve("memory://no-such/model", cache_dir=tmp_path)
    assert "\n" not in str(raised.value)


def test_any_fsspec_url_will_do_and_what_a_killed_process_left_is_not_used(folder: Path, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(f"{folder}/", "/models/small/", recursive=True)
    try:
        found = checkpoint.resolve("memory://models/small", cache_dir=tmp_path)
        downloaded = Path(found.folder)
        partial = downloaded.rename(downloaded.with_suffix(".partial"))
        (partial / "model.safetensors").write_bytes(b"half of it")
        (partial / "model-00001.safetensors").write_bytes(b"of another download")
        again = checkpoint.resolve("memory://models/small", cache_dir=tmp_path)
    finally:
        memory.rm("/models", recursive=True)
    assert again == found
    assert found.model_id == "memory://models/small"
    assert found.weights_digest == checkpoint.resolve(str(folder)).weights_digest
    assert len(list(downloaded.iterdir())) == 3
    assert not partial.exists()


# --- the space id -------------------------------------------------------------------------------------------------

SPEC = checkpoints.squash_spec(32)


def _space(found: Checkpoint, *, pooling: Pooling = "pooled", version: int = 1, **spec: Any) -> str:
    return checkpoint.space_id(found, dataclasses.replace(SPEC, **spec), pooling, decode_rules_version=version)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return checkpoint.resolve(str(checkpoints.write_small(tmp_path_factory.mktemp("models") / "small")))


def test_a_space_is_named_after_the_model_and_is_safe_in_a_path(found: Checkpoint) -> None:
    named = dataclasses.replace(found, model_id="facebook/DeiT_small=distilled..patch16 224/")
    assert re.fullmatch(r"deit-small-distilled\.\.patch16-224-[0-9a-f]{8}", _space(named))
    assert re.fullmatch(r"model-[0-9a-f]{8}", _space(dataclasses.replace(found, model_id="s3://bucket/模型")))
    assert len(_space(dataclasses.replace(found, model_id="x" * 500))) < 80


@pytest.mark.parametrize(
    "change",
    [
        {"weights_digest": "0" * 64},
        {"architecture": "DeiTForImageClassification"},
        {"input_px": 64},
        {"label_names": ("a", "b")},
    ],
)
def test_a_space_changes_with_the_checkpoint(found: Checkpoint, change: dict[str, Any]) -> None:
    assert _space(dataclasses.replace(found, **change)) != _space(found)


@pytest.mark.parametrize(
    "change",
    [
        {"mode": "paper"},
        {"resize": "shortest_edge"},
        {"resize_hw_px": (36, 36)},
        {"resample": 2},
        {"crop_px": 32},
        {"input_px": 33},
        {"rescale_factor": 1 / 256},
        {"image_mean": (0.5, 0.5, 0.4)},
        {"image_std": (0.5, 0.4, 0.5)},
    ],
)
def test_a_space_changes_with_every_field_of_the_preprocessing(found: Checkpoint, change: dict[str, Any]) -> None:
    assert set(change) <= {field.name for field in dataclasses.fields(SPEC)}
    assert _space(found, **change) != _space(found)


def test_a_space_changes_with_pooling_and_decoding_rules(found: Checkpoint) -> None:
    poolings: list[Pooling] = ["pooled", "cls", "distillation", "patch-mean", "none"]
    assert len({_space(found, pooling=pooling) for pooling in poolings} | {_space(found, version=2)}) == 6


def test_only_the_space_of_fast_mode_changes_with_its_rules(found: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {mode: _space(found, mode=mode) for mode in get_args(PreprocessMode)}
    monkeypatch.setattr(checkpoint, "FAST_RULES_VERSION", 0)
    assert {mode for mode, space_id in before.items() if _space(found, mode=mode) != space_id} == {"fast"}


def test_a_space_does_not_change_with_where_the_files_lie(found: Checkpoint) -> None:
    moved = dataclasses.replace(found, folder="/elsewhere", source="s3://bucket/small", revision="0" * 40)
    assert _space(moved) == _space(found)
