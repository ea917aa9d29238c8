"""Which label of a model a class of a set is: by rules that can be said, or not at all."""

import json
from pathlib import Path
from typing import get_args

import pytest

from pipeline.errors import ConfigError
from pipeline.label_map import RULES, Given, Match, Rule, match_names, match_one, read_map

MODEL = ["tench, Tinca tinca", "goldfish, Carassius auratus", "crane", "golden retriever", "crane", "Golf ball"]


@pytest.mark.parametrize(
    ("name", "label_id", "rule"),
    [
        ("tench, Tinca tinca", 0, "name"),
        ("tench", 0, "synonym"),
        ("Tench", 0, "synonym"),
        ("goldfish, anything", 1, "synonym"),
        ("golden_retriever", 3, "synonym"),
        ("golf  ball", 5, "synonym"),
        ("Tinca tinca", None, None),  # the second synonym
        ("crane", None, None),  # a bird or a machine
        ("Crane", None, None),
        ("n01440764", None, None),
        ("", None, None),
        ("2", None, None),  # a set of one class has not as many as the model
    ],
)
def test_a_name_is_the_same_or_the_same_first_synonym_of_one_label(
    name: str, label_id: int | None, rule: Rule | None
) -> None:
    assert match_names([name], MODEL) == {name: Match(label_id, rule)}


def test_an_exact_name_goes_before_a_synonym() -> None:
    names = ["cat", "cat, Felis"]
    assert match_names(names, names) == {"cat": Match(0, "name"), "cat, Felis": Match(1, "name")}
    assert match_names(["Cat"], names) == {"Cat": Match(None, None)}


def test_a_map_goes_before_everything_and_names_labels_by_name_synonym_or_id() -> None:
    given: Given = {
        "tench": "goldfish",
        "n02": "crane ",
        "bird": 2,
        "ball": "Golf ball",
        "none": None,
        "elsewhere": "tench",
    }
    with pytest.raises(
        ConfigError, match=r"n02 = 'crane ': expected one of the model's 6 labels, found 2 of that name"
    ):
        match_names(["n02"], MODEL, given)
    assert match_names(["tench", "bird", "ball", "none", "goldfish"], MODEL, given) == {
        "tench": Match(1, "file"),
        "bird": Match(2, "file"),
        "ball": Match(5, "file"),
        "none": Match(None, "file"),
        "goldfish": Match(1, "synonym"),
    }


@pytest.mark.parametrize("target", [6, -1, "dog"])
def test_a_map_to_a_label_that_there_is_not_is_refused(target: str | int) -> None:
    with pytest.raises(ConfigError, match=r"--label-map: x = .*: expected one of the model's 6 labels, found none"):
        match_names(["x"], MODEL, {"x": target})


# --- as many classes as the model ---------------------------------------------------------------------------------


def test_classes_that_stand_where_the_model_has_them_are_the_models_also_where_names_say_nothing() -> None:
    names = ["tench, Tinca tinca", "goldfish", "crane bird", "golden retriever", "crane", "Golf ball"]
    found = match_names(names, MODEL)
    assert [found[name].label_id for name in names] == list(range(6))
    assert [found[name].rule for name in names] == ["name", "synonym", "position", "name", "position", "name"]


def test_one_class_in_another_place_and_no_class_is_matched_by_position() -> None:
    names = ["goldfish", "tench", "crane bird", "golden retriever", "crane", "Golf ball"]
    found = match_names(names, MODEL)
    assert [found[name].label_id for name in names] == [1, 0, None, 3, None, 5]


def test_other_classes_are_not_the_models_because_they_are_as_many() -> None:
    names = ["ant", "bee", "cow", "dog", "eel", "golf ball"]
    assert [match.label_id for match in match_names(names, MODEL).values()] == [None, None, None, None, None, 5]


def test_as_many_wordnet_ids_in_ascending_order_are_the_models_labels() -> None:
    names = [f"n0144076{number}" for number in range(6)]
    assert [match_names(names, MODEL)[name] for name in names] == [Match(place, "position") for place in range(6)]
    assert {match.rule for match in match_names(names[::-1], MODEL).values()} == {None}
    assert {match.rule for match in match_names(names[:5], MODEL).values()} == {None}


def test_as_many_numbers_as_labels_are_ids_in_whatever_order() -> None:
    model = [f"thing {number}" for number in range(12)]
    names = sorted(str(number) for number in range(12))
    assert names[1:3] == ["1", "10"]
    assert match_names(names, model) == {name: Match(int(name), "number") for name in names}
    assert {match.rule for match in match_names(names[:11], model).values()} == {None}
    beyond = [*names[:11], "12"]
    assert match_names(beyond, model)["12"] == Match(None, None)


@pytest.mark.parametrize(
    ("label", "match"),
    [("3", Match(3, "number")), ("6", Match(None, None)), ("-1", Match(None, None)), ("tench", Match(0, "synonym"))],
)
def test_a_number_in_a_set_without_names_is_the_models_id_if_it_can_be_one(label: str, match: Match) -> None:
    assert match_one(label, MODEL) == match


def test_a_map_also_goes_before_numbers() -> None:
    assert match_one("3", MODEL, {"3": "tench"}) == Match(0, "file")
    assert match_one("3", ["3", "2", "1", "0"]) == Match(0, "name")


def test_every_rule_can_be_said() -> None:
    assert set(RULES) == set(get_args(Rule))


# --- the file -----------------------------------------------------------------------------------------------------


def test_a_map_is_json_or_toml(tmp_path: Path) -> None:
    content = {"n01440764": "tench, Tinca tinca", "cat": 281}
    (tmp_path / "map.json").write_text(json.dumps({**content, "none": None}))
    (tmp_path / "map.toml").write_text('n01440764 = "tench, Tinca tinca"\ncat = 281\n')
    assert read_map(tmp_path / "map.json") == {**content, "none": None}
    assert read_map(tmp_path / "map.toml") == content


@pytest.mark.parametrize("text", ["", "[1]", '{"cat": [1]}', '{"cat": 1.5}', '{"cat": true}', "cat = 1"])
def test_a_map_that_is_none_is_refused_with_its_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "map.json").write_text(text)
    with pytest.raises(ConfigError, match=r"--label-map .*map\.json: (cannot be read|expected one table)"):
        read_map(tmp_path / "map.json")
    with pytest.raises(ConfigError, match=r"absent\.json: cannot be read \(FileNotFoundError"):
        read_map(tmp_path / "absent.json")
