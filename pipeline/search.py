"""search(options): a picture, an image of the index, numbers or a label -> the rows nearest to it, best first.

In: an index (its own model is found for a picture), and what somebody asks. Out: rows with scores; as text for a
terminal, as JSON, or as a page with thumbnails.

A module of its own because what an answer is, which rows may be one and how they are shown, is decided here; `query`
knows vectors, and `index` rows.
"""

import difflib
import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
from PIL import Image

from pipeline import index, query, run_model, sheet, storage
from pipeline.errors import ConfigError
from pipeline.index import Index
from pipeline.index_vectors import Found, Ordinals
from pipeline.query import Vector
from pipeline.sheet import Section, Tile

_ANSWER = (
    *("uri", "image_id", "etag", "size_bytes", "width_px", "height_px"),
    *("label_names", "label_scores", "run_seq"),
)
_NUM_CLOSE_LABELS = 3


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is asked. Exactly one of `image`, `uri`, `image_id`, `vector` and `text_label` is given."""

    index: str
    space: str | None = None
    version: str | None = None
    image: str | None = None
    uri: str | None = None
    image_id: int | None = None
    vector: str | None = None
    text_label: str | None = None
    k: int = 10
    label: str | None = None
    """Only images whose best label this is."""
    min_score: float | None = None
    exact: bool = False
    model: str | None = None
    """Where the index's checkpoint lies; None: where the run found it."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was found."""

    question: str
    score_name: str
    index_name: str
    answers: list[dict[str, Any]]
    """`score` and _ANSWER, best first."""
    input: str
    """What the uris lie below."""
    picture: Image.Image | None = None
    """What was searched with, if it was a picture."""
    picture_labels: tuple[tuple[str, float], ...] = ()


def search(options: Options) -> Result:
    """The k best rows that the filters leave; fewer if there are fewer.

    An image of the index is not its own answer. Raises ConfigError for questions that make no sense, for an index,
    label or uri that is not there, and for a picture that cannot be decoded; ConflictError for a damaged index and
    another model than the index's; SourceError for storage.
    """
    _check(options)
    found = index.open_index(options.index, options.space, options.version)
    found.check_k(options.k)
    name = f"{found.store.root}/{found.info.folder}"
    shared: dict[str, Any] = {"index_name": name, "input": found.info.source.input}
    if options.text_label is not None:
        ordinals, scores = _with_best_label(found, options.text_label, "--text-label")
        order = np.argsort(-scores, kind="stable")
        answers = _answers(found, options, scores[order], ordinals[order])
        question = f"images labeled {options.text_label}"
        return Result(question=question, score_name="probability", answers=answers, **shared)
    picture, own = None, None
    if options.image is not None:
        picture = _picture(found, options, options.image)
        question, vector = f"images like {options.image}", picture.vector
    elif options.vector is not None:
        question, vector = "images like a vector", query.numbers(options.vector, found.info.dim)
    else:
        own = found.ordinal_of(options.uri) if options.uri is not None else _only(found, options.image_id)
        uri = found.rows([own])["uri"][0].as_py()
        question, vector = f"images like {uri}", found.true_vectors([own])[0]
    answers = _nearest(found, options, vector, own)
    if options.label is not None:
        question += f", labeled {options.label}"
    return Result(
        question=question,
        score_name="cosine",
        answers=answers,
        picture=picture.image if picture else None,
        picture_labels=tuple(picture.labels) if picture else (),
        **shared,
    )


def _check(options: Options) -> None:
    """ConfigError for flags that would say nothing."""
    for flag, is_given in (("--label", options.label is not None), ("--exact", options.exact)):
        if is_given and options.text_label is not None:
            raise ConfigError(f"{flag}: expected something to search with, found --text-label, which is no search")
    if options.min_score is not None and math.isnan(options.min_score):
        raise ConfigError("--min-score: expected a number, found nan")


def _picture(found: Index, options: Options, path_or_url: str) -> query.Picture:
    info = found.info
    first = found.rows([info.rows[0].first_ordinal])
    wanted = run_model.settings_of(info.facts, top_k=len(first["label_names"][0]))
    reported = run_model.reported_name(storage.connect(info.source.output), info.source.run_id)
    names = [options.model] if options.model is not None else [reported, info.model_id]
    return query.picture(path_or_url, wanted, names)


def _only(found: Index, image_id: int | None) -> int:
    ordinals = np.concatenate(
        [
            np.asarray(table["ordinal"])[np.asarray(pc.equal(table["image_id"], image_id))]
            for table in found.all_rows(["ordinal", "image_id"])
        ]
    )
    if len(ordinals) != 1:
        which = " and ".join(found.rows(ordinals[:3])["uri"].to_pylist()) or "none"
        raise ConfigError(f"--image-id {image_id}: expected one image of index {found.info.version}, found {which}")
    return int(ordinals[0])


