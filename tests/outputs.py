"""Copies of an output, edited as a damaged disk or a faulty writer would leave them."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import schema

Change = Callable[[pa.Table], pa.Table]


class Copy:
    """A copy of an output in a local folder."""

    def __init__(self, original: Path, folder: Path) -> None:
        self.root = Path(shutil.copytree(original, folder))

    def entry(self, run_seq: int) -> dict[str, Any]:
        """A commit of the log."""
        found: dict[str, Any] = json.loads((self.root / f"_log/{run_seq:08d}.json").read_text())
        return found

    def set_entry(self, run_seq: int, entry: dict[str, Any]) -> None:
        """Overwrite a commit, or add one with its claim."""
        (self.root / f"_log/{run_seq:08d}.json").write_text(json.dumps(entry))
        claim = self.root / f"_log/{run_seq:08d}.claim.json"
        if not claim.exists():
            base = json.loads((self.root / "_log/00000001.claim.json").read_text())
            claim.write_text(json.dumps({**base, "run_seq": run_seq, "run_id": entry["run_id"]}))

    def path(self, run_seq: int, kind: str = "labels") -> Path:
        """The only file of a kind that a commit names."""
        (file,) = self.entry(run_seq)[kind]
        return self.root / str(file["key"])

    def rewrite(self, run_seq: int, change: Change, kind: str = "labels") -> None:
        """Change the rows of the only file of a kind, and everything that the log says of it but the counts."""
        entry = self.entry(run_seq)
        (file,) = entry[kind]
        entry[kind] = [self.write(file["key"], change(pq.read_table(self.root / file["key"])), file["key"])]
        self.set_entry(run_seq, entry)

    def write(self, key: str, table: pa.Table, like: str, **metadata: str) -> dict[str, Any]:
        """A file with the footer of another one, changed where `metadata` says; what the log has to say of it."""
        footer = {name.decode(): value.decode() for name, value in pq.read_schema(self.root / like).metadata.items()}
        footer |= {f"label_bucket.{name}": value for name, value in metadata.items()}
        data = schema.encode(table, footer)
        path = self.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        names = self.keys_of(table)
        return {**reference(key, data, len(table)), "first_key": names[0], "last_key": names[-1]}

    def keys_of(self, table: pa.Table) -> list[str]:
        """The keys of rows of any published table."""
        if "key" in table.column_names:
            return [str(key) for key in table["key"].to_pylist()]
        return [uri.removeprefix(self.entry(1)["identity"]["input"] + "/") for uri in table["uri"].to_pylist()]

    def rewrite_catalog(self, run_seq: int, change: Change, num_files: int = 1) -> None:
        """Change the rows of a catalog of one file, cut it into several, and let everything that names them follow."""
        entry = self.entry(run_seq)
        manifest = self.root / entry["catalog"]["key"]
        listed = json.loads(manifest.read_text())
        (file,) = listed["files"]
        table = change(pq.read_table(self.root / file["key"]))
        borders = [len(table) * number // num_files for number in range(num_files + 1)]
        listed["files"] = [
            self.write(file["key"].replace("-00000.parquet", f"-{number:05d}.parquet"), piece, file["key"])
            for number, piece in [
                (number, table.slice(begin, borders[number + 1] - begin)) for number, begin in enumerate(borders[:-1])
            ][::-1]
        ][::-1]
        data = json.dumps(listed).encode()
        manifest.write_bytes(data)
        entry["catalog"] = reference(entry["catalog"]["key"], data, len(table))
        self.set_entry(run_seq, entry)


def reference(key: str, data: bytes, num_rows: int) -> dict[str, Any]:
    """What the log says of a file without bounds."""
    return {"key": key, "num_rows": num_rows, "size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def flip_byte(path: Path) -> None:
    """One bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def replaced(table: pa.Table, name: str, change: Callable[[list[Any]], list[Any]]) -> pa.Table:
    """A table with the values of one column changed."""
    place = table.column_names.index(name)
    field = table.schema.field(name)
    return table.set_column(place, field, pa.array(change(table[name].to_pylist()), field.type))
