"""Exports, taken by the real clients with the README's own text: what they hold is the view, after every night."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lance
import nights
import numpy as np
import outputs
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from nights import Nights
from opensearch_server import Index, MalformedError, OpenSearchServer, bulk, serve_opensearch
from opensearchpy import OpenSearch
from qdrant_client import QdrantClient
from servers import S3Server

from pipeline import catalog, export, log, schema, storage
from pipeline.errors import ConfigError, ConflictError, SourceError
from pipeline.export import Options, export_embeddings

DEIT, VIT = "deit-01234567", "vit-89abcdef"
ROOT = Path(__file__).resolve().parent.parent
ODD = ("line\nbreak.jpg", 'quote"back\\slash.jpg', "\u2028separator.jpg", "it's {{ é }}.jpg", "k" * 1000)


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Nights:
    """An output after nights of two spaces in which every fate occurs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalog, "MAX_FILE_ROWS", 7)
        return nights.several(storage.connect(str(tmp_path_factory.mktemp("export") / "o'ut [1]")))


@pytest.fixture(scope="module")
def evenings(several: Nights, tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """The output as it was after each run of the first space."""
    found = {}
    for run in log.read(several.output).runs:
        if run.space_id == DEIT:
            root = shutil.copytree(root_of(several), tmp_path_factory.mktemp("evening") / "out")
            for path in (root / "_log").iterdir():
                if int(path.name[:8]) > run.run_seq:
                    path.unlink()
            found[run.run_seq] = str(root)
    return found


def root_of(several: Nights) -> Path:
    return Path(several.output.root.removeprefix("file://"))


def view_of(output: str) -> dict[str, int]:
    """Uri -> run of its label, worked out from what each night published, without the code that reads views."""
    found: dict[str, int] = {}
    for run in log.read(storage.connect(output)).runs:
        if run.space_id == DEIT:
            for ref in (*run.dead_letters, *run.deletions):
                for uri in pq.read_table(Path(output) / ref.key)["uri"].to_pylist():
                    found.pop(uri, None)
            for ref in run.labels:
                found |= dict.fromkeys(pq.read_table(Path(output) / ref.key)["uri"].to_pylist(), run.run_seq)
    return found


def vector_of(uri: str) -> list[float]:
    return nights._vector(uri.removeprefix(f"{nights.ROOT}/"))


def run_export(output: str | Path, to: export.Target, target: str | Path, **options: Any) -> str:
    wanted = Options(input=str(output), to=to, output=str(target), **{"space": DEIT, **options})
    return export_embeddings(wanted)


def readme_code(import_line: str) -> dict[str, Any]:
    """What the README's own block with this import defines."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (block,) = [each for each in blocks if import_line in each]
    names: dict[str, Any] = {}
    exec(block, names)
    return names


# --- Lance --------------------------------------------------------------------------------------------------------


def lance_rows(path: str | Path, **options: Any) -> dict[str, int]:
    table = lance.dataset(str(path), **options).to_table()
    for uri, vector in zip(table["uri"].to_pylist(), table["embedding"].to_pylist(), strict=True):
        assert vector == vector_of(uri)
    found = dict(zip(table["uri"].to_pylist(), table["run_seq"].to_pylist(), strict=True))
    assert len(found) == len(table)
    return found


def test_lance_dataset_follows_the_nights_by_the_same_command(evenings: dict[int, str], tmp_path: Path) -> None:
    path = tmp_path / "o'ut [1].lance"
    for run_seq, output in evenings.items():
        said = run_export(output, "lance", path)
        assert said.startswith("wrote " if run_seq == 1 else "updated "), said
        assert lance_rows(path) == view_of(output)
        assert f"{len(view_of(output))} rows" in said
        version = lance.dataset(path).version
        assert "already" in run_export(output, "lance", path)
        assert lance.dataset(path).version == version


def test_lance_dataset_catches_up_with_all_nights_at_once(evenings: dict[int, str], tmp_path: Path) -> None:
    first, *_, last = evenings.values()
    run_export(first, "lance", tmp_path / "a.lance")
    run_export(last, "lance", tmp_path / "a.lance")
    assert lance_rows(tmp_path / "a.lance") == view_of(last)


def test_lance_dataset_has_the_schema_of_labels_and_says_what_it_is(evenings: dict[int, str], tmp_path: Path) -> None:
    run_export(evenings[1], "lance", tmp_path / "a.lance")
    dataset = lance.dataset(tmp_path / "a.lance")
    assert dataset.schema.names == schema.labels(nights.DIM).names
    vector = dataset.schema.field("embedding").type
    assert (vector.value_type, vector.list_size) == (pa.float32(), nights.DIM)
    assert dataset.schema.metadata[b"label_bucket.space_id"] == DEIT.encode()


def test_lance_finds_the_nearest_vectors(evenings: dict[int, str], tmp_path: Path) -> None:
    run_export(evenings[1], "lance", tmp_path / "a.lance")
    uris = sorted(view_of(evenings[1]))
    vectors = np.array([vector_of(uri) for uri in uris])
    query = np.array(vector_of(uris[3]), dtype=np.float32)
    dataset = lance.dataset(tmp_path / "a.lance")
    found = dataset.to_table(
        columns=["uri", "_distance"], nearest={"column": "embedding", "q": query, "k": 3, "metric": "dot"}
    )
    order = np.argsort(-(vectors @ query))[:3]
    assert found["uri"].to_pylist() == [uris[place] for place in order]
    assert found["_distance"].to_pylist() == pytest.approx(list(1 - (vectors @ query)[order]), abs=1e-5)


def test_lance_update_that_died_is_done_again(evenings: dict[int, str], tmp_path: Path) -> None:
    first, *_, last = evenings.values()
    run_export(last, "lance", tmp_path / "done.lance")
    run_export(first, "lance", tmp_path / "a.lance")
    rows = lance.dataset(tmp_path / "done.lance").to_table().slice(5, 12)
    merge = lance.dataset(tmp_path / "a.lance").merge_insert("uri")
    merge.when_matched_update_all().when_not_matched_insert_all().execute(rows)
    assert run_export(last, "lance", tmp_path / "a.lance").startswith("updated ")
    assert lance_rows(tmp_path / "a.lance") == view_of(last)


def test_lance_dataset_on_s3_is_written_updated_and_searched_there(
    s3: S3Server, bucket: str, evenings: dict[int, str]
) -> None:
    url = f"{bucket}/photos.lance"
    for output in list(evenings.values())[:2]:
        run_export(output, "lance", url)
        options = {"storage_options": {"allow_http": "true"}}
        assert lance_rows(url, **options) == view_of(output)
    assert s3.num_requests("PUT", ".manifest") >= 4  # through the variables that every other client uses
    with pytest.raises(SourceError, match=r"s3://no-such-bucket-\w+/x.lance: .*NoSuchBucket") as caught:
        run_export(evenings[1], "lance", "s3://no-such-bucket-here/x.lance")
    assert "\n" not in str(caught.value)
    assert ".rs:" not in str(caught.value)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ({"label_bucket.space_id": VIT}, f"expected a dataset of space {DEIT}, found one of space {VIT}; export to"),
        ({}, f"expected a dataset of space {DEIT}, found a dataset that is no export; export to"),
        (
            {"label_bucket.space_id": DEIT, "label_bucket.run_id": "00000099-ffffffff"},
            "holds the view after run 00000099-ffffffff, which is not in the log of this --input",
        ),
    ],
)
def test_lance_dataset_of_something_else_is_not_touched(
    evenings: dict[int, str], tmp_path: Path, spoil: dict[str, str], message: str
) -> None:
    path = tmp_path / "a.lance"
    lance.write_dataset(pa.table({"uri": ["x"]}).replace_schema_metadata(spoil), path)
    with pytest.raises(ConflictError, match=re.escape(message)):
        run_export(evenings[1], "lance", path)
    assert lance.dataset(path).version == 1


def test_lance_dataset_with_rows_of_somebody_else_never_says_that_it_is_up_to_date(
    evenings: dict[int, str], tmp_path: Path
) -> None:
    path, (first, *_, last) = tmp_path / "a.lance", evenings.values()
    run_export(first, "lance", path)
    dataset = lance.dataset(path)
    dataset.delete(f"uri = '{nights.ROOT}/top.jpg'")
    for _ in range(2):
        with pytest.raises(
            ConflictError, match=r"expected the \d+ rows of the view after run .*, found \d+; something"
        ):
            run_export(last, "lance", path)


def test_missing_package_is_named(evenings: dict[int, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lance", None)  # what makes an import fail
    with pytest.raises(ConfigError, match=r"needs the package pylance: pip install 'label-bucket\[export\]'"):
        run_export(evenings[1], "lance", tmp_path / "a.lance")


def test_lance_lines_of_the_readme_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    several = Nights(storage.connect(str(tmp_path / "out")), rows_per_file=300)
    several.publish([f"{number:03d}" for number in range(300)])
    run_export(tmp_path / "out", "lance", tmp_path / "exports" / "photos.lance")
    monkeypatch.chdir(tmp_path)
    found = readme_code("import lance")["found"]
    assert found["uri"][0].as_py() == f"{nights.ROOT}/000"
    assert len(found) == 10
    assert found["_distance"][0].as_py() == pytest.approx(0, abs=1e-5)


# --- Qdrant and OpenSearch ----------------------------------------------------------------------------------------


def lines_of(folder: Path) -> list[dict[str, Any]]:
    said = json.loads((folder / "export.json").read_text())
    return [json.loads(line) for name in said["files"] for line in (folder / name).read_bytes().split(b"\n")[:-1]]


def exported(output: str, to: export.Target, target: Path, since: int | None) -> Path:
    run_export(output, to, target, since=since)
    (folder,) = (target / f"space={DEIT}").glob(f"*since-{since:08d}" if since else "????????")
    return folder


@pytest.fixture
def qdrant() -> Iterator[Callable[[Path], dict[str, Any]]]:
    """Loads an export by the README's own lines, and gives uri -> (payload, vector)."""
    load, client = readme_code("import QdrantClient")["load"], QdrantClient(":memory:")

    def loaded(folder: Path) -> dict[str, Any]:
        load(client, "photos", folder)
        points, _ = client.scroll("photos", limit=1000, with_vectors=True)
        assert len({point.payload["uri"] for point in points if point.payload}) == len(points)
        assert {str(point.id) for point in points} == {
            export.document_id(point.payload["uri"]) for point in points if point.payload
        }
        nearest = client.query_points("photos", vector_of(f"{nights.ROOT}/a/06.jpg"), limit=1).points[0]
        assert nearest.payload
        assert nearest.payload["uri"] == f"{nights.ROOT}/a/06.jpg"
        assert nearest.score == pytest.approx(1, abs=1e-5)
        return {point.payload["uri"]: (point.payload, point.vector) for point in points if point.payload}

    yield loaded
    client.close()


@pytest.fixture
def server() -> Iterator[OpenSearchServer]:
    with serve_opensearch() as running:
        yield running


@pytest.fixture
def opensearch(server: OpenSearchServer) -> Iterator[Callable[[Path], dict[str, Any]]]:
    """Loads an export by the README's own lines, and gives uri -> (document, vector)."""
    load, client = readme_code("import OpenSearch")["load"], OpenSearch(server.url)

    def loaded(folder: Path) -> dict[str, Any]:
        load(client, "photos", folder)
        documents = server.indices["photos"].documents
        assert set(documents) == {export.document_id(each["uri"]) for each in documents.values()}
        return {each["uri"]: (each, each["embedding"]) for each in documents.values()}

    yield loaded
    client.close()


@pytest.fixture(params=["qdrant", "opensearch"])
def engine(request: pytest.FixtureRequest) -> tuple[export.Target, Callable[[Path], dict[str, Any]]]:
    return request.param, request.getfixturevalue(request.param)


def test_what_a_search_engine_holds_is_the_view_after_every_night(
    engine: tuple[export.Target, Callable[[Path], dict[str, Any]]], evenings: dict[int, str], tmp_path: Path
) -> None:
    to, load = engine
    last = None
    for run_seq, output in evenings.items():
        held = load(exported(output, to, tmp_path, last))
        assert {uri: payload["run_seq"] for uri, (payload, _) in held.items()} == view_of(output)
        for uri, (payload, vector) in held.items():
            assert np.array_equal(np.array(vector, np.float32), np.array(vector_of(uri), np.float32))
            assert payload["label_names"][0] == nights.label_of(uri.removeprefix(f"{nights.ROOT}/"))
            assert payload["last_modified"] == "2026-11-22T03:00:00+00:00"
            assert "version_id" not in payload
        last = run_seq


def test_increments_may_be_loaded_again_and_skipped_to(
    engine: tuple[export.Target, Callable[[Path], dict[str, Any]]], evenings: dict[int, str], tmp_path: Path
) -> None:
    to, load = engine
    first, *_, last = evenings.values()
    load(exported(first, to, tmp_path / "1", None))
    for number in range(2):
        held = load(exported(last, to, tmp_path / f"2{number}", 1))
        assert {uri: payload["run_seq"] for uri, (payload, _) in held.items()} == view_of(last)


def test_odd_and_long_keys_and_equal_image_ids_are_documents_of_their_own(
    engine: tuple[export.Target, Callable[[Path], dict[str, Any]]], tmp_path: Path
) -> None:
    to, load = engine
    several = Nights(storage.connect(str(tmp_path / "nights")), rows_per_file=100)
    several.publish([*ODD, "a/06.jpg"])
    copy = outputs.Copy(tmp_path / "nights", tmp_path / "out")
    copy.rewrite(1, lambda rows: outputs.replaced(rows, "image_id", lambda ids: [7] * len(ids)))
    held = load(exported(str(tmp_path / "out"), to, tmp_path / "x", None))
    assert set(held) == {f"{nights.ROOT}/{key}" for key in (*ODD, "a/06.jpg")}
    assert {payload["image_id"] for payload, _ in held.values()} == {7}


def test_export_says_what_it_is_and_where_the_next_one_begins(evenings: dict[int, str], tmp_path: Path) -> None:
    newest = max(evenings)
    said = run_export(evenings[newest], "opensearch", tmp_path)
    assert said.endswith(f" in 1 files; the next export is --since {newest}")
    folder = tmp_path / f"space={DEIT}" / f"{newest:08d}"
    found = json.loads((folder / "export.json").read_text())
    assert {name: found[name] for name in ("to", "space_id", "run_seq", "since", "dim", "metric")} == {
        **{"to": "opensearch", "space_id": DEIT, "run_seq": newest},
        **{"since": 0, "dim": nights.DIM, "metric": "inner_product"},
    }
    assert (found["num_upserts"], found["num_deletes"]) == (len(view_of(evenings[newest])), 0)
    vector = json.loads((folder / "index.json").read_text())["mappings"]["properties"]["embedding"]
    assert vector == {
        **{"type": "knn_vector", "dimension": nights.DIM, "space_type": "innerproduct"},
        **{"mode": "in_memory", "compression_level": "1x"},
    }


def test_files_are_cut_between_documents(
    evenings: dict[int, str], tmp_path: Path, server: OpenSearchServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "MAX_FILE_BYTES", 1500)
    folder = exported(evenings[max(evenings)], "opensearch", tmp_path, 1)
    found = json.loads((folder / "export.json").read_text())
    assert len(found["files"]) == 3
    with OpenSearch(server.url) as client:
        readme_code("import OpenSearch")["load"](client, "photos", folder)
    assert max(server.request_bytes) <= 1500
    assert server.request_bytes == [(folder / name).stat().st_size for name in found["files"]]
    assert len(server.indices["photos"].documents) == found["num_upserts"]


def test_an_export_is_never_written_over_another(evenings: dict[int, str], tmp_path: Path) -> None:
    folder = exported(evenings[1], "qdrant", tmp_path, None)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert "holds this export already; the next one is --since 1" in run_export(evenings[1], "qdrant", tmp_path)
    with pytest.raises(ConflictError, match=r"holds an export to qdrant of run 00000001-\w+; export to another place"):
        run_export(evenings[1], "opensearch", tmp_path)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_an_export_that_died_is_written_anew(evenings: dict[int, str], tmp_path: Path) -> None:
    whole = exported(evenings[1], "qdrant", tmp_path, None)
    expected = lines_of(whole)
    (whole / "export.json").unlink()
    (whole / "00000.ndjson").write_bytes(b"half")
    assert lines_of(exported(evenings[1], "qdrant", tmp_path, None)) == expected


def test_exports_are_written_to_s3(bucket: str, evenings: dict[int, str]) -> None:
    run_export(evenings[1], "qdrant", f"{bucket}/exports")
    store = storage.connect(f"{bucket}/exports/space={DEIT}/00000001")
    assert sorted(storage.list_keys(store, "")) == ["00000.ndjson", "export.json"]
    assert store.get("00000.ndjson").count(b"\n") == len(view_of(evenings[1]))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"delete":{"_id":"1"}}', "terminated by a newline"),
        (b'{"index":{"_id":"1"}}\n', "without its document"),
        (b'{"index":{"_id":"1"}}\n{"uri":\n', "Expecting value"),
        (b'{"uri":"x"}\n', "Malformed action"),
        (b'{"index":{"_id":7}}\n{}\n', "Malformed action"),
    ],
)
def test_the_server_of_these_tests_refuses_what_is_no_bulk_body(body: bytes, message: str) -> None:
    with pytest.raises(MalformedError, match=message):
        bulk(Index({}), body)


