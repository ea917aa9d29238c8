"""An index of a space's current view, opened, searched, and read row by row.

A row is named by its ordinal, a number that the index gives: 0, 1, 2, … in order of uris when it is built, greater ones
for what updates add. So nothing depends on image_id, of which two may be equal.

A module of its own because search, duplicates and exports read an index without building one. Neither Ray nor torch is
needed, and FAISS only for an index that was built with it. Where an index has approximations, true vectors are read
from the labeling output: `true_vectors`, `exact`.
"""

import functools
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import index_files, index_log, index_vectors, schema, storage, view
from pipeline.errors import ConfigError, ConflictError
from pipeline.index_files import SliceReader
from pipeline.index_log import ROWS, Info, RowsFile
from pipeline.index_vectors import EXACT, ExactVectors, Floats, Found, Ordinals, Vectors
from pipeline.storage import Store

_CACHED_FILES = 8


def open_index(url: str, space_id: str | None = None, version: str | None = None) -> "Index":
    """The newest index of a space, or one of its announced versions; `space_id` may be left out where there is one.

    Reads the log and index.json only: vectors and rows are read when they are first asked for. Raises ConfigError for
    an index, space or version that is not there, ConflictError for damage.
    """
    store = storage.connect(url)
    entries = index_log.read_log(store)
    if not entries:
        raise ConfigError(
            f"{store.root}: expected an index, found none announced; is this the --output of build_index?"
        )
    chosen = view.choose_space(store.root, {each.space_id for each in entries}, space_id)
    of_space = [each for each in entries if each.space_id == chosen]
    found = [each for each in of_space if version in (None, each.version)]
    if not found:
        names = ", ".join(each.version for each in of_space[-3:])
        raise ConfigError(f"{store.root}: expected a version of {of_space[0].space_id} ({names}), found {version}")
    return Index(store, index_log.read_info(store, found[-1]))


