"""build_index(options): the current view of one space -> a new version of its index, or an update of the last one.

    view ──> sample ──> train ──> encode every file ──> add ──> measure ──> write ──> announce

Vectors are read by the file of the catalog; in memory are the index itself and, of what is read, one slice. What is
announced was measured: recall@10 against exact search of sampled rows. A build that dies announces nothing, and the
next one starts anew.

A module of its own because the order of these steps is the contract: nothing is read of a version that is not
announced, and nothing is announced that does not find what it should.
"""

import logging
import math
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from pipeline import catalog, index_encode, index_files, index_log, index_recall, index_vectors, log, memory, view
from pipeline.errors import ConfigError, ConflictError
from pipeline.faults import crash_point
from pipeline.index_encode import EncodeFiles, Job, check_vectors
from pipeline.index_files import SliceWriter
from pipeline.index_log import AUTO, MIN_RECALL, Announcement, Info, RowsFile, Source
from pipeline.index_recall import Measured, Truth
from pipeline.index_vectors import EXACT, Floats, IvfVectors, Ordinals, Vectors
from pipeline.storage import Store
from pipeline.view import View

MAX_EXACT_ROWS = 50_000
"""Up to here every vector is compared, which finds everything: 3 to 8 ms a query at 384 dimensions on two cores."""
MAX_ROWS_WITHOUT_FAISS = 500_000
"""Beyond, exact search takes longer than anybody waits, and FAISS is asked for."""
MAX_FLAT_LISTS_ROWS = 2_000_000
"""Beyond, the list centres are searched by a graph."""
TRAINING_ROWS_PER_LIST = 50
"""FAISS warns below 39, and uses at most 256."""
_SAMPLED_FILES = 64
"""Files of the catalog, evenly spread, that training rows and samples are drawn from."""
TARGET_RECALL = 0.97
_RECALL_SLACK = 0.005
"""Below the target, searching more lists is not worth while for less than this."""
_EXACT_BYTES, _LISTS_BYTES = 400 << 20, 700 << 20
"""What a build takes whatever its rows are: Python and its libraries, files as they are read; FAISS and its work."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What an index is asked for."""

    input: str
    """The --output of the nights."""
    output: str
    space: str | None = None
    update: bool = False
    factory: str | None = None
    """None, of an update: as the base version was asked for; else auto."""
    min_recall: float | None = None
    """None, of an update: as the base version was asked for; else 0.95."""
    max_memory_bytes: int | None = None
    """None: what this machine has left."""


class Asked(NamedTuple):
    """What an index is asked for, and its next versions unless they are asked for something else."""

    factory: str
    min_recall: float


def asked(options: Options, base: Info | None) -> Asked:
    """What the flags say, else what they said for the version that is updated."""
    factory = base.asked_factory if base else AUTO
    min_recall = base.min_recall if base else MIN_RECALL
    return Asked(
        factory=options.factory if options.factory is not None else factory,
        min_recall=options.min_recall if options.min_recall is not None else min_recall,
    )


def max_memory_bytes(options: Options) -> int:
    """What the index may take while it is built."""
    return options.max_memory_bytes if options.max_memory_bytes is not None else memory.available_bytes()


def dim_of(current: View) -> int:
    """Length of a vector."""
    return int(current.columns.field("embedding").type.list_size)


# --- what kind ----------------------------------------------------------------------------------------------------


