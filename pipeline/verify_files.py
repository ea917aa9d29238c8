"""Files that the log names -> is each the file that was written, and do its rows keep what the schema promises.

A module of its own because it looks at one file at a time and at nothing else: that is what runs as a task per file.
What is found comes back as text, a record per file. Rows are looked at only in files that are as they were written, so
that one damage is one finding.
"""

import hashlib
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import catalog, schema, storage
from pipeline.errors import FailureKind
from pipeline.log import Entry, FileRef

MAX_EXAMPLES = 5
"""Findings that are told in words; the others are counted."""
LENGTH_TOLERANCE = 1e-3
"""How far a vector's length may be from 1."""
_BATCH_ROWS = 16_384
_KINDS = pa.array([str(kind) for kind in FailureKind])

Kind = Literal["labels", "failures", "deletions", "catalog", "manifest", "canaries"]


@dataclass(kw_only=True)
class Findings:
    """What is wrong: how often, and the first few in words."""

    num: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, examples: Iterable[str], num: int = 1) -> None:
        """Count `num` more, of which these tell."""
        self.num += num
        self.examples += list(examples)[: MAX_EXAMPLES - len(self.examples)]

    def merge(self, other: "Findings") -> None:
        """Count what another one has found, too."""
        self.add(other.examples, other.num)


@dataclass(frozen=True, kw_only=True)
class Named:
    """A file that a log entry (or the catalog manifest of one) names, and what it must say."""

    kind: Kind
    ref: FileRef
    space_id: str
    run_id: str
    """Of the run that wrote the file."""
    run_seq: int
    """Of the entry that names it: none of its rows is newer."""
    input_url: str
    embedding_dim: int | None
    top_k: int
    is_snapshot: bool = False
    """Its rows are of several runs."""


class FileFindings(NamedTuple):
    """What one file has to hear. With `damage`, its rows were not looked at."""

    damage: Findings
    rows: Findings
    num_rows: int


def named_by(entry: Entry) -> Iterator[Named]:
    """The files of a commit, without those of its catalog."""
    for kind, refs in (
        ("labels", entry.labels),
        ("failures", entry.dead_letters),
        ("deletions", entry.deletions),
        ("canaries", [entry.canaries] if entry.canaries else []),
        ("manifest", [entry.catalog] if entry.catalog else []),
    ):
        for ref in refs:
            # A snapshot's files are written before it has a place in the log: their folder names them.
            run_id = ref.key.split("/")[2] if entry.kind == "snapshot" else entry.run_id
            yield _named(entry, kind, ref, run_id)  # type: ignore[arg-type]


def catalog_file(entry: Entry, ref: FileRef) -> Named:
    """A file of the catalog that `entry` names; it says itself which run wrote it, and its name must agree."""
    return _named(entry, "catalog", ref, "-".join(ref.key.rpartition("/")[2].split("-")[:2]))


def _named(entry: Entry, kind: Kind, ref: FileRef, run_id: str) -> Named:
    return Named(
        kind=kind,
        ref=ref,
        space_id=entry.space_id,
        run_id=run_id,
        run_seq=entry.run_seq,
        input_url=entry.identity["input"],
        embedding_dim=entry.identity["embedding_dim"],
        top_k=entry.identity["top_k"],
        is_snapshot=entry.kind == "snapshot",
    )


# --- one file -----------------------------------------------------------------------------------------------------


def check_file(output_url: str, named: Named) -> FileFindings:
    """Read a file and everything in it; the bytes and a batch of rows are in memory."""
    found = FileFindings(Findings(), Findings(), 0)
    data = storage.get_or_none(storage.connect(output_url), named.ref.key)
    problem = _bytes_problem(named.ref, data)
    if problem is not None or data is None:
        found.damage.add([f"{named.ref.key}: {problem}"])
        return found
    if named.kind == "manifest":
        return found
    try:
        file = pq.ParquetFile(io.BytesIO(data))
        problems = list(_footer_problems(named, file))
        found.damage.add([f"{named.ref.key}: {each}" for each in problems], len(problems))
        if problems or named.kind == "canaries":
            return found
        rows = _check_rows(named, file, found)
    except (pa.ArrowException, OSError) as error:  # OSError is what a damaged page gives
        found.damage.add([f"{named.ref.key}: expected a Parquet file, found {storage.describe(error)}"])
        rows = Findings()
    return FileFindings(found.damage, Findings() if found.damage.num else rows, named.ref.num_rows)


