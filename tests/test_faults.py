"""Storms of faults of every kind against reads, commits and listings: nothing wrong or lost, few requests more."""

import contextlib
import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from servers import Fault, Kind, S3Server, Storm, put_quickly
from test_log import claim, entry_of
from test_plan import Place as CatalogPlace
from test_plan import row

from pipeline import fetch, log, parts, plan, storage, store
from pipeline.catalog import KeyRange
from pipeline.diff import Rules
from pipeline.errors import ConflictError, SourceError, UnavailableError
from pipeline.listing import Scope
from pipeline.storage import ObjectInfo

GET_KINDS: tuple[Kind, ...] = (
    *(503, 500, 429, "slow_down_html", "expired_token", "error_in_200"),
    *("reset", "hang", "drip", "cut", "cut_fin", "short", "flip", "swapped", "exchanged"),
)
PUT_KINDS: tuple[Kind, ...] = (503, 500, 409, 429, "slow_down_html", "reset", "answer_lost", "done_then_500", "twin")
LIST_KINDS: tuple[Kind, ...] = (503, 500, 429, "slow_down_html", "error_in_200", "reset", "cut", "cut_fin", "short")
MIN_HITS = 10
"""Of each kind: one that fires less often has not been tried."""
SEED = 20261125


def check_every_kind_fired(storm: Storm) -> None:
    wanted = {(operation, kind) for operation, kinds in storm.kinds.items() for kind in kinds}
    assert {each for each in wanted if storm.num_hits[each] < MIN_HITS} == set(), storm.num_hits


def fill(s3: S3Server, bucket: str, num_objects: int) -> dict[str, bytes]:
    """That many small objects below in/."""
    files = {f"{number:05d}": f"{number:05d}".encode() * 20 for number in range(num_objects)}
    put_quickly(s3, bucket[5:], {f"in/{key}": data for key, data in files.items()})
    return files


def listed(url: str) -> list[ObjectInfo]:
    return [info for page in storage.connect(url).list_pages() for info in page]


@pytest.mark.parametrize(
    ("kind", "is_reset"), [("reset", True), ("answer_lost", True), ("cut", True), ("cut_fin", False)]
)
def test_a_client_sees_a_reset_where_one_is_meant_and_an_early_end_where_that_is(
    s3: S3Server, bucket: str, faults: list[Fault], kind: Kind, is_reset: bool
) -> None:
    s3.client.put_object(Bucket=bucket[5:], Key="key", Body=bytes(1000))
    signed = urlsplit(s3.client.generate_presigned_url("get_object", {"Bucket": bucket[5:], "Key": "key"}))
    request = f"GET {signed.path}?{signed.query} HTTP/1.1\r\nHost: {signed.netloc}\r\n\r\n".encode()
    for _ in range(5):
        faults[:] = [Fault(kind, "GET", "/key", 1)]
        found = b""
        with socket.create_connection(("127.0.0.1", urlsplit(s3.url).port), timeout=10) as client:
            client.sendall(request)
            with pytest.raises(ConnectionResetError) if is_reset else contextlib.nullcontext():
                while data := client.recv(100):
                    found += data
        assert is_reset or found.endswith(b"\r\n\r\n" + bytes(500))
        assert faults[0].num_hits == 1


@pytest.mark.slow
def test_five_percent_of_faults_of_every_kind_cost_no_byte_and_less_than_a_third_more_requests(
    weather: S3Server, bucket: str
) -> None:
    files = fill(weather, bucket, 3500)
    infos, source = listed(f"{bucket}/in"), storage.connect(f"{bucket}/in")
    before = len(weather.requests)
    read = dict(zip(files, fetch.fetch(source, infos[:500], max_image_bytes=1000, deadline_s=2), strict=False))
    assert list(read.values()) == list(files.values())[:500]
    assert Counter(weather.requests[before:]) == {("GET", f"/{bucket[5:]}/in/{key}"): 1 for key in read}

    weather.storm = storm = Storm(SEED, {"GET": GET_KINDS}, {"GET": 0.05})
    before = len(weather.requests)
    found = list(fetch.fetch(source, infos, max_image_bytes=1000, deadline_s=2))
    assert found == list(files.values())
    check_every_kind_fired(storm)
    assert (len(weather.requests) - before) / len(infos) <= 1.3


