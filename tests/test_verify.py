"""An output of three nights in two spaces, and every damage to it: each is the finding of one check and of no other."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import boto3
import checkpoints
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from cluster import ROOT, Head
from outputs import Copy, flip_byte, replaced

from pipeline import schema, verify, verify_catalog, verify_files
from pipeline.draw import draw_file
from pipeline.errors import ConfigError, SourceError
from pipeline.log import FileRef

NUM_IMAGES = 90
CHECKS = ["log", "files", "rows", "catalog", "listing", "sample"]


@pytest.fixture(scope="module")
def root(head: Head, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """in/, and out/ of three nights over it: two of model a, with new, changed, gone and broken pictures; one of b,
    without embeddings.
    """
    folder = tmp_path_factory.mktemp("verify")

    def draw(indexes: range) -> list[Path]:
        drawn = [draw_file(5, index, broken_fraction=0.1) for index in indexes]
        paths = [folder / "in" / file.path for file in drawn]
        for path, file in zip(paths, drawn, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.data)
        return paths

    def label(model: str, *more: str) -> None:
        checkpoint = checkpoints.write_small(folder / model, seed=ord(model))
        options = ("--input", str(folder / "in"), "--output", str(folder / "out"), "--model", str(checkpoint))
        done = head.label_bucket(*options, "--gpu-actors=1", "--run-date=2026-11-22", *more)
        assert done.returncode == 0, done.stderr

    paths = [path for path in draw(range(NUM_IMAGES)) if "/broken/" not in str(path)]
    label("a")
    paths[0].unlink()
    paths[1].unlink()
    paths[2].write_bytes(paths[3].read_bytes())
    draw(range(NUM_IMAGES, NUM_IMAGES + 10))
    label("a")
    label("b", "--embedding=none", "--top-k=3")
    return folder


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> Copy:
    """The output, to be damaged."""
    return Copy(root / "out", tmp_path / "out")


def look(output: Path, *, num_sample_rows: int = 0, **options: Any) -> list[verify.Check]:
    """Every check of an output, in this process."""
    audit = verify.Audit(output_url=str(output), num_sample_rows=num_sample_rows, **options)
    return verify.verify(audit, itertools.starmap)


def failed(output: Path, **options: Any) -> dict[str, str]:
    """The checks that failed, and what they found."""
    checks = look(output, **options)
    return {each.name: " ".join([each.text, *each.examples]) for each in checks if each.status == "FAILED"}


def space_of(copy: Copy, run_seq: int) -> str:
    return str(copy.entry(run_seq)["identity"]["space_id"])


# --- healthy ------------------------------------------------------------------------------------------------------


def test_a_healthy_output_passes_every_check(root: Path) -> None:
    checks = look(root / "out", num_sample_rows=1000)
    assert {each.status for each in checks} == {"ok"}, verify.summary(checks)
    assert [each.name.split()[0] for each in checks] == [*CHECKS, *CHECKS[3:]]
    assert all(not each.examples for each in checks)
    labels = pq.read_table(root / "out" / "labels", partitioning=None)
    assert set(labels["run_seq"].to_pylist()) == {1, 2, 3}
    num_now = {seq: pc.sum(pc.equal(labels["run_seq"], seq)).as_py() for seq in (1, 2, 3)}
    by_name = {each.name: each.text for each in checks}
    spaces = sorted({each.name.split()[1] for each in checks if " " in each.name})
    # Of the first night, two are gone and one has changed.
    num_of_a = num_now[1] - 3 + num_now[2]
    assert sorted(int(by_name[f"sample {space}"].split()[0]) for space in spaces) == sorted([num_of_a, num_now[3]])
    assert all("98 listed now = 98 accounted for" in by_name[f"listing {space}"] for space in spaces)
    assert verify.summary(checks).splitlines()[-1] == "verified: 9 checks ok, 0 failed, 0 skipped"


def test_a_catalog_of_several_files_passes(copy: Copy) -> None:
    copy.rewrite_catalog(2, lambda table: table, num_files=4)
    checks = look(copy.root, num_sample_rows=5)
    assert {each.status for each in checks} == {"ok"}, verify.summary(checks)
    assert any("98 keys in 4 file(s)" in each.text for each in checks)


def test_only_the_asked_for_space_is_looked_at(copy: Copy) -> None:
    flip_byte(copy.path(3))
    assert set(failed(copy.root)) == {"files"}
    assert failed(copy.root, space_id=space_of(copy, 1)) == {}
    with pytest.raises(ConfigError, match=r"^--space other: expected one of "):
        look(copy.root, space_id="other")


def test_what_changed_in_the_source_since_is_counted_and_no_failure(root: Path) -> None:
    files = sorted(path for path in (root / "in").rglob("*.*") if "broken" not in str(path))
    extra, hidden, stat = root / "in" / "zz.png", root / "hidden", files[1].stat()
    extra.write_bytes(files[2].read_bytes())
    files[0].rename(hidden)
    os.utime(files[1], ns=(stat.st_atime_ns, stat.st_mtime_ns + 5))
    try:
        checks = look(root / "out", num_sample_rows=1000)
    finally:
        extra.unlink()
        hidden.rename(files[0])
        os.utime(files[1], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert {each.status for each in checks} == {"ok"}, verify.summary(checks)
    listings = [each.text for each in checks if each.name.startswith("listing ")]
    assert all(
        "98 listed now = 96 accounted for + 0 filtered + 1 changed + 1 new since run" in each for each in listings
    )
    assert all(each.endswith("; 1 gone") for each in listings)
    samples = [each.text for each in checks if each.name.startswith("sample ")]
    assert all(each.endswith("; passed by, as they changed or cannot be read now: 2") for each in samples)


def test_what_the_catalog_lacks_is_new_or_for_a_limited_run_not_looked_at(copy: Copy) -> None:
    copy.rewrite_catalog(2, lambda table: table.slice(0, 60))
    space = space_of(copy, 1)
    (listing,) = [each for each in look(copy.root, space_id=space) if each.name == f"listing {space}"]
    assert "60 accounted for + 0 filtered + 0 changed + 38 new since run" in listing.text
    assert listing.examples == ()
    claim = copy.root / "_log" / "00000002.claim.json"
    later = datetime.now(UTC) + timedelta(days=2)
    claim.write_text(json.dumps({**json.loads(claim.read_text()), "created_at": later.isoformat()}))
    (listing,) = [each for each in look(copy.root, space_id=space) if each.name == f"listing {space}"]
    assert listing.examples[0].startswith("warning: 38 of the new ones are dated more than a day before that run began")
    entry = copy.entry(2)
    copy.set_entry(2, {**entry, "identity": {**entry["identity"], "limit": 60}})
    (listing,) = [each for each in look(copy.root, space_id=space) if each.name == f"listing {space}"]
    assert "+ 0 new since run" in listing.text
    assert "+ 38 not looked at (it had a limit or a manifest); 0 gone" in listing.text
    assert listing.examples == ()


def test_a_snapshot_that_lacks_rows_of_its_runs_is_noticed_while_their_files_still_stand(copy: Copy) -> None:
    second = copy.entry(2)
    snapshot = {
        **{name: second[name] for name in ("schema_version", "identity", "run_date", "model_id", "model_revision")},
        **{"kind": "snapshot", "run_id": "00000004-00000000", "run_seq": 4, "through_seq": 2, "committed_at": "now"},
        "labels": [],
    }
    copy.set_entry(4, snapshot)
    assert set(failed(copy.root)) == {f"catalog {space_of(copy, 1)}"}


def test_files_of_the_open_run_are_in_progress_and_others_are_not(copy: Copy) -> None:
    entry = copy.entry(3)
    (copy.root / "_log/00000003.json").unlink()
    checks = look(copy.root)
    assert {each.status for each in checks} == {"ok", "skipped"}, verify.summary(checks)
    (files,) = [each for each in checks if each.name == "files"]
    assert files.examples[0].startswith("warning: 2 files of the open run " + entry["run_id"])
    shutil.copy(copy.path(1), copy.path(1).with_name("part-extra.parquet"))
    assert set(failed(copy.root)) == {"files"}


def test_rows_of_retired_runs_are_looked_for_in_the_snapshot(copy: Copy) -> None:
    """As compaction leaves an output: the current view in one file, the files it replaced gone."""
    first, second = copy.entry(1), copy.entry(2)
    gone = set(pq.read_table(copy.path(2, "deletions"))["uri"].to_pylist())
    new = pq.read_table(copy.path(2))
    old = pq.read_table(copy.path(1)).filter
    is_old = [
        uri not in gone and uri not in set(new["uri"].to_pylist())
        for uri in pq.read_table(copy.path(1))["uri"].to_pylist()
    ]
    view = pa.concat_tables([old(pa.array(is_old)), new], promote_options="none").sort_by("uri")
    like = first["labels"][0]["key"]
    key = f"snapshots/space={space_of(copy, 1)}/00000004-00000000/part-00000-000.parquet"
    snapshot = {
        **{name: second[name] for name in ("schema_version", "identity", "run_date", "model_id", "model_revision")},
        **{"kind": "snapshot", "run_id": "00000004-00000000", "run_seq": 4, "through_seq": 3, "committed_at": "now"},
        "labels": [copy.write(key, view, like, run_id="00000004-00000000")],
    }
    paths = [copy.path(1), copy.path(2)]
    copy.set_entry(4, snapshot)
    assert failed(copy.root) == {}
    retired = {
        **snapshot,
        "kind": "retired",
        "run_id": "00000005-00000000",
        "run_seq": 5,
        "labels": [],
        "retires": [1, 2],
    }
    copy.set_entry(5, retired)
    for path in paths:
        path.unlink()
    checks = look(copy.root, num_sample_rows=10)
    assert {each.status for each in checks} == {"ok"}, verify.summary(checks)

    snapshot["labels"] = [copy.write(key, view.slice(1), key, run_id="00000004-00000000")]
    copy.set_entry(4, snapshot)
    assert set(failed(copy.root)) == {f"catalog {space_of(copy, 1)}"}


# --- one damage, one finding --------------------------------------------------------------------------------------


def flipped_byte(copy: Copy) -> str:
    flip_byte(copy.path(1))
    return "files"


def lost_labels(copy: Copy) -> str:
    copy.path(1).unlink()
    return "files"


def lost_deletions(copy: Copy) -> str:
    copy.path(2, "deletions").unlink()
    return "files"


def lost_canaries(copy: Copy) -> str:
    (copy.root / copy.entry(1)["canaries"]["key"]).unlink()
    return "files"


def foreign_file(copy: Copy) -> str:
    (copy.path(1).parent / "notes.txt").write_text("mine")
    return "files"


def forgotten_file(copy: Copy) -> str:
    shutil.copy(copy.path(1), copy.path(1).with_name("part-extra.parquet"))
    return "files"


def file_of_another_space(copy: Copy) -> str:
    entry = copy.entry(2)
    (own,), (other,) = entry["labels"], copy.entry(3)["labels"]
    shutil.copy(copy.root / other["key"], copy.root / own["key"])
    copy.set_entry(2, {**entry, "labels": [{**other, "key": own["key"]}]})
    unchanged = entry["counts"]["unchanged"] + own["num_rows"] - other["num_rows"]
    changes = {"labeled": other["num_rows"], "unchanged": unchanged}
    copy.set_entry(2, {**copy.entry(2), "counts": {**entry["counts"], **changes}})
    return "files"


def unsorted_rows(copy: Copy) -> str:
    copy.rewrite(1, lambda table: table.take([1, 0, *range(2, len(table))]))
    return "files"


def other_bounds(copy: Copy) -> str:
    entry = copy.entry(1)
    entry["labels"][0]["last_key"] += "x"
    copy.set_entry(1, entry)
    return "files"


def other_columns(copy: Copy) -> str:
    copy.rewrite(1, lambda table: table.drop_columns(["version_id"]))
    return "files"


def log_hole(copy: Copy) -> str:
    (copy.root / "_log/00000002.json").unlink()
    return "log"


def lost_object(copy: Copy) -> str:
    entry = copy.entry(1)
    copy.set_entry(1, {**entry, "counts": {**entry["counts"], "listed": entry["counts"]["listed"] + 1}})
    return "log"


def more_rows_than_counted(copy: Copy) -> str:
    copy.rewrite(1, lambda table: pa.concat_tables([table, table.slice(len(table) - 1)]))
    return "log rows"  # one too many is also there twice


def duplicate_in_a_second_file(copy: Copy) -> str:
    entry = copy.entry(1)
    (own,) = entry["labels"]
    key = own["key"].replace("-000.parquet", "-001.parquet")
    again = copy.write(key, pq.read_table(copy.root / own["key"]).slice(7, 1), own["key"])
    counts = {name: entry["counts"][name] + 1 for name in ("listed", "labeled")}
    copy.set_entry(1, {**entry, "labels": [own, again], "counts": {**entry["counts"], **counts}})
    return "rows"


def scaled_embedding(copy: Copy) -> str:
    copy.rewrite(1, lambda table: replaced(table, "embedding", lambda all_: [np.array(all_[0]) * 2, *all_[1:]]))
    return "rows"


def score_above_one(copy: Copy) -> str:
    def change(scores: list[Any]) -> list[Any]:
        return [[1.5, *scores[0][1:]], *scores[1:]]

    copy.rewrite(1, lambda table: replaced(table, "label_scores", change))
    return "rows"


def four_labels(copy: Copy) -> str:
    copy.rewrite(1, lambda table: replaced(table, "label_names", lambda names: [names[0][:4], *names[1:]]))
    return "rows"


def other_run_seq(copy: Copy) -> str:
    copy.rewrite(2, lambda table: replaced(table, "run_id", lambda ids: ["00000009-00000000", *ids[1:]]))
    return "rows"


def lost_catalog_row(copy: Copy) -> str:
    copy.rewrite_catalog(2, lambda table: table.filter(pa.array([row != 40 for row in range(len(table))])))
    return "catalog"


def catalog_of_the_night_before(copy: Copy) -> str:
    entry = copy.entry(2)
    copy.set_entry(2, {**entry, "catalog": copy.entry(1)["catalog"]})
    return "catalog"


def swapped_row(copy: Copy) -> str:
    """A label of a picture that is not there in place of one that is."""

    def change(table: pa.Table) -> pa.Table:
        uris = table["uri"].to_pylist()
        uris[5] = f"{uris[4]}-"
        table = replaced(table, "uri", lambda _: uris)
        return replaced(table, "image_id", lambda _: [schema.image_id(uri) for uri in uris])

    copy.rewrite(1, change)
    return "catalog"


def other_kind_of_failure(copy: Copy) -> str:
    def change(kinds: list[Any]) -> list[Any]:
        return ["empty" if kind == "corrupt" else "corrupt" for kind in kinds]

    copy.rewrite(1, lambda table: replaced(table, "failure_kind", change), "dead_letters")
    return "catalog"


def altered_label(copy: Copy) -> str:
    def change(rows: list[Any]) -> list[Any]:
        rows[9][0], rows[9][-1] = rows[9][-1], rows[9][0]
        return rows

    copy.rewrite(1, lambda table: replaced(replaced(table, "label_names", change), "label_ids", change))
    return "sample"


def altered_name(copy: Copy) -> str:
    def change(rows: list[Any]) -> list[Any]:
        rows[9][1] = "something else"
        return rows

    copy.rewrite(1, lambda table: replaced(table, "label_names", change))
    return "sample"


def embedding_of_a_neighbour(copy: Copy) -> str:
    copy.rewrite(1, lambda table: replaced(table, "embedding", lambda all_: [*all_[1:], all_[0]]))
    return "sample"


DAMAGES: list[Callable[[Copy], str]] = [
    *(flipped_byte, lost_labels, lost_deletions, foreign_file, forgotten_file, file_of_another_space, unsorted_rows),
    *(other_bounds, other_columns, log_hole, lost_object, more_rows_than_counted, duplicate_in_a_second_file),
    *(scaled_embedding, score_above_one, four_labels, other_run_seq, lost_catalog_row, catalog_of_the_night_before),
    *(swapped_row, other_kind_of_failure, altered_label, altered_name, embedding_of_a_neighbour, lost_canaries),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda each: each.__name__)
def test_a_damage_is_the_finding_of_one_check(copy: Copy, damage: Callable[[Copy], str]) -> None:
    expected = damage(copy)
    is_about_labels = expected == "sample"
    found = failed(copy.root, num_sample_rows=1000 if is_about_labels else 0)
    assert {name.split()[0] for name in found} == set(expected.split()), found


def test_findings_name_what_was_expected_and_what_was_found(copy: Copy) -> None:
    flip_byte(copy.path(1))
    copy.path(2).unlink()
    (found,) = failed(copy.root).values()
    assert found.startswith("2 findings; ")
    assert f"{copy.entry(1)['labels'][0]['key']}: expected SHA-256 " in found
    assert (
        f"{copy.entry(2)['labels'][0]['key']}: expected {copy.entry(2)['labels'][0]['size_bytes']} bytes, found nothing"
        in found
    )


def test_many_findings_are_counted_and_the_first_few_told(copy: Copy) -> None:
    copy.rewrite(1, lambda table: replaced(table, "embedding", lambda rows: [np.array(row) * 2 for row in rows]))
    (rows,) = [each for each in look(copy.root) if each.name == "rows"]
    num_rows = copy.entry(1)["counts"]["labeled"]
    assert rows.num_findings == num_rows
    assert len(rows.examples) == verify_files.MAX_EXAMPLES
    assert f"and {num_rows - verify_files.MAX_EXAMPLES} more" in verify.summary([rows])


def test_without_checksums_a_cut_file_is_found_and_rows_are_not_looked_at(copy: Copy) -> None:
    path = copy.path(1)
    path.write_bytes(path.read_bytes()[:-1])
    assert set(failed(copy.root, reads_files=False)) == {"files"}
    assert [each.status for each in look(copy.root, reads_files=False) if each.name == "rows"] == ["skipped"]


def test_a_damaged_catalog_is_one_finding(copy: Copy) -> None:
    (copy.root / copy.entry(2)["catalog"]["key"]).write_text("{}")
    checks = look(copy.root)
    assert {each.name for each in checks if each.status == "FAILED"} == {"files"}
    space = space_of(copy, 1)
    assert {each.status for each in checks if each.name.endswith(space)} == {"skipped"}


def test_a_model_that_is_not_here_is_skipped_unless_a_sample_was_asked_for(root: Path, copy: Copy) -> None:
    with moved(root / "a"):
        checks = look(copy.root, num_sample_rows=5, space_id=space_of(copy, 1))
        assert [(each.status, "no such folder" in each.text) for each in checks[-1:]] == [("skipped", True)]
        assert "FAILED" not in {each.status for each in checks}
        found = failed(copy.root, num_sample_rows=5, space_id=space_of(copy, 1), is_sample_required=True)
        assert set(found) == {f"sample {space_of(copy, 1)}"}
        checkpoints.write_small(root / "a", seed=7)
        checks = look(copy.root, num_sample_rows=5, space_id=space_of(copy, 1))
        shutil.rmtree(root / "a")
        assert [(each.status, "expected the model of space" in each.text) for each in checks[-1:]] == [
            ("skipped", True)
        ]


@contextmanager
def moved(folder: Path) -> Iterator[None]:
    folder.rename(folder.with_name("elsewhere"))
    try:
        yield
    finally:
        folder.with_name("elsewhere").rename(folder)


def test_an_output_that_is_not_there_or_empty_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="expected a folder, found nothing"):
        look(tmp_path / "none")
    with pytest.raises(ConfigError, match="expected an output of label_bucket, found no log in it"):
        look(tmp_path)


# --- pieces -------------------------------------------------------------------------------------------------------


def test_files_overlap_where_their_bounds_do() -> None:
    def ref(first: str, last: str) -> FileRef:
        return FileRef(key=f"{first}-{last}", num_rows=1, size_bytes=1, sha256="", first_key=first, last_key=last)

    apart = [ref("a", "b"), ref("c", "d"), ref("e", "e")]
    assert list(verify_files.overlapping(apart[::-1])) == []
    pairs = verify_files.overlapping([*apart, ref("b", "c"), ref("a", "z")])
    assert {tuple(sorted(each.key for each in pair)) for pair in pairs} == {
        *(("a-b", "a-z"), ("a-b", "b-c"), ("a-z", "b-c"), ("a-z", "c-d"), ("a-z", "e-e"), ("b-c", "c-d")),
    }


def test_the_sample_is_the_same_for_a_seed_and_another_one_for_another() -> None:
    ids = np.arange(1000, dtype=np.int64)
    ranks = [verify_catalog._ranks(ids, seed) for seed in (0, 0, 1)]
    assert (ranks[0] == ranks[1]).all()
    first, other = (set(np.argsort(each)[:100].tolist()) for each in ranks[1:])
    assert len(first & other) < 30
    assert 300 < np.mean(sorted(first)) < 700


# --- the command --------------------------------------------------------------------------------------------------


def run(head: Head, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "jobs/verify_labels.py", *arguments],
        env={**head.environment, "RAY_ADDRESS": head.address},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.mark.slow
def test_the_command_verifies_an_output_in_a_bucket_and_one_with_a_lost_file(
    head: Head, copy: Copy, bucket: str
) -> None:
    client, name = boto3.client("s3"), bucket.removeprefix("s3://").partition("/")[0]
    keys = [path.relative_to(copy.root).as_posix() for path in copy.root.rglob("*") if path.is_file()]
    for key in keys:
        client.upload_file(str(copy.root / key), name, f"out/{key}")
    done = run(head, "--output", f"s3://{name}/out", "--sample=10")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "verified: 9 checks ok, 0 failed, 0 skipped"
    assert all(line.startswith("ok  ") for line in lines[:-1])

    client.delete_object(Bucket=name, Key=f"out/{copy.entry(1)['labels'][0]['key']}")
    done = run(head, "--output", f"s3://{name}/out", "--sample=0", "--no-listing")
    assert done.returncode == 5, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "verified: 4 checks ok, 1 failed, 4 skipped"


def test_the_command_says_in_one_line_what_it_cannot_do(head: Head, copy: Copy, tmp_path: Path) -> None:
    other = run(head, "--output", str(copy.root), "--space", "other")
    assert other.returncode == 2
    assert other.stderr.splitlines()[-1].startswith("verify_labels: exit code 2: --space other: expected one of ")
    absent = run(head, "--output", str(tmp_path / "none"))
    assert absent.returncode == 3
    assert absent.stderr.splitlines()[-1].startswith("verify_labels: exit code 3: ")
