"""find_duplicates(options): an index -> exact copies and near-duplicates, as edges, groups and a page of pictures.

    rows ──> equal digests ──> one row per content ──> its nearest ──> true cosines ──> groups ──> duplicate_files

Copies are taken out first, so 10,000 copies of one placeholder are 9,999 edges and not 50 million. The index finds who
may be near whom, by cosines that may be approximations; what is said then is true of the labeling output's vectors.

A module of its own because what counts as a copy, and as near, is decided here. In memory are the index, about 60 bytes
for each row, and the row of each image that has a duplicate; their vectors are on local disk for the while.
"""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import duplicate_files, index, index_files, leaders, sheet, storage
from pipeline.duplicate_files import ROWS, Copies, Duplicates, Members, Settings
from pipeline.errors import ConfigError, SourceError
from pipeline.index import Index
from pipeline.index_vectors import Floats, Ordinals
from pipeline.leaders import Ints, Pairs
from pipeline.meter import metered
from pipeline.storage import describe

NUM_NEIGHBOURS = 32
"""Of each content, as edges. What a leader has beyond is looked for when its group is made."""
MARGIN = 0.003
"""Cosines of an index may be so much too low; those of 8-bit codes err by 0.0005."""
MAX_PAIRS = 50_000_000
"""20 bytes each while they are gathered, three times that while they are sorted."""
_TIE = 1e-6
"""What float32 makes of a cosine."""
_SLICE_ROWS = 1 << 16
"""True vectors in memory at a time: 100 MB of 384."""
_QUERIES = 4096
_READ = ["ordinal", "uri", "etag", "size_bytes", "width_px", "height_px", "phash", "label_names", "label_scores"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Where to look for duplicates."""

    index: str
    """The --output of build_index."""
    output: str
    space: str | None = None
    version: str | None = None
    min_cosine: float = 0.995
    """Of near-duplicates. On 3,000 drawn pictures with `demo`: 5 false pairs, and 99.0 % of the copies that were
    compressed again with JPEG quality 75; 0.95 gives 52,807 false pairs."""
    sheet_groups: int = 50
    """The largest groups, which the page shows."""


def find_duplicates(options: Options) -> str:
    """Find, write below `<output>/<version>/`, and say what was found and in which folder. The same again writes the
    same over it, and a later version of the index goes beside it.

    Raises ConfigError for an index that is not there, a threshold that is none, or one that gives more than MAX_PAIRS;
    ConflictError for damage, and a folder that holds duplicates of another index or threshold; SourceError for
    storage. Pictures that cannot be read are shown as such.
    """
    started_s = time.perf_counter()
    if not 0 < options.min_cosine <= 1:
        raise ConfigError(f"--min-cosine: expected above 0, at most 1, found {options.min_cosine:g}")
    opened = index.open_index(options.index, options.space, options.version)
    target = storage.connect_output(f"{options.output.rstrip('/')}/{opened.info.version}")
    settings = Settings(
        index=opened.store.root,
        space_id=opened.info.space_id,
        version=opened.info.version,
        min_cosine=options.min_cosine,
    )
    duplicate_files.check(target, settings)
    contents, copies, num_without_digest = exact_copies(opened)
    near, groups, num_crowded = _near(opened, contents, copies, options.min_cosine)
    found = _joined(opened, copies, near, groups)
    counts = duplicate_files.write(target, settings, found, opened.info.source.input, options.sheet_groups)
    seconds = round(time.perf_counter() - started_s, 2)
    counts |= {
        "num_rows": opened.info.num_rows,
        "num_without_digest": num_without_digest,
        "num_crowded": num_crowded,
        "seconds": seconds,
    }
    duplicate_files.finish(target, settings, counts)
    without = sheet.counted(num_without_digest, "row")
    unknown = f" ({without} without a digest: label with --image-stats)" if num_without_digest else ""
    return (
        f"wrote {target.root}: of {sheet.counted(opened.info.num_rows, 'row')},"
        f" {sheet.counted(len(copies.copy), 'exact copy', 'exact copies')}{unknown};"
        f" {sheet.counted(len(near.a), 'pair')} with a cosine of {options.min_cosine:g} or more;"
        f" {sheet.counted(counts['num_groups'], 'group')}, with {sheet.counted(counts['num_duplicates'], 'row')} of"
        f" {counts['duplicate_bytes'] / 1e6:,.1f} MB beside the best; {seconds:,.1f} s"
    )


# --- exact copies -------------------------------------------------------------------------------------------------


def exact_copies(opened: Index) -> tuple[Ordinals, Copies, int]:
    """One row per content, ascending; the other rows, each with that one; how many rows have no digest.

    Equal are rows of equal SHA-256; where that is not known, of equal MD5, which an etag of S3 may be, and size. Of
    equals, the one with the smallest uri stands for the content.
    """
    ordinals, sha256, md5 = [], [], []
    for table in opened.all_rows(["ordinal", "sha256", "etag", "size_bytes"]):
        ordinals.append(table["ordinal"].to_numpy())
        sha256.append(_digests(table["sha256"], 64))
        md5.append(_digests(table["etag"], 32, table["size_bytes"]))
    ordinals_N, sha256_N, md5_N = np.concatenate(ordinals), _codes(sha256), _codes(md5)
    num_without_digest = int(((sha256_N < 0) & (md5_N < 0)).sum())
    first_N = _first_equals(sha256_N, md5_N)
    num_equals_N = np.bincount(first_N, minlength=len(first_N))[first_N]
    several = np.flatnonzero(num_equals_N > 1)
    rows = _rows(opened, ordinals_N[several]).append_column("first", pa.array(first_N[several]))
    rows = rows.sort_by([("first", "ascending"), ("uri", "ascending")])
    sorted_ordinals = rows["ordinal"].to_numpy()
    is_original = np.diff(rows["first"].to_numpy(), prepend=-1) != 0
    original = sorted_ordinals[is_original][np.cumsum(is_original) - 1]
    copies = Copies(sorted_ordinals[~is_original], original[~is_original])
    return np.setdiff1d(ordinals_N, copies.copy, assume_unique=True), copies, num_without_digest


def _digests(hexes: pa.ChunkedArray, num_digits: int, sizes: pa.ChunkedArray | None = None) -> pa.Array:
    """The first 16 bytes of digests, with the size if there is one; null for what is no digest of so many digits."""
    is_digest = pc.match_substring_regex(hexes, f"^[0-9a-f]{{{num_digits}}}$")
    texts = pc.if_else(is_digest, pc.utf8_slice_codeunits(hexes, 0, 32), None).to_pylist()
    suffixes = [b""] * len(texts) if sizes is None else [each.to_bytes(8, "big") for each in sizes.to_pylist()]
    values = [text and bytes.fromhex(text) + suffix for text, suffix in zip(texts, suffixes, strict=True)]
    return pa.array(values, pa.binary(16 if sizes is None else 24))


def _codes(pieces: list[pa.Array]) -> Ints:
    """A number for each different value, -1 for null."""
    codes: Ints = pa.concat_arrays(pieces).dictionary_encode().indices.fill_null(-1).to_numpy().astype(np.int64)
    return codes


def _first_equals(sha256_N: Ints, md5_N: Ints) -> Ints:
    """The place of the first row of the same content, for each row.

    A row without SHA-256 is what the first row of its MD5 that has one is; so two SHA-256 are never one content, though
    anybody can make two files of one MD5.
    """
    first_N = np.arange(len(sha256_N))
    order = np.argsort(sha256_N < 0, kind="stable")
    for codes_N in (md5_N, sha256_N):
        coded = order[codes_N[order] >= 0]
        _, places, inverse = np.unique(codes_N[coded], return_index=True, return_inverse=True)
        first_N[coded] = coded[places][inverse]
    return first_N[first_N]


# --- near-duplicates ----------------------------------------------------------------------------------------------


def _near(opened: Index, contents: Ordinals, copies: Copies, min_cosine: float) -> tuple[Pairs, leaders.Groups, int]:
    """Pairs of contents, their groups, and how many contents have more neighbours than edges."""
    among = contents if len(copies.copy) else None
    candidates, crowded = _candidates(opened, contents, among, min_cosine)
    nodes = np.unique(np.concatenate([candidates.a, candidates.b]))
    with _true_vectors(opened, nodes) as vectors_ND:

        def true(a: Ints, b: Ints) -> Pairs:
            cosines = _cosines(vectors_ND, np.searchsorted(nodes, a), np.searchsorted(nodes, b))
            is_near = cosines >= min_cosine - _TIE
            return Pairs(a[is_near], b[is_near], cosines[is_near])

        def all_like(node: int) -> tuple[Ints, Floats] | None:
            if node not in is_crowded:
                return None
            query_QD = vectors_ND[np.searchsorted(nodes, [node])]
            like = _all_above(opened, query_QD, among, len(contents), min_cosine - MARGIN)
            # Whoever is near a leader has it among its own nearest, or others as near: it is a node.
            like = like[np.isin(like, nodes) & (like != node)]
            found = true(np.full(len(like), node), like)
            return found.b, found.cosine

        pairs = true(candidates.a, candidates.b)
        is_crowded = set(crowded.tolist())
        groups = leaders.lead(_ranked(opened, np.unique(np.concatenate([pairs.a, pairs.b]))), pairs, all_like)
    is_led = groups.member != groups.leader
    edges = leaders.unique_pairs(
        np.concatenate([pairs.a, groups.leader[is_led]]),
        np.concatenate([pairs.b, groups.member[is_led]]),
        np.concatenate([pairs.cosine, groups.cosine[is_led]]),
    )
    return edges, groups, len(crowded)


def _candidates(opened: Index, contents: Ordinals, among: Ordinals | None, min_cosine: float) -> tuple[Pairs, Ordinals]:
    """What the index finds among the nearest of each content, and the contents that may have more neighbours."""
    k = min(NUM_NEIGHBOURS + 1, len(contents))  # an image is nearest to itself
    sources, targets, cosines, crowded = ([np.empty(0, np.int64)] for _ in range(4))
    num_found = 0
    for some in metered(_slices(opened, contents), "searching the neighbours of rows", len(contents), size=len):
        vectors_ND = opened.true_vectors(some)
        for begin in range(0, len(some), _QUERIES):
            asked_Q = some[begin : begin + _QUERIES]
            found = opened.search(vectors_ND[begin : begin + _QUERIES], k, among=among)
            is_near_QK = (found.cosines_QK >= min_cosine - MARGIN) & (found.ordinals_QK != asked_Q[:, None])
            places, _ = np.nonzero(is_near_QK)
            sources.append(asked_Q[places])
            targets.append(found.ordinals_QK[is_near_QK])
            cosines.append(found.cosines_QK[is_near_QK])
            if k < len(contents):
                crowded.append(asked_Q[is_near_QK.sum(axis=1) >= NUM_NEIGHBOURS])
            num_found += len(places)
            if num_found > MAX_PAIRS:
                raise ConfigError(
                    f"--min-cosine {min_cosine:g}: expected at most {MAX_PAIRS:,} neighbours, found more in"
                    f" {int(np.searchsorted(contents, asked_Q[-1])) + 1:,} of {len(contents):,} rows; raise it"
                )
    pairs = leaders.unique_pairs(
        np.concatenate(sources), np.concatenate(targets), np.concatenate(cosines).astype(np.float32)
    )
    return pairs, np.concatenate(crowded)


def _all_above(opened: Index, query_QD: Floats, among: Ordinals | None, most: int, min_cosine: float) -> Ordinals:
    """All that the index finds above a cosine: so many more each time, until the last one is below."""
    k = NUM_NEIGHBOURS + 1
    while True:
        k = min(4 * k, most)
        found = opened.search(query_QD, k, among=among)
        is_near_K = found.cosines_QK[0] >= min_cosine
        if k == most or not is_near_K[-1]:
            above: Ordinals = found.ordinals_QK[0][is_near_K]
            return above


def _slices(opened: Index, ordinals: Ordinals) -> Iterator[Ordinals]:
    """Ascending ordinals in pieces whose rows are in one file."""
    for ref in opened.info.rows:
        begin, end = np.searchsorted(ordinals, [ref.first_ordinal, ref.last_ordinal + 1]).tolist()
        for start in range(begin, end, _SLICE_ROWS):
            yield ordinals[start : min(start + _SLICE_ROWS, end)]


@contextmanager
def _true_vectors(opened: Index, nodes: Ordinals) -> Iterator[Floats]:
    """The true vectors (N, D) of ascending nodes, in a file that goes with the block: pairs want them in any order."""
    shape = (len(nodes), opened.info.dim)
    if not len(nodes):
        yield np.empty(shape, np.float32)
        return
    with tempfile.TemporaryFile(buffering=0) as file:  # what a buffer holds would fail once more when it is closed
        for some in metered(_slices(opened, nodes), "reading vectors of candidates", len(nodes), size=len):
            left = memoryview(opened.true_vectors(some).astype(np.float32, copy=False).tobytes())
            try:
                while left:
                    left = left[file.write(left) :]
            except OSError as error:
                raise SourceError(
                    f"{tempfile.gettempdir()}: expected room for {4 * shape[0] * shape[1] / 1e9:.1f} GB of vectors,"
                    f" found {describe(error)}; set TMPDIR, or raise --min-cosine"
                ) from error
        yield np.memmap(file, np.float32, "r", shape=shape)


def _cosines(vectors_ND: Floats, left: Ints, right: Ints) -> Floats:
    """Of pairs of rows of unit vectors."""
    found = np.empty(len(left), np.float32)
    for begin in range(0, len(left), _SLICE_ROWS):
        here = slice(begin, begin + _SLICE_ROWS)
        found[here] = np.einsum("pd,pd->p", vectors_ND[left[here]], vectors_ND[right[here]])
    return np.minimum(found, np.float32(1))


# --- groups -------------------------------------------------------------------------------------------------------


def _ranked(opened: Index, nodes: Ordinals) -> Ordinals:
    """Nodes, the best leader first: most pixels, then most bytes, then the smallest uri."""
    rows = _rows(opened, nodes)
    num_pixels = pc.multiply(rows["width_px"].cast(pa.int64()), rows["height_px"].cast(pa.int64()))
    keys = [("num_pixels", "descending"), ("size_bytes", "descending"), ("uri", "ascending")]
    ranked: Ordinals = rows.append_column("num_pixels", num_pixels).sort_by(keys)["ordinal"].to_numpy()
    return ranked


def _joined(opened: Index, copies: Copies, near: Pairs, groups: leaders.Groups) -> Duplicates:
    """Groups with all copies in them: a copy is in the group of its content, which has one of its own if need be."""
    alone = np.setdiff1d(copies.original, groups.member)
    order = np.argsort(np.concatenate([groups.member, alone]))
    member, leader = np.concatenate([groups.member, alone])[order], np.concatenate([groups.leader, alone])[order]
    cosine = np.concatenate([groups.cosine, np.ones(len(alone), np.float32)])[order]
    content = np.searchsorted(member, copies.original)
    members = Members(
        np.concatenate([member, copies.copy]),
        np.concatenate([leader, leader[content]]),
        np.concatenate([cosine, cosine[content]]),
        np.concatenate([member, copies.original]),
    )
    nodes = np.unique(np.concatenate([members.member, near.a, near.b]))
    return Duplicates(_rows(opened, nodes), copies, near, members)


def _rows(opened: Index, ordinals: Ordinals) -> pa.Table:
    """The rows (duplicate_files.ROWS) of ordinals, ascending, read file by file."""
    wanted = np.sort(ordinals)
    pieces = [ROWS.empty_table()]
    for ref in opened.info.rows:
        begin, end = np.searchsorted(wanted, [ref.first_ordinal, ref.last_ordinal + 1]).tolist()
        if begin < end:
            table = index_files.read_table(opened.store, ref, _READ)
            pieces.append(_with_best_label(table.filter(pc.is_in(table["ordinal"], pa.array(wanted[begin:end])))))
    return pa.concat_tables(pieces)


def _with_best_label(table: pa.Table) -> pa.Table:
    best = {
        "label_name": pc.list_element(table["label_names"], 0),
        "label_score": pc.list_element(table["label_scores"], 0),
    }
    return pa.table([best[name] if name in best else table[name] for name in ROWS.names], ROWS.names).cast(ROWS)
