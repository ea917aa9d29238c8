"""A few rows of the current view -> the same rows labeled again, from the object's bytes to the scores.

A module of its own because it needs what the other checks do not: the source's bytes, the model, and torch (in the
worker only). It uses the stages of the job itself, with the settings that the run's claim says.
"""

import io
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import canary, catalog, log, run_model, schema, storage
from pipeline.decode import DEFAULT_LIMITS, DecodeLimits
from pipeline.errors import TRANSIENT, ConfigError, ConflictError, SourceError
from pipeline.label import Labeler
from pipeline.log import Claim, FileRef
from pipeline.picture import Recipe
from pipeline.prepare import prepare_unit
from pipeline.run_model import Settings
from pipeline.storage import Source, Store
from pipeline.verify_catalog import Candidate
from pipeline.verify_files import Findings

MIN_COSINE = 0.999
MAX_SCORE_DIFFERENCE = {"fp32": 1e-3, "bf16": 2e-2}
"""By what the run computed in: another CPU or GPU adds in another order."""
SPARE_CANDIDATES = 4
"""So many candidates for each row that is wanted: objects may have changed or gone since."""
_UNIT_ROWS = 256
_DEADLINE_S = 120.0


@dataclass(kw_only=True)
class SampleFindings:
    """What labeling again has found, or why it could not be done here."""

    findings: Findings = field(default_factory=Findings)
    num_compared: int = 0
    num_passed_by: int = 0
    """Rows whose object is not the one any more that was labeled, or cannot be read now."""
    least_cosine: float = 1.0
    greatest_difference: float = 0.0
    least_canary_cosine: float | None = None
    skipped: str = ""


def compare(
    output_url: str,
    input_url: str,
    space_id: str,
    candidates: Sequence[Candidate],
    num_rows: int,
    canaries: FileRef | None,
) -> SampleFindings:
    """Label the first `num_rows` candidates again whose object is still the one that was labeled.

    On CPU wherever they were labeled, in the precision of their run: a few rows are not worth waiting for a GPU, and
    what is allowed covers the difference.
    """
    output, source = storage.connect(output_url), storage.connect_input(input_url)
    found = SampleFindings()
    labelers: dict[Settings, Labeler] = {}
    waiting = sorted(candidates)
    try:
        while waiting and found.num_compared < num_rows:
            chunk = waiting[: min(_UNIT_ROWS, num_rows - found.num_compared)]
            waiting = waiting[len(chunk) :]
            for run_seq, table in _rows(output, chunk):
                claim = log.read_claim(output, run_seq)
                settings = _settings(claim)
                if settings not in labelers:
                    labelers[settings] = _labeler(output, claim)
                _compare_rows(source, settings, labelers[settings], table, found)
        if labelers and canaries is not None:
            _compare_canaries(output, canaries, space_id, next(iter(labelers.values())), found)
    except ConfigError as error:
        found.skipped = str(error)
    except ConflictError as error:
        found.findings.add([str(error)])
    return found


def _rows(output: Store, candidates: Sequence[Candidate]) -> Iterator[tuple[int, pa.Table]]:
    """The candidates' rows of labels/, by run; the bytes of one file and one run's rows are in memory."""
    by_file: dict[FileRef, list[str]] = defaultdict(list)
    for each in candidates:
        by_file[each.ref].append(each.uri)
    tables: dict[int, list[pa.Table]] = defaultdict(list)
    seqs = {each.uri: each.run_seq for each in candidates}
    for ref, uris in by_file.items():
        file = pq.ParquetFile(io.BytesIO(catalog.read_file(output, ref)))
        for batch in file.iter_batches(batch_size=16_384):
            table = pa.table(batch)
            table = table.filter(pc.is_in(table.column("uri"), pa.array(uris)))
            for row in range(len(table)):
                one = table.slice(row, 1)
                if one.column("run_seq")[0].as_py() == seqs[one.column("uri")[0].as_py()]:
                    tables[seqs[one.column("uri")[0].as_py()]].append(one)
    for run_seq in sorted(tables):
        yield run_seq, pa.concat_tables(tables[run_seq]).combine_chunks()


def _settings(claim: Claim) -> Settings:
    return run_model.settings_of(claim.metadata, top_k=claim.identity["top_k"])