def choose_factory(wanted: str, num_rows: int, dim: int, memory_bytes: int, *, has_faiss: bool) -> str:
    """`exact`, or inverted lists whose codes fit into memory: 8 bits a dimension, else 6. With 4, recall is below 0.95.

    Raises ConfigError for a factory that takes no deletions, more lists than rows, FAISS that is not there, and an
    index that does not fit.
    """
    if wanted not in (AUTO, EXACT):
        candidates = [wanted]
        if index_vectors.num_lists(wanted) > num_rows:
            raise ConfigError(f"--factory {wanted}: expected at most as many lists as rows, found {num_rows:,} rows")
    elif wanted == EXACT or num_rows <= (MAX_EXACT_ROWS if has_faiss else MAX_ROWS_WITHOUT_FAISS):
        candidates = [EXACT]
    elif num_rows <= MAX_FLAT_LISTS_ROWS:
        candidates = [f"IVF{2 * math.isqrt(num_rows)},SQ{bits}" for bits in (8, 6)]
    else:
        candidates = [f"IVF{4 * math.isqrt(num_rows)}_HNSW32,SQ{bits}" for bits in (8, 6)]
    if candidates != [EXACT] and not has_faiss:
        raise ConfigError(
            f"expected FAISS for an index of {num_rows:,} rows, found none; pip install 'label-bucket[index]'"
            + (f", or --factory {EXACT} with {gib(estimate_bytes(EXACT, num_rows, dim))}" if wanted == AUTO else "")
        )
    for candidate in candidates:
        if estimate_bytes(candidate, num_rows, dim) <= memory_bytes:
            return candidate
    raise ConfigError(
        f"--max-memory-gib: expected {gib(estimate_bytes(candidates[-1], num_rows, dim))} for {num_rows:,} rows of"
        f" {dim} as {candidates[-1]}, found {gib(memory_bytes)}; use a larger machine, or export_embeddings.py --to"
        " lance, which searches on disk and in buckets"
    )


def estimate_bytes(factory: str, num_rows: int, dim: int) -> int:
    """Memory that building takes at its peak, with room to spare: 1.0 to 1.5 times what was measured, see
    tests/benchmarks/index.md.
    """
    slices = 3 * min(index_encode.SLICE_ROWS, num_rows) * dim * 4
    if factory == EXACT:
        return _EXACT_BYTES + slices + int(1.3 * num_rows * (8 * dim + 8))
    training = 2 * TRAINING_ROWS_PER_LIST * index_vectors.num_lists(factory) * dim * 4
    # Lists grow by doubling, so a half of them is empty at worst.
    return _LISTS_BYTES + slices + training + int(1.2 * 1.5 * num_rows * (index_vectors.code_bytes(factory, dim) + 8))


def gib(num_bytes: int) -> str:
    """`1.50 GiB`."""
    return f"{num_bytes / 2**30:.2f} GiB"


# --- building -----------------------------------------------------------------------------------------------------


def build(nights: Store, store: Store, current: View, options: Options, wanted: Asked, encode: EncodeFiles) -> str:
    """Build from nothing and announce; what was done. `encode` is `index_encode.in_this_process`, or spreads it.

    Raises ConfigError as `choose_factory` and for a view without rows, ConflictError for damage, for recall below the
    floor, and if another version was announced meanwhile.
    """
    started_s = time.perf_counter()
    newest = index_log.newest_of(index_log.read_log(store), current.space_id)
    most_rows = sum(ref.num_rows for ref in current.catalog)  # failed ones among them, which are few
    factory = choose_factory(
        wanted.factory,
        most_rows,
        dim_of(current),
        max_memory_bytes(options),
        has_faiss=index_vectors.has_faiss(),
    )
    num_lists = 0 if factory == EXACT else index_vectors.num_lists(factory)
    ordinals, vectors_ND = _sample(nights, current, max(index_recall.NUM_SAMPLES, TRAINING_ROWS_PER_LIST * num_lists))
    if not len(ordinals):
        raise ConfigError(f"{nights.root}: expected labeled images in space {current.space_id}, found none")
    if num_lists > len(ordinals):
        raise ConfigError(f"--factory {factory}: expected at most as many lists as rows, found {len(ordinals):,} rows")
    _log.info(
        "building %s for up to %s rows of %d, %s at its peak", factory, f"{most_rows:,}", dim_of(current),
        gib(estimate_bytes(factory, most_rows, dim_of(current))),
    )  # fmt: skip
    vectors: Vectors = (
        index_vectors.train_ivf(factory, vectors_ND) if num_lists else index_vectors.empty_exact(dim_of(current))
    )
    chosen = np.random.default_rng(1).permutation(len(ordinals))[: index_recall.NUM_SAMPLES]
    truth = index_recall.begin(ordinals[chosen], vectors_ND[chosen])
    del vectors_ND
    version_name = new_version(current)
    job = Job(
        nights_url=nights.root,
        index_url=store.root,
        folder=f"index/{current.space_id}/{version_name}/",
        current=current,
        truth=truth,
    )
    rows: list[RowsFile] = []
    for each in encode(job, vectors):
        vectors.add(each.codes, each.ordinals)
        truth = index_recall.merged(truth, each.nearest)
        rows.append(each.rows)
    draft = Draft(
        factory=factory,
        version=version_name,
        vectors=vectors,
        rows=rows,
        truth=truth,
        next_ordinal=most_rows,
        newest=newest,
        base=None,
        num_changed_rows=0,
        asked=wanted,
    )
    return publish(nights, store, current, draft, check_recall(draft, tune(vectors, truth)), started_s)


