"""Is an output right? Judged from its files alone, by code that shares nothing with the pipeline.

In: where an output and its source are, and what the test knows (exit codes, a fault-free output, secrets). Out:
findings, one line each, that begin with the number of the invariant they break; none if all hold:

    1  every object of the source has exactly one outcome, that of its present version
    2  every file below labels/ and failures/ opens and is what its log entry says
    3  a reader that polls meanwhile never sees a duplicate, a partial file or a shrinking count
    4  no temporary file and no open multipart upload is left
    5  labels are those of a fault-free run, embeddings within 1e-3 cosine; and those that transformers computes
    6  work that was done again is no more than what was in flight at a kill, or hit by a fault
    7  memory and time are bounded
    8  exit code, report and log entry agree
    9  no secret anywhere
"""

import contextlib
import hashlib
import io
import itertools
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from botocore.exceptions import ClientError

KINDS = {"labels": "labels", "failures": "dead_letters", "deletions": "deletions"}
"""Folder -> what a log entry calls its files."""
MIN_COSINE = 1 - 1e-3
MAX_SCORE_DIFFERENCE = 1e-3


class Place:
    """Objects below a prefix of a bucket, or only the `first` of them, by a boto3 client that meets no faults."""

    def __init__(self, url: str, client: Any, *, first: int | None = None) -> None:
        self.url, self.first = url, first
        self.bucket, _, prefix = url.removeprefix("s3://").partition("/")
        self.prefix = f"{prefix}/"
        self.client = client

    def etags(self, below: str = "") -> dict[str, str]:
        """Key below the prefix -> etag."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.prefix + below)
        found = {
            item["Key"].removeprefix(self.prefix): item["ETag"].strip('"')
            for page in pages
            for item in page.get("Contents", [])
        }
        return dict(itertools.islice(found.items(), self.first))

    def read(self, key: str) -> bytes:
        """The bytes of an object."""
        data: bytes = self.client.get_object(Bucket=self.bucket, Key=self.prefix + key)["Body"].read()
        return data

    def open_uploads(self) -> list[str]:
        """Keys of multipart uploads that were begun and not completed."""
        found = self.client.list_multipart_uploads(Bucket=self.bucket, Prefix=self.prefix)
        return [each["Key"] for each in found.get("Uploads", [])]


def read_rows(output: Place, kind: str) -> list[dict[str, Any]]:
    """All rows of labels/, failures/ or deletions/ in key order of the files."""
    keys = sorted(key for key in output.etags(f"{kind}/") if key.endswith(".parquet"))
    return [row for key in keys for row in pq.ParquetFile(io.BytesIO(output.read(key))).read().to_pylist()]


def check(
    output: Place, source: Place, *, exit_code: int, like: Place | None = None, secrets: Sequence[str] = ()
) -> list[str]:
    """Every invariant that the files alone can break: 1, 2, 4, 5 (against the rows of `like`), 8 and 9."""
    findings = [*check_files(output), *check_leftovers(output), *check_secrets(output, secrets)]
    if any(line.startswith("2 ") for line in findings):
        return findings  # what does not open has no rows
    findings += check_outcomes(output, source)
    findings += check_ending(output, exit_code)
    return findings + (check_like(output, like) if like is not None else [])


def check_outcomes(output: Place, source: Place) -> list[str]:
    """1: no uri twice in a run; the newest outcome of every uri is that of the object that is there now."""
    findings = []
    newest: dict[str, tuple[int, str | None]] = {}
    for kind in KINDS:
        seen: Counter[tuple[int, str]] = Counter()
        for row in read_rows(output, kind):
            place = (row["run_seq"], row["uri"])
            seen[place] += 1
            if seen[place] == 2:
                findings.append(f"1 {row['uri']} stands more than once in {kind}/ of run {row['run_seq']}")
            before = newest.get(row["uri"])
            if before is not None and before[0] == row["run_seq"] and seen[place] == 1:
                findings.append(f"1 {row['uri']} has two outcomes in run {row['run_seq']}")
            if before is None or row["run_seq"] >= before[0]:
                newest[row["uri"]] = (row["run_seq"], None if kind == "deletions" else row["etag"])
    found = {uri: etag for uri, (_, etag) in newest.items() if etag is not None}
    wanted = {f"{source.url}/{key}": etag for key, etag in source.etags().items()}
    findings += [f"1 {uri} has no outcome" for uri in sorted(wanted.keys() - found.keys())]
    findings += [f"1 {uri} has an outcome and does not exist" for uri in sorted(found.keys() - wanted.keys())]
    both = sorted(wanted.keys() & found.keys())
    return findings + [
        f"1 {uri}: the outcome of {found[uri]}, not of {wanted[uri]}" for uri in both if found[uri] != wanted[uri]
    ]


def check_files(output: Place) -> list[str]:
    """2: what readers glob is exactly what the log names, byte for byte."""
    findings = []
    named: dict[str, Any] = {}
    for entry in entries(output):
        named |= {each["key"]: each for name in KINDS.values() for each in entry[name]}
    present = {key for kind in KINDS for key in output.etags(f"{kind}/")}
    findings += [f"2 {key} is named by the log and not there" for key in sorted(named.keys() - present)]
    findings += [
        f"2 {key} stands where readers look and no log entry names it" for key in sorted(present - named.keys())
    ]
    for key in sorted(present):
        data = output.read(key)
        try:
            num_rows = pq.ParquetFile(io.BytesIO(data)).read().num_rows
        except (pa.ArrowException, OSError) as error:
            findings.append(f"2 {key} does not open: {error}")
            continue
        said = named.get(key)
        if said is not None and (num_rows, hashlib.sha256(data).hexdigest()) != (said["num_rows"], said["sha256"]):
            findings.append(f"2 {key} has {num_rows} rows, its entry says {said['num_rows']}, or other bytes")
    return findings


def check_leftovers(output: Place) -> list[str]:
    """4: below what readers glob only finished files ever stand, and nothing waits to be completed."""
    odd = re.compile(r"(^|/)[._]|tmp|temp|staging|partial", re.IGNORECASE)
    findings = [f"4 {key} is no finished file" for key in output.etags("labels/") if odd.search(key)]
    return findings + [f"4 {key} is an upload that was never completed" for key in output.open_uploads()]


def newest(output: Place) -> dict[str, dict[str, Any]]:
    """The row of each uri, of labels/ or failures/, whichever came last."""
    rows = [row for kind in ("labels", "failures") for row in read_rows(output, kind)]
    return {row["uri"]: row for row in sorted(rows, key=lambda row: int(row["run_seq"]))}


def check_like(output: Place, like: Place) -> list[str]:
    """5: of everything the same failure or labels, nearly the same scores and vectors, as another output has."""
    findings = []
    wanted = newest(like)
    for uri, row in sorted(newest(output).items()):
        kinds = [each.get("failure_kind") for each in (row, wanted.get(uri, {}))]
        if kinds[0] != kinds[1]:
            findings.append(f"5 {uri} failed as {kinds[0]}, without faults as {kinds[1]}")
        elif kinds[0] is None and uri not in wanted:
            findings.append(f"5 {uri} has labels, without faults it has no outcome")
        elif kinds[0] is None:
            findings += compare(row, *(wanted[uri][name] for name in ("label_ids", "label_scores", "embedding")))
    return findings


def compare(
    row: Mapping[str, Any], label_ids: Sequence[int], scores: Sequence[float], embedding: Sequence[float]
) -> list[str]:
    """5: one row against what it should be."""
    if list(row["label_ids"]) != list(label_ids):
        return [f"5 {row['uri']} has the labels {list(row['label_ids'])}, expected {list(label_ids)}"]
    difference = np.abs(np.array(row["label_scores"]) - np.array(scores)).max()
    if difference > MAX_SCORE_DIFFERENCE:
        return [f"5 {row['uri']} has scores that are off by {difference:.4f}"]
    first, second = np.array(row["embedding"]), np.array(embedding)
    cosine = first @ second / (np.linalg.norm(first) * np.linalg.norm(second))
    return [] if cosine >= MIN_COSINE else [f"5 {row['uri']} has an embedding of cosine {cosine:.5f}"]


def check_labels(output: Place, source: Place, model: Path, num_rows: int) -> list[str]:
    """5: some rows, spread over all of objects as they are now, against transformers' own processor, classes and
    forward pass.
    """
    etags = {f"{source.url}/{key}": etag for key, etag in source.etags().items()}
    rows = [row for row in read_rows(output, "labels") if etags.get(row["uri"]) == row["etag"]]
    chosen = rows[:: max(1, len(rows) // num_rows)]
    pictures = [source.read(row["uri"].removeprefix(f"{source.url}/")) for row in chosen]
    wanted = label(pictures, model, len(chosen[0]["label_ids"]))
    return [line for row, each in zip(chosen, wanted, strict=True) for line in compare(row, *each)]


def label(
    pictures: Sequence[bytes], model: Path, num_labels: int
) -> Iterator[tuple[list[int], list[float], list[float]]]:
    """Ids and scores of the best labels and the embedding of each picture, by transformers alone."""
    import torch
    from PIL import Image
    from transformers import DeiTForImageClassificationWithTeacher, DeiTImageProcessorPil

    processor = DeiTImageProcessorPil.from_pretrained(model)
    network = DeiTForImageClassificationWithTeacher.from_pretrained(model).train(False)
    images = [Image.open(io.BytesIO(data)).convert("RGB") for data in pictures]
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several wait for each other where the machine is busy
    with torch.inference_mode():
        scores, ids = network(pixels).logits.softmax(1).topk(num_labels)
        embeddings = network.deit(pixels).last_hidden_state[:, :2].mean(1)
    torch.set_num_threads(num_threads)
    yield from zip(ids.tolist(), scores.tolist(), embeddings.tolist(), strict=True)


class Stretch(NamedTuple):
    """What was read between two kills, or before the first or after the last."""

    done: Set[str]
    """Objects that were in a part when it began."""
    num_reads: Mapping[str, int]


def check_redone(stretches: Sequence[Stretch], num_explained: int) -> list[str]:
    """6: reads of source objects that no kill explains, which are those of what is in a part and all but the first
    between two kills, against `num_explained` that something else does.
    """
    num_again = sum(
        number - (key not in stretch.done) for stretch in stretches for key, number in stretch.num_reads.items()
    )
    if num_again <= num_explained:
        return []
    return [f"6 {num_again} reads that no kill explains, {num_explained} that something else does"]


def check_bounds(peak_bytes: int, took_s: float, *, max_bytes: int, max_s: float) -> list[str]:
    """7: the largest process, and the time it all took."""
    findings = [] if peak_bytes <= max_bytes else [f"7 a process took {peak_bytes:,} bytes, {max_bytes:,} are allowed"]
    return findings + ([] if took_s <= max_s else [f"7 it took {took_s:.0f} s, {max_s:.0f} are allowed"])


def check_ending(output: Place, exit_code: int) -> list[str]:
    """8: of the newest run: exit code 0, a report that says so and a commit go together, with the same counts."""
    runs = [entry for entry in entries(output) if entry["kind"] == "run"]
    reports = {
        key.split("/")[1]: json.loads(output.read(key))
        for key in output.etags("_runs/")
        if key.endswith("/report.json")
    }
    findings = []
    for entry in runs:
        report = reports.get(entry["run_id"])
        if report is None or report["exit_code"] != 0 or report["counts"] != entry["counts"]:
            findings.append(f"8 run {entry['run_id']} was committed, its report says otherwise")
        counts = {kind: sum(each["num_rows"] for each in entry[KINDS[kind]]) for kind in ("labels", "failures")}
        said = {"labels": entry["counts"]["labeled"], "failures": entry["counts"]["failed"]}
        if counts != said:
            findings.append(f"8 run {entry['run_id']} counts {said}, its files have {counts}")
    committed = {entry["run_id"] for entry in runs}
    findings += [
        f"8 run {run_id} reports exit code 0 and was not committed"
        for run_id, report in reports.items()
        if report["exit_code"] == 0 and run_id not in committed
    ]
    newest = max(claims(output), default=0)
    of_newest = [report["exit_code"] for run_id, report in reports.items() if run_id.startswith(f"{newest:08d}-")]
    if exit_code and any(said not in (None, exit_code) for said in of_newest):
        findings.append(f"8 the exit code was {exit_code}, the newest run's report says {of_newest[0]}")
    is_open = newest > max((entry["run_seq"] for entry in entries(output)), default=0)
    if (exit_code == 0) == is_open or (exit_code == 0 and not runs):
        findings.append(f"8 the exit code was {exit_code}, and the newest claim is {'open' if is_open else 'closed'}")
    return findings


def check_logs(files: Iterable[Path], secrets: Iterable[str]) -> list[str]:
    """9: in no log either."""
    wanted = [each.encode() for each in secrets]
    findings = []
    for path in files:
        with contextlib.suppress(FileNotFoundError):  # it was rotated meanwhile
            data = path.read_bytes()
            findings += [f"9 a secret stands in {path}" for each in wanted if each in data]
    return findings


def check_secrets(output: Place, secrets: Iterable[str]) -> list[str]:
    """9: in no key and no object, also where Parquet has compressed it."""
    wanted = [each.encode() for each in secrets]
    findings = []
    for key in output.etags():
        data = output.read(key)
        texts = [key.encode(), data]
        if key.endswith(".parquet"):
            with contextlib.suppress(pa.ArrowException, OSError):  # what does not open is a finding of its own
                table = pq.ParquetFile(io.BytesIO(data)).read()
                names = table.schema.to_string(truncate_metadata=False, show_field_metadata=True)
                texts += [names.encode(), repr(table.to_pylist()).encode()]
        findings += [f"9 a secret stands in {key}" for each in wanted if any(each in text for text in texts)]
    return findings


def entries(output: Place) -> list[dict[str, Any]]:
    """The commits of the log, in order."""
    return [json.loads(output.read(key)) for key in sorted(output.etags("_log/")) if ".claim." not in key]


def claims(output: Place) -> list[int]:
    """The places in the log that somebody claimed."""
    return [int(Path(key).name.partition(".")[0]) for key in output.etags("_log/") if ".claim." in key]


class Reader:
    """3: somebody who globs labels/ and failures/ all the time while a run goes on, and samples the memory it takes."""

    def __init__(self, output: Place, rss_bytes: Callable[[], int] = lambda: 0) -> None:
        self.findings: list[str] = []
        self.num_polls = 0
        self.peak_bytes = 0
        self._output, self._rss_bytes = output, rss_bytes
        self._files: dict[str, tuple[str, list[tuple[int, str]]]] = {}
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._poll_until_over, daemon=True)

    def __enter__(self) -> "Reader":
        self._thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._is_over.set()
        self._thread.join()
        self.poll()

    def _poll_until_over(self) -> None:
        while not self._is_over.wait(0.2):
            self.poll()

    def poll(self) -> None:
        """Look once."""
        self.num_polls += 1
        self.peak_bytes = max(self.peak_bytes, self._rss_bytes())
        present = {key: etag for kind in ("labels", "failures") for key, etag in self._output.etags(f"{kind}/").items()}
        for key, (etag, _) in self._files.items():
            if present.get(key) != etag:
                self.findings.append(f"3 {key} was there, and is now {'another' if key in present else 'gone'}")
        for key in present.keys() - self._files.keys():
            try:
                columns = pq.ParquetFile(io.BytesIO(self._output.read(key))).read(["run_seq", "uri"]).to_pydict()
            except (pa.ArrowException, OSError, ClientError) as error:  # the last one if it went after the listing
                self.findings.append(f"3 a reader cannot open {key}: {error}")
                continue
            outcomes = list(zip(columns["run_seq"], columns["uri"], strict=True))
            self._files[key] = (present[key], outcomes)
            seen = Counter(each for _, outcomes in self._files.values() for each in outcomes)
            twice = [each for each in outcomes if seen[each] > 1]
            if twice:
                self.findings.append(f"3 a reader sees {len(twice)} uris twice in one run, first {twice[0][1]}")