def test_commits_under_faults_of_every_kind_leave_exactly_what_was_committed(weather: S3Server, bucket: str) -> None:
    output = storage.connect(bucket)
    weather.storm = storm = Storm(SEED, {"PUT": PUT_KINDS}, {"PUT": 0.6})
    wanted = {f"part-{number:04d}": f"{number} of this run".encode() for number in range(130)}
    with ThreadPoolExecutor(8) as pool:
        standing = list(pool.map(lambda item: output.put_if_absent(*item), wanted.items()))
        assert standing == list(wanted.values())
        others = list(pool.map(lambda key: output.put_if_absent(key, b"of another run"), wanted))
        assert others == standing
    check_every_kind_fired(storm)
    weather.storm = None
    assert {info.key: output.get(info.key) for info in listed(bucket)} == wanted


def test_an_error_that_comes_with_status_200_is_never_taken_for_the_object(
    s3: S3Server, bucket: str, faults: list[Fault]
) -> None:
    output = storage.connect(bucket)
    output.put("report.json", b"{}")
    faults.append(fault := Fault("error_in_200", "GET", "report.json", times=2))
    assert output.get("report.json") == b"{}"
    assert fault.num_hits == 2


def test_listings_under_faults_of_every_kind_are_complete(
    weather: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "PAGE_OBJECTS", 3)
    files = fill(weather, bucket, 100)
    weather.storm = storm = Storm(SEED, {"LIST": LIST_KINDS}, {"LIST": 0.3}, max_per_path=1000)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: [info.key for info in listed(f"{bucket}/in")], range(12)))
    assert found == [list(files)] * 12
    check_every_kind_fired(storm)


