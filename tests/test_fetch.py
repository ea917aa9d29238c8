"""Listed objects -> bytes or the right failure, in order, with bounded concurrency."""

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import Fault, Kind, S3Server

from pipeline import fetch, storage, store, store_s3_get
from pipeline.config import Config
from pipeline.errors import FailureKind, ForbiddenError, ImageError, UnavailableError
from pipeline.storage import ObjectInfo

SOON_S = 2.5
"""A deadline that any answer meets, on a busy machine too, and a stalled one does not."""


def put(s3: S3Server, bucket: str, objects: dict[str, bytes], **options: Any) -> list[ObjectInfo]:
    for key, data in objects.items():
        s3.client.put_object(Bucket=bucket[5:], Key=key, Body=data, **options)
    return [info for page in storage.connect(bucket).list_pages() for info in page]


def outcomes(
    url: str, infos: Sequence[ObjectInfo], *, max_image_bytes: int = 100, deadline_s: float = 5
) -> list[bytes | ImageError]:
    return list(fetch.fetch(storage.connect(url), infos, max_image_bytes=max_image_bytes, deadline_s=deadline_s))


def kinds(found: list[bytes | ImageError]) -> list[str | bytes]:
    return [str(each.kind) if isinstance(each, ImageError) else each for each in found]


def test_every_way_a_read_can_fail_is_its_own_kind(s3: S3Server, bucket: str, faults: list[Fault]) -> None:
    names = ("changed", "empty", "flipped", "forbidden", "good", "missing", "refused", "too large", "unavailable")
    infos = put(s3, bucket, {name: b"" if name == "empty" else name.encode() for name in names})
    infos[names.index("too large")] = infos[names.index("too large")]._replace(size_bytes=101)
    s3.client.put_object(Bucket=bucket[5:], Key="changed", Body=b"CHANGED")
    s3.client.delete_object(Bucket=bucket[5:], Key="missing")
    faults += [
        Fault.always("flip", "GET", "/flipped"),
        Fault.always(403, "GET", "/forbidden"),
        Fault.always(400, "GET", "/refused"),
        Fault.always(503, "GET", "/unavailable"),
    ]
    found = outcomes(bucket, infos, deadline_s=SOON_S)
    assert kinds(found) == [
        "changed",
        "empty",
        "unstable_bytes",
        "forbidden",
        b"good",
        "missing",
        "forbidden",
        "too_large",
        "unavailable",
    ]
    for name, outcome in zip(names, found, strict=True):
        if isinstance(outcome, ImageError):
            assert outcome.stage == "fetch"
            assert "\n" not in str(outcome)
            assert name in str(outcome) or name in ("empty", "too large")
    assert "101 bytes, the limit is 100" in str(found[names.index("too large")])


@pytest.mark.parametrize("kind", ["drip", "hang"])
@pytest.mark.parametrize("is_cheap", [True, False], ids=["cheap client first", "s3fs alone"])
def test_an_answer_that_never_ends_is_given_up_at_the_deadline_of_the_object(
    s3: S3Server, bucket: str, faults: list[Fault], monkeypatch: pytest.MonkeyPatch, kind: Kind, is_cheap: bool
) -> None:
    monkeypatch.setattr(store_s3_get, "_MAX_LOST", 8 if is_cheap else 0)
    infos = put(s3, bucket, {"endless": bytes(100), "good": b"good"})
    faults.append(endless := Fault.always(kind, "GET", "/endless"))
    started_s = time.monotonic()
    assert kinds(outcomes(bucket, infos, deadline_s=1.5)) == ["unavailable", b"good"]
    assert 1 < time.monotonic() - started_s < 1.5 + 2
    assert endless.num_hits >= 2


def test_a_listed_object_has_thirty_seconds_unless_the_run_says_otherwise() -> None:
    assert store.DEADLINE_S == Config.model_fields["object_deadline_s"].default == 30


def test_archived_empty_and_too_large_objects_are_not_asked_for(s3: S3Server, bucket: str) -> None:
    infos = put(s3, bucket, {"a": b"x"}, StorageClass="GLACIER")
    infos += [infos[0]._replace(key="b", size_bytes=0, storage_class=None)]
    infos += [infos[0]._replace(key="c", size_bytes=101, storage_class=None)]
    num_before = len(s3.requests)
    assert kinds(outcomes(bucket, infos)) == ["archived", "empty", "too_large"]
    assert len(s3.requests) == num_before


fates = st.lists(st.sampled_from(["good", "missing", "changed", "empty", "too_large"]), max_size=60)


