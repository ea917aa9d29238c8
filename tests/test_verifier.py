"""The verifier finds what is wrong: a careful writer passes it under a storm, one that lacks a single precaution fails.

The writers are as simple as can be and share nothing with the pipeline. A suite of faults that never fails proves
nothing: these are its controls.
"""

import contextlib
import hashlib
import io
import json
import re
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkpoints
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import verifier
from PIL import Image
from servers import Fault, Kind, S3Server, Storm, connect, put_quickly
from verifier import Place, Reader

from pipeline.draw import draw_file

UNIT_ROWS = 20
KINDS: dict[str, tuple[Kind, ...]] = {
    "GET": ("exchanged", 503, "reset", "short"),
    "PUT": ("answer_lost", 503, "done_then_500"),
}


@pytest.fixture(scope="module")
def source(s3: S3Server) -> Place:
    url = s3.create_bucket("control")
    files = [draw_file(12, number) for number in range(60)]
    put_quickly(s3, url.removeprefix("s3://"), {f"in/{file.path}": file.data for file in files})
    return Place(f"{url}/in", s3.client)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write_small(tmp_path_factory.mktemp("model"))


@pytest.fixture
def storm(s3: S3Server, source: Place) -> Iterator[Storm]:
    s3.storm = Storm(3, KINDS, {"GET": 0.35, "PUT": 1}, re.compile(f"/{source.bucket}/"))
    yield s3.storm
    s3.storm = None


class Writer:
    """Labels a source, in one process, through the server with the faults. Asks again until it has an answer."""

    def __init__(self, s3: S3Server, model: Path, *, checks_bytes: bool = True, names_are_known: bool = True) -> None:
        self._client = connect(s3.url)
        self._checks_bytes, self._names_are_known = checks_bytes, names_are_known
        self._model = model

    def run(self, source: Place, output: Place) -> None:
        """Label everything; one file of labels for each unit, then a report and a log entry."""
        etags = sorted(source.etags().items())
        units = [etags[first : first + UNIT_ROWS] for first in range(0, len(etags), UNIT_ROWS)]
        files: list[dict[str, Any]] = []
        for number, unit in enumerate(units):
            pictures = [self._get(source, key, etag) for key, etag in unit]
            facts = [{"uri": f"{source.url}/{key}", "etag": etag, "run_seq": 1} for key, etag in unit]
            names = ("label_ids", "label_scores", "embedding")
            labels = [dict(zip(names, each, strict=True)) for each in verifier.label(pictures, self._model, 5)]
            table = pa.Table.from_pylist([row | label for row, label in zip(facts, labels, strict=True)])
            sink = io.BytesIO()
            pq.write_table(table, sink)
            key = self._put(output, f"labels/part-{number:03d}.parquet", sink.getvalue())
            digest = hashlib.sha256(sink.getvalue()).hexdigest()
            files.append({"key": key, "num_rows": len(table), "sha256": digest})
        counts = {"labeled": sum(each["num_rows"] for each in files), "failed": 0}
        entry = {"kind": "run", "run_seq": 1, "run_id": "r", "counts": counts}
        entry |= {"labels": files, "dead_letters": [], "deletions": []}
        put_at_once(output, "_runs/r/report.json", {"exit_code": 0, "counts": counts})
        put_at_once(output, "_log/00000001.claim.json", {})
        put_at_once(output, "_log/00000001.json", entry)

    def _get(self, source: Place, key: str, etag: str) -> bytes:
        while True:
            with contextlib.suppress(OSError):  # of HTTP, of the connection, or of a picture that ends early
                with urllib.request.urlopen(self._signed("get_object", source, key)) as answer:
                    data: bytes = answer.read()
                Image.open(io.BytesIO(data)).load()
                if not self._checks_bytes or hashlib.md5(data, usedforsecurity=False).hexdigest() == etag:
                    return data

    def _put(self, output: Place, known_key: str, data: bytes) -> str:
        while True:
            key = known_key if self._names_are_known else f"labels/part-{uuid.uuid4().hex}.parquet"
            url = self._signed("put_object", output, key)
            headers = {"Content-Type": "application/octet-stream"}
            try:
                urllib.request.urlopen(urllib.request.Request(url, data, headers, method="PUT")).close()
                return key
            except OSError:
                continue

    def _signed(self, operation: str, place: Place, key: str) -> str:
        parameters = {"Bucket": place.bucket, "Key": place.prefix + key}
        url: str = self._client.generate_presigned_url(operation, Params=parameters)
        return url


def put_at_once(output: Place, key: str, values: dict[str, Any]) -> None:
    """Small files without faults: they are not what these controls are about."""
    output.client.put_object(Bucket=output.bucket, Key=output.prefix + key, Body=json.dumps(values).encode())


