"""What an output's store keeps: honest stores, and one that ignores conditions."""

import json
import logging
import time
from pathlib import Path

import checkpoints
import pytest
from cluster import Head
from kills import Kills, fill_with_pictures, label_undisturbed, watched
from servers import Fault, S3Server
from verifier import Place

from pipeline import capability, storage
from pipeline.errors import ConfigError


def recorded(url: str) -> dict[str, bool]:
    found: dict[str, bool] = json.loads(storage.connect(url).get(capability.KEY))
    return found


def test_an_s3_store_keeps_everything_and_so_it_stands_in_the_output(bucket: str) -> None:
    found = capability.check(storage.connect(f"{bucket}/out"), is_single_writer=False)
    expected = ("creates_once", "notices_changes", "lists_what_it_wrote", "etag_is_md5")
    assert recorded(f"{bucket}/out") == dict.fromkeys(expected, True)
    assert all(getattr(found, name) for name in expected)


def test_a_folder_keeps_everything_but_has_no_md5(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    capability.check(storage.connect(str(tmp_path)), is_single_writer=False)
    assert recorded(str(tmp_path)) == {
        "creates_once": True,
        "notices_changes": True,
        "lists_what_it_wrote": True,
        "etag_is_md5": False,
    }
    assert not caplog.records


def test_a_store_is_tried_out_once_per_output_below_runs_alone(s3: S3Server, bucket: str) -> None:
    output = storage.connect(bucket)
    num_before, started_s = len(s3.requests), time.monotonic()
    capability.check(output, is_single_writer=False)
    assert time.monotonic() - started_s <= 3
    assert len(s3.requests) - num_before <= 10
    keys = sorted(storage.list_keys(output, ""))
    assert all(key.startswith("_runs/store") for key in keys)
    num_requests = len(s3.requests)
    capability.check(output, is_single_writer=False)
    assert len(s3.requests) - num_requests == 1
    assert sorted(storage.list_keys(output, "")) == keys


def test_a_store_is_tried_out_anew_where_that_is_asked_for(bucket: str) -> None:
    output = storage.connect(bucket)
    assert capability.recorded(output) is None
    first = capability.check(output, is_single_writer=False, anew=True)
    assert first == capability.recorded(output) == capability.check(output, is_single_writer=False, anew=True)
    assert len(list(storage.list_keys(output, "_runs/store-"))) == 2


@pytest.mark.parametrize(
    "record", [b"", b"\xff", b"[]", b'{"creates_once": true}'], ids=["cut", "binary", "list", "short"]
)
def test_a_record_that_cannot_be_read_is_made_anew(bucket: str, record: bytes) -> None:
    output = storage.connect(bucket)
    output.put(capability.KEY, record)
    found = capability.check(output, is_single_writer=False)
    assert found.creates_once
    assert capability.recorded(output) == found
    values = json.loads(output.get(capability.KEY)) | {"knows_more": True}
    output.put(capability.KEY, json.dumps(values).encode())
    assert capability.recorded(output) == found


def test_a_store_that_ignores_conditional_creation_is_refused(bucket: str, faults: list[Fault]) -> None:
    faults.append(Fault.always("unconditional", "PUT", ""))
    output = storage.connect(bucket)
    for _ in range(2):  # the refusal is not remembered as an agreement
        with pytest.raises(
            ConfigError, match=r"expected a store that creates .* found one that overwrites.*--single-w"
        ):
            capability.check(output, is_single_writer=False)


def test_with_a_single_writer_it_is_used_and_warned_of_every_time(
    bucket: str, faults: list[Fault], caplog: pytest.LogCaptureFixture
) -> None:
    faults.append(Fault.always("unconditional", "PUT", ""))
    output = storage.connect(bucket)
    for _ in range(2):
        assert not capability.check(output, is_single_writer=True).creates_once
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert "two runs at once would spoil this output" in caplog.records[0].message
    with pytest.raises(ConfigError, match="--single-writer"):
        capability.check(output, is_single_writer=False)


def test_a_store_that_ignores_the_version_asked_for_is_known(
    bucket: str, faults: list[Fault], caplog: pytest.LogCaptureFixture
) -> None:
    faults.append(Fault.always("unconditional", "GET", ".txt"))
    found = capability.check(storage.connect(bucket), is_single_writer=False)
    assert (found.creates_once, found.notices_changes, found.etag_is_md5) == (True, False, True)
    assert not caplog.records  # MD5s tell it as well


def test_a_store_that_lists_late_is_used_and_warned_of(
    bucket: str, faults: list[Fault], caplog: pytest.LogCaptureFixture
) -> None:
    faults.append(Fault.always("stale_page", "GET", bucket.removeprefix("s3:/")))
    found = capability.check(storage.connect(bucket), is_single_writer=False)
    assert (found.creates_once, found.notices_changes, found.lists_what_it_wrote) == (True, True, False)
    assert recorded(bucket)["lists_what_it_wrote"] is False
    (record,) = caplog.records
    assert "lists objects late: a resumed run may do finished work again" in record.message


@pytest.mark.slow
def test_a_run_on_a_store_that_ignores_conditional_creation_claims_nothing_unless_it_is_the_only_writer(
    head: Head, s3: S3Server, faults: list[Fault], tmp_path: Path
) -> None:
    source = fill_with_pictures(s3, "unconditional", 100, seed=13)
    output = Place(f"s3://{source.bucket}/out", s3.client)
    model = checkpoints.write_small(tmp_path / "model")
    undisturbed = label_undisturbed(head, source, model)
    kills = Kills(s3, source, output, undisturbed)
    kills.num_read_twice = 1  # the refused command's first look
    options = ("--input", source.url, "--output", output.url, "--model", str(model), "--gpu-actors=1")
    faults.append(ignored := Fault.always("unconditional", "PUT", ""))
    refused = head.label_bucket(*options)
    assert refused.returncode == 2, refused.stderr
    assert "say with --single-writer that no other run ever works on this output" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert [key.split("-")[0] for key in output.etags()] == ["_runs/store"]  # what was tried out, and no claim

    with watched(kills, source, undisturbed, model, head, max_s=120):
        done = head.label_bucket(*options, "--single-writer")
    assert done.returncode == 0, done.stderr
    assert "two runs at once would spoil this output" in done.stderr
    assert ignored.num_hits > 0
