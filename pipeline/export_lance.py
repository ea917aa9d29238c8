"""The current view as a Lance dataset: made once, then kept up with the nights; searched where it is stored.

In: the changes of a view, a folder or an s3:// URL. Out: a dataset of schema.labels whose `embedding` is a fixed-size
list of float32, and whose schema metadata say which space it holds and after which run.

A module of its own because it is the only one that knows Lance (the extra `export`), which brings its own storage and
its own commits: a version is written once, by a conditional PUT, as our log is.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipeline import storage, store, store_s3_get
from pipeline.changes import Change
from pipeline.errors import ConfigError, ConflictError, SourceError
from pipeline.log import State
from pipeline.view import View

if TYPE_CHECKING:
    from lance import LanceDataset

MERGE_ROWS = 100_000
"""Rows that one merge takes at most: they are in memory, and each merge reads the dataset's uris once."""
_SPACE, _RUN = "label_bucket.space_id", "label_bucket.run_id"


def export(
    url: str,
    state: State,
    current: View,
    metadata: Mapping[str, str],
    since: Callable[[int], Iterator[Change]],
) -> str:
    """Make the dataset at `url` be the current view, and say what that took.

    `since` gives the changes after a place in the log, `metadata` is kept in the schema. A new dataset appears as a
    whole. An existing one gets the rows that changed merged in by uri, then loses what is gone, then says of which run
    it is; an update that died is done again. Raises ConfigError without Lance, ConflictError for a dataset of another
    space or another output, or which has other rows than it should, and SourceError for storage that does not answer.
    """
    try:
        import lance  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"--to lance needs the package pylance: pip install 'label-bucket[export]' ({error})"
        ) from error
    path = storage.connect_output(url).root.removeprefix("file://")
    held = _open(path)
    metadata = {**metadata, _SPACE: current.space_id, _RUN: current.newest.run_id}
    if held is None:
        return _create(path, current, metadata, since(0))
    base_seq = _base_seq(held, path, state, current)
    if base_seq == current.newest.run_seq:
        return f"{path} holds the view after run {current.newest.run_id} already: {held.count_rows():,} rows"
    return _update(held, path, current, metadata, since(base_seq))


def _create(path: str, current: View, metadata: Mapping[str, str], found: Iterator[Change]) -> str:
    import lance

    rows_schema = current.columns.with_metadata(metadata)
    fragments, num_rows = [], 0
    for change in found:
        if len(change.rows):
            with _errors(path):
                fragments += lance.fragment.write_fragments(
                    change.rows, path, rows_schema, mode="create", storage_options=_options(path)
                )
            num_rows += len(change.rows)
    with _errors(path):
        whole = lance.LanceOperation.Overwrite(rows_schema, fragments)
        lance.LanceDataset.commit(path, whole, storage_options=_options(path))
    return f"wrote {path}: {num_rows:,} rows, the view after run {current.newest.run_id}"


def _update(
    held: "LanceDataset", path: str, current: View, metadata: Mapping[str, str], found: Iterator[Change]
) -> str:
    num_upserted = num_deleted = num_current = 0
    for changes in _bundles(found):
        rows = pa.concat_tables([change.rows for change in changes])
        gone = pa.table({"uri": pa.concat_arrays([change.gone for change in changes])})
        num_current += sum(change.num_current for change in changes)
        with _errors(path):
            if len(rows):
                held.merge_insert("uri").when_matched_update_all().when_not_matched_insert_all().execute(rows)
            if len(gone):
                merged: dict[str, Any] = held.merge_insert("uri").when_matched_delete().execute(gone)
                num_deleted += merged["num_deleted_rows"]
        num_upserted += len(rows)
    with _errors(path):
        num_rows = held.count_rows()
    if num_rows != num_current:
        raise ConflictError(
            f"{path}: expected the {num_current:,} rows of the view after run {current.newest.run_id}, found"
            f" {num_rows:,}; something else writes into it: run again, or export to a new place"
        )
    with _errors(path):
        held.update_schema_metadata(dict(metadata), replace=True)
    return (
        f"updated {path}: {num_upserted:,} rows new or changed, {num_deleted:,} deleted; {num_rows:,} rows, the view"
        f" after run {current.newest.run_id}"
    )


def _bundles(found: Iterable[Change]) -> Iterator[list[Change]]:
    """Neighbouring changes with up to MERGE_ROWS rows and as many deletions together."""
    bundle: list[Change] = []
    for change in found:
        sizes = [max(len(each.rows), len(each.gone)) for each in [*bundle, change]]
        if bundle and sum(sizes) > MERGE_ROWS:
            yield bundle
            bundle = []
        bundle.append(change)
    if bundle:
        yield bundle


def _open(path: str) -> "LanceDataset | None":
    import lance

    with _errors(path):
        try:
            return lance.dataset(path, storage_options=_options(path))
        except ValueError as error:
            if "was not found" in str(error):
                return None
            raise


def _base_seq(held: "LanceDataset", path: str, state: State, current: View) -> int:
    """Place of the run whose view the dataset holds."""
    said = {name.decode(): value.decode() for name, value in (held.schema.metadata or {}).items()}
    if said.get(_SPACE) != current.space_id:
        found = f"one of space {said[_SPACE]}" if _SPACE in said else "a dataset that is no export"
        raise ConflictError(
            f"{path}: expected a dataset of space {current.space_id}, found {found}; export to another place"
        )
    for run in state.runs:
        if run.run_id == said.get(_RUN) and run.space_id == current.space_id:
            return run.run_seq
    raise ConflictError(
        f"{path}: holds the view after run {said.get(_RUN)}, which is not in the log of this --input; export to another"
        " place"
    )


def _options(path: str) -> dict[str, str]:
    """What Lance's S3 client does not take from the environment by itself."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if not path.startswith("s3://") or not endpoint:
        return {}
    store.check_endpoint(endpoint, store_s3_get.ENDPOINT_SETTINGS)
    return {"aws_endpoint": endpoint, "allow_http": str(endpoint.startswith("http://")).lower()}


@contextmanager
def _errors(path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:  # what Lance raises for storage and damage alike
        said = re.sub(r",? ?/\S+\.rs:\d+(:\d+)?", "", storage.describe(error))  # without places in Lance's source
        raise SourceError(f"{path}: {said}") from error
