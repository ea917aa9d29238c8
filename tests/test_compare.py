"""What changes between two runs: against direct definitions, on published outputs and on predictions."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import nights
import numpy as np
import pyarrow as pa
import pytest
from nights import Nights
from test_predictions import ABOUT, BOTH, rows

from pipeline import predictions, schema, storage, view
from pipeline.compare import Comparison, compare
from pipeline.errors import ConfigError

A, B = "deit-01234567", "vit-89abcdef"
KEYS = [f"{folder}/{number:03d}.jpg" for folder in ("a", "ü") for number in range(120)]
LABELS = ("cat", "dog", "eel", "fox", "gnu")


def answer(row: dict[str, Any], salt: int) -> dict[str, Any]:
    """Three labels of five, scores and a vector that depend on the picture and a number."""
    rng = np.random.default_rng([salt, schema.image_id(row["uri"])])
    ids = rng.permutation(5)[:3].tolist() if rng.random() < 0.4 else [0, 1, 2]
    scores = np.sort(rng.dirichlet([1, 1, 1]))[::-1].astype(np.float32).tolist()
    vector = np.array(row["embedding"]) + salt * rng.normal(size=nights.DIM) * 0.05
    return {
        **row,
        "label_ids": ids,
        "label_names": [LABELS[number] for number in ids],
        "label_scores": scores,
        "embedding": (vector / np.linalg.norm(vector)).astype(np.float32).tolist(),
    }


@pytest.fixture
def output(tmp_path: Path) -> str:
    """Two spaces: of A the first ten pictures are not labeled, of B every seventh, and the last nine are failed."""
    published = Nights(storage.connect(str(tmp_path / "out")), rows_per_file=50)
    published.publish(KEYS[10:], change=lambda row: answer(row, 0))
    failed = dict.fromkeys(KEYS[-9:], "corrupt")
    published.publish(
        [key for key in KEYS[:-9:] if KEYS.index(key) % 7], failed, space_id=B, change=lambda row: answer(row, 1)
    )
    return str(tmp_path / "out")


def read(output: str, space_id: str) -> dict[str, dict[str, Any]]:
    tables = view.batches(storage.connect(output), space_id)
    return {row["uri"]: row for table in tables for row in table.to_pylist()}


def test_a_comparison_of_two_spaces_is_what_the_definitions_say(output: str) -> None:
    found = compare(f"{output}#space={A}", f"{output}#space={B}")
    a, b = read(output, A), read(output, B)
    both = sorted(a.keys() & b.keys())
    assert 100 < found.num_both == len(both)
    assert (found.num_only_a, found.num_only_b) == (len(a.keys() - b.keys()), len(b.keys() - a.keys()))
    assert 0 < found.num_only_b < found.num_only_a
    names = [(a[uri]["label_names"], b[uri]["label_names"]) for uri in both]
    assert found.top_k == 3
    assert found.top_1_agreement == sum(x[0] == y[0] for x, y in names) / len(both) < 1
    assert found.top_k_agreement == sum(set(x) == set(y) for x, y in names) / len(both)
    assert found.top_k_overlap == pytest.approx(np.mean([len(set(x) & set(y)) / 3 for x, y in names]))
    assert found.best_a_in_b == sum(x[0] in y for x, y in names) / len(both)
    assert found.best_b_in_a == sum(y[0] in x for x, y in names) / len(both)
    change = [b[uri]["label_scores"][0] - a[uri]["label_scores"][0] for uri in both]
    assert found.mean_score_change == pytest.approx(np.mean(change))
    flips = Counter((x[0], y[0]) for x, y in names if x[0] != y[0])
    assert {(each.name, each.becomes): each.num_images for each in found.flips} == flips
    assert {each.name: each.num_images for each in found.classes} == Counter(x[0] for x, _ in names)
    assert {each.name: each.num_flipped for each in found.classes if each.num_flipped} == Counter(
        x[0] for x, y in names if x[0] != y[0]
    )
    for each in found.bins:
        inside = [uri for uri in both if each.above < a[uri]["label_scores"][0] <= each.up_to]
        assert each.num_images == len(inside)
        assert each.num_flipped == sum(a[uri]["label_names"][0] != b[uri]["label_names"][0] for uri in inside)
    assert sum(each.num_images for each in found.bins) == len(both)
    assert found.truth is None


def test_vectors_are_compared_where_both_have_some(output: str) -> None:
    cosines = compare(f"{output}#space={A}", f"{output}#space={B}").cosines
    a, b = read(output, A), read(output, B)
    each = {uri: float(np.dot(a[uri]["embedding"], b[uri]["embedding"])) for uri in a.keys() & b.keys()}
    assert cosines is not None
    assert cosines.mean == pytest.approx(np.mean(list(each.values())), abs=1e-6)
    assert cosines.least == pytest.approx(min(each.values()), abs=1e-6)
    assert cosines.least_uri == min(each, key=lambda uri: each[uri])
    lowest = sorted(each.values())[len(each) // 100]
    assert cosines.first_percentile <= lowest + 1e-6
    assert 1 - cosines.first_percentile == pytest.approx(1 - lowest, rel=0.012)


def test_a_run_changes_nothing_from_itself(output: str) -> None:
    found = compare(f"{output}#space={A}", f"{output}#space={A}")
    assert (found.top_1_agreement, found.top_k_agreement, found.top_k_overlap, found.best_a_in_b) == (1, 1, 1, 1)
    assert (found.flips, found.num_only_a, found.num_only_b, found.mean_score_change) == ([], 0, 0, 0)
    assert found.cosines is not None
    assert found.cosines.least == pytest.approx(1, abs=1e-12)
    assert found.cosines.first_percentile >= 1 - 1e-8


def test_a_run_without_vectors_is_compared_without_them(output: str, tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    with predictions.writer(path, BOTH[:1], ABOUT) as writer:
        a = read(output, A)
        names = [field for field in predictions.SCHEMA if field.name not in BOTH[0]._fields]
        said = [{**row, "true_name": row["label_names"][1], "true_id": row["label_ids"][1]} for row in a.values()]
        writer.add(pa.Table.from_pylist(said, pa.schema(names)), BOTH[0])
    found = compare(str(path), f"{output}#space={A}")
    assert (found.num_both, found.top_1_agreement, found.cosines, found.truth) == (len(a), 1, None, None)


def test_where_truth_is_known_the_comparison_says_who_is_right(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    with predictions.writer(path, BOTH, ABOUT) as writer:
        said = rows(0, 70)
        writer.add(said, BOTH[0])
        # Wrong for every picture of true id 0, which is its first label in `rows`.
        wrong = [[9, 0] if ids and ids[0] == 0 else ids for ids in said["label_ids"].to_pylist()]
        names = [["other", "fish"] if ids and ids[0] == 9 else ["fish", "other"][: len(ids)] for ids in wrong]
        for name, values in (("label_ids", wrong), ("label_names", names)):
            place = said.column_names.index(name)
            said = said.set_column(place, said.schema.field(name), pa.array(values, said.schema.field(name).type))
        writer.add(said, BOTH[1])
    found = compare(f"{path}#precision=fp32", f"{path}#precision=bf16")
    num_wrong = sum(number % 3 == 0 for number in range(70) if number % 7)
    assert found.num_both == 60
    assert found.truth is not None
    assert (found.truth.top_1_a, found.truth.top_1_b) == (1, (60 - num_wrong) / 60)
    assert (found.truth.num_only_a_right, found.truth.num_only_b_right) == (num_wrong, 0)
    assert [(each.name, each.becomes, each.num_images) for each in found.flips] == [("fish", "other", num_wrong)]
    assert (found.top_1_agreement, found.top_k_agreement) == ((60 - num_wrong) / 60, 1)


def test_runs_over_other_pictures_are_refused_with_their_numbers(output: str, tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    with predictions.writer(path, BOTH[:1], ABOUT) as writer:
        writer.add(rows(0, 20), BOTH[0])
    with pytest.raises(ConfigError, match=r"found none among 230 of .*out#space=deit-01234567 and 17 of .*p\.parquet#"):
        compare(f"{output}#space={A}", str(path))


def test_the_json_of_a_comparison_has_all_of_it(output: str) -> None:
    found = compare(f"{output}#space={A}", f"{output}#space={B}")
    content = json.loads(found.to_json())
    assert set(content) == set(Comparison.__dataclass_fields__)
    assert content["a"]["where"].endswith(f"#space={A}")
    assert content["bins"][0].keys() == {"above", "up_to", "num_images", "num_flipped"}
    assert content["flips"][0].keys() == {"name", "becomes", "num_images"}
