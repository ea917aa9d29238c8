"""Two runs -> their answers to the same pictures, side by side.

A run is a space of a labeling output (`URL#space=ID`, the part after # where the output has several) or a combination
of an evaluation's predictions (`FILE.parquet#preprocess=MODE,precision=FORMAT`, likewise). Both give rows in uri order,
so they are joined as they are read: in memory are a piece of each, at most a catalog file's rows.

A module apart from `compare`, which counts: this one knows where rows come from, and nothing of what they say.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import log, predictions, storage, view
from pipeline.errors import ConfigError, ConflictError

_FRAGMENT = re.compile(r"#((?:space|preprocess|precision)=[^#]*)$")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One side of a comparison."""

    where: str
    """As it was resolved: URL or file, and which part of it."""
    model_id: str
    weights_digest: str
    embedding_dim: int | None


class Source(NamedTuple):
    """A run that can be read."""

    run: Run
    name: str
    part: Mapping[str, str]

    def read(self, has_vectors: bool) -> Iterator[pa.Table]:
        """Labeled pictures in uri order: uri, label_names, label_scores, of an evaluation label_ids and true_id, too,
        and, if asked for, embedding. Raises ConflictError or SourceError for damage.
        """
        labeled: Iterator[pa.Table]
        if self.name.endswith(".parquet"):
            rows = predictions.batches(Path(self.name), _combination(Path(self.name), self.part))
            labeled = (table.filter(pc.is_null(table["failure_kind"])) for table in rows)
        else:
            columns = ["uri", "label_names", "label_scores", *(["embedding"] if has_vectors else [])]
            labeled = view.batches(storage.connect_output(self.name), self.part.get("space"), columns)
        return _ordered(labeled, self.run.where)


def open_run(name: str) -> Source:
    """What a run's name means. Raises ConfigError for one that is not there or not named among several."""
    fragment = _FRAGMENT.search(name)
    where = name[: fragment.start()] if fragment else name
    part = dict(each.partition("=")[::2] for each in fragment[1].split(",")) if fragment else {}
    allowed = {"preprocess", "precision"} if where.endswith(".parquet") else {"space"}
    if not set(part) <= allowed:
        raise ConfigError(
            f"--compare {name}: expected {' and '.join(sorted(allowed))} after #, found {', '.join(part)}"
        )
    if where.endswith(".parquet"):
        combination = _combination(Path(where), part)
        _, about = predictions.about(Path(where))
        run = Run(
            where=f"{where}#{combination}",
            model_id=about["model_id"],
            weights_digest=about["weights_digest"],
            embedding_dim=None,
        )
        return Source(run, where, part)
    output = storage.connect_output(where)
    current = view.resolve(output, part.get("space"))
    claim = log.read_claim(output, current.newest.run_seq)
    run = Run(
        where=f"{output.root}#space={current.space_id}",
        model_id=claim.model_id,
        weights_digest=claim.metadata.get("label_bucket.weights_digest", ""),
        embedding_dim=current.newest.identity["embedding_dim"],
    )
    return Source(run, where, {"space": current.space_id})


def _combination(path: Path, part: Mapping[str, str]) -> predictions.Combination:
    """The only combination of the file that is meant."""
    listed, _ = predictions.about(path)
    meant = [each for each in listed if part.items() <= each._asdict().items()]
    if len(meant) != 1:
        found = ", ".join(f"#{name}={value}" for name, value in part.items()) or "nothing after the name"
        raise ConfigError(
            f"--compare {path}: expected one of its combinations ({', '.join(f'#{each}' for each in listed)}), found"
            f" {found}"
        )
    return meant[0]


def joined(
    left: Iterator[pa.Table], right: Iterator[pa.Table], only: Counter[str]
) -> Iterator[tuple[pa.Table, pa.Table]]:
    """Rows of both with the same uri, in pieces of equal length and order; rows of one alone are counted as `a` or `b`.

    Both must come in uri order without doubles, and no piece be empty.
    """
    a, b = next(left, None), next(right, None)
    while a is not None and b is not None:
        # Up to here both are complete: the next piece of either begins after it.
        border = min(a["uri"][-1].as_py(), b["uri"][-1].as_py())
        num_a, num_b = _count_up_to(a["uri"], border), _count_up_to(b["uri"], border)
        place = pc.index_in(a["uri"][:num_a].combine_chunks(), value_set=b["uri"][:num_b].combine_chunks())
        rows_a, rows_b = a.slice(0, num_a).filter(place.is_valid()), b.take(place.drop_null())
        only.update(a=num_a - len(rows_a), b=num_b - len(rows_b))
        yield rows_a, rows_b
        a = a.slice(num_a) if num_a < len(a) else next(left, None)
        b = b.slice(num_b) if num_b < len(b) else next(right, None)
    for name, piece, rest in (("a", a, left), ("b", b, right)):
        only[name] += (0 if piece is None else len(piece)) + sum(map(len, rest))


def _ordered(tables: Iterator[pa.Table], where: str) -> Iterator[pa.Table]:
    """Tables that are not empty, having checked that their uris ascend."""
    last = ""
    for table in tables:
        if len(table):
            uris = pa.concat_arrays([pa.array([last]), *table["uri"].chunks])
            if not pc.all(pc.less(uris[:-1], uris[1:])).as_py():
                raise ConflictError(
                    f"{where}: expected rows in order of their uris, each once, found another after {last!r}"
                )
            last = uris[-1].as_py()
            yield table


def _count_up_to(uris: pa.ChunkedArray, border: str) -> int:
    return int(pc.sum(pc.less_equal(uris, border)).as_py())