def written(s3: S3Server, source: Place, model: Path, name: str, **lacks: bool) -> tuple[Place, list[str]]:
    """The output of a writer, and everything that the verifier and a reader have to say of it."""
    output = Place(f"s3://{source.bucket}/{name}", s3.client)
    with Reader(output) as reader:
        Writer(s3, model, **lacks).run(source, output)
    findings = [*verifier.check(output, source, exit_code=0), *verifier.check_labels(output, source, model, 60)]
    return output, findings + reader.findings


def test_a_careful_writer_passes_without_faults_and_under_a_storm(
    s3: S3Server, source: Place, model: Path, storm: Storm
) -> None:
    s3.storm = None
    calm, findings = written(s3, source, model, "calm")
    assert findings == []
    s3.storm = storm
    output, findings = written(s3, source, model, "careful")
    assert findings == []
    assert verifier.check_like(output, calm) == []
    assert all(storm.num_hits[operation, kind] > 0 for operation, kinds in storm.kinds.items() for kind in kinds)


def test_a_writer_that_believes_the_bytes_it_gets_is_found_out(
    s3: S3Server, source: Place, model: Path, storm: Storm
) -> None:
    _, findings = written(s3, source, model, "credulous", checks_bytes=False)
    assert storm.num_hits["GET", "exchanged"] > 0
    assert len([line for line in findings if re.match(r"5 .* has (the labels|scores|an embedding)", line)]) >= 5
    assert {line[0] for line in findings} == {"5"}


def test_a_writer_whose_names_are_random_is_found_out(
    s3: S3Server, source: Place, model: Path, faults: list[Fault]
) -> None:
    faults.append(Fault("answer_lost", "PUT", ".parquet", times=2))
    output, findings = written(s3, source, model, "random", names_are_known=False)
    assert any(re.match("2 .* no log entry names it", line) for line in findings)
    assert any(re.match("1 .* stands more than once", line) for line in verifier.check_outcomes(output, source))
    assert any(re.match("3 a reader sees", line) for line in findings)


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        ("lose a row", r"2 labels/\S+ has 19 rows, its entry says 20"),
        ("lose a file", r"2 labels/\S+ is named by the log and not there"),
        ("cut a file", r"2 labels/\S+ does not open"),
        ("leave a temporary file", r"4 labels/_tmp\S+ is no finished file"),
        ("leave an upload", r"4 \S+/labels/big is an upload that was never completed"),
        ("lose an object", r"1 \S+/new.jpg has no outcome"),
        ("report another count", r"8 run r was committed, its report says otherwise"),
        ("end with an error", r"8 the exit code was 3, and the newest claim is closed"),
        ("keep a secret", r"9 a secret stands in _runs/r/report.json"),
        ("keep a secret in a compressed value", r"9 a secret stands in labels/part-000.parquet"),
        ("keep a secret in a footer", r"9 a secret stands in labels/part-000.parquet"),
        ("keep a secret in a column's metadata", r"9 a secret stands in labels/part-000.parquet"),
    ],
)
def test_every_invariant_that_files_can_break_has_its_finding(
    s3: S3Server, source: Place, model: Path, change: str, finding: str
) -> None:
    name = change.replace(" ", "-")
    inside = Place(f"s3://{source.bucket}/{name}-in", s3.client)
    for key in sorted(source.etags())[:20]:
        s3.client.put_object(Bucket=source.bucket, Key=inside.prefix + key, Body=source.read(key))
    output = Place(f"s3://{source.bucket}/{name}", s3.client)
    Writer(s3, model).run(inside, output)
    assert verifier.check(output, inside, exit_code=0, secrets=["hidden"]) == []
    file = "labels/part-000.parquet"

    def put(place: Place, key: str, data: bytes) -> None:
        s3.client.put_object(Bucket=source.bucket, Key=place.prefix + key, Body=data)

    if change == "lose a row":
        sink = io.BytesIO()
        pq.write_table(pq.read_table(io.BytesIO(output.read(file))).slice(1), sink)
        put(output, file, sink.getvalue())
    elif change == "lose a file":
        s3.client.delete_object(Bucket=source.bucket, Key=output.prefix + file)
    elif change == "cut a file":
        put(output, file, output.read(file)[:-10])
    elif change == "leave a temporary file":
        put(output, "labels/_tmp.parquet", output.read(file))
    elif change == "leave an upload":
        s3.client.create_multipart_upload(Bucket=source.bucket, Key=output.prefix + "labels/big")
    elif change == "lose an object":
        put(inside, "new.jpg", b"x")
    elif change == "report another count":
        put(output, "_runs/r/report.json", b'{"exit_code": 0, "counts": {"labeled": 19, "failed": 0}}')
    elif change == "keep a secret":
        put(output, "_runs/r/report.json", output.read("_runs/r/report.json")[:-1] + b', "key": "hidden"}')
    elif change.startswith("keep a secret in"):
        data = with_secret(change.split()[-1], pq.read_table(io.BytesIO(output.read(file))), "hidden")
        put(output, file, data)
    exit_code = 3 if change == "end with an error" else 0
    findings = verifier.check(output, inside, exit_code=exit_code, secrets=["hidden"])
    assert any(re.match(finding, line) for line in findings), findings