@pytest.mark.parametrize(
    ("id_", "document"),
    [("k" * 513, {}), ("1", {"other": 1}), ("1", {"embedding": [1.0]}), ("1", {"uri": 1}), ("1", {"run_seq": 2**63})],
)
def test_the_server_of_these_tests_refuses_documents_that_do_not_fit(id_: str, document: dict[str, Any]) -> None:
    body = b"\n".join(json.dumps(each).encode() for each in ({"index": {"_id": id_}}, document)) + b"\n"
    answer = bulk(Index(export._index(2)), body)
    assert (answer["errors"], answer["items"][0]["index"]["status"]) == (True, 400)


# --- what cannot work ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["lance", "qdrant", "opensearch"])
@pytest.mark.parametrize("value", [[float("nan")] * 8, [0.0] * 8, [1.0] * 8])
def test_vectors_that_search_would_rank_wrongly_are_not_exported(
    to: export.Target, value: list[float], tmp_path: Path
) -> None:
    several = Nights(storage.connect(str(tmp_path / "nights")), rows_per_file=100)
    several.publish(["a", "b", "c"])
    copy = outputs.Copy(tmp_path / "nights", tmp_path / "out")
    copy.rewrite(1, lambda rows: outputs.replaced(rows, "embedding", lambda each: [each[0], value, value]))
    with pytest.raises(
        ConflictError, match=f"expected finite embeddings of length 1, found 2 others, first {nights.ROOT}/b"
    ):
        run_export(tmp_path / "out", to, tmp_path / "x")
    assert not list(tmp_path.rglob("export.json"))
    assert not list(tmp_path.rglob("*.manifest"))


