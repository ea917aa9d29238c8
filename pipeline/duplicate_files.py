"""Duplicates as they were found -> Parquet files, a page of the largest groups, and duplicates.json, written last.

    settings.json     which index, version and threshold: a folder holds the duplicates of one
    edges.parquet     EDGES; edges-00001.parquet and so on where there are many
    groups.parquet    GROUPS, in the same way
    duplicates.html   thumbnails of the largest groups, read from where the pictures are
    duplicates.json   counts, settings and files

A module of its own because this is what other programs and people read; how it was found they need not know.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict

from pipeline import schema, sheet, storage
from pipeline.errors import ConflictError
from pipeline.leaders import Floats, Ints, Pairs
from pipeline.sheet import Section, Tile
from pipeline.storage import Store

FILE_ROWS = 250_000
"""A file is one PUT, and in memory: some 30 MB, and 500 MB if all keys have the 1024 bytes that a key may have."""
SHEET_TILES = 12
"""Pictures of a group that the page shows."""

ROWS = pa.schema(
    [
        pa.field("ordinal", pa.int64(), nullable=False),
        pa.field("uri", pa.large_string(), nullable=False),  # of any number of rows: a string column ends at 2 GiB
        pa.field("etag", pa.large_string()),
        pa.field("size_bytes", pa.int64(), nullable=False),
        pa.field("width_px", pa.int32(), nullable=False),
        pa.field("height_px", pa.int32(), nullable=False),
        pa.field("phash", pa.int64()),
        pa.field("label_name", pa.large_string(), nullable=False),
        pa.field("label_score", pa.float32(), nullable=False),
    ]
)
"""What is known of a row that has duplicates; sorted by ordinal. The label is the best one."""
EDGES = pa.schema(
    [
        pa.field("uri_a", pa.string(), nullable=False),  # the smaller one; of exact copies the one that stands for all
        pa.field("uri_b", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),  # exact, near
        pa.field("cosine", pa.float32(), nullable=False),  # 1 for exact
        pa.field("phash_distance", pa.int32()),  # bits of 64 that differ; null without --image-stats
    ]
)
GROUPS = pa.schema(
    [
        pa.field("group_id", pa.int64(), nullable=False),  # 1 is the largest
        pa.field("leader_uri", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),  # leader, exact (the leader's bytes), near
        pa.field("cosine", pa.float32(), nullable=False),  # to the leader
        pa.field("phash_distance", pa.int32()),  # to the leader
        pa.field("size_bytes", pa.int64(), nullable=False),
        pa.field("width_px", pa.int32(), nullable=False),
        pa.field("height_px", pa.int32(), nullable=False),
        pa.field("label_name", pa.string(), nullable=False),
        pa.field("label_score", pa.float32(), nullable=False),
    ]
)
KINDS = np.array(["leader", "exact", "near"])


class Settings(BaseModel):
    """What decides which duplicates there are."""

    model_config = ConfigDict(frozen=True)

    index: str
    space_id: str
    version: str
    min_cosine: float


class Copies(NamedTuple):
    """Ordinals of exact copies, each with the row that stands for its content, which is none itself."""

    copy: Ints
    original: Ints


class Members(NamedTuple):
    """Everybody in a group, leaders too: ordinals, and the cosine of the member's content and the leader's."""

    member: Ints
    leader: Ints
    cosine: Floats
    content: Ints
    """The row that stands for the member's content."""


class Duplicates(NamedTuple):
    """All that was found."""

    rows: pa.Table
    """ROWS of everybody in what follows."""
    copies: Copies
    near: Pairs
    members: Members


def check(target: Store, settings: Settings) -> None:
    """ConflictError for a folder that holds duplicates of another index or threshold."""
    standing = storage.get_or_none(target, "settings.json")
    if standing is not None:
        _check_equal(target, settings, standing)


