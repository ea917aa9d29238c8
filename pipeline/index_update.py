"""build_index(options): a new version of a space's index, built from nothing or, with --update, from the last one.

An update applies what the nights since the last version changed: rows that came or became others, and uris that are
gone or failed last. It reads the last version and these rows, no old vector. Where an update would not do, it builds
anew: after more than 20 % churn, when recall fell, and when too few of the sampled rows are left to know that. After a
compaction nothing changed but where the true vectors are, which is a version of its own as well.

A module of its own because it is the only one that changes an index, and it must never change what a reader has open:
every version has all its files in a folder of its own.
"""

import logging
import time
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import changes, index_build, index_files, index_log, index_recall, log, storage, view
from pipeline.changes import Change
from pipeline.errors import ConfigError, ConflictError
from pipeline.index import Index
from pipeline.index_build import Asked, Draft, Options, gib
from pipeline.index_encode import EncodeFiles, check_vectors, in_this_process, write_rows, write_rows_table
from pipeline.index_log import AUTO, FROM_LABELS, Announcement, Info, RowsFile
from pipeline.index_vectors import Ordinals
from pipeline.log import State
from pipeline.storage import Store
from pipeline.view import View

MAX_CHURN = 0.2
"""Rows added and removed since the last full build, of those it had: its lists then fit what is in them no more."""
MAX_RECALL_LOSS = 0.02
"""Below recall@10 of the last full build."""
_log = logging.getLogger(__name__)


class _AnewError(Exception):
    """Why an update is not worth finishing."""


def build_index(options: Options, encode: EncodeFiles = in_this_process) -> str:
    """Build or update, announce, and say what there is now; the same again is always right.

    Raises ConfigError for a space that is not there or has no embeddings, and as `index_build.choose_factory`;
    SourceError for storage; ConflictError for damage, for recall below the floor, and where the index is of another
    output or was changed meanwhile.
    """
    nights, store = storage.connect_output(options.input), storage.connect(options.output)
    state = log.read(nights)
    current = view.resolve_embedded(nights, options.space, state)
    newest = index_log.newest_of(index_log.read_log(store), current.space_id)
    if options.update and newest is None:
        _log.info("%s: no index of space %s yet, building one", store.root, current.space_id)
    if not options.update or newest is None:
        return index_build.build(nights, store, current, options, index_build.asked(options, None), encode)
    base = index_log.read_info(store, newest)
    if base.source.output != nights.root or base.source.run_seq > current.newest.run_seq:
        raise ConflictError(
            f"{store.root}: expected an index of {nights.root} up to run {current.newest.run_seq:08d}, found"
            f" {base.version} of {base.source.output} after run {base.source.run_seq:08d}; update it from there, or"
            " build without --update"
        )
    if base.source.run_seq == current.newest.run_seq and base.source.labels == current.labels:
        return f"up to date: {index_build.describe(store, base).removeprefix('announced ')}"
    wanted = index_build.asked(options, base)
    try:
        return _update(nights, store, state, current, options, wanted, newest, base)
    except _AnewError as reason:
        _log.info("building anew: %s", reason)
    # Only here, where the exception and with it the old index are no longer in memory.
    return index_build.build(nights, store, current, options, wanted, encode)


def _update(
    nights: Store,
    store: Store,
    state: State,
    current: View,
    options: Options,
    wanted: Asked,
    newest: Announcement,
    base: Info,
) -> str:
    started_s = time.perf_counter()
    if wanted.factory not in (AUTO, base.factory):
        raise _AnewError(f"--factory is {wanted.factory}, version {base.version} has {base.factory}")
    needed_bytes = index_build.estimate_bytes(base.factory, base.num_rows, base.dim)
    allowed_bytes = index_build.max_memory_bytes(options)
    if needed_bytes > allowed_bytes:
        raise ConfigError(
            f"--max-memory-gib: expected {gib(needed_bytes)} for the {base.num_rows:,} rows of {base.version}, found"
            f" {gib(allowed_bytes)}; use a larger machine"
        )
    index = Index(store, base)
    vectors = index.vectors
    truth = index_recall.from_table(index_files.read_table(store, base.truth))
    version = index_build.new_version(current)
    folder = f"index/{current.space_id}/{version}/"
    added_files: list[RowsFile] = []
    removed: list[Ordinals] = [np.empty(0, np.int64)]
    next_ordinal, num_changed = base.next_ordinal, base.num_changed_rows
    columns = [*FROM_LABELS, "embedding"]
    for change in changes.since(nights, state, current, base.source.run_seq, columns):
        gone = _ordinals_of(index, change)
        num_changed += len(gone) + len(change.rows)
        if num_changed > MAX_CHURN * base.num_built_rows:
            raise _AnewError(f"more than {MAX_CHURN:.0%} of {base.num_built_rows:,} rows changed since the last build")
        vectors_ND = check_vectors(nights, current, change.rows)
        ordinals_N = np.arange(next_ordinal, next_ordinal + len(change.rows))
        truth = index_recall.updated(truth, gone, vectors_ND, ordinals_N, vectors.num_rows)
        vectors.remove(gone)
        removed.append(gone)
        if len(change.rows):
            vectors.add(vectors.encode(vectors_ND), ordinals_N)
            key = f"{folder}rows-added-{len(added_files):05d}.parquet"
            added_files.append(write_rows(store, key, change.rows, ordinals_N))
            next_ordinal += len(change.rows)
    if len(truth.ordinals) < min(index_recall.NUM_SAMPLES, vectors.num_rows) / 2:
        raise _AnewError(f"{len(truth.ordinals)} of the sampled rows are left to measure recall by")
    measured = index_build.measure(vectors, truth)
    least = max(wanted.min_recall, base.built_recall_at_10 - MAX_RECALL_LOSS)
    if measured.recall_at_10 < least:
        raise _AnewError(f"recall@10 fell to {measured.recall_at_10:.4f}, {least:.4f} is the least")
    draft = Draft(
        factory=base.factory,
        version=version,
        vectors=vectors,
        rows=[*_carried(store, base.rows, np.concatenate(removed), folder), *added_files],
        truth=truth,
        next_ordinal=next_ordinal,
        newest=newest,
        base=base,
        num_changed_rows=num_changed,
        asked=wanted,
    )
    return index_build.publish(nights, store, current, draft, measured, started_s)


def _ordinals_of(index: Index, change: Change) -> Ordinals:
    """Ascending ordinals of what the index has of the changed and gone uris."""
    uris = pa.concat_arrays([change.rows["uri"].combine_chunks(), change.gone])
    return np.sort(index.ordinals_of(uris))


def _carried(store: Store, refs: Sequence[RowsFile], removed: Ordinals, folder: str) -> Iterator[RowsFile]:
    """The rows of the last version that stay, in files of this one."""
    for number, ref in enumerate(refs):
        key = f"{folder}rows-{number:05d}.parquet"
        here = removed[(removed >= ref.first_ordinal) & (removed <= ref.last_ordinal)]
        if not len(here):
            data = index_files.read(store, ref)
            yield ref.model_copy(update=index_files.write(store, key, data).model_dump())
            continue
        rows = index_files.read_table(store, ref)
        rows = rows.filter(pc.invert(pc.is_in(rows["ordinal"], pa.array(here))))
        if len(rows):
            yield write_rows_table(store, key, rows)
