"""An index is the current view and finds what is nearest in it; it follows the nights, and what is wrong is refused."""

import json
import os
import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import nights
import numpy as np
import outputs
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cluster import Head
from nights import DIM, Nights

from pipeline import (
    catalog,
    index,
    index_build,
    index_encode,
    index_files,
    index_log,
    index_recall,
    index_update,
    index_vectors,
    log,
    schema,
    storage,
)
from pipeline.compact import Options as CompactOptions
from pipeline.compact import compact_labels
from pipeline.errors import ConfigError, ConflictError
from pipeline.index import Index
from pipeline.index_build import Options
from pipeline.index_encode import EncodeFiles
from pipeline.index_update import build_index
from pipeline.index_vectors import Floats

DEIT, VIT = "deit-01234567", "vit-89abcdef"
ROOT = Path(__file__).resolve().parent.parent
FLAT, SQ8 = "IVF4,Flat", "IVF4,SQ8"


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several files of everything for a few rows."""
    monkeypatch.setattr(catalog, "MAX_FILE_ROWS", 7)
    monkeypatch.setattr(index_encode, "SLICE_ROWS", 5)
    monkeypatch.setattr(index_files, "SLICE_BYTES", 300)


@pytest.fixture
def several(tmp_path: Path) -> Nights:
    """An output after nights of two spaces in which every fate occurs."""
    return nights.several(storage.connect(str(tmp_path / "o'ut [1]")))


@pytest.fixture
def place(tmp_path: Path) -> str:
    return str(tmp_path / "search")


def options(output: Nights, place: str, **changes: Any) -> Options:
    return Options(**{"input": output.output.root, "output": place, "space": DEIT, "min_recall": 0, **changes})


def built(output: Nights, place: str, **changes: Any) -> Index:
    """The index after building it."""
    wanted = options(output, place, **changes)
    assert "announced" in build_index(wanted) or wanted.update
    return index.open_index(place, wanted.space)


def updated(output: Nights, place: str, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Index:
    """The index after an update that must not build anew."""
    monkeypatch.setattr(index_update, "MAX_CHURN", 100.0)
    before = index_log.read_log(storage.connect(place))[-1]
    found = built(output, place, update=True, **changes)
    assert found.info.base_version == before.version
    return found


def rows_of(found: Index) -> dict[str, int]:
    table = pa.concat_tables(found.all_rows())
    assert table["ordinal"].to_pylist() == sorted(set(table["ordinal"].to_pylist()))
    assert len(table) == found.info.num_rows == found.vectors.num_rows
    return dict(zip(table["uri"].to_pylist(), table["run_seq"].to_pylist(), strict=True))


def true_vectors(uris: list[str]) -> Floats:
    return np.array([nights._vector(uri.removeprefix(f"{nights.ROOT}/")) for uri in uris], np.float32)


def nearest_uris(uris: list[str], queries_QD: Floats, k: int) -> list[list[str]]:
    """The truth, without the code that searches."""
    cosines_QN = queries_QD.astype(np.float64) @ true_vectors(uris).astype(np.float64).T
    return [[uris[place] for place in np.argsort(-row, kind="stable")[:k]] for row in cosines_QN]


def found_uris(found: Index, queries_QD: Floats, k: int, **how: Any) -> list[list[str]]:
    answers = found.search(queries_QD, k, **how)
    return [found.rows(row).column("uri").to_pylist() for row in answers.ordinals_QK]


def queries(num: int = 9) -> Floats:
    return np.random.default_rng(3).normal(size=(num, DIM)).astype(np.float32)


# --- building -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factory", ["auto", FLAT, SQ8, "IVF4_HNSW8,SQ8"])
def test_an_index_holds_each_image_of_the_view_once_by_its_newest_label(
    several: Nights, place: str, factory: str
) -> None:
    found = built(several, place, factory=factory)
    assert rows_of(found) == several.current[DEIT]
    assert found.info.factory == ("exact" if factory == "auto" else factory)
    row = found.rows([found.ordinal_of(f"{nights.ROOT}/ü'x/01.jpg")]).to_pylist()[0]
    assert row["image_id"] == schema.image_id(row["uri"])
    assert row["label_names"][0] == nights.label_of("ü'x/01.jpg")
    with pytest.raises(
        ConfigError, match=r"expected a uri of index 00000007-.*, found none such; the uris around it: "
    ):
        found.ordinal_of(f"{nights.ROOT}/a/04.jpg")


def test_a_uri_that_is_not_there_is_answered_with_those_around_it_in_all_files(
    several: Nights, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    built(several, place)
    several.publish(["a/04c.jpg", "zz.jpg"])
    found = updated(several, place, monkeypatch)
    uris = sorted(several.current[DEIT])
    for key in (
        "",
        "a/04b.jpg",
        "a/04d.jpg",
        "a/07z.jpg",
        "b b/03x.jpg",
        "top2.jpg",
        "zzz.jpg",
        "ü'x/01x.jpg",
        "ü'z.jpg",
    ):
        uri = f"{nights.ROOT}/{key}"
        before = [each for each in uris if each < uri][-1:]
        after = [each for each in uris if each > uri][:1]
        around = re.escape(", ".join([*before, *after]))
        with pytest.raises(ConfigError, match=f"found none such; the uris around it: {around}$"):
            found.ordinal_of(uri)


@pytest.mark.parametrize("factory", ["exact", FLAT])
def test_a_search_through_everything_gives_what_brute_force_gives(several: Nights, place: str, factory: str) -> None:
    found = built(several, place, factory=factory)
    uris = sorted(several.current[DEIT])
    assert found_uris(found, queries(), 6, is_exhaustive=True) == nearest_uris(uris, queries(), 6)
    cosines = found.search(queries(), 6, is_exhaustive=True).cosines_QK
    best = [[np.dot(query, vector) for vector in true_vectors(uris)] for query in queries()]
    lengths = np.linalg.norm(queries(), axis=1)
    assert np.allclose(cosines[:, 0], np.max(best, axis=1) / lengths, atol=1e-6)


def test_the_truth_comes_from_the_labels_where_an_index_has_approximations(several: Nights, place: str) -> None:
    found = built(several, place, factory="IVF4,SQ4")
    uris = sorted(several.current[DEIT])
    assert found_uris(found, queries(), 9, is_exhaustive=True) != nearest_uris(uris, queries(), 9)
    answers = found.exact(queries(), 9)
    assert [found.rows(row)["uri"].to_pylist() for row in answers.ordinals_QK] == nearest_uris(uris, queries(), 9)
    assert np.array_equal(found.true_vectors([found.ordinal_of(uris[3])])[0], true_vectors(uris)[3])


@pytest.mark.parametrize("factory", ["exact", SQ8])
def test_a_search_among_some_rows_finds_all_of_them_and_no_others(several: Nights, place: str, factory: str) -> None:
    found = built(several, place, factory=factory)
    rows = pa.concat_tables(found.all_rows(["ordinal", "label_names"]))
    among = np.array([row["ordinal"] for row in rows.to_pylist() if row["label_names"][0] == "cat"])
    wanted = {uri for uri in several.current[DEIT] if nights.label_of(uri.removeprefix(f"{nights.ROOT}/")) == "cat"}
    answers = found_uris(found, queries(), len(among), among=among)
    assert all(set(row) == wanted for row in answers)
    assert (found.search(queries(), 3, among=among[:0]).ordinals_QK == -1).all()


@pytest.mark.parametrize("factory", ["IVF8,SQ8", "IVF8_HNSW8,Flat"])
def test_a_search_gives_as_many_as_were_asked_for_however_many_lists_that_takes(
    several: Nights, place: str, factory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = built(several, place, factory=factory)
    assert isinstance(found.vectors, index_vectors.IvfVectors)
    found.vectors.nprobe = 1
    for k in (5, 12, found.info.num_rows):
        for row in found_uris(found, queries(40), k):
            assert len(set(row)) == k
    monkeypatch.setattr(index_vectors, "MAX_SCANNED_ROWS", 3)
    among = np.array([found.ordinal_of(uri) for uri in sorted(several.current[DEIT])[::2]])
    answers = found.search(queries(40), len(among) + 2, among=among).ordinals_QK
    assert all(set(row[: len(among)]) == set(among.tolist()) for row in answers)
    assert (answers[:, len(among) :] == -1).all()


def test_two_images_with_one_image_id_are_both_found(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = Nights(storage.connect(str(tmp_path / "out")))
    with monkeypatch.context() as patch:
        patch.setattr(schema, "image_id", lambda uri: 7 if uri.endswith(("/a.jpg", "/b.jpg")) else 8)
        output.publish(["a.jpg", "b.jpg", "c.jpg"])
    found = built(output, place, factory="IVF1,SQ8")
    assert found.rows([0, 1, 2])["image_id"].to_pylist() == [7, 7, 8]
    assert rows_of(found) == output.current[DEIT]
    monkeypatch.undo()
    output.publish([], {}, ["a.jpg"])
    assert set(rows_of(updated(output, place, monkeypatch))) == {f"{nights.ROOT}/{key}" for key in ("b.jpg", "c.jpg")}


def test_index_json_says_what_the_index_is(several: Nights, place: str) -> None:
    found = built(several, place, factory=SQ8)
    said = json.loads((Path(place) / found.info.folder / "index.json").read_text())
    assert said["space_id"] == DEIT
    assert said["dim"] == DIM
    assert said["metric"] == "inner_product"
    assert said["num_rows"] == len(several.current[DEIT])
    assert 0 < said["recall_at_10"] <= 1
    assert said["num_recall_samples"] == said["num_rows"]
    assert said["p50_ms"] > 0
    assert said["facts"]["label_bucket.space_id"] == DEIT
    assert {"numpy", "pyarrow", "faiss-cpu"} <= said["versions"].keys()
    named = {ref["key"] for ref in [*said["vectors"], *said["rows"], said["truth"]]}
    folder = Path(place) / found.info.folder
    assert named | {f"{found.info.folder}index.json"} == {str(path.relative_to(place)) for path in folder.iterdir()}


def test_an_index_on_s3_of_an_output_on_s3_is_the_one_of_local_folders(
    several: Nights, place: str, bucket: str
) -> None:
    remote = nights.several(storage.connect(f"{bucket}/labels"))
    found = built(remote, f"{bucket}/search", factory=SQ8)
    assert rows_of(found) == several.current[DEIT]
    local = built(several, place, factory=SQ8)
    assert np.array_equal(found.search(queries(), 5).ordinals_QK, local.search(queries(), 5).ordinals_QK)


def test_an_index_on_another_store_is_built_updated_and_read(several: Nights, monkeypatch: pytest.MonkeyPatch) -> None:
    place = "memory://indexes/of labels"
    built(several, place, factory=SQ8)
    several.publish(["zzz.jpg"], {}, ["top.jpg"])
    assert rows_of(updated(several, place, monkeypatch)) == several.current[DEIT]


def test_files_encoded_on_a_cluster_make_the_same_index(driver: Head, several: Nights, tmp_path: Path) -> None:
    from pipeline import index_cluster

    ways: list[EncodeFiles] = [index_encode.in_this_process, index_cluster.on_cluster]
    found = []
    for number, encode in enumerate(ways):
        build_index(options(several, str(tmp_path / f"search{number}"), factory=SQ8), encode)
        found.append(index.open_index(str(tmp_path / f"search{number}")))
    here, there = found
    assert len(here.info.rows) > 3
    assert rows_of(here) == rows_of(there) == several.current[DEIT]
    assert [each.sha256 for each in here.info.vectors] == [each.sha256 for each in there.info.vectors]
    assert here.info.truth.sha256 == there.info.truth.sha256


# --- updates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factory", ["exact", SQ8])
def test_after_every_night_an_updated_index_holds_what_a_new_one_holds(
    tmp_path: Path, place: str, factory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = Nights(storage.connect(str(tmp_path / "out")))
    keys = [f"{number:03d}.jpg" for number in range(60)]
    output.publish(keys)
    built(output, place, factory=factory)
    fates: list[tuple[list[str], dict[str, str], list[str]]] = [
        (["000.jpg", "new/1.jpg"], {"001.jpg": "corrupt"}, ["002.jpg", "003.jpg"]),
        ([], {}, []),
        (["001.jpg", "003.jpg"], {"new/1.jpg": "missing"}, ["059.jpg", "000.jpg"]),
        (["zz.jpg"], {}, []),
    ]
    for number, (labeled, failed, deleted) in enumerate(fates):
        output.publish(labeled, failed, deleted)
        if number == 2:
            output.snapshot()
        found = updated(output, place, monkeypatch)
        assert rows_of(found) == output.current[DEIT]
        everything = found_uris(found, queries(), found.info.num_rows, is_exhaustive=True)
        assert all(set(row) == set(output.current[DEIT]) for row in everything)
        fresh = built(output, str(tmp_path / f"fresh{number}"), factory=factory)
        best = nearest_uris(sorted(output.current[DEIT]), queries(), 1)
        for each in (found, fresh):
            assert [row[:1] for row in found_uris(each, queries(), 3, is_exhaustive=True)] == best
        uris = found.rows(found.search(queries(), 1).ordinals_QK[:, 0])["uri"].to_pylist()
        assert np.array_equal(found.true_vectors([found.ordinal_of(uri) for uri in uris]), true_vectors(uris))
    assert {"002.jpg", "059.jpg", "000.jpg", "new/1.jpg"}.isdisjoint(
        uri.removeprefix(f"{nights.ROOT}/") for uri in rows_of(found)
    )


def test_an_older_version_stays_as_it_was_and_one_that_is_up_to_date_is_left_alone(
    several: Nights, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = built(several, place, factory=SQ8)
    held = rows_of(first)
    several.publish(["a/00.jpg", "zzz.jpg"], {}, ["b b/00.jpg"])
    second = updated(several, place, monkeypatch)
    assert build_index(options(several, place, update=True)).startswith(f"up to date: {storage.connect(place).root}")
    assert [each.version for each in index_log.read_log(first.store)] == [first.info.version, second.info.version]
    again = index.open_index(place, DEIT, first.info.version)
    assert rows_of(again) == held
    assert not {each.key for each in again.info.rows} & {each.key for each in second.info.rows}
    assert second.info.num_changed_rows == 2 + 2  # a row that changed goes and comes


@pytest.mark.parametrize("factory", ["exact", SQ8])
def test_an_update_after_compaction_finds_the_rows_where_they_are_now(
    several: Nights, place: str, factory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = built(several, place, factory=factory)
    uris = sorted(several.current[DEIT])
    several.snapshot()
    compact_labels(
        CompactOptions(output=several.output.root, space=DEIT, keep_runs=1, grace=timedelta(0)),
        start_engine=lambda: None,
    )
    ordinals = [first.ordinal_of(uri) for uri in uris]
    if factory == "exact":  # holds the truth itself
        assert np.array_equal(first.true_vectors(ordinals), true_vectors(uris))
        with pytest.raises(ConfigError, match=r"expected an ordinal of index .*, found 4000"):
            first.true_vectors([0, 4000])
    else:
        with pytest.raises(ConflictError, match=r"found nothing; restore it; if the output was compacted since index"):
            first.true_vectors(ordinals)
    second = updated(several, place, monkeypatch)
    assert second.info.num_changed_rows == first.info.num_changed_rows
    assert rows_of(second) == several.current[DEIT]
    assert np.array_equal(second.true_vectors(ordinals), true_vectors(uris))
    assert second.info.recall_at_10 == first.info.recall_at_10
    assert build_index(options(several, place, update=True)).startswith("up to date: ")


def test_the_first_update_builds(several: Nights, place: str) -> None:
    assert rows_of(built(several, place, update=True)) == several.current[DEIT]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "more than 20% of"),
        ({"factory": "exact"}, "--factory is exact, version"),
    ],
)
def test_what_an_update_would_make_worse_is_built_anew(
    several: Nights,
    place: str,
    changes: dict[str, str],
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    first = built(several, place, factory=SQ8)
    several.publish([f"more/{number}.jpg" for number in range(1 if changes else 20)])
    with caplog.at_level("INFO"):
        found = built(several, place, update=True, **changes)
    assert f"building anew: {reason}" in caplog.text
    assert found.info.base_version is None
    assert found.info.version != first.info.version
    assert rows_of(found) == several.current[DEIT]


def test_an_update_that_builds_anew_keeps_to_what_was_asked_for_before(several: Nights, place: str) -> None:
    def asked(**changes: Any) -> Index:
        build_index(Options(input=several.output.root, output=place, space=DEIT, **changes))
        return index.open_index(place)

    first = asked(factory="IVF3,SQ8", min_recall=0.1)
    several.publish([f"more/{number}.jpg" for number in range(20)])
    second = asked(update=True)
    assert second.info.base_version is None
    several.publish(["one.jpg"])
    third = asked(update=True)
    assert third.info.base_version == second.info.version
    several.publish([f"most/{number}.jpg" for number in range(20)])
    fourth = asked(update=True)
    assert fourth.info.base_version is None
    for each in (first, second, third, fourth):
        assert (each.info.factory, each.info.asked_factory, each.info.min_recall) == ("IVF3,SQ8", "IVF3,SQ8", 0.1)
    several.publish(["two.jpg"])
    fifth = asked(update=True, factory="exact", min_recall=0.3)
    assert (fifth.info.factory, fifth.info.asked_factory, fifth.info.min_recall) == ("exact", "exact", 0.3)
    old = json.loads(first.info.model_dump_json(exclude={"asked_factory", "min_recall"}))
    read = index_log.Info.model_validate(old)
    assert (read.asked_factory, read.min_recall) == ("auto", 0.95)
    assert asked().info.asked_factory == "auto"


def test_an_index_that_finds_less_after_an_update_is_built_anew(
    several: Nights, place: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    several.publish([f"many/{number}.jpg" for number in range(100)])  # lists that give ten answers by themselves
    first = built(several, place, factory=SQ8)
    assert first.info.recall_at_10 > index_build.TARGET_RECALL
    store = storage.connect(place)
    entry = index_log.read_log(store)[-1]
    worse = first.info.model_copy(update={"nprobe": 1})  # as if what lies in the lists had drifted
    ref = index_files.write(store, f"{worse.folder}index2.json", worse.model_dump_json().encode())
    store.put("_log/00000001.json", entry.model_copy(update={"info": ref}).model_dump_json().encode())
    several.publish(["zzz.jpg"])
    monkeypatch.setattr(index_update, "MAX_CHURN", 100.0)
    with caplog.at_level("INFO"):
        found = built(several, place, update=True)
    assert re.search(r"building anew: recall@10 fell to 0\.\d+, 0\.9\d+ is the least", caplog.text)
    assert found.info.recall_at_10 > index_build.TARGET_RECALL


def test_an_update_without_enough_samples_left_is_built_anew(
    several: Nights, place: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    built(several, place, factory=SQ8)
    gone = [uri.removeprefix(f"{nights.ROOT}/") for uri in sorted(several.current[DEIT])[:15]]
    several.publish([f"n{number}.jpg" for number in range(12)], {}, gone)
    monkeypatch.setattr(index_update, "MAX_CHURN", 100.0)
    with caplog.at_level("INFO"):
        found = built(several, place, update=True)
    assert re.search(r"building anew: \d+ of the sampled rows are left", caplog.text)
    assert found.info.num_recall_samples == found.info.num_rows


# --- recall -------------------------------------------------------------------------------------------------------


def test_recall_is_the_share_of_the_true_ten_nearest_others_that_a_search_gives() -> None:
    vectors_ND = unit(400)
    ordinals_N = np.arange(400, dtype=np.int64) * 3
    truth = index_recall.begin(ordinals_N[:50], vectors_ND[:50])
    for start in range(0, 400, 37):
        part = slice(start, start + 37)
        truth = index_recall.merged(truth, index_recall.nearest_others(truth, vectors_ND[part], ordinals_N[part]))
    whole = index_vectors.ExactVectors(vectors_ND, ordinals_N)
    half = index_vectors.ExactVectors(vectors_ND[::2], ordinals_N[::2])
    assert index_recall.recall_at_10(search_of(whole), truth, 400) == (1.0, 50)
    recall, _ = index_recall.recall_at_10(search_of(half), truth, 400)
    cosines_QN = vectors_ND[:50] @ vectors_ND.T
    ranked = [[place for place in np.argsort(-row) if place != number][:10] for number, row in enumerate(cosines_QN)]
    assert recall == pytest.approx(np.mean([[place % 2 == 0 for place in row] for row in ranked]))


def test_lists_of_the_true_nearest_stay_true_whatever_comes_and_goes() -> None:
    random = np.random.default_rng(5)
    vectors_ND = unit(900)
    live = np.arange(500, dtype=np.int64)
    truth = index_recall.begin(live[:40], vectors_ND[:40])
    truth = index_recall.merged(truth, index_recall.nearest_others(truth, vectors_ND[live], live))
    for night in range(8):
        removed = random.choice(live, 60, replace=False)
        added = np.arange(500 + night * 50, 550 + night * 50, dtype=np.int64)
        truth = index_recall.updated(truth, removed, vectors_ND[added], added, len(live))
        live = np.concatenate([live[~np.isin(live, removed)], added])
        assert set(truth.ordinals.tolist()) == set(range(40)) & set(live.tolist())
        for ordinal, ordinals in zip(truth.ordinals, truth.nearest.ordinals_QK, strict=True):
            known = ordinals[ordinals >= 0]
            cosines = vectors_ND[live] @ vectors_ND[ordinal]
            right = [place for place in live[np.argsort(-cosines)] if place != ordinal][: len(known)]
            assert known.tolist() == right
    assert len(known) >= 10


def test_copies_of_one_picture_are_right_answers_whichever_they_are() -> None:
    vectors_ND = np.repeat(unit(30), 12, axis=0)  # each with eleven equals
    ordinals_N = np.arange(360, dtype=np.int64)
    truth = index_recall.begin(ordinals_N[::12], vectors_ND[::12])
    truth = index_recall.merged(truth, index_recall.nearest_others(truth, vectors_ND, ordinals_N))
    backwards = index_vectors.ExactVectors(vectors_ND[::-1].copy(), ordinals_N)

    def search(queries_QD: Floats, k: int) -> index_vectors.Found:
        found = search_of(backwards)(queries_QD, k)
        return found._replace(ordinals_QK=359 - found.ordinals_QK)

    assert index_recall.recall_at_10(search, truth, 360) == (1.0, 30)


def test_more_equals_than_are_known_say_nothing_about_recall() -> None:
    vectors_ND = np.repeat(unit(2), [300, 40], axis=0)
    ordinals_N = np.arange(340, dtype=np.int64)
    truth = index_recall.begin(ordinals_N[[0, 310]], vectors_ND[[0, 310]])
    truth = index_recall.merged(truth, index_recall.nearest_others(truth, vectors_ND, ordinals_N))
    _, num_samples = index_recall.recall_at_10(
        search_of(index_vectors.ExactVectors(vectors_ND, ordinals_N)), truth, 340
    )
    assert num_samples == 1  # the one of 40, whose list goes on to the others


def unit(num: int) -> Floats:
    vectors_ND = np.random.default_rng(1).normal(size=(num, DIM)).astype(np.float32)
    unit_ND: Floats = vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    return unit_ND


def search_of(vectors: index_vectors.Vectors) -> index_recall.Search:
    return lambda queries_QD, k: vectors.search(queries_QD, k, among=None, is_exhaustive=False)


# --- what kind ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_rows", "has_faiss", "memory_gib", "expected"),
    [
        (50_000, True, 4, "exact"),
        (100_000, True, 4, "IVF632,SQ8"),
        (1_000_000, True, 1.75, "IVF2000,SQ8"),
        (1_000_000, True, 1.6, "IVF2000,SQ6"),
        (100_000_000, True, 100, "IVF40000_HNSW32,SQ8"),
        (500_000, False, 4, "exact"),
    ],
)
def test_the_factory_is_chosen_by_rows_and_memory(
    num_rows: int, has_faiss: bool, memory_gib: float, expected: str
) -> None:
    chosen = index_build.choose_factory("auto", num_rows, 384, int(memory_gib * 2**30), has_faiss=has_faiss)
    assert chosen == expected


@pytest.mark.parametrize(
    ("wanted", "num_rows", "has_faiss", "memory_gib", "message"),
    [
        (
            "auto",
            100_000_000,
            True,
            8,
            r"--max-memory-gib: expected [\d.]+ GiB for 100,000,000 rows of 384 as IVF40000_H",
        ),
        (
            "auto",
            1_000_000,
            True,
            1.4,  # enough for four bits, which would be refused after all the work
            r"expected 1\.47 GiB for 1,000,000 rows of 384 as IVF2000,SQ6, found 1\.40 GiB; use a larger machine",
        ),
        ("auto", 600_000, False, 8, r"expected FAISS for an index of 600,000 rows, found none; pip install"),
        ("IVF32,SQ8", 100, False, 8, r"expected FAISS for an index of 100 rows"),
        ("HNSW32", 100, True, 8, r"--factory: expected auto, exact or inverted lists .* found HNSW32"),
        ("IVF0,SQ8", 100, True, 8, r"--factory: expected auto"),
        ("IVF512,SQ8", 100, True, 8, r"--factory IVF512,SQ8: expected at most as many lists as rows, found 100 rows"),
    ],
)
def test_a_factory_that_cannot_be_is_refused_before_anything_is_read(
    wanted: str, num_rows: int, has_faiss: bool, memory_gib: float, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        index_build.choose_factory(wanted, num_rows, 384, int(memory_gib * 2**30), has_faiss=has_faiss)


@pytest.mark.parametrize(
    ("factory", "num_rows", "measured_mib"),
    [
        ("exact", 10_000, 360),
        ("exact", 100_000, 1069),
        ("exact", 300_000, 1690),
        ("IVF632,SQ8", 100_000, 918),
        ("IVF1094,SQ8", 300_000, 1194),
        ("IVF2000,SQ8", 1_000_000, 1618),
    ],
)
def test_the_estimate_is_what_was_measured_or_at_most_half_more(
    factory: str, num_rows: int, measured_mib: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_encode, "SLICE_ROWS", 1 << 16)
    estimate = index_build.estimate_bytes(factory, num_rows, 384) / 2**20
    assert measured_mib < estimate < 1.5 * measured_mib


def test_without_faiss_a_small_index_is_built_searched_and_updated(
    several: Nights, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_with_it = built(several, f"{place}2", factory=SQ8)
    index_vectors.faiss.cache_clear()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "faiss", None)
        found = built(several, place)
        assert found_uris(found, queries(), 3) == nearest_uris(sorted(several.current[DEIT]), queries(), 3)
        several.publish(["zzz.jpg"])
        updated(several, place, monkeypatch)
        with pytest.raises(ConfigError, match=r"expected FAISS for this index, found none; pip install"):
            index.open_index(f"{place}2").search(queries(), 3)
    assert made_with_it.search(queries(), 3).ordinals_QK.shape == (9, 3)


# --- what is refused ----------------------------------------------------------------------------------------------


def nothing_announced(place: str) -> bool:
    return not index_log.read_log(storage.connect(place))


def test_two_spaces_are_never_mixed(several: Nights, place: str) -> None:
    with pytest.raises(ConfigError, match=rf"expected the name of one of its spaces \({DEIT}, {VIT}\), found none"):
        build_index(options(several, place, space=None))
    assert nothing_announced(place)
    built(several, place)
    built(several, place, space=VIT)
    with pytest.raises(ConfigError, match=rf"expected the name of one of its spaces \({DEIT}, {VIT}\), found none"):
        index.open_index(place)
    assert rows_of(index.open_index(place, VIT)) == several.current[VIT]


@pytest.mark.parametrize("bad", [[np.nan] * DIM, [np.inf] + [0.0] * (DIM - 1), [0.0] * DIM, [0.7] + [0.0] * (DIM - 1)])
def test_vectors_that_are_not_finite_and_of_length_1_are_counted_and_refused_with_the_file(
    tmp_path: Path, place: str, bad: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = Nights(storage.connect(str(tmp_path / "out")), rows_per_file=2)
    output.publish(["0.jpg", "5.jpg", *(f"{number}.jpg" for number in range(1, 5))])
    first = built(output, place)
    entry = output.publish(  # files of 1 and 3, of 4 and 6: the second and the keys of an older one enclose the bad row
        ["1.jpg", "3.jpg", "4.jpg", "6.jpg"],
        change=lambda row: {**row, "embedding": bad} if row["key"] in ("4.jpg", "6.jpg") else row,
    )
    message = (
        rf"out/{re.escape(entry.labels[1].key)}: expected finite embeddings of length 1, found another of"
        r" s3://photos/in/4.jpg, the first of \d among \d neighbouring rows; verify the output; no index was announced$"
    )
    monkeypatch.setattr(index_update, "MAX_CHURN", 100.0)
    for update in (False, True):
        with pytest.raises(ConflictError, match=message):
            build_index(options(output, place, update=update))
    assert index.open_index(place).info == first.info


def test_a_folder_of_foreign_parquet_is_no_input(tmp_path: Path, place: str) -> None:
    (tmp_path / "foreign").mkdir()
    pq.write_table(pa.table({"uri": ["a"]}), tmp_path / "foreign" / "part.parquet")
    with pytest.raises(ConfigError, match=r"foreign: expected published runs, found none; is this the --output of a"):
        build_index(Options(input=str(tmp_path / "foreign"), output=place))
    assert nothing_announced(place)


def test_an_output_and_an_index_in_each_others_place_are_named_with_their_flags(several: Nights, place: str) -> None:
    labels = r"expected an index, which is --output of build_index and --index of search_images, found a labeling outp"
    for update in (False, True):
        with pytest.raises(ConfigError, match=rf"o'ut \[1\]: {labels}ut, which is --input of build_index$"):
            build_index(options(several, several.output.root, update=update))
    with pytest.raises(ConfigError, match=labels):
        index.open_index(several.output.root)
    built(several, place)
    with pytest.raises(
        ConfigError,
        match=r"expected the log of a labeling output, found that of an index, which is --output of build_i",
    ):
        build_index(Options(input=place, output=f"{place}2"))


@pytest.mark.parametrize(
    ("type_", "found"),
    [(pa.list_(pa.float64(), DIM), "fixed_size_list<.*double"), (pa.list_(pa.float32()), "list<.*float")],
)
def test_vectors_of_another_type_are_refused_with_the_file(
    several: Nights, tmp_path: Path, place: str, type_: pa.DataType, found: str
) -> None:
    copy = outputs.Copy(Path(several.output.root.removeprefix("file://")), tmp_path / "copy")
    entry = copy.entry(1)
    name = entry["labels"][0]["key"]

    def retyped(table: pa.Table) -> pa.Table:
        column = pa.array(table["embedding"].to_pylist(), type_)
        return table.set_column(table.column_names.index("embedding"), "embedding", column)

    entry["labels"][0] = copy.write(name, retyped(pq.read_table(copy.root / name)), name)
    copy.set_entry(1, entry)
    with pytest.raises(ConflictError, match=rf"{re.escape(name)}: expected one column embedding of .*, found {found}"):
        build_index(Options(input=str(copy.root), output=place, space=DEIT))
    assert nothing_announced(place)


def test_an_output_without_embeddings_or_without_labels_is_refused(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = Nights(storage.connect(str(tmp_path / "bare")))
    bare.publish([], {"a.jpg": "corrupt"})
    with pytest.raises(ConfigError, match=rf"expected labeled images in space {DEIT}, found none"):
        build_index(options(bare, place))
    with pytest.raises(ConfigError, match=r"expected one of its spaces \(deit-01234567\), found other"):
        build_index(options(bare, place, space="other"))
    monkeypatch.setattr(nights, "DIM", None)
    claim = Nights(storage.connect(str(tmp_path / "none"))).claim()
    output = storage.connect(str(tmp_path / "none"))
    log.commit(output, log.entry_of(claim, "run", "2026-11-25T04:00:00+00:00", counts={}))
    with pytest.raises(ConfigError, match=r"has no embeddings; label with --embedding pooled"):
        build_index(Options(input=output.root, output=place))


def test_recall_below_the_floor_announces_nothing(several: Nights, place: str) -> None:
    with pytest.raises(
        ConflictError, match=r"expected recall@10 of 1 or more from IVF4,SQ4, found 0\.\d+ of \d+ sampled"
    ):
        build_index(options(several, place, factory="IVF4,SQ4", min_recall=1.0))
    assert nothing_announced(place)


@pytest.mark.parametrize("which", ["vectors-00001.bin", "rows-00001-00.parquet", "index.json", "truth.parquet"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_damaged_index_is_refused_with_the_file(
    several: Nights, place: str, which: str, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = built(several, place, factory=SQ8)
    path = Path(place) / first.info.folder / which
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-7])
    else:
        outputs.flip_byte(path)
    several.publish(["zzz.jpg"])
    monkeypatch.setattr(index_update, "MAX_CHURN", 100.0)
    with pytest.raises(
        ConflictError, match=rf"{re.escape(first.info.folder + which)}: expected .* found .*restore the"
    ):
        build_index(options(several, place, update=True))
    assert len(index_log.read_log(storage.connect(place))) == 1
    assert rows_of(built(several, place, factory=SQ8)) == several.current[DEIT]


def test_an_index_of_another_output_or_a_later_run_is_not_updated(several: Nights, place: str, tmp_path: Path) -> None:
    built(several, place)
    other = nights.several(storage.connect(str(tmp_path / "other")))
    with pytest.raises(ConflictError, match=r"expected an index of .*/other up to run 00000007, found 00000007-.* of "):
        build_index(options(other, place, update=True))
    for path in (Path(several.output.root.removeprefix("file://")) / "_log").glob("00000007*"):
        path.unlink()
    with pytest.raises(ConflictError, match=r"up to run 00000006, found 00000007-.* after run 00000007"):
        build_index(options(several, place, update=True))


def test_of_two_builds_at_once_the_second_to_finish_is_in_vain(several: Nights, place: str) -> None:
    def meanwhile(job: index_encode.Job, vectors: index_vectors.Vectors) -> Any:
        build_index(options(several, place))
        yield from index_encode.in_this_process(job, vectors)

    with pytest.raises(ConflictError, match=r"was announced while this command built .* run it again with --update"):
        build_index(options(several, place), meanwhile)
    assert len(index_log.read_log(storage.connect(place))) == 1


def test_a_build_that_was_killed_before_its_announcement_left_nothing_that_is_read(several: Nights, place: str) -> None:
    command = [sys.executable, str(ROOT / "jobs" / "build_index.py"), "--input", several.output.root]
    command += ["--output", place, "--space", DEIT, "--min-recall", "0"]
    killed = subprocess.run(
        command,
        env={**os.environ, "LABEL_BUCKET_CRASH_AT": "index-written"},
        capture_output=True,
        check=False,
    )
    assert killed.returncode == -9
    left = {path.name for path in Path(place).rglob("*") if path.is_file()}
    assert "truth.parquet" in left
    assert "index.json" not in left
    assert nothing_announced(place)
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0
    assert re.search(
        r"build_index: exit code 0: announced file://.*/index/deit-01234567/00000007-[0-9a-f]{8}/: \d+ rows of 8 after"
        r" run 00000007-[0-9a-f]{8}, exact, recall@10 1\.0000 of \d+ sampled rows, p50 [\d.]+ ms, 0\.0 MB, [\d.]+ s\n$",
        finished.stderr,
    )
    assert rows_of(index.open_index(place)) == several.current[DEIT]


def test_questions_that_cannot_be_answered_are_refused(several: Nights, place: str) -> None:
    found = built(several, place)
    num_rows = len(several.current[DEIT])
    with pytest.raises(ConfigError, match=rf"-k: expected 1 to {num_rows}, the rows of index .*, found {num_rows + 1}"):
        found.search(queries(), num_rows + 1)
    with pytest.raises(ConfigError, match=r"expected queries of 8 values as index .* has, found shape \(9, 7\)"):
        found.search(queries()[:, :7], 1)
    with pytest.raises(ConfigError, match=r"expected queries that are finite and not zero, found others"):
        found.search(queries() * 0, 1)
    with pytest.raises(ConfigError, match=r"expected an ordinal of index .*, found 4000"):
        found.rows([4000])
    with pytest.raises(ConfigError, match=r"expected an index, found none announced; is this the --output of build_in"):
        index.open_index(f"{place}/nowhere")
    with pytest.raises(ConfigError, match=r"expected a version of deit-01234567 \(00000007-.*\), found 7"):
        index.open_index(place, version="7")