def test_space_without_embeddings_is_refused(tmp_path: Path) -> None:
    several = Nights(storage.connect(str(tmp_path / "out")))
    several.publish(["a"])
    copy = outputs.Copy(tmp_path / "out", tmp_path / "copy")
    entry = copy.entry(1)
    copy.set_entry(1, {**entry, "identity": {**entry["identity"], "embedding_dim": None}})
    with pytest.raises(ConfigError, match=f"space {DEIT} has no embeddings; label with --embedding"):
        run_export(tmp_path / "copy", "lance", tmp_path / "x")


def test_since_must_be_a_place_in_the_log_and_is_not_for_lance(evenings: dict[int, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected a place in the log of .*, 1 to 1, found 2"):
        run_export(evenings[1], "qdrant", tmp_path, since=2)
    with pytest.raises(ConfigError, match="a Lance dataset knows what it holds"):
        run_export(evenings[1], "lance", tmp_path, since=1)


def test_job_says_in_its_last_line_what_was_made_or_what_is_wrong(evenings: dict[int, str], tmp_path: Path) -> None:
    def job(*options: str) -> tuple[int, str]:
        command = [sys.executable, str(ROOT / "jobs" / "export_embeddings.py"), *options]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        return ended.returncode, ended.stderr.splitlines()[-1]

    newest = max(evenings)
    options = ("--input", evenings[newest], "--to", "qdrant", "--output", str(tmp_path / "x"))
    code, line = job(*options, "--space", DEIT, "--since", "1")
    assert (code, line.partition(": ")[0]) == (0, "export_embeddings")
    assert line.endswith(f"in 1 files; the next export is --since {newest}")
    code, line = job(*options)
    assert (code, line.startswith("export_embeddings: exit code 2: ")) == (2, True)
