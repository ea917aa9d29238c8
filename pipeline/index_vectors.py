"""Unit vectors in memory, searched by cosine: exactly with numpy, or through inverted lists with FAISS.

In: vectors with their ordinals, queries. Out: for each query the nearest ordinals; and all of it as bytes and back.

A module of its own because this is all that knows FAISS, which is an extra: `exact` works without it.

    D  dim of a vector    N  vectors of the index    Q  queries    K  answers per query    C  bytes of a vector's code
"""

import functools
import logging
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ConfigError, ConflictError
from pipeline.index_files import SliceReader, SliceWriter

EXACT = "exact"
MAX_SCANNED_ROWS = 20_000
"""A selection of at most so many rows is scanned: inverted lists gave 4.5 of 10 answers within 0.1 % of the rows."""
_BLOCK_SCORES = 1 << 23
"""Cosines in memory at a time: 32 MB."""
_CODE_BITS = {"Flat": 32, "SQfp16": 16, "SQ8": 8, "SQ6": 6, "SQ4": 4}
_FACTORY = re.compile(rf"IVF(?P<num_lists>[1-9]\d*)(?:_HNSW\d+)?,(?P<code>{'|'.join(_CODE_BITS)})")

Floats = NDArray[np.float32]
Ordinals = NDArray[np.int64]
Codes = NDArray[np.uint8]


class Found(NamedTuple):
    """The answers of each query, best first: `cosines_QK` float32 and `ordinals_QK` int64, -inf and -1 where there are
    fewer."""

    cosines_QK: Floats
    ordinals_QK: Ordinals


class Vectors(Protocol):
    """Vectors of an index in memory."""

    @property
    def num_rows(self) -> int:
        """How many vectors there are."""
        ...

    def search(self, queries_QD: Floats, k: int, *, among: Ordinals | None, is_exhaustive: bool) -> Found:
        """The k nearest of all vectors, or of those whose ordinals are named; see `Index.search`."""
        ...

    def encode(self, vectors_ND: Floats) -> Codes:
        """Vectors as this index holds them, (N, C): the work of adding them, which any copy of the index can do."""
        ...

    def add(self, codes_NC: Codes, ordinals_N: Ordinals) -> None:
        """Add encoded vectors; their ordinals ascend and are greater than all there are."""
        ...

    def remove(self, ordinals_N: Ordinals) -> None:
        """Remove the vectors of these ordinals, all of which are there."""
        ...

    def write(self, writer: SliceWriter) -> None:
        """Everything of it as bytes; `read` makes it again."""
        ...


# --- exact --------------------------------------------------------------------------------------------------------


def nothing_found(num_queries: int, k: int) -> Found:
    """No answers."""
    return Found(np.full((num_queries, k), -np.inf, np.float32), np.full((num_queries, k), -1, np.int64))


