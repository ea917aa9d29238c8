"""export_embeddings(options): the current view of one space, or what changed in it, as other search engines take it.

    lance        a dataset, see `export_lance`; running it again updates it
    qdrant       <output>/space=…/<run_seq>[-since-<run_seq>]/00000.ndjson, …   a point or an id per line
    opensearch   the same, as bodies of bulk requests, and index.json            the mapping, once

Files come with export.json, written last: space, run, counts and names. One of these exports is never written over
another, so that increments can be loaded in their order, whenever that is.

A module of its own because what all targets want alike is decided here: which rows, checked vectors, one id per uri.
"""

import json
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import changes, export_lance, log, storage, view
from pipeline.changes import Change
from pipeline.errors import ConfigError, ConflictError
from pipeline.log import State
from pipeline.storage import Store
from pipeline.verify_files import is_no_unit_vector
from pipeline.view import View

Target = Literal["lance", "qdrant", "opensearch"]

MAX_FILE_BYTES = 8 * 2**20
"""A file is one request: OpenSearch advises 5 to 15 MiB, its smallest hosted nodes take 10, Qdrant takes 32."""
PAYLOAD = (
    *("image_id", "uri", "etag", "size_bytes", "last_modified", "width_px", "height_px"),
    *("label_ids", "label_names", "label_scores", "model_id", "model_revision", "space_id", "run_seq"),
)
"""Columns that go with a vector into a search engine."""
_SLICE_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class Options:
    """What an export is asked for."""

    input: str
    """The --output of the nights."""
    to: Target
    output: str
    space: str | None = None
    since: int | None = None
    """Only what changed after this place in the log; None: everything, or for Lance what the dataset lacks."""


def export_embeddings(options: Options) -> str:
    """Export and say what was written where; the same again is always right, and changes nothing.

    Raises ConfigError for a space that is not there or has no embeddings, or a `since` that is no place in the log;
    SourceError for storage; ConflictError for damaged rows, and where the target holds something else.
    """
    nights = storage.connect_output(options.input)
    state = log.read(nights)
    current = view.resolve_embedded(nights, options.space, state)
    _check_since(options, nights, state)
    metadata = log.read_claim(nights, current.newest.run_seq).metadata
    if options.to == "lance":
        everything = partial(_checked, nights, state, current, columns=current.columns.names)
        return export_lance.export(options.output, state, current, metadata, everything)
    found = _checked(nights, state, current, options.since or 0, columns=[*PAYLOAD, "embedding"])
    return _write_files(options, current, metadata, found)


def _check_since(options: Options, nights: Store, state: State) -> None:
    if options.since is None:
        return
    if options.to == "lance":
        raise ConfigError("--since: a Lance dataset knows what it holds; leave it out")
    if not 0 < options.since <= state.newest_seq:
        raise ConfigError(
            f"--since: expected a place in the log of {nights.root}, 1 to {state.newest_seq}, found {options.since}"
        )


def _checked(nights: Store, state: State, current: View, run_seq: int, *, columns: list[str]) -> Iterator[Change]:
    """The changes; ConflictError for vectors that are not finite and of length 1, which search would rank wrongly."""
    for change in changes.since(nights, state, current, run_seq, columns):
        is_bad = is_no_unit_vector(change.rows.column("embedding").combine_chunks())
        if is_bad.any():
            first = change.rows["uri"][int(is_bad.argmax())].as_py()
            raise ConflictError(
                f"{nights.root}: expected finite embeddings of length 1, found {is_bad.sum():,} others, first {first};"
                " verify the output"
            )
        yield change


# --- files --------------------------------------------------------------------------------------------------------


def _write_files(options: Options, current: View, metadata: Mapping[str, str], found: Iterator[Change]) -> str:
    name = f"{current.newest.run_seq:08d}" + (f"-since-{options.since:08d}" if options.since is not None else "")
    target = storage.connect_output(f"{storage.normalize(options.output)}/space={current.space_id}/{name}")
    standing = storage.get_or_none(target, "export.json")
    if standing is not None:
        said = json.loads(standing)
        if (said["run_id"], said["to"]) != (current.newest.run_id, options.to):
            raise ConflictError(
                f"{target.root}: holds an export to {said['to']} of run {said['run_id']}; export to another place"
            )
        return f"{target.root} holds this export already; the next one is --since {current.newest.run_seq}"
    counts: Counter[str] = Counter()
    pieces = (_points if options.to == "qdrant" else _bulk)(found, counts)
    files = []
    for number, data in enumerate(_cut(pieces)):
        files.append(f"{number:05d}.ndjson")
        target.put(files[-1], data)
    dim = current.columns.field("embedding").type.list_size
    if options.to == "opensearch":
        target.put("index.json", _json(_index(dim)))
    said = {
        **{"to": options.to, "space_id": current.space_id, "run_id": current.newest.run_id},
        **{"run_seq": current.newest.run_seq, "since": options.since or 0, "dim": dim, "metric": "inner_product"},
        **{"num_upserts": counts["upserts"], "num_deletes": counts["deletes"], "files": files, "metadata": metadata},
    }
    target.put("export.json", _json(said))
    return (
        f"wrote {target.root}: {counts['upserts']:,} upserts and {counts['deletes']:,} deletes in {len(files):,} files;"
        f" the next export is --since {current.newest.run_seq}"
    )