@given(fates)
@settings(deadline=None, max_examples=25, derandomize=True)
def test_outcomes_are_in_the_order_of_the_objects_whatever_fails(fate_of: list[str]) -> None:
    with TemporaryDirectory() as folder:
        for number, fate in enumerate(fate_of):
            (Path(folder) / f"{number:03d}").write_bytes(
                {"empty": b"", "too_large": bytes(50)}.get(fate, b"%d" % number)
            )
        infos = [info for page in storage.connect(folder).list_pages() for info in page]
        for info, fate in zip(infos, fate_of, strict=True):
            if fate == "missing":
                (Path(folder) / info.key).unlink()
            elif fate == "changed":
                (Path(folder) / info.key).write_bytes(b"another")
        expected = [b"%d" % number if fate == "good" else fate for number, fate in enumerate(fate_of)]
        assert kinds(outcomes(folder, infos, max_image_bytes=49)) == expected


def test_order_is_kept_when_the_first_answers_come_last(s3: S3Server, bucket: str, faults: list[Fault]) -> None:
    objects = {f"{number:02d}": b"%d" % number for number in range(40)}
    infos = put(s3, bucket, objects)
    faults += [Fault("slow", "GET", "/00"), Fault(503, "GET", "/07"), Fault("slow", "GET", "/33")]
    assert outcomes(bucket, infos) == list(objects.values())


def test_requests_overlap_up_to_the_bound_and_not_beyond(s3: S3Server, bucket: str, faults: list[Fault]) -> None:
    infos = put(s3, bucket, {f"{number:02d}": b"x" for number in range(80)})
    faults.append(Fault.always("slow", "GET", ""))
    s3.max_in_flight = 0
    started_s = time.monotonic()
    assert len(outcomes(bucket, infos)) == 80
    assert time.monotonic() - started_s < 80 * 0.05
    assert 2 <= s3.max_in_flight <= fetch.CONCURRENCY


def test_what_is_read_ahead_of_a_slow_reader_is_bounded_in_bytes(
    s3: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "_READ_AHEAD_BYTES", 100)
    infos = put(s3, bucket, {**{f"a{number}": bytes(30) for number in range(9)}, "b": bytes(99), "c": bytes(99)})
    num_before = len(s3.requests)
    found = fetch.fetch(storage.connect(bucket), infos, max_image_bytes=100, deadline_s=5)
    assert next(found) == bytes(30)
    found.close()  # waits for what was begun
    assert len(s3.requests) - num_before == 3
    assert [len(each) for each in outcomes(bucket, infos) if isinstance(each, bytes)] == [30] * 9 + [99] * 2


def test_one_object_larger_than_the_read_ahead_still_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_READ_AHEAD_BYTES", 10)
    (tmp_path / "big").write_bytes(bytes(80))
    infos = [info for page in storage.connect(str(tmp_path)).list_pages() for info in page]
    assert outcomes(str(tmp_path), infos * 2) == [bytes(80)] * 2


def test_a_reader_that_stops_early_leaves_no_thread(tmp_path: Path) -> None:
    for number in range(100):
        (tmp_path / f"{number:03d}").write_bytes(b"x")
    infos = [info for page in storage.connect(str(tmp_path)).list_pages() for info in page]
    found = fetch.fetch(storage.connect(str(tmp_path)), infos, max_image_bytes=100, deadline_s=5)
    next(found)
    assert any(thread.name.startswith("fetch") for thread in threading.enumerate())
    found.close()
    assert not any(thread.name.startswith("fetch") for thread in threading.enumerate())


def test_storage_that_answers_for_none_of_the_first_objects_is_an_outage_at_once(
    s3: S3Server, bucket: str, faults: list[Fault]
) -> None:
    infos = put(s3, bucket, {f"{number:03d}": b"a" for number in range(100)})
    empty = infos[0]._replace(key="0", size_bytes=0)  # needs no answer, so it is none
    faults.append(Fault.always(503, "GET", ""))
    with pytest.raises(UnavailableError, match=r"none of 16 objects in a row"):
        outcomes(bucket, [empty, *infos], deadline_s=SOON_S)
    assert s3.num_requests("GET", f"{bucket[5:]}/099") == 0


def _numbered(s3: S3Server, bucket: str, kind_of: dict[range, str]) -> list[ObjectInfo]:
    """One object for each number; its key ends with the kind whose range holds the number."""
    names = {number: kind for numbers, kind in kind_of.items() for number in numbers}
    return put(s3, bucket, {f"{number:03d}-{kind}": kind.encode() for number, kind in names.items()})


