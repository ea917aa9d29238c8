"""The current view of a space: the newest label of every image that still exists, read by code or as SQL.

In: the log, a space's newest catalog, and label files of runs and snapshots. Out: rows of schema.labels, one for every
key whose last outcome is a label. A key that failed, or went away, after it was labeled is not in it.

A module of its own because everything that is done with results (snapshot, index, search, export) reads this view and
never a bare glob. Neither Ray nor torch is needed.
"""

import io
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import catalog, log, schema
from pipeline.errors import ConfigError, ConflictError
from pipeline.log import Entry, FileRef, State
from pipeline.storage import Store


class LabelFile(NamedTuple):
    """A file that holds rows of the view, among others."""

    ref: FileRef
    first_seq: int
    """It holds rows of the runs from this one on: one run, or for a file of the snapshot all that it covers."""
    last_seq: int

    def may_hold(self, run_seqs: Collection[int]) -> bool:
        """Whether rows of one of these runs can be in it."""
        return any(self.first_seq <= run_seq <= self.last_seq for run_seq in run_seqs)


@dataclass(frozen=True, kw_only=True)
class View:
    """Where the rows of a space's current view are."""

    space_id: str
    newest: Entry
    """The newest published run of the space: the view is what holds after it."""
    snapshot: Entry | None
    """Holds the rows of all runs up to its `through_seq`."""
    catalog: list[FileRef]
    """Files of the last outcome of every key, in key order."""
    labels: list[LabelFile]

    @property
    def root(self) -> str:
        """A key's uri is this, a slash and the key."""
        return str(self.newest.identity["input"])

    @property
    def columns(self) -> pa.Schema:
        """What a row of this view has."""
        return schema.labels(self.newest.identity["embedding_dim"])


def resolve(output: Store, space_id: str | None = None, state: State | None = None) -> View:
    """The view as of now; `space_id` may be left out where the output has one space.

    Raises ConfigError for a space that is not there, or not named among several, and ConflictError for damage.
    """
    state = state if state is not None else log.read(output)
    if not state.runs:
        raise ConfigError(f"{output.root}: expected published runs, found none; is this the --output of a night?")
    newest = state.newest(choose_space(output.root, {entry.space_id for entry in state.runs}, space_id))
    assert newest is not None
    snapshot = state.snapshot(newest.space_id)
    through_seq = snapshot.through_seq if snapshot else 0
    later = [run for run in state.runs if run.space_id == newest.space_id and run.run_seq > through_seq]
    return View(
        space_id=newest.space_id,
        newest=newest,
        snapshot=snapshot,
        catalog=catalog.files_of(output, newest),
        # Rows of runs that the snapshot covers are read from the snapshot alone, so no row has two places.
        labels=[
            *(LabelFile(ref, 1, through_seq) for ref in (snapshot.labels if snapshot else ())),
            *(LabelFile(ref, run.run_seq, run.run_seq) for run in later for ref in run.labels),
        ],
    )


def resolve_embedded(output: Store, space_id: str | None, state: State) -> View:
    """As `resolve`; ConfigError also for a space without embeddings."""
    current = resolve(output, space_id, state)
    if "embedding" not in current.columns.names:
        raise ConfigError(f"{output.root}: space {current.space_id} has no embeddings; label with --embedding pooled")
    return current


def choose_space(where: str, known: Collection[str], wanted: str | None) -> str:
    """The wanted one of one or more known spaces; the only one where none is named. ConfigError for others."""
    names = ", ".join(sorted(known))
    if wanted is None and len(known) > 1:
        raise ConfigError(f"{where}: expected the name of one of its spaces ({names}), found none")
    if wanted is not None and wanted not in known:
        raise ConfigError(f"{where}: expected one of its spaces ({names}), found {wanted}")
    return wanted if wanted is not None else next(iter(known))


def files(output: Store, space_id: str | None = None) -> list[FileRef]:
    """The label files that hold the view, and rows that are superseded. Errors as `resolve`."""
    return [each.ref for each in resolve(output, space_id).labels]