def _bytes_problem(ref: FileRef, data: bytes | None) -> str | None:
    if data is None:
        return f"expected {ref.size_bytes} bytes, found nothing"
    if len(data) != ref.size_bytes:
        return f"expected {ref.size_bytes} bytes, found {len(data)}"
    digest = hashlib.sha256(data).hexdigest()
    return None if digest == ref.sha256 else f"expected SHA-256 {ref.sha256[:12]}…, found {digest[:12]}…"


def _wanted_schema(named: Named, found: pa.Schema) -> pa.Schema:
    if named.kind == "labels":
        return schema.labels(named.embedding_dim)
    if named.kind == "canaries":
        # Without embeddings the vectors are as long as there are labels, which the log does not say.
        vectors = found.field("vector").type if "vector" in found.names else pa.null()
        is_free = named.embedding_dim is None and pa.types.is_fixed_size_list(vectors)
        return schema.canaries(vectors.list_size if is_free else named.embedding_dim or 1)
    return {"failures": schema.FAILURES, "deletions": schema.DELETIONS, "catalog": schema.CATALOG}[named.kind]


def _footer_problems(named: Named, file: pq.ParquetFile) -> Iterator[str]:
    """What the footer says against the log and the path."""
    found = file.schema_arrow
    wanted = _wanted_schema(named, found)
    if not found.equals(wanted):
        differing = [
            name for name in wanted.names if name not in found.names or found.field(name) != wanted.field(name)
        ]
        differing += [name for name in found.names if name not in wanted.names]
        yield f"expected the columns of {named.kind}, found others: {', '.join(differing) or 'their order'}"
    if schema.version_of(found) != schema.SCHEMA_VERSION:
        yield f"expected schema version {schema.SCHEMA_VERSION}, found {schema.version_of(found)}"
    if file.metadata.num_rows != named.ref.num_rows:
        yield f"expected {named.ref.num_rows} rows, found {file.metadata.num_rows}"
    metadata = {key.decode(): value.decode(errors="replace") for key, value in (found.metadata or {}).items()}
    expected = {"label_bucket.space_id": named.space_id}
    if named.kind != "canaries":
        expected["label_bucket.run_id"] = named.run_id
    for name, value in expected.items():
        if metadata.get(name) != value:
            yield f"expected {name} {value} in the footer, found {metadata.get(name)}"
    folder = "" if named.kind == "canaries" else f"space={named.space_id}"
    if folder and folder not in named.ref.key.split("/"):
        yield f"expected a path with {folder}"


def _check_rows(named: Named, file: pq.ParquetFile, found: FileFindings) -> Findings:
    """The rows' findings; order and bounds are the file's, and are added to its damage."""
    rows = Findings()
    name = "key" if named.kind == "catalog" else "uri"
    prefix = "" if named.kind == "catalog" else f"{named.input_url}/"
    first = last = None
    for batch in file.iter_batches(batch_size=_BATCH_ROWS):
        if not len(batch):
            continue
        names = batch.column(name)
        ordered = names if last is None else pa.concat_arrays([pa.array([last]), names])
        before, after = ordered[:-1], ordered[1:]
        first = names[0].as_py() if first is None else first
        last = names[-1].as_py()
        if pc.any(pc.greater(before, after)).as_py():
            found.damage.add([f"{named.ref.key}: expected rows in order of {name}, found {last} out of order"])
        twice = after.filter(pc.equal(before, after))
        rows.add((f"{each}: twice in {named.ref.key}" for each in twice[:MAX_EXAMPLES].to_pylist()), len(twice))
        for rule, is_bad in _broken_rules(batch, named):
            bad = names.filter(pa.array(is_bad))[:MAX_EXAMPLES].to_pylist()
            rows.add((f"{each}: {rule}, in {named.ref.key}" for each in bad), int(is_bad.sum()))
    bounds = ((first or "").removeprefix(prefix), (last or "").removeprefix(prefix))
    if bounds != (named.ref.first_key, named.ref.last_key):
        found.damage.add(
            [
                f"{named.ref.key}: expected keys from {named.ref.first_key} to {named.ref.last_key}, found {bounds[0]}"
                f" to {bounds[1]}"
            ]
        )
    return rows


# --- rows ---------------------------------------------------------------------------------------------------------

Mask = npt.NDArray[np.bool_]