def _cut(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Pieces together, up to MAX_FILE_BYTES."""
    waiting: list[bytes] = []
    num_bytes = 0
    for piece in pieces:
        if waiting and num_bytes + len(piece) > MAX_FILE_BYTES:
            yield b"".join(waiting)
            waiting, num_bytes = [], 0
        waiting.append(piece)
        num_bytes += len(piece)
    if waiting:
        yield b"".join(waiting)


def _points(found: Iterable[Change], counts: Counter[str]) -> Iterator[bytes]:
    """Lines for Qdrant: a point, or the id of one to delete."""
    for change in found:
        for id_, row, vector in _rows(change.rows, counts):
            yield b'{"id":"%s","vector":%s,"payload":%s}\n' % (id_.encode(), vector.encode(), _json(row))
        for id_ in _gone(change, counts):
            yield _json({"id": id_}) + b"\n"


def _bulk(found: Iterable[Change], counts: Counter[str]) -> Iterator[bytes]:
    """Actions for OpenSearch, each with its document's line."""
    for change in found:
        for id_, row, vector in _rows(change.rows, counts):
            document = _json(row)[:-1] + b',"embedding":%s}' % vector.encode()
            yield _json({"index": {"_id": id_}}) + b"\n" + document + b"\n"
        for id_ in _gone(change, counts):
            yield _json({"delete": {"_id": id_}}) + b"\n"


def _gone(change: Change, counts: Counter[str]) -> list[str]:
    counts["deletes"] += len(change.gone)
    return [document_id(uri) for uri in change.gone.to_pylist()]


def _rows(table: pa.Table, counts: Counter[str]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Id, payload and the vector as JSON."""
    counts["upserts"] += len(table)
    for start in range(0, len(table), _SLICE_ROWS):
        piece = table.slice(start, _SLICE_ROWS)
        rows = piece.select(PAYLOAD).to_pylist()
        for row, vector in zip(rows, _vectors(piece), strict=True):
            if row["last_modified"] is not None:
                row["last_modified"] = row["last_modified"].isoformat()
            yield document_id(row["uri"]), {name: value for name, value in row.items() if value is not None}, vector


def _vectors(table: pa.Table) -> list[str]:
    """Each vector as a JSON array of the shortest decimals that are its float32.

    34 µs and 4.7 kB for 384 values; as Python's floats 165 µs and 8.4 kB.
    """
    texts = pc.cast(table.column("embedding").combine_chunks().flatten(), pa.string())
    borders = pa.array(np.arange(len(table) + 1) * (len(texts) // max(1, len(table))), pa.int32())
    joined = pc.binary_join(pa.ListArray.from_arrays(borders, texts), ",")
    return [f"[{each}]" for each in joined.to_pylist()]


def document_id(uri: str) -> str:
    """The id of an image in a search engine: the version 5 UUID of its uri in the URL namespace of RFC 9562.

    122 bits of SHA-1: no two of 1e9 images share one, as two `image_id` may with a chance of 5 %, so no image ever
    overwrites another. 36 characters where a key may have 1024 bytes, and OpenSearch takes ids of 512.
    """
    return str(uuid.uuid5(uuid.NAMESPACE_URL, uri))


def _index(dim: int) -> dict[str, Any]:
    """Settings and mapping of an OpenSearch index (2.17 or newer) for these documents.

    Vectors have length 1, so the inner product is the cosine. Mode and compression are said, because defaults have
    changed to quantized vectors elsewhere.
    """
    types: dict[str, dict[str, Any]] = {name: {"type": "keyword"} for name in PAYLOAD}
    types |= {name: {"type": "long"} for name in ("image_id", "size_bytes", "run_seq")}
    types |= {name: {"type": "integer"} for name in ("width_px", "height_px", "label_ids")}
    types |= {"last_modified": {"type": "date"}, "label_scores": {"type": "float"}}
    vector = {"type": "knn_vector", "dimension": dim, "space_type": "innerproduct"}
    types["embedding"] = {**vector, "mode": "in_memory", "compression_level": "1x"}
    return {"settings": {"index": {"knn": True}}, "mappings": {"dynamic": "strict", "properties": types}}


def _json(value: Any) -> bytes:
    # ASCII, so that no reader takes a character of a key for the end of a line.
    return json.dumps(value, separators=(",", ":")).encode()