def batches(output: Store, space_id: str | None = None, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """The rows of the view in key order, a table of schema.labels per file of the catalog (up to 200,000 rows).

    `columns` names those wanted, in this order; all by default. In memory are one file of the catalog, its rows of the
    view, and one file of labels (up to 96 MiB) at a time. Errors as `resolve` and `rows`; ConfigError for a column that
    is none.
    """
    current = resolve(output, space_id)
    unknown = [name for name in columns or () if name not in current.columns.names]
    if unknown:
        raise ConfigError(
            f"expected columns of {current.space_id} ({', '.join(current.columns.names)}), found {unknown}"
        )
    for ref in current.catalog:
        table = rows(output, current, ref, columns)
        if len(table):
            yield table


def rows(output: Store, current: View, ref: FileRef, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of the view whose keys are in one file of its catalog, in key order. Errors as `rows_of`."""
    wanted = wanted_rows(catalog.read_table(output, ref))
    return rows_of(output, current.labels, current.root, wanted, fields_of(current, columns))


def fields_of(current: View, columns: Sequence[str] | None) -> pa.Schema:
    """Some columns of the view in this order, or all."""
    return current.columns if columns is None else pa.schema([current.columns.field(name) for name in columns])


def rows_of(
    output: Store, labels: Sequence[LabelFile], root: str, wanted: pa.Table, fields: pa.Schema, *, what: str = "catalog"
) -> pa.Table:
    """The rows of `wanted` (key, run_seq; in key order) that these files hold, as a table of `fields` in this order.

    Files that can hold none of them are not read. Raises ConflictError for a label file that is gone, another one or of
    other types, and for a row that no file has, or two have; `what` says that it must be there.
    """
    found = fields.empty_table()
    if not len(wanted):
        return found
    first_key, last_key = (wanted.column("key")[place].as_py() for place in (0, -1))
    uris = uris_of(root, wanted.column("key"))
    run_seqs = wanted.column("run_seq").combine_chunks()
    present = set(run_seqs.unique().to_pylist())
    pieces, places = [], []
    for each in labels:
        if each.may_hold(present) and each.ref.first_key <= last_key and each.ref.last_key >= first_key:
            piece = _read(output, each.ref, fields, uris[0].as_py(), uris[-1].as_py())
            place = pc.index_in(piece.column("uri").combine_chunks(), value_set=uris)
            # Null where the uri is not wanted, and so is then the comparison: such a row is left out.
            is_wanted = pc.equal(run_seqs.take(place), piece.column("run_seq"))
            pieces.append(piece.filter(is_wanted).select(fields.names))
            places.append(place.filter(is_wanted.combine_chunks()))
    order = pa.concat_arrays(places) if places else pa.array([], pa.int32())
    _check_places(output, order, uris, run_seqs, what)
    if pieces:
        found = pa.concat_tables(pieces).cast(fields)
    is_sorted = len(order) < 2 or pc.all(pc.less(order[:-1], order[1:])).as_py()
    return found if is_sorted else found.take(pc.array_sort_indices(order))


def file_of(output: Store, labels: Sequence[LabelFile], root: str, uri: str, run_seq: int) -> FileRef:
    """Which of these files holds a row that `rows_of` gave. Errors as there."""
    key = uri[len(root) + 1 :]
    near = [each.ref for each in labels if each.may_hold([run_seq]) and each.ref.first_key <= key <= each.ref.last_key]
    held = (ref for ref in near if run_seq in _read(output, ref, pa.schema([]), uri, uri)["run_seq"].to_pylist())
    return next(held)


def wanted_rows(outcomes: pa.Table) -> pa.Table:
    """Key and run_seq of every row of a catalog (schema.CATALOG) that is a label, in the same order."""
    return outcomes.filter(pc.is_null(outcomes.column("failure_kind"))).select(["key", "run_seq"])


def uris_of(root: str, keys: pa.ChunkedArray) -> pa.Array:
    """The uri of each key below an input."""
    return pc.binary_join_element_wise(pa.scalar(root), keys.combine_chunks(), "/")


def _read(output: Store, ref: FileRef, fields: pa.Schema, first_uri: str, last_uri: str) -> pa.Table:
    data = catalog.read_file(output, ref)
    file_schema = pq.read_schema(io.BytesIO(data))
    found = schema.version_of(file_schema)
    if found != schema.SCHEMA_VERSION:
        raise ConflictError(
            f"{output.root}/{ref.key}: expected schema version {schema.SCHEMA_VERSION}, found {found}; use the version"
            " of this program that wrote it"
        )
    _check_types(f"{output.root}/{ref.key}", file_schema, fields)
    between = (pc.field("uri") >= first_uri) & (pc.field("uri") <= last_uri)  # skips row groups by their statistics
    names = sorted({*fields.names, "uri", "run_seq"})
    return pq.read_table(io.BytesIO(data), columns=names, filters=between)


def _check_types(where: str, found: pa.Schema, wanted: pa.Schema) -> None:
    """Raise ConflictError for a column that would only fit if it was converted, or is not there."""
    for each in wanted:
        types = [found.field(place).type for place in found.get_all_field_indices(each.name)]
        if types != [each.type]:
            raise ConflictError(
                f"{where}: expected one column {each.name} of type {each.type}, found"
                f" {', '.join(map(str, types)) or 'none'}; restore the file"
            )


def _check_places(output: Store, found: pa.Array, uris: pa.Array, run_seqs: pa.Array, what: str) -> None:
    """Raise ConflictError unless every uri has exactly one row."""
    is_missing = pc.invert(pc.is_in(pa.array(range(len(uris)), pa.int32()), value_set=found))
    missing = uris.filter(is_missing)
    if len(missing):
        run_seq = run_seqs.filter(is_missing)[0].as_py()
        raise ConflictError(
            f"{output.root}: {len(missing):,} image(s) have no row in any label file, though the {what} says that"
            f" they are labeled, first {missing[0].as_py()} by run {run_seq:08d}; restore the files of labels/ and"
            " snapshots/"
        )
    if len(found) != len(uris):
        raise ConflictError(
            f"{output.root}: expected one row for each of {len(uris):,} images, found {len(found):,} in its label"
            " files; a file is named twice in the log, or holds a row twice"
        )


# --- the same as SQL ----------------------------------------------------------------------------------------------


def duckdb_sql(output: Store, space_id: str | None = None, name: str = "current_labels") -> str:
    """`CREATE OR REPLACE VIEW` for DuckDB over exactly the files that hold the view now.

    For s3:// URLs, DuckDB needs its extension `httpfs`. The view stays what it was after later nights, until
    `compact_labels --keep-runs` removes its files: make it anew after each night. Errors as `resolve`; ConfigError for
    a space without any label, of which DuckDB could not know the columns.
    """
    current = resolve(output, space_id)
    if not current.labels or not current.catalog:
        raise ConfigError(f"{output.root}: expected labeled images in space {current.space_id}, found none")
    root = output.root.removeprefix("file://")

    def listed(refs: Sequence[FileRef]) -> str:
        return "[" + ", ".join(_quoted(f"{_literal(root)}/{ref.key}") for ref in refs) + "]"

    return f"""\
CREATE OR REPLACE VIEW {name} AS
SELECT labels.*
FROM read_parquet({listed([each.ref for each in current.labels])}, hive_partitioning = false) AS labels
JOIN read_parquet({listed(current.catalog)}, hive_partitioning = false) AS last
  ON labels.uri = {_quoted(f"{current.root}/")} || last.key AND labels.run_seq = last.run_seq
WHERE last.failure_kind IS NULL;
"""


def glob_sql(space_id: str | None = None, name: str = "current_labels", *, has_embedding: bool = True) -> str:
    """`CREATE OR REPLACE VIEW` in standard SQL, for Athena, Trino and Spark, over tables instead of the log.

    The tables `labels`, `snapshots`, `failures` and `deletions` hold every Parquet file below the folders of these
    names. For each uri and space the newest event counts, and it is in the view if that is a label. Without `space_id`
    it is the view of all spaces; `has_embedding` is false for an output without vectors.
    """
    names = [each for each in schema.labels(1).names if has_embedding or each != "embedding"]
    only = f" AND space_id = {_quoted(space_id)}" if space_id else ""
    return f"""\
CREATE OR REPLACE VIEW {name} AS
WITH written AS (
  SELECT {", ".join(names)} FROM labels
  UNION ALL
  SELECT {", ".join(names)} FROM snapshots
),
events AS (
  SELECT space_id, uri, run_seq FROM written
  UNION ALL
  SELECT space_id, uri, run_seq FROM failures
  UNION ALL
  SELECT space_id, uri, run_seq FROM deletions
),
newest AS (
  SELECT space_id, uri, MAX(run_seq) AS run_seq FROM events GROUP BY space_id, uri
),
numbered AS (
  SELECT written.*,
    ROW_NUMBER() OVER (PARTITION BY written.space_id, written.uri ORDER BY written.run_seq) AS copy_number
  FROM written
  JOIN newest
    ON written.space_id = newest.space_id AND written.uri = newest.uri AND written.run_seq = newest.run_seq
)
SELECT {", ".join(names)}
FROM numbered
WHERE copy_number = 1{only};
"""


def _literal(path: str) -> str:
    """A path in which DuckDB finds nothing to expand."""
    return "".join(f"[{char}]" if char in "*?[" else char for char in path)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