def _broken_rules(batch: pa.RecordBatch, named: Named) -> Iterator[tuple[str, Mask]]:
    """What a row must be, and for each row whether it is not."""
    if named.kind == "catalog":
        yield "a run_seq that is not committed yet", _mask(pc.greater(batch.column("run_seq"), named.run_seq))
        yield "an unknown failure_kind", ~_is_in(batch.column("failure_kind"), _KINDS, null=True)
        return
    yield f"expected space_id {named.space_id}", _mask(pc.not_equal(batch.column("space_id"), named.space_id))
    if named.is_snapshot:
        yield "a run_seq after its snapshot's", _mask(pc.greater(batch.column("run_seq"), named.run_seq))
    else:
        yield f"expected run_id {named.run_id}", _mask(pc.not_equal(batch.column("run_id"), named.run_id))
        yield f"expected run_seq {named.run_seq}", _mask(pc.not_equal(batch.column("run_seq"), named.run_seq))
    uris = batch.column("uri")
    yield f"expected a uri below {named.input_url}", ~_mask(pc.starts_with(uris, f"{named.input_url}/"))
    ids = pa.array([schema.image_id(uri) for uri in uris.to_pylist()], pa.int64())
    yield "expected the image_id of its uri", _mask(pc.not_equal(batch.column("image_id"), ids))
    if named.kind == "failures":
        yield "an unknown failure_kind", ~_is_in(batch.column("failure_kind"), _KINDS, null=False)
    if named.kind == "labels":
        yield from _broken_label_rules(batch, named)


def _broken_label_rules(batch: pa.RecordBatch, named: Named) -> Iterator[tuple[str, Mask]]:
    has_all = np.ones(len(batch), dtype=bool)
    for name in ("label_ids", "label_names", "label_scores"):
        lengths = pc.list_value_length(batch.column(name)).to_numpy(zero_copy_only=False)
        is_short = lengths != named.top_k
        has_all &= ~is_short
        yield f"expected {named.top_k} {name}", is_short
    complete = batch.column("label_scores").filter(pa.array(has_all))
    scores_Nk = complete.flatten().to_numpy(zero_copy_only=False).reshape(-1, named.top_k)
    in_range = ((scores_Nk >= 0) & (scores_Nk <= 1)).all(axis=1)  # not NaN either
    yield "expected label_scores from 0 to 1", _spread(~in_range, has_all)
    yield "expected label_scores in descending order", _spread((np.diff(scores_Nk, axis=1) > 0).any(axis=1), has_all)
    if named.embedding_dim is not None:
        yield "expected a finite embedding of length 1", is_no_unit_vector(batch.column("embedding"))


def is_no_unit_vector(embeddings: pa.FixedSizeListArray) -> Mask:
    """For each vector, none of them null: whether it is not finite, or not of length 1."""
    vectors_ND = embeddings.flatten().to_numpy(zero_copy_only=False).reshape(-1, embeddings.type.list_size)
    lengths_N = np.sqrt(np.einsum("nd,nd->n", vectors_ND, vectors_ND, dtype=np.float64))
    return np.asarray(~(np.abs(lengths_N - 1) <= LENGTH_TOLERANCE), dtype=bool)  # NaN is in no range


def _spread(is_bad: Mask, where: Mask) -> Mask:
    """A mask over some rows as one over all."""
    full = np.zeros(len(where), dtype=bool)
    full[where] = is_bad
    return full


def _is_in(values: pa.Array, known: pa.Array, *, null: bool) -> Mask:
    found = _mask(pc.is_in(values, value_set=known))
    return found | (_mask(values.is_null()) if null else False)


def _mask(values: Any) -> Mask:
    return np.asarray(values.to_numpy(zero_copy_only=False), dtype=bool)


# --- between files ------------------------------------------------------------------------------------------------


def overlapping(refs: Iterable[FileRef]) -> Iterator[tuple[FileRef, FileRef]]:
    """Pairs of files of one run and kind whose bounds overlap: none where each key was published once."""
    open_refs: list[FileRef] = []
    for ref in sorted(refs, key=lambda each: each.first_key):
        open_refs = [each for each in open_refs if each.last_key >= ref.first_key]
        yield from ((each, ref) for each in open_refs)
        open_refs.append(ref)


def shared_uris(output_url: str, first: FileRef, second: FileRef) -> Findings:
    """Uris that two files of one run and kind both hold."""
    output = storage.connect(output_url)
    uris = [
        pq.read_table(io.BytesIO(catalog.read_file(output, ref)), columns=["uri"])["uri"] for ref in (first, second)
    ]
    shared = uris[1].filter(pc.is_in(uris[1], value_set=uris[0].combine_chunks()))
    found = Findings()
    found.add((f"{each}: in {first.key} and {second.key}" for each in shared[:MAX_EXAMPLES].to_pylist()), len(shared))
    return found