def _sample(nights: Store, current: View, num_rows: int) -> tuple[Ordinals, Floats]:
    """About so many rows of evenly spread files of the catalog, in order: ordinals and vectors."""
    files = current.catalog
    numbers = sorted({int(place) for place in np.linspace(0, len(files) - 1, _SAMPLED_FILES)}) if files else []
    random = np.random.default_rng(0)
    total = sum(files[number].num_rows for number in numbers)
    ordinals, vectors = [np.empty(0, np.int64)], [np.empty((0, dim_of(current)), np.float32)]
    for number in numbers:
        wanted = view.wanted_rows(catalog.read_table(nights, files[number]))
        share = min(len(wanted), math.ceil(num_rows * files[number].num_rows / total))
        places = np.sort(random.choice(len(wanted), share, replace=False))
        fields = view.fields_of(current, ["uri", "run_seq", "embedding"])
        for start in range(0, len(places), index_encode.SLICE_ROWS):
            some = places[start : start + index_encode.SLICE_ROWS]
            table = view.rows_of(nights, current.labels, current.root, wanted.take(pa.array(some)), fields)
            ordinals.append(index_encode.first_ordinal(current, number) + some)
            vectors.append(check_vectors(nights, current, table))
    return np.concatenate(ordinals), np.concatenate(vectors)


def tune(vectors: Vectors, truth: Truth) -> Measured:
    """Measure, and for inverted lists search as few of them as give TARGET_RECALL, or nearly what all give."""
    if isinstance(vectors, IvfVectors):
        steps = [2**power for power in range(3, 30) if 2**power < vectors.num_lists]
        found: dict[int, float] = {}
        for nprobe in [*steps, vectors.num_lists]:
            vectors.nprobe = nprobe
            found[nprobe], _ = index_recall.recall_at_10(_search(vectors), truth, vectors.num_rows)
            if found[nprobe] >= TARGET_RECALL:
                break
        enough = min(TARGET_RECALL, max(found.values()) - _RECALL_SLACK)
        vectors.nprobe = next(nprobe for nprobe, recall in found.items() if recall >= enough)
    return index_recall.measure(_search(vectors), truth, vectors.num_rows)


def measure(vectors: Vectors, truth: Truth) -> Measured:
    """Recall@10 and time per query, as the index is."""
    return index_recall.measure(_search(vectors), truth, vectors.num_rows)


def _search(vectors: Vectors) -> index_recall.Search:
    return lambda queries_QD, k: vectors.search(queries_QD, k, among=None, is_exhaustive=False)


# --- publishing ---------------------------------------------------------------------------------------------------