class Index:
    """One version of an index, open for reading.

    In memory are its vectors once it was searched, and up to eight files of rows. Every file is checked against its
    digest when it is read; ConflictError, naming it, for one that is not as it was written.
    """

    def __init__(self, store: Store, info: Info) -> None:
        self.store = store
        self.info = info
        self._cache: OrderedDict[str, pa.Table] = OrderedDict()

    @functools.cached_property
    def vectors(self) -> Vectors:
        """All vectors as the index holds them; with a factory other than `exact` they are approximations."""
        reader = SliceReader(self.store, self.info.vectors)
        if self.info.factory == EXACT:
            return index_vectors.read_exact(reader, self.info.num_rows, self.info.dim)
        return index_vectors.read_ivf(reader, self.info.nprobe or 1)

    # --- nearest --------------------------------------------------------------------------------------------------

    def search(
        self, vectors_QD: Floats, k: int, *, among: Ordinals | None = None, is_exhaustive: bool = False
    ) -> Found:
        """The k nearest of each query: ordinals and cosines, best first; cosines of FAISS's codes are approximations.

        `vectors_QD` need not have length 1. `among` are the ordinals that may be found (up to MAX_SCANNED_ROWS of them
        are scanned, none is missed); `is_exhaustive` scans all inverted lists. Raises ConfigError for vectors of
        another dimension or without direction, for k beyond the rows there are, and for an index of FAISS without it.
        """
        queries_QD = self._queries(vectors_QD, k)
        if among is not None and not len(among):
            return index_vectors.nothing_found(len(queries_QD), k)
        return self.vectors.search(queries_QD, k, among=among, is_exhaustive=is_exhaustive)

    def exact(self, vectors_QD: Floats, k: int, *, among: Ordinals | None = None) -> Found:
        """As `search`, by the true vectors: those in memory for an `exact` index, else those of the labeling output,
        which are streamed (every label file that holds a row). Errors as `search` and `true_vectors`.
        """
        if self.info.factory == EXACT:
            return self.search(vectors_QD, k, among=among)
        queries_QD = self._queries(vectors_QD, k)
        found = index_vectors.nothing_found(len(queries_QD), k)
        for table in self.all_rows(["ordinal", "uri", "run_seq"]):
            wanted = table if among is None else table.filter(pc.is_in(table["ordinal"], pa.array(among)))
            if len(wanted):
                vectors_ND, ordinals_N = self._true(wanted), wanted["ordinal"].to_numpy()
                found = index_vectors.merged(found, index_vectors.nearest(queries_QD, vectors_ND, ordinals_N, k), k)
        return found

    def check_k(self, k: int) -> None:
        """ConfigError for more answers than there are rows."""
        if not 1 <= k <= self.info.num_rows:
            raise ConfigError(
                f"-k: expected 1 to {self.info.num_rows:,}, the rows of index {self.info.version}, found {k:,}"
            )

    def _queries(self, vectors_QD: Floats, k: int) -> Floats:
        """The queries as unit vectors, if they are queries."""
        queries_QD = np.ascontiguousarray(vectors_QD, np.float32)
        if queries_QD.ndim != 2 or queries_QD.shape[1] != self.info.dim:
            raise ConfigError(
                f"expected queries of {self.info.dim} values as index {self.info.version} has, found shape"
                f" {queries_QD.shape}"
            )
        lengths_Q1 = np.linalg.norm(queries_QD.astype(np.float64), axis=1, keepdims=True)
        if not np.all((lengths_Q1 > 0) & np.isfinite(lengths_Q1)):
            raise ConfigError("expected queries that are finite and not zero, found others")
        self.check_k(k)
        unit_QD: Floats = (queries_QD / lengths_Q1).astype(np.float32)
        return unit_QD

    # --- rows -----------------------------------------------------------------------------------------------------

    def rows(self, ordinals: Ordinals | Sequence[int]) -> pa.Table:
        """The rows (index_log.ROWS) of these ordinals, in their order; one may occur twice. ConfigError for one that is
        not there.
        """
        wanted = np.asarray(ordinals, np.int64)
        pieces = [ROWS.empty_table()]
        for ref in self.info.rows:
            here = wanted[(wanted >= ref.first_ordinal) & (wanted <= ref.last_ordinal)]
            if len(here):
                table = self._rows_of(ref)
                pieces.append(table.filter(pc.is_in(table["ordinal"], pa.array(here))))
        found = pa.concat_tables(pieces)
        places = pc.index_in(pa.array(wanted), value_set=found["ordinal"].combine_chunks())
        if places.null_count:
            missing = wanted[np.asarray(places.is_null())][0]
            raise ConfigError(f"expected an ordinal of index {self.info.version}, found {missing}")
        return found.take(places)

    def all_rows(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Every row in order of ordinals, some or all columns, a file of rows in memory at a time."""
        for ref in self.info.rows:
            yield index_files.read_table(self.store, ref, columns)

    def ordinal_of(self, uri: str) -> int:
        """The ordinal of a uri; ConfigError if the index does not have it."""
        before, after = [], []  # of each file, the uris next to it
        for ref in self.info.rows:
            if ref.first_uri <= uri <= ref.last_uri:
                table = self._rows_of(ref)
                place = pc.index(table["uri"], uri).as_py()
                if place >= 0:
                    return int(table["ordinal"][place].as_py())
                uris = sorted(table["uri"].to_pylist())
                place = bisect_left(uris, uri)
                before.append(uris[place - 1])
                after.append(uris[place])
            else:
                (before if ref.last_uri < uri else after).append(ref.last_uri if ref.last_uri < uri else ref.first_uri)
        around = [*([max(before)] if before else []), *([min(after)] if after else [])]
        near = f"; the uris around it: {', '.join(around)}" if around else ""
        raise ConfigError(
            f"{uri}: expected a uri of index {self.info.version}, all of which are below {self.info.source.input}/,"
            f" found none such{near}"
        )

    def ordinals_of(self, uris: pa.Array) -> Ordinals:
        """The ordinals of those of these uris that the index has, in no order."""
        found = [np.empty(0, np.int64)]
        if len(uris):
            least, greatest = pc.min_max(uris).values()
            for ref in self.info.rows:
                if ref.first_uri <= greatest.as_py() and ref.last_uri >= least.as_py():
                    table = self._rows_of(ref)
                    found.append(table.filter(pc.is_in(table["uri"], uris))["ordinal"].to_numpy())
        return np.concatenate(found)

    def _rows_of(self, ref: RowsFile) -> pa.Table:
        table = self._cache.pop(ref.key, None)
        self._cache[ref.key] = table = index_files.read_table(self.store, ref) if table is None else table
        if len(self._cache) > _CACHED_FILES:
            self._cache.popitem(last=False)
        return table

    # --- true vectors ---------------------------------------------------------------------------------------------

    def true_vectors(self, ordinals: Ordinals | Sequence[int]) -> Floats:
        """The true vectors of these ordinals, in their order: (N, D). An `exact` index holds them itself; those of
        others are read from the labeling output.

        Raises ConfigError for an ordinal that is not there, ConflictError for a label file that is gone or another one.
        """
        if self.info.factory != EXACT:
            return self._true(self.rows(ordinals))
        held = self.vectors
        assert isinstance(held, ExactVectors)
        wanted = np.asarray(ordinals, np.int64)
        is_missing = ~np.isin(wanted, held.ordinals_N)
        if is_missing.any():
            raise ConfigError(f"expected an ordinal of index {self.info.version}, found {wanted[is_missing][0]}")
        return held.vectors_of(wanted)

    def _true(self, rows: pa.Table) -> Floats:
        uris, places = np.unique(np.asarray(rows["uri"].to_pylist(), object), return_inverse=True)
        order = np.empty(len(uris), np.int64)
        order[places] = np.arange(len(rows))
        source = self.info.source
        keys = [uri[len(source.input) + 1 :] for uri in uris]
        wanted = pa.table({"key": pa.array(keys, pa.string()), "run_seq": rows["run_seq"].take(order)})
        fields = pa.schema([pa.field("embedding", schema.embedding_type(self.info.dim), nullable=False)])
        output = storage.connect(source.output)
        try:
            found = view.rows_of(output, source.labels, source.input, wanted, fields, what="index")
        except ConflictError as error:
            raise ConflictError(
                f"{error}; if the output was compacted since index {self.info.version}, run build_index --update"
            ) from error
        return as_vectors(found)[places]


def as_vectors(table: pa.Table) -> Floats:
    """The column `embedding` of rows as (N, D)."""
    column = table["embedding"].combine_chunks()
    flat = column.flatten().to_numpy(zero_copy_only=False)
    vectors_ND: Floats = flat.reshape(len(table), column.type.list_size)
    return vectors_ND