def test_an_outage_that_begins_after_answers_is_an_outage_too(s3: S3Server, bucket: str, faults: list[Fault]) -> None:
    infos = _numbered(s3, bucket, {range(20): "good", range(20, 100): "silent"})
    # Needs no answer, so it is none.
    infos.insert(30, infos[30]._replace(key="empty", size_bytes=0))
    faults.append(Fault.always(503, "GET", "-silent"))
    found = fetch.fetch(storage.connect(bucket), infos, max_image_bytes=100, deadline_s=SOON_S)
    seen: list[bytes | ImageError] = []
    with pytest.raises(UnavailableError, match=r"none of 16 objects in a row"):
        seen += found  # a list keeps what came before the exception
    assert kinds(seen[:20]) == [b"good"] * 20
    assert s3.num_requests("GET", f"{bucket[5:]}/099-silent") == 0


def test_silence_between_answers_is_rows_and_not_an_outage(s3: S3Server, bucket: str, faults: list[Fault]) -> None:
    infos = _numbered(s3, bucket, {range(15): "silent", range(15, 16): "good", range(16, 31): "silent"})
    faults.append(Fault.always(503, "GET", "-silent"))
    expected = ["unavailable"] * 15 + [b"good"] + ["unavailable"] * 15
    assert kinds(outcomes(bucket, infos, deadline_s=SOON_S)) == expected


def test_a_role_that_is_revoked_in_the_middle_ends_the_run(s3: S3Server, bucket: str, faults: list[Fault]) -> None:
    infos = _numbered(s3, bucket, {range(10): "good", range(10, 150): "refused"})
    infos.insert(40, infos[40]._replace(key="empty", size_bytes=0))
    faults.append(Fault.always(403, "GET", "-refused"))
    with pytest.raises(ForbiddenError, match=r"64 objects in a row .*access denied"):
        outcomes(bucket, infos)
    assert s3.num_requests("GET", f"{bucket[5:]}/149-refused") == 0


def test_refusals_between_answers_are_rows(s3: S3Server, bucket: str, faults: list[Fault]) -> None:
    infos = _numbered(s3, bucket, {range(63): "refused", range(63, 64): "good", range(64, 127): "refused"})
    faults.append(Fault.always(403, "GET", "-refused"))
    assert kinds(outcomes(bucket, infos)) == ["forbidden"] * 63 + [b"good"] + ["forbidden"] * 63


def test_storage_that_answers_for_none_of_few_objects_and_does_not_list_is_an_outage(
    s3: S3Server, bucket: str, faults: list[Fault], monkeypatch: pytest.MonkeyPatch
) -> None:
    infos = put(s3, bucket, {"a": b"a", "b": b"b"})
    monkeypatch.setattr(store, "DEADLINE_S", SOON_S)
    faults.append(Fault.always(503, "GET", ""))
    with pytest.raises(UnavailableError, match=r"list .*no usable answer"):
        outcomes(bucket, infos, deadline_s=SOON_S)


def test_a_few_objects_without_an_answer_are_rows_where_storage_still_lists(
    s3: S3Server, bucket: str, faults: list[Fault]
) -> None:
    infos = put(s3, bucket, {"in/a.jpg": b"a", "in/b.jpg": b"b"})
    faults.append(Fault.always(503, "GET", ".jpg"))
    assert kinds(outcomes(bucket, infos, deadline_s=SOON_S)) == ["unavailable", "unavailable"]


@pytest.mark.parametrize("answer", ["found", "gone", "overwritten", "denied"])
def test_any_answer_of_storage_shows_that_there_is_no_outage(
    s3: S3Server, bucket: str, faults: list[Fault], answer: str
) -> None:
    infos = put(s3, bucket, {"a": b"a", "b": b"b"})
    if answer == "gone":
        s3.client.delete_object(Bucket=bucket[5:], Key="a")
    elif answer == "overwritten":
        s3.client.put_object(Bucket=bucket[5:], Key="a", Body=b"new")
    elif answer == "denied":
        faults.append(Fault.always(403, "GET", "/a"))
    faults.append(Fault.always(503, "GET", "/b"))
    expected = {"found": b"a", "gone": "missing", "overwritten": "changed", "denied": "forbidden"}[answer]
    assert kinds(outcomes(bucket, infos, deadline_s=SOON_S)) == [expected, "unavailable"]


def test_no_objects_are_no_outage(tmp_path: Path) -> None:
    assert outcomes(str(tmp_path), []) == []


def test_kinds_are_known_to_be_transient_or_not() -> None:
    assert {kind for _, kind in fetch._KINDS} == {
        FailureKind.MISSING,
        FailureKind.CHANGED,
        FailureKind.FORBIDDEN,
        FailureKind.UNSTABLE_BYTES,
        FailureKind.UNAVAILABLE,
    }