def nearest(queries_QD: Floats, vectors_ND: Floats, ordinals_N: Ordinals, k: int) -> Found:
    """The k vectors with the greatest inner product for each query, by brute force in blocks."""
    found = nothing_found(len(queries_QD), k)
    step = max(1024, _BLOCK_SCORES // max(1, len(queries_QD)))
    for begin in range(0, len(vectors_ND), step):
        scores_QB = queries_QD @ vectors_ND[begin : begin + step].T
        found = merged(found, _top(scores_QB, ordinals_N[begin : begin + step], k), k)
    return found


def merged(left: Found, right: Found, k: int) -> Found:
    """The k best of two sets of answers; of equal cosines the lower ordinal comes first."""
    cosines_QK = np.concatenate([left.cosines_QK, right.cosines_QK], axis=1)
    ordinals_QK = np.concatenate([left.ordinals_QK, right.ordinals_QK], axis=1)
    order_QK = np.lexsort((ordinals_QK, -cosines_QK), axis=1)[:, :k]
    return Found(np.take_along_axis(cosines_QK, order_QK, 1), np.take_along_axis(ordinals_QK, order_QK, 1))


def _top(scores_QB: Floats, ordinals_B: Ordinals, k: int) -> Found:
    """The k greatest of each row, in any order."""
    if scores_QB.shape[1] <= k:
        return Found(scores_QB, np.broadcast_to(ordinals_B, scores_QB.shape))
    places_QK = np.argpartition(scores_QB, -k, axis=1)[:, -k:]
    return Found(np.take_along_axis(scores_QB, places_QK, 1), ordinals_B[places_QK])


class ExactVectors:
    """float32 vectors in order of their ordinals; a search reads all of them."""

    def __init__(self, vectors_ND: Floats, ordinals_N: Ordinals) -> None:
        self._vectors_ND, self.ordinals_N = vectors_ND, ordinals_N

    @property
    def num_rows(self) -> int:
        """See Vectors."""
        return len(self.ordinals_N)

    def search(self, queries_QD: Floats, k: int, *, among: Ordinals | None, is_exhaustive: bool) -> Found:
        """See Vectors."""
        if among is None:
            return nearest(queries_QD, self._vectors_ND, self.ordinals_N, k)
        wanted = np.unique(among)
        places = np.searchsorted(self.ordinals_N, wanted)
        return nearest(queries_QD, self._vectors_ND[places], wanted, k)

    def vectors_of(self, ordinals_N: Ordinals) -> Floats:
        """The vectors of these ordinals, all of which are there, in their order."""
        return self._vectors_ND[np.searchsorted(self.ordinals_N, ordinals_N)]

    def encode(self, vectors_ND: Floats) -> Codes:
        """See Vectors: little-endian float32."""
        return np.ascontiguousarray(vectors_ND, "<f4").view(np.uint8)

    def add(self, codes_NC: Codes, ordinals_N: Ordinals) -> None:
        """See Vectors."""
        self._vectors_ND = np.concatenate([self._vectors_ND, codes_NC.view("<f4")])
        self.ordinals_N = np.concatenate([self.ordinals_N, ordinals_N])

    def remove(self, ordinals_N: Ordinals) -> None:
        """See Vectors."""
        is_kept = ~np.isin(self.ordinals_N, ordinals_N)
        self._vectors_ND, self.ordinals_N = self._vectors_ND[is_kept], self.ordinals_N[is_kept]

    def write(self, writer: SliceWriter) -> None:
        """All ordinals as int64, then all vectors as float32, little-endian both."""
        writer.write(self.ordinals_N.astype("<i8", copy=False).data)
        if len(self._vectors_ND):
            writer.write(np.ascontiguousarray(self._vectors_ND, "<f4").data)


def empty_exact(dim: int) -> ExactVectors:
    """No vectors yet."""
    return ExactVectors(np.empty((0, dim), np.float32), np.empty(0, np.int64))


def read_exact(reader: SliceReader, num_rows: int, dim: int) -> ExactVectors:
    """What ExactVectors.write wrote."""
    ordinals_N, vectors_ND = np.empty(num_rows, "<i8"), np.empty((num_rows, dim), "<f4")
    for array in (ordinals_N, vectors_ND):
        num_read = reader.read_into(array.reshape(-1).view(np.uint8).data)
        if num_read != array.nbytes:
            raise ConflictError(f"expected {array.nbytes:,} bytes of vectors, found {num_read:,}; build the index anew")
    return ExactVectors(vectors_ND, ordinals_N)


# --- FAISS --------------------------------------------------------------------------------------------------------


def has_faiss() -> bool:
    """Whether FAISS is installed."""
    try:
        faiss()
    except ConfigError:
        return False
    return True


@functools.cache
def faiss() -> Any:
    """The module; ConfigError if it is not installed."""
    logging.getLogger("faiss.loader").setLevel(logging.WARNING)  # tells of every variant that it does not find
    try:
        import faiss as module
    except ImportError as error:
        raise ConfigError(
            "expected FAISS for this index, found none; pip install 'label-bucket[index]', or build with --factory"
            f" {EXACT}"
        ) from error
    found: ModuleType = module
    return found


def num_lists(factory: str) -> int:
    """How many inverted lists a factory has. Raises ConfigError for what is no factory of this kind: only inverted
    lists take deletions."""
    return int(_parsed(factory)["num_lists"])


def code_bytes(factory: str, dim: int) -> int:
    """Bytes that a factory makes of a vector. Errors as `num_lists`."""
    return -(-_CODE_BITS[_parsed(factory)["code"]] * dim // 8)


def _parsed(factory: str) -> re.Match[str]:
    match = _FACTORY.fullmatch(factory)
    if match is None:
        raise ConfigError(
            f"--factory: expected auto, {EXACT} or inverted lists of FAISS such as IVF1024,SQ8, IVF65536_HNSW32,SQ8 or"
            f" IVF1024,Flat ({', '.join(_CODE_BITS)}), which take additions and deletions, found {factory}"
        )
    return match


class IvfVectors:
    """An IndexIVF of FAISS, with our ordinals as its ids. `nprobe` lists are searched for a query."""

    def __init__(self, index: Any, nprobe: int) -> None:
        self.index = index
        self.nprobe = nprobe

    @property
    def num_rows(self) -> int:
        """See Vectors."""
        return int(self.index.ntotal)

    @property
    def num_lists(self) -> int:
        """How many lists the vectors are in."""
        return int(self.index.nlist)

    def search(self, queries_QD: Floats, k: int, *, among: Ordinals | None, is_exhaustive: bool) -> Found:
        """See Vectors. The rarer the selected rows, the more lists are searched, and more yet for queries that found
        fewer than k, until all were.
        """
        nprobe, selector, most = self.nprobe, None, self.num_rows
        if among is not None:
            bits = np.zeros(int(among.max(initial=0)) // 8 + 1, np.uint8)
            np.bitwise_or.at(bits, among >> 3, np.left_shift(1, among & 7).astype(np.uint8))
            selector, most = faiss().IDSelectorBitmap(bits), len(np.unique(among))
            is_exhaustive |= len(among) <= MAX_SCANNED_ROWS
            nprobe *= -(-self.num_rows // max(1, len(among)))
        nprobe = self.num_lists if is_exhaustive else min(nprobe, self.num_lists)
        cosines_QK, ordinals_QK = self.index.search(queries_QD, k, params=self._parameters(nprobe, selector))
        short = np.flatnonzero(ordinals_QK[:, min(k, most) - 1] < 0)
        while len(short) and nprobe < self.num_lists:
            nprobe = min(4 * nprobe, self.num_lists)
            again = self.index.search(queries_QD[short], k, params=self._parameters(nprobe, selector))
            cosines_QK[short], ordinals_QK[short] = again
            short = short[ordinals_QK[short, min(k, most) - 1] < 0]
        return Found(np.where(ordinals_QK >= 0, cosines_QK, np.float32(-np.inf)), ordinals_QK)

    def _parameters(self, nprobe: int, selector: Any) -> Any:
        values: dict[str, Any] = {"nprobe": nprobe}
        if selector is not None:
            values["sel"] = selector
        if isinstance(faiss().downcast_index(self.index.quantizer), faiss().IndexHNSW):
            values["quantizer_params"] = faiss().SearchParametersHNSW(efSearch=max(64, 2 * nprobe))
        return faiss().SearchParametersIVF(**values)

    def encode(self, vectors_ND: Floats) -> Codes:
        """See Vectors: the list of each, and FAISS's code."""
        codes_NC: Codes = self.index.sa_encode(np.ascontiguousarray(vectors_ND, np.float32))
        return codes_NC

    def add(self, codes_NC: Codes, ordinals_N: Ordinals) -> None:
        """See Vectors."""
        self.index.add_sa_codes(codes_NC, ordinals_N)

    def remove(self, ordinals_N: Ordinals) -> None:
        """See Vectors."""
        self.index.remove_ids(faiss().IDSelectorBatch(ordinals_N))

    def write(self, writer: SliceWriter) -> None:
        """As FAISS writes it."""
        _called_back(writer.write, faiss().PyCallbackIOWriter, lambda sink: faiss().write_index(self.index, sink))


def train_ivf(factory: str, sample_ND: Floats) -> IvfVectors:
    """No vectors yet, but lists and codes that fit a sample of them. Raises ConfigError as `num_lists` and `faiss`."""
    num_lists(factory)
    index = faiss().index_factory(sample_ND.shape[1], factory, faiss().METRIC_INNER_PRODUCT)
    index.cp.seed = 1  # FAISS's own is the same every time as well; said, because a build should be repeatable
    index.train(np.ascontiguousarray(sample_ND))
    return IvfVectors(index, nprobe=1)


def read_ivf(reader: SliceReader, nprobe: int) -> IvfVectors:
    """What IvfVectors.write wrote."""
    index = _called_back(reader.read, faiss().PyCallbackIOReader, faiss().read_index)
    return IvfVectors(index, nprobe)


def _called_back(callback: Callable[..., Any], stream: Callable[..., Any], function: Callable[[Any], Any]) -> Any:
    """`function` of a stream of FAISS over `callback`, whose errors come out as they were raised."""
    raised: list[Exception] = []

    def guarded(argument: Any) -> Any:
        try:
            return callback(argument)
        except Exception as error:
            raised.append(error)
            raise

    try:
        return function(stream(guarded, 1 << 20))
    except Exception as error:  # FAISS makes RuntimeError or SystemError of it
        if raised:
            raise raised[0] from None
        raise ConflictError(f"expected an index of FAISS, found {' '.join(str(error).split())}") from error
