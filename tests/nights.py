"""Nights without images: what published runs leave behind, written through the pipeline's own publishing code."""

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import catalog, files, log, schema, snapshot, view
from pipeline.catalog import KeyRange
from pipeline.log import Claim, Entry, FileRef
from pipeline.storage import Store

ROOT = "s3://photos/in"
DIM = 8
NAMES = ("cat", "dog, hot", "Ä/ö")
BEGIN = datetime(2026, 11, 22, 3, tzinfo=UTC)


@dataclass
class Nights:
    """An output, and what must be true of it: for each space, uri -> the run that gave its newest label."""

    output: Store
    rows_per_file: int = 5
    num: int = 0
    current: dict[str, dict[str, int]] = field(default_factory=dict)

    def claim(self, space_id: str = "deit-01234567", **changes: Any) -> Claim:
        """Take the next place in the log."""
        identity = {"input": ROOT, "space_id": space_id, "embedding_dim": DIM, "top_k": 2, **changes}
        return log.claim(
            self.output,
            log.read(self.output),
            identity,
            run_date=str((BEGIN + timedelta(days=self.num)).date()),
            model_id="deit",
            model_revision="r1",
            metadata={"label_bucket.space_id": space_id},
            now=BEGIN.isoformat(),
        )

    def publish(
        self,
        labeled: Iterable[str],
        failed: Mapping[str, str] | None = None,
        deleted: Iterable[str] = (),
        space_id: str = "deit-01234567",
        change: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    ) -> Entry:
        """A night in which these keys are labeled (`change` makes of each row what is said of it), failed, or gone."""
        claim = self.claim(space_id)
        self.num += 1
        labeled, deleted, failed = sorted(labeled), sorted(deleted), dict(sorted((failed or {}).items()))
        base = log.read(self.output).newest(space_id)
        fresh = [_catalog_row(key, failed.get(key), claim.run_seq) for key in sorted([*labeled, *failed])]
        gone = [_catalog_row(key, None, 0) for key in deleted]
        entry = log.entry_of(
            claim,
            "run",
            (BEGIN + timedelta(days=self.num)).isoformat(),
            counts={"labeled": len(labeled)},
            labels=self._put("labels", claim, [files.labels(_part(labeled, {}, change), claim, DIM)]),
            dead_letters=self._put("failures", claim, [files.failures(_part(list(failed), failed), claim)]),
            deletions=self._put("deletions", claim, [files.deletions(_table(gone), claim)]),
            catalog=self._catalog(claim, base, _table(gone), _table(fresh)),
        )
        for kind in ("plan/x", "parts/y", "publish/z"):
            self.output.put(f"_runs/{claim.run_id}/{kind}.parquet", b"staged")
        for name in ("plan.json", "publish.json", "report.json"):
            self.output.put(f"_runs/{claim.run_id}/{name}", b"{}")
        log.commit(self.output, entry)
        now = self.current.setdefault(space_id, {})
        now.update({f"{ROOT}/{key}": claim.run_seq for key in labeled})
        for key in [*failed, *deleted]:
            now.pop(f"{ROOT}/{key}", None)
        return entry

    def snapshot(self, space_id: str = "deit-01234567", committed_at: datetime = BEGIN) -> Entry:
        """A snapshot of the view now, as compaction leaves it."""
        current = view.resolve(self.output, space_id)
        claim = log.read_claim(self.output, current.newest.run_seq)
        name = f"{claim.run_seq:08d}-{log.read(self.output).newest_seq:08d}"
        refs = [
            files.put(self.output, f"snapshots/space={space_id}/{name}/part-{number:05d}.parquet", rows, claim, name)
            for number, rows in enumerate(view.batches(self.output, space_id))
        ]
        manifest = catalog.write_manifest(self.output, space_id, f"snapshot-{name}", refs)
        return snapshot.add_snapshot(self.output, current.newest, manifest, "none", committed_at.isoformat)

    def _put(self, kind: str, claim: Claim, tables: list[pa.Table]) -> list[FileRef]:
        where = f"{kind}/space={claim.identity['space_id']}/run_date={claim.run_date}/part-{claim.run_id}"
        pieces = [
            table.slice(start, self.rows_per_file)
            for table in tables
            for start in range(0, len(table), self.rows_per_file)
        ]
        return [
            files.put(self.output, f"{where}-{i:03d}.parquet", each, claim, str(i)) for i, each in enumerate(pieces)
        ]

    def _catalog(self, claim: Claim, base: Entry | None, gone: pa.Table, fresh: pa.Table) -> FileRef:
        old = catalog.files_of(self.output, base)
        whole = KeyRange(range_id="00000", after="", through=None, files=tuple(old))
        where = f"_catalog/space={claim.identity['space_id']}/{claim.run_id}-00000"

        def write(number: int, rows: pa.Table) -> FileRef:
            return files.put(self.output, f"{where}-{number:05d}.parquet", rows, claim, str(number))

        some = [each for each in (fresh,) if len(each)]
        renewed = catalog.renew(self.output, whole, [gone] if len(gone) else [], some, write)
        return catalog.write_manifest(self.output, claim.identity["space_id"], claim.run_id, renewed)


def several(output: Store) -> Nights:
    """Nights of two spaces in which every fate occurs: new, changed, failed after a label, gone, there again."""
    nights = Nights(output)
    keys = [f"{folder}/{number:02d}.jpg" for folder in ("a", "b b", "ü'x") for number in range(8)]
    nights.publish([*keys, "top.jpg"], {"bad.jpg": "corrupt"})
    nights.publish(keys[:3], space_id="vit-89abcdef")
    nights.publish([keys[1], keys[9], "new/1.jpg"], {keys[2]: "truncated"}, [keys[3], keys[4], keys[23]])
    nights.publish([], {keys[0]: "missing"}, [], space_id="vit-89abcdef")
    nights.publish([keys[3], "bad.jpg"], {keys[5]: "corrupt"}, ["new/1.jpg"])
    nights.publish([])
    nights.publish([keys[2], "new/1.jpg"])
    return nights


def label_of(key: str) -> str:
    """The best label of a key."""
    return NAMES[schema.image_id(key) % len(NAMES)]


def _table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema.CATALOG)


def _catalog_row(key: str, failure_kind: str | None, run_seq: int) -> dict[str, Any]:
    return {
        "key": key,
        "etag": f"e{run_seq}",
        "size_bytes": 10,
        "last_modified": BEGIN,
        "failure_kind": failure_kind,
        "run_seq": run_seq,
    }


def _part(
    keys: list[str], failed: Mapping[str, str], change: Callable[[dict[str, Any]], dict[str, Any]] = dict
) -> pa.Table:
    return pa.Table.from_pylist([change(_row(key, failed.get(key))) for key in keys], schema.labeled(DIM))


@functools.cache
def _vector(key: str) -> list[float]:
    vector = np.random.default_rng(schema.image_id(key)).normal(size=DIM)
    return list((vector / np.linalg.norm(vector)).astype(np.float32).tolist())


def _row(key: str, kind: str | None) -> dict[str, Any]:
    best = label_of(key)
    return {
        "key": key,
        "uri": f"{ROOT}/{key}",
        "etag": "e",
        "size_bytes": 10,
        "last_modified": BEGIN,
        "width_px": 640,
        "height_px": 480,
        "failure_kind": kind,
        "failure_stage": kind and "decode",
        "failure_message": kind and "why",
        "label_ids": [NAMES.index(best), 9],
        "label_names": [best, "none"],
        "label_scores": [0.75, 0.25],
        "embedding": _vector(key),
    }