def _labeler(output: Store, claim: Claim) -> Labeler:
    """The model of a run as it was then, where its report says that it was, else by its id."""
    try:
        found = run_model.find(_settings(claim), [run_model.reported_name(output, claim.run_id), claim.model_id])
    except (SourceError, ConflictError) as error:
        raise ConfigError(str(error)) from error  # what lies there now says nothing about the output
    return run_model.labeler(_settings(claim), found)


# --- comparing ----------------------------------------------------------------------------------------------------


def _compare_rows(source: Source, settings: Settings, labeler: Labeler, table: pa.Table, found: SampleFindings) -> None:
    """Fetch, decode, preprocess and label the rows' objects, and compare what comes out with the rows."""
    limits = DecodeLimits(
        max_bytes=max([DEFAULT_LIMITS.max_bytes, *table.column("size_bytes").to_pylist()]),
        max_pixels=max(
            width * height
            for width, height in zip(
                table.column("width_px").to_pylist(), table.column("height_px").to_pylist(), strict=True
            )
        ),
    )
    recipe = Recipe(spec=settings.spec, limits=limits)
    decoded, _ = prepare_unit(source, _objects(table, source.root), recipe, deadline_s=_DEADLINE_S)
    again = labeler(decoded)
    allowed = MAX_SCORE_DIFFERENCE[settings.precision]
    for row, fresh in zip(table.to_pylist(), again.to_pylist(), strict=True):
        if fresh["failure_kind"] in TRANSIENT:
            found.num_passed_by += 1
            continue
        found.num_compared += 1
        problems = list(_differences(row, fresh, allowed, found))
        if problems:
            found.findings.add([f"{row['uri']}: {'; '.join(problems)}"])


def _objects(table: pa.Table, root: str) -> pa.Table:
    """Rows of labels/ as the plan would list their objects."""
    columns = []
    for each in schema.OBJECTS:
        if each.name == "key":
            column = pc.utf8_slice_codeunits(table.column("uri"), start=len(root) + 1)
        elif each.name in table.column_names:
            column = table.column(each.name)
        else:
            column = pa.nulls(len(table), each.type)
        columns.append(column)
    return pa.table(columns, schema=schema.OBJECTS)


def _differences(row: dict[str, Any], fresh: dict[str, Any], allowed: float, found: SampleFindings) -> Iterator[str]:
    """What a row says otherwise than the labels of the same object now. Labels whose scores are closer than what is
    allowed may have changed places.
    """
    if fresh["failure_kind"] is not None:
        yield f"expected {row['label_names'][0]}, found {fresh['failure_kind']}: {fresh['failure_message']}"
        return
    if (row["width_px"], row["height_px"]) != (fresh["width_px"], fresh["height_px"]):
        yield (
            f"expected {fresh['width_px']}x{fresh['height_px']} pixels, found {row['width_px']}x{row['height_px']}"
            " in its row"
        )
    scores = dict(zip(fresh["label_ids"], fresh["label_scores"], strict=True))
    names = dict(zip(fresh["label_ids"], fresh["label_names"], strict=True))
    least = fresh["label_scores"][-1]
    first = row["label_ids"][0]
    if first not in scores or scores[first] < fresh["label_scores"][0] - allowed:
        yield f"expected {fresh['label_names'][0]} first, found {row['label_names'][0]} in its row"
        return
    for label_id, name, score in zip(row["label_ids"], row["label_names"], row["label_scores"], strict=True):
        # A label that is not among the first any more has at most the score of the last of them.
        difference = abs(score - scores[label_id]) if label_id in scores else max(0.0, score - least)
        found.greatest_difference = max(found.greatest_difference, difference)
        if difference > allowed:
            yield f"expected the score {scores.get(label_id, least):.4f} for {name}, found {score:.4f} in its row"
        if names.get(label_id, name) != name:
            yield f"expected the name {names[label_id]} for label {label_id}, found {name} in its row"
    if "embedding" in row:
        old, new = np.array(row["embedding"], np.float64), np.array(fresh["embedding"], np.float64)
        cosine = float(old @ new / (np.linalg.norm(old) * np.linalg.norm(new)))
        found.least_cosine = min(found.least_cosine, cosine)
        if not cosine >= MIN_COSINE:
            yield f"expected its embedding (cosine >= {MIN_COSINE}), found cosine {cosine:.6f}"


def _compare_canaries(
    output: Store, reference: FileRef, space_id: str, labeler: Labeler, found: SampleFindings
) -> None:
    expected, now = canary.read(output, reference, space_id), labeler.canary_vectors()
    canary.check(now, expected)
    found.least_canary_cosine = float(canary.cosines(now, expected).min())