def test_a_report_with_another_exit_code_than_the_command_is_found_out(s3: S3Server, source: Place) -> None:
    output = Place(f"s3://{source.bucket}/open", s3.client)
    put_at_once(output, "_log/00000001.claim.json", {})
    assert verifier.check_ending(output, 3) == []
    put_at_once(output, "_runs/00000001-abc/report.json", {"exit_code": 4, "counts": {}})
    assert verifier.check_ending(output, 4) == []
    assert verifier.check_ending(output, 3) == ["8 the exit code was 3, the newest run's report says 4"]


def test_a_secret_in_a_log_is_found_out(tmp_path: Path) -> None:
    (tmp_path / "worker.out").write_text("request signed with hidden\n")
    assert verifier.check_logs([tmp_path / "worker.out", tmp_path / "rotated.out"], ["hidden"]) != []
    assert verifier.check_logs([tmp_path / "worker.out"], ["canary"]) == []


def with_secret(where: str, table: pa.Table, secret: str) -> bytes:
    """The table as a file that holds a secret in one place, where no search through its bytes finds it if it is in a
    value (compressed) or in the metadata of a column (base64).
    """
    if where == "value":
        table = table.append_column("note", pa.array([secret] * len(table)))
    elif where == "footer":
        table = table.replace_schema_metadata({"note": secret})
    else:
        field = pa.field("note", pa.string(), metadata={"note": secret})
        table = table.append_column(field, pa.array(["x"] * len(table)))
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="gzip", write_statistics=False)
    assert (secret.encode() in sink.getvalue()) is (where == "footer")
    return sink.getvalue()


def test_work_that_nothing_explains_is_found_out() -> None:
    undisturbed = verifier.Stretch(set(), {"a": 1, "b": 1, "c": 1})
    assert verifier.check_redone([undisturbed, verifier.Stretch({"b"}, {"a": 1, "c": 1})], 0) == []
    stretches = [undisturbed, verifier.Stretch({"b"}, {"a": 3, "b": 2})]
    assert verifier.check_redone(stretches, 4) == []
    assert verifier.check_redone(stretches, 3) == ["6 4 reads that no kill explains, 3 that something else does"]


def test_memory_and_time_beyond_their_bounds_are_found_out() -> None:
    assert verifier.check_bounds(2000, 9.0, max_bytes=2000, max_s=9) == []
    assert verifier.check_bounds(2001, 9.0, max_bytes=2000, max_s=9) == [
        "7 a process took 2,001 bytes, 2,000 are allowed"
    ]
    assert verifier.check_bounds(2000, 11.0, max_bytes=2000, max_s=9) == ["7 it took 11 s, 9 are allowed"]


class Vanishing(Place):
    """An output whose files are gone when somebody who has just seen them in a listing reads them."""

    def read(self, key: str) -> bytes:
        self.client.delete_object(Bucket=self.bucket, Key=self.prefix + key)
        return super().read(key)


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        ("gone", "3 labels/a.parquet was there, and is now gone"),
        ("another", "3 labels/a.parquet was there, and is now another"),
        ("partial", "3 a reader cannot open labels/b.parquet: "),
        ("gone before it is read", "3 a reader cannot open labels/b.parquet: "),
    ],
)
def test_a_file_that_changes_under_a_reader_is_found_out(s3: S3Server, bucket: str, change: str, finding: str) -> None:
    sink = io.BytesIO()
    pq.write_table(pa.table({"run_seq": [1], "uri": ["s3://in/1"]}), sink)
    place = Vanishing if change == "gone before it is read" else Place
    output = Place(f"{bucket}/out", s3.client)

    def put(key: str, data: bytes) -> None:
        s3.client.put_object(Bucket=output.bucket, Key=output.prefix + key, Body=data)

    reader = Reader(output)
    put("labels/a.parquet", sink.getvalue())
    reader.poll()
    assert reader.findings == []
    if change == "gone":
        s3.client.delete_object(Bucket=output.bucket, Key=f"{output.prefix}labels/a.parquet")
    elif change == "another":
        put("labels/a.parquet", sink.getvalue() + b"x")
    else:
        put("labels/b.parquet", sink.getvalue()[:-10] if change == "partial" else sink.getvalue())
        reader._output = place(output.url, s3.client)
    reader.poll()
    assert [line.startswith(finding) for line in reader.findings] == [True]