def _check_equal(target: Store, settings: Settings, standing: bytes) -> None:
    if standing != _json(settings.model_dump()):
        held = " ".join(standing.decode(errors="replace").split())
        raise ConflictError(
            f"{target.root}: expected a folder for duplicates of {settings.version} at {settings.min_cosine:g}, found"
            f" one of {held[:500]}; give another --output"
        )


def write(target: Store, settings: Settings, found: Duplicates, input_url: str, sheet_groups: int) -> dict[str, Any]:
    """Write everything but duplicates.json; what to say in it. Errors as `check`; SourceError for storage."""
    own = _json(settings.model_dump())
    _check_equal(target, settings, target.put_if_absent("settings.json", own))
    groups = _groups(found)
    files = [*_put(target, "edges", _edges(found)), *_put(target, "groups", _slices(groups))]
    target.put("duplicates.html", _page(settings, groups, found, input_url, sheet_groups).encode())
    is_duplicate = pc.not_equal(groups["kind"], "leader")
    num_groups = _num_groups(groups)
    return {
        "num_exact_copies": len(found.copies.copy),
        "num_near_pairs": len(found.near.a),
        "num_groups": num_groups,
        "num_duplicates": len(groups) - num_groups,
        "duplicate_bytes": pc.sum(groups["size_bytes"].filter(is_duplicate)).as_py() or 0,
        "files": [*files, "duplicates.html"],
    }


def finish(target: Store, settings: Settings, counts: dict[str, Any]) -> None:
    """Write duplicates.json: everything else is there."""
    target.put("duplicates.json", _json({**settings.model_dump(), **counts}))


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=1).encode()


def _put(target: Store, name: str, tables: Iterator[pa.Table]) -> list[str]:
    """Write files of one kind; their names."""
    names = []
    for number, table in enumerate(tables):
        names.append(f"{name}-{number:05d}.parquet" if number else f"{name}.parquet")
        target.put(names[-1], schema.encode(table))
    return names


# --- tables -------------------------------------------------------------------------------------------------------


def _edges(found: Duplicates) -> Iterator[pa.Table]:
    """EDGES by the file: the exact ones, then the near ones; at least one file."""
    a = np.concatenate([found.copies.original, found.near.a])
    b = np.concatenate([found.copies.copy, found.near.b])
    num_exact = len(found.copies.copy)
    cosine = np.concatenate([np.ones(num_exact, np.float32), found.near.cosine])
    for start in range(0, max(1, len(a)), FILE_ROWS):
        here = slice(start, start + FILE_ROWS)
        left, right = _taken(found.rows, a[here]), _taken(found.rows, b[here])
        is_ordered = pc.less(left["uri"], right["uri"])
        yield pa.table(
            {
                "uri_a": pc.if_else(is_ordered, left["uri"], right["uri"]),
                "uri_b": pc.if_else(is_ordered, right["uri"], left["uri"]),
                "kind": KINDS[np.where(np.arange(len(a))[here] < num_exact, 1, 2)],
                "cosine": cosine[here],
                "phash_distance": _phash_distance(left, right),
            }
        ).cast(EDGES)


def _groups(found: Duplicates) -> pa.Table:
    """GROUPS, and the etag: the largest group first, in it the leader, its copies, and the others by cosine."""
    members = found.members
    kinds = np.where(members.member == members.leader, 0, np.where(members.content == members.leader, 1, 2))
    rows, leaders = _taken(found.rows, members.member), _taken(found.rows, members.leader)
    _, places, counts = np.unique(members.leader, return_inverse=True, return_counts=True)
    sorted_by = {
        "count": (counts[places], "descending"),
        "leader_uri": (leaders["uri"], "ascending"),
        "kind": (kinds, "ascending"),
        "cosine": (members.cosine, "descending"),
        "uri": (rows["uri"], "ascending"),
    }
    keys = pa.table({name: values for name, (values, _) in sorted_by.items()})
    order = pc.sort_indices(keys, [(name, direction) for name, (_, direction) in sorted_by.items()])
    kinds = kinds[order]
    columns = {
        "group_id": np.cumsum(kinds == 0),
        "leader_uri": leaders["uri"].take(order),
        "kind": KINDS[kinds],
        "cosine": members.cosine[order],
        "phash_distance": _phash_distance(rows, leaders).take(order),
    }
    rows = rows.take(order)
    names = [*GROUPS.names, "etag"]
    return pa.table([columns[name] if name in columns else rows[name] for name in names], names)