def new_version(current: View) -> str:
    """A name that no other build takes, not even one of the same run."""
    return f"{current.newest.run_seq:08d}-{secrets.token_hex(4)}"


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A version that is not announced."""

    factory: str
    version: str
    vectors: Vectors
    rows: Sequence[RowsFile]
    """Written already."""
    truth: Truth
    next_ordinal: int
    newest: Announcement | None
    """The newest version of the space when this one was begun."""
    base: Info | None
    """What was updated; None for a build from nothing."""
    num_changed_rows: int
    """Since the last build from nothing."""
    asked: Asked


def check_recall(draft: Draft, measured: Measured) -> Measured:
    """What was measured; ConflictError below --min-recall."""
    if measured.recall_at_10 < draft.asked.min_recall:
        raise ConflictError(
            f"expected recall@10 of {draft.asked.min_recall:g} or more from {draft.factory}, found"
            f" {measured.recall_at_10:.4f} of {measured.num_samples} sampled rows; nothing was announced; use a"
            f" --factory with more bits (IVF…,SQ8 or IVF…,Flat), --factory {EXACT}, or a lower --min-recall"
        )
    return measured


def publish(nights: Store, store: Store, current: View, draft: Draft, measured: Measured, started_s: float) -> str:
    """Write what is not written yet, announce it, and say what it is. Errors as `index_log.announce`."""
    folder = f"index/{current.space_id}/{draft.version}/"
    writer = SliceWriter(store, f"{folder}vectors")
    draft.vectors.write(writer)
    writer.close()
    truth = index_recall.to_table(draft.truth, dim_of(current))
    recall = round(measured.recall_at_10, 5)
    info = Info(
        space_id=current.space_id,
        version=draft.version,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        source=Source(
            output=nights.root,
            input=current.root,
            run_id=current.newest.run_id,
            run_seq=current.newest.run_seq,
            labels=current.labels,
        ),
        model_id=current.newest.model_id,
        model_revision=current.newest.model_revision,
        facts=log.read_claim(nights, current.newest.run_seq).metadata,
        dim=dim_of(current),
        factory=draft.factory,
        asked_factory=draft.asked.factory,
        min_recall=draft.asked.min_recall,
        nprobe=draft.vectors.nprobe if isinstance(draft.vectors, IvfVectors) else None,
        num_rows=draft.vectors.num_rows,
        next_ordinal=draft.next_ordinal,
        base_version=draft.base.version if draft.base else None,
        num_built_rows=draft.base.num_built_rows if draft.base else draft.vectors.num_rows,
        num_changed_rows=draft.num_changed_rows,
        recall_at_10=recall,
        built_recall_at_10=draft.base.built_recall_at_10 if draft.base else recall,
        num_recall_samples=measured.num_samples,
        p50_ms=round(measured.p50_ms, 4),
        seconds=round(time.perf_counter() - started_s, 2),
        versions={name: version(name) for name in ("numpy", "pyarrow", *_faiss(draft.factory))},
        vectors=writer.refs,
        rows=list(draft.rows),
        truth=index_files.write_table(store, f"{folder}truth.parquet", truth),
    )
    crash_point("index-written")
    index_log.announce(store, info, draft.newest.version if draft.newest else None, info.created_at)
    return describe(store, info)


def _faiss(factory: str) -> list[str]:
    return [] if factory == EXACT else ["faiss-cpu"]


def describe(store: Store, info: Info) -> str:
    """An index in a line."""
    size_bytes = sum(each.size_bytes for each in [*info.vectors, *info.rows, info.truth])
    lists = f", {info.nprobe} lists searched" if info.nprobe else ""
    return (
        f"announced {store.root}/{info.folder}: {info.num_rows:,} rows of {info.dim} after run {info.source.run_id},"
        f" {info.factory}{lists}, recall@10 {info.recall_at_10:.4f} of {info.num_recall_samples} sampled rows, p50"
        f" {info.p50_ms:.2f} ms, {size_bytes / 1e6:,.1f} MB, {info.seconds:.1f} s"
    )
