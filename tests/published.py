"""What a run left behind, read without the pipeline's code: keys, log entries and rows."""

import io
import json
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.parquet as pq


def keys(output: str) -> dict[str, tuple[str, str]]:
    """Every object below an output (`s3://…` or a folder) -> what changes when it is written again."""
    if not output.startswith("s3://"):
        root = Path(output)
        files = [path for path in root.rglob("*") if path.is_file()]
        return {str(path.relative_to(root)): (str(path.stat().st_ino), str(path.stat().st_mtime_ns)) for path in files}
    bucket, _, prefix = output.removeprefix("s3://").partition("/")
    pages = boto3.client("s3").get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/")
    return {
        item["Key"].removeprefix(f"{prefix}/"): (item["ETag"], str(item["LastModified"]))
        for page in pages
        for item in page.get("Contents", [])
    }


def read(output: str, key: str) -> bytes:
    """The bytes of one object of an output."""
    if not output.startswith("s3://"):
        return (Path(output) / key).read_bytes()
    bucket, _, prefix = output.removeprefix("s3://").partition("/")
    data: bytes = boto3.client("s3").get_object(Bucket=bucket, Key=f"{prefix}/{key}")["Body"].read()
    return data


def table(output: str, kind: str) -> pa.Table:
    """All rows of labels/, failures/ or deletions/, sorted by run and uri; an empty table without columns if none."""
    names = [key for key in keys(output) if key.startswith(f"{kind}/") and key.endswith(".parquet")]
    if not names:
        return pa.table({})
    tables = [pq.ParquetFile(io.BytesIO(read(output, name))).read() for name in sorted(names)]
    return pa.concat_tables(tables).sort_by([("run_seq", "ascending"), ("uri", "ascending")])


def entries(output: str) -> list[dict[str, Any]]:
    """The commits of the log, in order."""
    names = [key for key in keys(output) if key.startswith("_log/") and ".claim." not in key]
    return [json.loads(read(output, name)) for name in sorted(names)]


def reports(output: str) -> list[dict[str, Any]]:
    """report.json of every run, in order."""
    return [json.loads(read(output, key)) for key in sorted(keys(output)) if key.endswith("/report.json")]


def parts(output: str) -> dict[str, tuple[str, str]]:
    """The staged parts -> what changes when one is written again."""
    return {key: value for key, value in keys(output).items() if "/parts/" in key}