def _slices(groups: pa.Table) -> Iterator[pa.Table]:
    """GROUPS by the file, at least one."""
    for start in range(0, max(1, len(groups)), FILE_ROWS):
        yield groups.slice(start, FILE_ROWS).select(GROUPS.names).cast(GROUPS)


def _taken(rows: pa.Table, ordinals: Ints) -> pa.Table:
    return rows.take(pa.array(np.searchsorted(rows["ordinal"].to_numpy(), ordinals)))


def _phash_distance(left: pa.Table, right: pa.Table) -> pa.Array:
    """Bits in which two perceptual hashes differ; null where one is not known."""
    differing = pc.bit_wise_xor(left["phash"], right["phash"])
    is_known = np.asarray(differing.is_valid())
    bits = np.bitwise_count(np.asarray(differing.fill_null(0)).view(np.uint64))
    return pa.array(bits.astype(np.int32), mask=~is_known)


# --- page ---------------------------------------------------------------------------------------------------------


def _page(settings: Settings, groups: pa.Table, found: Duplicates, input_url: str, sheet_groups: int) -> str:
    """The largest groups with thumbnails."""
    num_groups = _num_groups(groups)
    ids = groups["group_id"].to_numpy()
    borders = np.searchsorted(ids, np.arange(1, min(sheet_groups, num_groups) + 2)).tolist()
    spans = list(itertools.pairwise(borders))
    parts = [groups.slice(begin, min(end - begin, SHEET_TILES)).to_pylist() for begin, end in spans]
    pictures = iter(sheet.thumbnails(input_url, [row for part in parts for row in part]))
    sections = [
        _section(part, end - begin, [next(pictures) for _ in part])
        for part, (begin, end) in zip(parts, spans, strict=True)
    ]
    note = (
        f"Index {settings.version} of space {settings.space_id}, cosine {settings.min_cosine:g} or more:"
        f" {sheet.counted(len(found.copies.copy), 'exact copy', 'exact copies')},"
        f" {sheet.counted(len(found.near.a), 'near pair')}, {sheet.counted(num_groups, 'group')}, {len(parts):,} shown."
        " The first picture of a group leads it: most pixels, then most bytes. The number is"
        " the cosine to it."
    )
    return sheet.write("Duplicates", sections, note)


def _num_groups(groups: pa.Table) -> int:
    return int(pc.max(groups["group_id"]).as_py() or 0)


def _section(rows: Sequence[dict[str, Any]], num_rows: int, pictures: Sequence[tuple[bytes | None, str]]) -> Section:
    tiles = [
        Tile(row["uri"], *picture, lines=list(_lines(row)), score=None if row["kind"] == "leader" else row["cosine"])
        for row, picture in zip(rows, pictures, strict=True)
    ]
    note = f"{len(rows):,} of them shown" if len(rows) < num_rows else ""
    return Section(f"Group {rows[0]['group_id']:,}: {num_rows:,} pictures", note, tiles)


def _lines(row: dict[str, Any]) -> Iterator[str]:
    yield {"leader": "leader", "exact": "the same bytes", "near": "near"}[row["kind"]]
    yield f"{row['width_px']} × {row['height_px']}, {row['size_bytes'] / 1e3:,.1f} kB"
    yield f"{row['label_name']} {row['label_score']:.3f}"
    if row["kind"] == "near" and row["phash_distance"] is not None:
        yield f"{row['phash_distance']} of 64 bits of the perceptual hash differ"
