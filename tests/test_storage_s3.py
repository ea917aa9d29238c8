"""What only S3 can get wrong: opaque keys, faults on the wire, lost answers, outages."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import botocore.utils
import pytest
from servers import Fault, S3Server, put_quickly
from test_storage import keys, listed

from pipeline import storage, store, store_s3, store_s3_get
from pipeline.errors import AbsentError, ForbiddenError, SourceError, UnavailableError, UnstableError


def _put(s3: S3Server, bucket: str, key: str, data: bytes, **options: Any) -> None:
    s3.client.put_object(Bucket=bucket.removeprefix("s3://"), Key=key, Body=data, **options)


def test_a_bucket_of_more_than_one_full_page_is_listed_to_its_end(s3: S3Server, bucket: str) -> None:
    names = [f"{number:04d}" for number in range(1003)]
    put_quickly(s3, bucket[5:], dict.fromkeys(names, b"x"))
    pages = list(storage.connect(bucket).list_pages())
    assert [len(page) for page in pages] == [1000, 3]
    assert [info.key for page in pages for info in page] == names
    assert keys(storage.connect(bucket), start_after="0001") == names[2:]


def test_keys_with_empty_parts_are_opaque(s3: S3Server, bucket: str) -> None:
    names = ["/leading", "a//b", "a/./b", "a/../b", "a/b/", "a/b"]
    for name in names:
        _put(s3, bucket, f"root/{name}", name.encode())
    store = storage.connect(f"{bucket}/root")
    assert keys(store) == sorted(names)
    for name in names:
        assert store.get(name) == name.encode()


def test_a_root_is_a_folder_and_not_a_prefix_of_names(s3: S3Server, bucket: str) -> None:
    _put(s3, bucket, "photos/in", b"x")
    _put(s3, bucket, "photos-of-others/out", b"x")
    assert keys(storage.connect(f"{bucket}/photos")) == ["in"]


def test_a_wrong_bucket_is_absent(s3: S3Server) -> None:
    store = storage.connect("s3://no-such-bucket")
    with pytest.raises(AbsentError, match="no such bucket"):
        listed(store)
    with pytest.raises(AbsentError, match="no such bucket"):
        store.get("key")
    with pytest.raises(AbsentError, match="no such bucket"):
        store.put_if_absent("key", b"x")


def test_without_faults_a_read_is_one_request_and_so_is_a_write(s3: S3Server, bucket: str) -> None:
    store = storage.connect(bucket)
    store.put_if_absent("one", b"data")
    (info,) = listed(store)
    store.get("one", listed=info)
    assert s3.num_requests("PUT", f"{bucket[5:]}/one") == 1
    assert s3.num_requests("GET", f"{bucket[5:]}/one") == 1
    assert s3.num_requests("HEAD", f"{bucket[5:]}/one") == 0


@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_access_denied_is_forbidden_and_asked_once(s3: S3Server, bucket: str, faults: list[Fault], method: str) -> None:
    store = storage.connect(bucket)
    faults.append(Fault.always(403, method, "/locked"))
    with pytest.raises(ForbiddenError, match="access denied"):
        store.get("locked") if method == "GET" else store.put_if_absent("locked", b"x")
    assert s3.num_requests(method, f"{bucket[5:]}/locked") == 1


def test_a_listing_that_is_denied_is_forbidden(bucket: str, faults: list[Fault]) -> None:
    faults.append(Fault.always(403, "GET", bucket[5:]))
    with pytest.raises(ForbiddenError, match=f"list {bucket}"):
        listed(storage.connect(bucket))


def test_a_request_the_store_refuses_is_not_repeated(s3: S3Server, bucket: str, faults: list[Fault]) -> None:
    faults.append(Fault.always(400, "GET", "/odd"))
    with pytest.raises(SourceError, match="refused") as caught:
        storage.connect(bucket).get("odd")
    assert type(caught.value) is SourceError
    assert s3.num_requests("GET", f"{bucket[5:]}/odd") == 1


@pytest.mark.parametrize("kind", [503, 500, "reset", "cut", "short", "flip", "swapped"])
def test_a_read_that_fails_once_is_repeated(s3: S3Server, bucket: str, faults: list[Fault], kind: Any) -> None:
    _put(s3, bucket, "key", b"the right bytes")
    (info,) = listed(storage.connect(bucket))
    faults.append(Fault(kind, "GET", "/key"))
    assert storage.connect(bucket).get("key", listed=info) == b"the right bytes"
    assert s3.num_requests("GET", f"{bucket[5:]}/key") == 2


@pytest.mark.parametrize("is_listed", [True, False])
@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        (503, "throttled"),
        (429, "throttled"),
        ("slow_down_html", "throttled"),
        (500, "server"),
        ("cut", "connection"),  # aiohttp repeats by itself what a reset of a kept connection took away
        ("flip", "unstable"),
        ("expired_token", "other"),
    ],
)
def test_a_repeated_read_is_counted_by_its_cause(
    s3: S3Server, bucket: str, faults: list[Fault], kind: Any, cause: str, is_listed: bool
) -> None:
    _put(s3, bucket, "key", b"the right bytes")
    (info,) = listed(storage.connect(bucket))
    faults.append(Fault(kind, "GET", "/key"))
    before = store.repeats.counted()
    storage.connect(bucket).get("key", listed=info if is_listed else None)
    assert store.repeats.counted() - before == {cause: 1}


def test_what_does_not_answer_in_time_is_counted_as_that(s3: S3Server, bucket: str, faults: list[Fault]) -> None:
    _put(s3, bucket, "key", b"the right bytes")
    (info,) = listed(storage.connect(bucket))
    faults.append(Fault("hang", "GET", "/key", 2))
    before = store.repeats.counted()
    for each in (info, None):  # through either client
        storage.connect(bucket).get("key", listed=each, deadline_s=1)
    assert store.repeats.counted() - before == {"timeout": 2}


def test_a_request_that_is_given_up_is_not_counted(bucket: str, faults: list[Fault]) -> None:
    faults.append(Fault.always(403, "GET", "/locked"))
    before = store.repeats.counted()
    with pytest.raises(ForbiddenError):
        storage.connect(bucket).get("locked")
    assert store.repeats.counted() == before


@pytest.mark.parametrize("kind", ["cut", "short", "flip", "swapped"])
def test_our_own_files_are_checked_without_a_listing_too(bucket: str, faults: list[Fault], kind: Any) -> None:
    storage.connect(bucket).put_if_absent("part", b"the right bytes")
    faults.append(Fault(kind, "GET", "/part"))
    assert storage.connect(bucket).get("part") == b"the right bytes"


@pytest.mark.parametrize("kind", ["short", "flip", "swapped"])
def test_bytes_that_never_match_their_listing_are_unstable(
    s3: S3Server, bucket: str, faults: list[Fault], kind: Any
) -> None:
    _put(s3, bucket, "key", b"the right bytes")
    (info,) = listed(storage.connect(bucket))
    faults.append(Fault.always(kind, "GET", "/key"))
    with pytest.raises(UnstableError, match="key"):
        storage.connect(bucket).get("key", listed=info)
    assert s3.num_requests("GET", f"{bucket[5:]}/key") == 3


def test_the_etag_of_a_multipart_upload_is_not_taken_for_an_md5(s3: S3Server, bucket: str) -> None:
    name, data = bucket[5:], b"x" * (5 * 2**20 + 1)
    upload = s3.client.create_multipart_upload(Bucket=name, Key="key")["UploadId"]
    etags = [
        s3.client.upload_part(Bucket=name, Key="key", UploadId=upload, PartNumber=number, Body=body)["ETag"]
        for number, body in ((1, data[: 5 * 2**20]), (2, data[5 * 2**20 :]))
    ]
    parts = [{"PartNumber": number, "ETag": etag} for number, etag in enumerate(etags, 1)]
    s3.client.complete_multipart_upload(Bucket=name, Key="key", UploadId=upload, MultipartUpload={"Parts": parts})
    (info,) = listed(storage.connect(bucket))
    assert info.etag is not None
    assert info.etag.endswith("-2")
    assert storage.connect(bucket).get("key", listed=info) == data


def test_the_etag_of_an_object_encrypted_with_a_key_is_not_taken_for_an_md5(
    s3: S3Server, bucket: str, faults: list[Fault]
) -> None:
    _put(s3, bucket, "key", b"bytes", ServerSideEncryption="aws:kms")
    # A real KMS etag looks like an MD5 and is none; moto's is one, so other bytes stand for the difference.
    faults.append(Fault("flip", "GET", "/key"))
    assert storage.connect(bucket).get("key") == b"cytes"


def test_the_storage_class_of_an_archived_object_is_listed(s3: S3Server, bucket: str) -> None:
    for storage_class in ("STANDARD", "GLACIER", "DEEP_ARCHIVE", "GLACIER_IR"):
        _put(s3, bucket, storage_class, b"x", StorageClass=storage_class)
    archived = {info.key: info.is_archived for info in listed(storage.connect(bucket))}
    assert archived == {"DEEP_ARCHIVE": True, "GLACIER": True, "GLACIER_IR": False, "STANDARD": False}


@pytest.mark.parametrize("kind", [503, 500, 409, "reset", "answer_lost"])
def test_a_commit_whose_request_or_answer_is_lost_is_settled_by_reading_back(
    bucket: str, faults: list[Fault], kind: Any
) -> None:
    faults.append(Fault(kind, "PUT", "/commit"))
    assert storage.connect(bucket).put_if_absent("commit", b"mine") == b"mine"
    assert storage.connect(bucket).get("commit") == b"mine"


def test_a_lost_answer_to_a_commit_that_lost_the_race_gives_the_winner(bucket: str, faults: list[Fault]) -> None:
    storage.connect(bucket).put_if_absent("commit", b"theirs")
    faults.append(Fault("answer_lost", "PUT", "/commit"))
    assert storage.connect(bucket).put_if_absent("commit", b"mine") == b"theirs"


def test_an_object_that_vanishes_between_refusal_and_read_back_is_written_again(
    s3: S3Server, bucket: str, faults: list[Fault]
) -> None:
    faults += [Fault(409, "PUT", "/commit"), Fault(404, "GET", "/commit")]
    assert storage.connect(bucket).put_if_absent("commit", b"mine") == b"mine"
    assert s3.num_requests("PUT", f"{bucket[5:]}/commit") == 2


@pytest.mark.parametrize("kind", [503, "reset"])
def test_an_outage_ends_at_the_deadline(bucket: str, faults: list[Fault], kind: Any) -> None:
    faults.append(Fault.always(kind, "GET", "/key"))
    started_s = time.monotonic()
    with pytest.raises(UnavailableError, match=r"no usable answer within 0\.5 s"):
        storage.connect(bucket).get("key", deadline_s=0.5)
    assert time.monotonic() - started_s < 5


def test_an_outage_ends_a_commit_and_a_listing_too(
    bucket: str, faults: list[Fault], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "DEADLINE_S", 0.5)
    faults += [Fault.always(503, "PUT", "/key"), Fault.always(503, "GET", bucket[5:])]
    with pytest.raises(UnavailableError, match="create"):
        storage.connect(bucket).put_if_absent("key", b"x")
    with pytest.raises(UnavailableError, match="list"):
        listed(storage.connect(bucket))


@contextmanager
def _dripping_server() -> Iterator[str]:
    """The URL of a server that begins every answer at once and then sends a byte of its body every 50 ms."""
    ended = threading.Event()

    def drip(connection: socket.socket) -> None:
        with connection:
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
            try:
                while not ended.wait(0.05):
                    connection.sendall(b"x")
            except OSError:  # the client hung up
                return

    def accept(listening: socket.socket) -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:  # closed
                return
            threads.append(threading.Thread(target=drip, args=(connection,)))
            threads[-1].start()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threads = [threading.Thread(target=accept, args=(listening,))]
        threads[0].start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            ended.set()
            listening.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join()


@pytest.mark.parametrize(
    "ask",
    [
        lambda root: root.get("key", deadline_s=1),
        lambda root: list(root.list_pages()),
        lambda root: root.put("key", b"x"),
        lambda root: root.put_if_absent("key", b"x"),
    ],
    ids=["get", "list", "put", "create"],
)
def test_a_server_that_drips_its_answer_is_given_up_at_the_deadline(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, ask: Callable[[storage.Store], Any]
) -> None:
    monkeypatch.setattr(store, "DEADLINE_S", 1)
    with _dripping_server() as url, monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", url)
        store_s3._build_s3.cache_clear()
        try:
            started_s = time.monotonic()
            with pytest.raises(UnavailableError, match=r"within 1 s; last: no complete answer in time"):
                ask(storage.connect("s3://bucket"))
            assert time.monotonic() - started_s < 6
        finally:
            store_s3._build_s3.cache_clear()


def test_more_than_one_put_can_carry_is_refused_before_any_request(bucket: str) -> None:
    with pytest.raises(ValueError, match="one conditional PUT"):
        storage.connect(bucket).put_if_absent("key", bytes(storage.MAX_PUT_BYTES + 1))
    assert listed(storage.connect(bucket)) == []


_FIRST_USE = """
import threading
from pipeline import store_s3
built = []
def use():
    barrier.wait()
    built.append(id(store_s3._s3()))
