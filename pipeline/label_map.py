"""What a labeled set calls its classes -> the ids of a model's labels, and by which rule.

A module of its own because a wrong answer here is an accuracy that nobody would doubt: so nothing is guessed, every
rule is one that can be said in a line, and what matches nothing stays without an id.
"""

import json
import re
import tomllib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pipeline.errors import ConfigError
from pipeline.storage import describe

Rule = Literal["file", "name", "synonym", "number", "position"]
RULES: dict[Rule, str] = {
    "file": "as --label-map says",
    "name": "by name",
    "synonym": "by the first synonym",
    "number": "by number",
    "position": "by position: as many classes as the model, and none in another place",
}

_WORDNET_ID = re.compile(r"n\d{8}")


class Match(NamedTuple):
    """One class of the set."""

    label_id: int | None
    """Of the model; None: no match, or more than one."""
    rule: Rule | None


Given = Mapping[str, str | int | None]
"""Of a --label-map: the set's name or number -> the model's name or id, None for a class to leave out."""


def match_names(names: Sequence[str], model_names: Sequence[str], given: Given | None = None) -> dict[str, Match]:
    """For each class of a set the model's label, by the first rule that gives one.

    `file`: as given. `name`: the same name. `synonym`: the same up to the first comma, ignoring case and with `_` read
    as a space ("tench, Tinca tinca" is "Tench"). Only where the set has as many classes as the model: `number`, if all
    names are numbers, and `position`, if those that match by name, at least half of them, all stand at their id, or if
    all names are WordNet ids in ascending order, as ImageNet's folders are. A name that fits two labels ("crane")
    matches none of them by `name` and `synonym`.

    Raises ConfigError for a given target that the model does not have.
    """
    given = given or {}
    by_name, by_synonym = _positions(model_names), _positions([_first_synonym(name) for name in model_names])
    found: dict[str, Match] = {}
    for name in names:
        if name in given:
            found[name] = Match(_target(given[name], name, by_name, by_synonym, len(model_names)), "file")
        elif len(ids := by_name[name]) == 1:
            found[name] = Match(ids[0], "name")
        elif not ids and len(ids := by_synonym[_first_synonym(name)]) == 1:
            found[name] = Match(ids[0], "synonym")
        else:
            found[name] = Match(None, None)
    rest = [name for name in names if found[name].rule is None]
    if len(names) == len(model_names) and all(name.isdecimal() for name in names):
        found |= {name: Match(int(name), "number") for name in rest if int(name) < len(names)}
    elif len(names) == len(model_names) and _stands_in_order(names, found):
        found |= {name: Match(place, "position") for place, name in enumerate(names) if name in rest}
    return found


def match_one(name: str, model_names: Sequence[str], given: Given | None = None) -> Match:
    """The same for a class of a set that does not say which classes it has: a number is the model's id, if it can be
    one and is no name.
    """
    found = match_names([name], model_names, given)[name]
    if found.rule is None and name.isdecimal() and int(name) < len(model_names):
        return Match(int(name), "number")
    return found


def read_map(path: Path) -> dict[str, str | int | None]:
    """A --label-map: a JSON or (by its suffix) TOML file of one table. ConfigError if it is none."""
    try:
        text = path.read_text()
        content: Any = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--label-map {path}: cannot be read ({describe(error)})") from error
    wrong = content if not isinstance(content, dict) else [each for each in content.items() if not _is_target(each[1])]
    if wrong or not isinstance(content, dict):
        raise ConfigError(
            f"--label-map {path}: expected one table of the set's name -> the model's name or id, found"
            f" {str(wrong)[:80]}"
        )
    return content


def _is_target(value: object) -> bool:
    return value is None or (isinstance(value, str | int) and not isinstance(value, bool))


def _positions(names: Sequence[str]) -> defaultdict[str, list[int]]:
    found: defaultdict[str, list[int]] = defaultdict(list)
    for position, name in enumerate(names):
        found[name].append(position)
    return found


def _first_synonym(name: str) -> str:
    return " ".join(name.partition(",")[0].replace("_", " ").casefold().split())


def _target(
    value: str | int | None,
    name: str,
    by_name: Mapping[str, list[int]],
    by_synonym: Mapping[str, list[int]],
    num_labels: int,
) -> int | None:
    if value is None:
        return None
    if isinstance(value, int):
        ids = [value] if 0 <= value < num_labels else []
    else:
        ids = by_name.get(value) or by_synonym.get(_first_synonym(value)) or []
    if len(ids) != 1:
        raise ConfigError(
            f"--label-map: {name} = {value!r}: expected one of the model's {num_labels} labels, found"
            f" {f'{len(ids)} of that name' if ids else 'none'}"
        )
    return ids[0]


def _stands_in_order(names: Sequence[str], found: Mapping[str, Match]) -> bool:
    if all(_WORDNET_ID.fullmatch(name) for name in names):
        return list(names) == sorted(names)
    by_name = [place for place, name in enumerate(names) if found[name].rule in ("name", "synonym")]
    return 2 * len(by_name) >= len(names) and all(found[names[place]].label_id == place for place in by_name)