def _nearest(found: Index, options: Options, vector: Vector, own: int | None) -> list[dict[str, Any]]:
    among = None
    if options.label is not None:
        among, _ = _with_best_label(found, options.label, "--label")
    # One more than wanted, because an image is nearest to itself.
    k = min(options.k + (own is not None), found.info.num_rows)
    query_QD = vector[None]
    answers: Found = found.exact(query_QD, k, among=among) if options.exact else found.search(query_QD, k, among=among)
    scores, ordinals = answers.cosines_QK[0], answers.ordinals_QK[0]
    is_answer = (ordinals >= 0) & (ordinals != own if own is not None else True)
    return _answers(found, options, scores[is_answer], ordinals[is_answer])


def _answers(
    found: Index, options: Options, scores: np.ndarray[Any, np.dtype[np.float32]], ordinals: Ordinals
) -> list[dict[str, Any]]:
    """The first k that score enough."""
    if options.min_score is not None:
        ordinals, scores = ordinals[scores >= options.min_score], scores[scores >= options.min_score]
    rows = found.rows(ordinals[: options.k]).select(_ANSWER).to_pylist()
    return [{"score": float(score), **row} for score, row in zip(scores, rows, strict=False)]


def _with_best_label(found: Index, label: str, flag: str) -> tuple[Ordinals, np.ndarray[Any, np.dtype[np.float32]]]:
    """Ordinals, ascending, and scores of the images whose best label this is. ConfigError if there is none."""
    ordinals, scores, known = [np.empty(0, np.int64)], [np.empty(0, np.float32)], set()
    for table in found.all_rows(["ordinal", "label_names", "label_scores"]):
        best = pc.list_element(table["label_names"], 0)
        known.update(best.unique().to_pylist())
        rows = table.filter(pc.equal(best, label))
        ordinals.append(rows["ordinal"].to_numpy())
        scores.append(pc.list_element(rows["label_scores"], 0).to_numpy())
    if label not in known:
        folded = {name.casefold(): name for name in known}
        close = difflib.get_close_matches(label.casefold(), folded, _NUM_CLOSE_LABELS)
        shown = [folded[name] for name in close] or sorted(known)[:_NUM_CLOSE_LABELS]
        raise ConfigError(
            f"{flag}: expected the best label of some image of index {found.info.version}, such as"
            f" {', '.join(map(repr, shown))}, found {label!r}"
        )
    return np.concatenate(ordinals), np.concatenate(scores)


# --- how it is shown ----------------------------------------------------------------------------------------------


def as_table(result: Result) -> str:
    """For a terminal: a line per answer."""
    lines = [f"{sheet.shown(result.question)}, in {result.index_name}"]
    if result.picture_labels:
        lines.append(f"labeled {_labels(result.picture_labels)}")
    if not result.answers:
        return "\n".join([*lines, "nothing found"])
    width = max(len(sheet.shown(each["label_names"][0])) for each in result.answers)
    lines.append(f"\n   # {result.score_name:>11}  {'label':{width}}   prob  uri")
    for number, each in enumerate(result.answers, 1):
        name = sheet.shown(each["label_names"][0])
        uri, probability = sheet.shown(each["uri"]), each["label_scores"][0]
        lines.append(f"{number:4} {each['score']:11.4f}  {name:{width}}  {probability:5.3f}  {uri}")
    return "\n".join(lines)


def as_json(result: Result) -> str:
    """For programs: one object."""
    said = {
        "question": result.question,
        "index": result.index_name,
        "score": result.score_name,
        "labels": [{"name": name, "score": score} for name, score in result.picture_labels],
        "answers": result.answers,
    }
    return json.dumps(said, ensure_ascii=False, indent=1)


def as_page(result: Result) -> str:
    """For a browser: the pictures, fetched now from where they are."""
    sections = []
    if result.picture is not None:
        lines = [f"{name} {score:.3f}" for name, score in result.picture_labels]
        asked = Tile(result.question.removeprefix("images like "), sheet.thumbnail(result.picture), lines=lines)
        sections.append(Section("Searched with", "", [asked]))
    pictures = sheet.thumbnails(result.input, result.answers)
    tiles = [
        Tile(
            each["uri"],
            *picture,
            lines=[
                f"{each['label_names'][0]} {each['label_scores'][0]:.3f}",
                f"{each['width_px']} × {each['height_px']}",
            ],
            score=each["score"],
        )
        for each, picture in zip(result.answers, pictures, strict=True)
    ]
    found = f"{len(tiles)} found, by {result.score_name}" if tiles else "Nothing found"
    sections.append(Section(found, "", tiles))
    title = result.question[0].upper() + result.question[1:]
    return sheet.write(title, sections, f"Index {result.index_name}")


def _labels(labels: tuple[tuple[str, float], ...]) -> str:
    return ", ".join(f"{sheet.shown(name)} {score:.3f}" for name, score in labels)