@pytest.mark.parametrize("kind", ["repeated_page", "dropped_token"])
def test_a_listing_that_contradicts_itself_is_planned_anew_or_refused_and_never_half_a_plan(
    weather: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    monkeypatch.setattr(store, "PAGE_OBJECTS", 20)
    fill(weather, bucket, 100)
    whole = KeyRange(range_id="00000", after="", through=None, files=())
    rules, sizes = Rules(scope=Scope(), limit=None, records_deletions=True), plan.UnitSizes.of(32, 1)
    ended: Counter[str] = Counter()
    hits = 0
    for seed in range(20):
        weather.storm = storm = Storm(seed, {"LIST": [kind]}, {"LIST": 0.15}, max_per_path=1)
        try:
            planned = plan.preview_range(storage.connect(f"{bucket}/in"), storage.connect(bucket), whole, rules, sizes)
            ended[f"{planned.counts['planned']} planned"] += 1
        except SourceError as error:
            ended["refused" if "run the command again" in str(error) else str(error)] += 1
        hits += storm.num_hits["LIST", kind]
    assert hits >= MIN_HITS
    assert set(ended) <= {"100 planned", "refused"}
    assert ended["100 planned"] > 0


def test_an_object_that_a_stale_page_lacks_is_never_recorded_as_deleted(
    weather: S3Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "PAGE_OBJECTS", 20)
    fill(weather, bucket, 100)
    place = CatalogPlace(tmp_path)
    known = [row(info.key, info.etag, info.size_bytes) for info in listed(f"{bucket}/in")]
    place.remember(known, rows_per_file=1000)
    ended: Counter[str] = Counter()
    hits = 0
    for seed in range(30):
        weather.storm = storm = Storm(seed, {"LIST": ["stale_page"]}, {"LIST": 0.15}, max_per_path=1)
        sizes = plan.UnitSizes.of(32, 1)
        rules = Rules(scope=Scope(), limit=None, records_deletions=True)
        planned = plan.preview_range(storage.connect(f"{bucket}/in"), place.output, place.whole, rules, sizes)
        ended[f"{planned.counts['unchanged']} unchanged, {planned.counts['deleted']} deleted"] += 1
        hits += storm.num_hits["LIST", "stale_page"]
    assert set(ended) == {"100 unchanged, 0 deleted"}
    assert hits >= MIN_HITS


@pytest.mark.parametrize("kind", ["repeated_page", "dropped_token", "stale_page"])
def test_a_faulty_listing_of_an_output_is_refused_or_shows_what_was_there_and_never_more(
    weather: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    monkeypatch.setattr(store, "PAGE_OBJECTS", 3)
    output = storage.connect(bucket)
    for night in range(1, 5):
        log.commit(output, entry_of(claim(output, run_date=f"2026-11-{night:02d}")))
    finished = {f"unit-{number:02d}" for number in range(20)}
    for unit_id in finished:
        output.put_if_absent(parts.part_key("run", "00000", unit_id), unit_id.encode())
    ended: Counter[str] = Counter()
    hits = 0
    for seed in range(30):
        weather.storm = storm = Storm(seed, {"LIST": [kind]}, {"LIST": 0.15}, max_per_path=1)
        try:
            found = parts.finished_units(output, "run", "00000")
            assert found <= finished, "a unit would be left out"
            ended["all units" if found == finished else "fewer units"] += 1
        except SourceError:
            ended["units refused"] += 1
        try:
            places = [entry.run_seq for entry in log.read(output).entries]
            assert places in ([1, 2, 3, 4], [1, 2, 3])
            ended[f"{len(places)} nights"] += 1
        except (ConflictError, SourceError):
            ended["nights refused"] += 1
        hits += storm.num_hits["LIST", kind]
    assert hits >= MIN_HITS
    assert ended["all units"] > 0
    assert ended["4 nights"] > 0
    if kind != "stale_page":
        assert ended["fewer units"] == ended["3 nights"] == 0


def test_who_does_not_see_the_newest_commit_replaces_nothing(
    s3: S3Server, bucket: str, faults: list[Fault], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = storage.connect(bucket)
    for night in range(1, 3):
        log.commit(output, entry_of(claim(output, run_date=f"2026-11-{night:02d}")))
    committed = output.get("_log/00000002.json")
    faults.append(Fault.always("stale_page", "GET", bucket.removeprefix("s3:/")))
    stale = log.read(output)
    assert stale.newest_seq == 1
    assert stale.open_claim is not None, "the claim of the commit that is not seen"
    with pytest.raises(ConflictError, match="has an open run"):
        claim(output, limit=5)
    with pytest.raises(ConflictError, match=r"expected .*, found run .* committed"):
        log.commit(output, log.abandoned(stale.open_claim, "t3"))
    log.commit(output, entry_of(stale.open_claim))  # as the same command does, which finds all units done
    assert output.get("_log/00000002.json") == committed


@pytest.mark.slow
@pytest.mark.parametrize("kind", [503, "reset"])
def test_in_an_outage_a_worker_asks_at_most_five_times_a_second(
    s3: S3Server, bucket: str, faults: list[Fault], kind: Kind
) -> None:
    fill(s3, bucket, 64)
    infos = listed(f"{bucket}/in")
    faults.append(Fault.always(kind, "any", ""))
    before, started_s = len(s3.requests), time.monotonic()
    with pytest.raises(UnavailableError, match="none of 16 objects in a row could be read"):
        list(fetch.fetch(storage.connect(f"{bucket}/in"), infos, max_image_bytes=1000, deadline_s=15))
    took_s = time.monotonic() - started_s
    assert (len(s3.requests) - before) / took_s <= 5
    assert took_s < 45  # twice the deadline: objects that were begun meanwhile have theirs


def test_after_an_outage_reads_go_on(s3: S3Server, bucket: str, faults: list[Fault]) -> None:
    files = fill(s3, bucket, 40)
    infos = listed(f"{bucket}/in")
    faults.append(outage := Fault(503, "any", "", times=18))  # each of 16 objects once, and a few again
    found = list(fetch.fetch(storage.connect(f"{bucket}/in"), infos, max_image_bytes=1000, deadline_s=20))
    assert found == list(files.values())
    assert outage.num_hits == 18