barrier = threading.Barrier(16)
threads = [threading.Thread(target=use) for _ in range(16)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(len(set(built)))
"""


def test_threads_that_begin_together_share_one_client(s3: S3Server) -> None:
    environment = {**os.environ, **s3.environment()}
    ran = subprocess.run(
        [sys.executable, "-c", _FIRST_USE], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert ran.stdout == "1\n"


@pytest.mark.parametrize("kind", ["reset", "answer_lost", 503])
def test_a_deletion_is_asked_for_again_after_a_fault(s3: S3Server, bucket: str, faults: list[Fault], kind: Any) -> None:
    _put(s3, bucket, "one", b"x")
    faults.append(Fault(kind, "POST", f"/{bucket[5:]}"))
    storage.connect(bucket).delete(["one"])
    assert keys(storage.connect(bucket)) == []


def test_credentials_that_stay_expired_are_named(bucket: str, faults: list[Fault]) -> None:
    faults.append(expired := Fault.always("expired_token", "GET", "/key"))
    with pytest.raises(UnavailableError, match="no usable answer within 2 s; last: 400 ExpiredToken"):
        storage.connect(bucket).get("key", deadline_s=2)
    assert expired.num_hits > 1


def test_what_a_store_does_not_implement_is_asked_for_once(s3: S3Server, bucket: str, faults: list[Fault]) -> None:
    faults.append(missing := Fault.always(501, "PUT", "/commit"))
    with pytest.raises(SourceError, match=r"create .*/commit: refused \(501 NotImplemented\)"):
        storage.connect(bucket).put_if_absent("commit", b"data")
    assert missing.num_hits == 1


def test_a_deletion_that_is_refused_is_forbidden(s3: S3Server, bucket: str, faults: list[Fault]) -> None:
    _put(s3, bucket, "one", b"x")
    faults.append(Fault(403, "POST", f"/{bucket[5:]}"))
    with pytest.raises(ForbiddenError, match=r"delete s3://.*/one: access denied"):
        storage.connect(bucket).delete(["one"])
    assert keys(storage.connect(bucket)) == ["one"]


def test_a_key_that_may_not_be_deleted_is_named(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "DEADLINE_S", 0.5)
    place = store_s3.S3Store(bucket)
    errors = [{"Key": "two", "Code": "AccessDenied", "Message": "no"}]
    monkeypatch.setattr(place, "_call", lambda *_, **__: {"Errors": errors})
    with pytest.raises(ForbiddenError, match="access denied for two; removing needs s3:DeleteObject"):
        place.delete(["one", "two"])
    errors[0]["Code"] = "InternalError"
    with pytest.raises(UnavailableError, match="and 1 more: no usable answer"):
        place.delete(["one", "two"])


@pytest.mark.parametrize(
    "text",
    [
        "2026-11-22T10:20:30.000Z",
        "2026-11-22T10:20:30.123Z",
        "2026-11-22T10:20:30Z",
        "2026-11-22T10:20:30+01:00",
        "Sun, 22 Nov 2026 10:20:30 GMT",
        "1763806830",
        1763806830,
    ],
)
def test_times_are_read_as_the_clients_own_parser_reads_them(text: str | int) -> None:
    found, expected = store_s3._parse_time(text), botocore.utils.parse_timestamp(text)
    assert found == expected
    assert found.utcoffset() == expected.utcoffset()


def test_a_listing_has_the_times_that_the_server_names(s3: S3Server, bucket: str) -> None:
    s3.client.put_object(Bucket=bucket[5:], Key="a", Body=b"x")
    expected = s3.client.head_object(Bucket=bucket[5:], Key="a")["LastModified"]
    ((info,),) = storage.connect(bucket).list_pages()
    assert info.last_modified == expected


# --- the cheaper client -------------------------------------------------------------------------------------------


@pytest.fixture
def cheap(s3: S3Server) -> Iterator[None]:
    """No bucket was given up before."""
    store_s3_get._num_lost.clear()
    yield
    store_s3_get._num_lost.clear()


def _user_agents(s3: S3Server, key: str) -> list[str]:
    return [agent.partition("/")[0] for path, agent in s3.agents if path.endswith(key)]


def test_a_listed_object_is_read_by_the_cheap_client_in_one_request(s3: S3Server, bucket: str, cheap: None) -> None:
    _put(s3, bucket, "root/ü b%20+'~#?.jpg", b"bytes")
    (info,) = listed(storage.connect(f"{bucket}/root"))
    assert storage.connect(f"{bucket}/root").get(info.key, listed=info) == b"bytes"
    assert _user_agents(s3, info.key) == ["object_store"]


@pytest.mark.parametrize("kind", [503, 403, "reset", "cut", "short", "flip", "swapped"])
def test_what_the_cheap_client_does_not_bring_whole_is_read_by_the_other(
    s3: S3Server, bucket: str, faults: list[Fault], kind: Any, cheap: None
) -> None:
    _put(s3, bucket, "key", b"the right bytes")
    (info,) = listed(storage.connect(bucket))
    faults.append(Fault(kind, "GET", "/key"))
    assert storage.connect(bucket).get("key", listed=info) == b"the right bytes"
    first, second = _user_agents(s3, f"{bucket[5:]}/key")
    assert first == "object_store" != second


@pytest.mark.parametrize("key", ["/lead", "a//b", "a/../b", "tail/", "bell\x07", "\u202ertl"])
def test_keys_that_the_cheap_client_would_change_are_read_by_the_other(
    s3: S3Server, bucket: str, key: str, cheap: None
) -> None:
    _put(s3, bucket, key, b"x")
    (info,) = listed(storage.connect(bucket))
    assert storage.connect(bucket).get(info.key, listed=info) == b"x"
    assert "object_store" not in _user_agents(s3, key)


def test_a_bucket_that_only_the_other_client_can_serve_is_given_up(
    s3: S3Server, bucket: str, faults: list[Fault], cheap: None
) -> None:
    num_objects = store_s3_get._MAX_LOST + 3
    for number in range(num_objects):
        _put(s3, bucket, f"{number:02d}.key", b"bytes", ServerSideEncryption="aws:kms")
    # A real KMS etag looks like an MD5 and is none; moto's is one, so other bytes stand for the difference.
    faults.append(Fault.always("flip", "GET", ".key"))
    store = storage.connect(bucket)
    assert [store.get(info.key, listed=info) for info in listed(store)] == [b"cytes"] * num_objects
    agents = _user_agents(s3, ".key")
    assert len([agent for agent in agents if agent == "object_store"]) == store_s3_get._MAX_LOST
    assert len([agent for agent in agents if agent != "object_store"]) == num_objects


def test_a_read_that_succeeds_forgives_those_that_did_not(s3: S3Server, bucket: str, cheap: None) -> None:
    _put(s3, bucket, "key", b"bytes")
    (info,) = listed(storage.connect(bucket))
    for _ in range(2):
        for _ in range(store_s3_get._MAX_LOST - 1):
            store_s3_get.lost(bucket[5:])
        assert storage.connect(bucket).get("key", listed=info) == b"bytes"
    assert _user_agents(s3, f"{bucket[5:]}/key") == ["object_store"] * 2


def test_the_cheap_client_reads_a_public_bucket_without_credentials(s3: S3Server, bucket: str, cheap: None) -> None:
    _put(s3, bucket, "key", b"bytes", ACL="public-read")
    (info,) = listed(storage.connect(bucket))
    code = (
        "import sys; from pipeline import storage; from pipeline.storage import ObjectInfo;"
        "print(storage.connect(sys.argv[1]).get('key', listed=ObjectInfo('key', 5, sys.argv[2], None)).decode())"
    )
    hidden = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    environment = hidden | {"AWS_NO_SIGN_REQUEST": "true", "AWS_ENDPOINT_URL_S3": s3.url, "HOME": "/nonexistent"}
    ended = subprocess.run(
        [sys.executable, "-c", code, bucket, str(info.etag)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.stdout, ended.stderr[-500:]) == ("bytes\n", "")
    assert _user_agents(s3, f"{bucket[5:]}/key") == ["object_store"]


@pytest.mark.parametrize("host", ["169.254.169.254", "[fe80::1]", "[fd00:ec2::254]", "[::ffff:169.254.169.254]"])
def test_an_endpoint_at_a_link_local_address_is_refused_before_any_request(host: str) -> None:
    code = (
        "from pipeline import storage; from pipeline.errors import SourceError\n"
        "from pipeline.storage import ObjectInfo\n"
        "store, info = storage.connect('s3://bucket'), ObjectInfo('key', 5, 'a' * 32, None)\n"
        "for ask in (lambda: store.get('key', listed=info), lambda: next(store.list_pages())):\n"
        "    try: ask()\n"
        "    except SourceError as error: print(error)"
    )
    environment = {**os.environ, "AWS_ENDPOINT_URL": f"http://{host}/latest"}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    lines = ended.stdout.splitlines()
    assert len(lines) == 2
    assert all("found the link-local address" in line for line in lines)


def test_an_endpoint_that_does_not_resolve_or_is_private_is_no_link_local_one() -> None:
    for url in ("http://no.such.host.invalid:9000", "http://10.0.0.1", "http://127.0.0.1:9", "http://[fd12::1]"):
        store.check_endpoint(url, "the URL")
