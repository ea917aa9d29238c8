"""A config -> what it asks for, resolved against the source, the output's log and the model.

In: a `Config`. Out: a `Request` that the run can be claimed and done with. A module of its own because everything here
happens before anything is written: a mistake of the operator ends here, in one line.
"""

import functools
import json
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path

from pipeline import catalog, checkpoint, dataset, decode, log
from pipeline.checkpoint import Checkpoint, PreprocessSpec
from pipeline.config import Config
from pipeline.diff import Rules
from pipeline.errors import AbsentError, ConfigError, ConflictError, ForbiddenError, SourceError
from pipeline.listing import Scope
from pipeline.log import Entry, FileRef, State
from pipeline.picture import Recipe
from pipeline.preprocess import spec_from_config
from pipeline.storage import ObjectInfo, Source, Store

OUTPUT_FOLDERS = frozenset({"labels", "failures", "deletions", "snapshots", "_catalog", "_log", "_runs"})
"""What is written below an output."""
MAX_PAGES_LOOKED_AT = 100
"""Of the listing, before anything is written: 15 s on S3."""
PRECISION = "label_bucket.compute_dtype"
"""The footer key, also in a claim, that says what the model computes in."""
IMAGE_STATS = "label_bucket.image_stats"
"""Likewise: whether the columns of schema.STATS are filled, as Python writes a boolean."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command asks for, resolved against the source, the output's log and the model."""

    source: Source
    output: Store
    rules: Rules
    checkpoint: Checkpoint
    spec: PreprocessSpec
    space_id: str
    identity: dict[str, object]
    base: Entry | None
    """The newest published run of this space."""
    base_files: list[FileRef]
    """Its catalog, which says what need not be labeled again."""


def _check_output(config: Config, source: Source, output: Store, state: State) -> None:
    """Refuse another source for this output, and a source in which its results would appear."""
    below = f"{source.root}/".removeprefix(f"{output.root}/").partition("/")[0]
    if below in OUTPUT_FOLDERS and source.root.startswith(f"{output.root}/"):
        raise ConfigError(
            f"--input {source.root} is where --output {output.root} keeps its {below}; choose another --output"
        )
    known = next((each.identity["input"] for each in [*state.runs, state.open_claim] if each is not None), None)
    if known is not None and known != source.root and not (config.abandon_run and not state.runs):
        raise ConflictError(
            f"--output {output.root} holds labels of {known}, this command reads {source.root}: one output has one"
            " source; choose another --output"
        )


def resolve(config: Config, source: Source, output: Store, state: State) -> Request:
    """Check everything that can be checked without Ray and without writing, cheapest first.

    Raises ConfigError, SourceError or ConflictError.
    """
    _check_output(config, source, output, state)
    scope = Scope(include=config.include, exclude=config.exclude)
    is_empty = not _has_objects(source, scope, config.max_image_bytes)
    found = checkpoint.resolve(config.model, config.revision or _remembered_revision(config, state))
    spec = spec_from_config(found.preprocessor_config, mode=config.preprocess, input_px=found.input_px)
    if config.top_k > len(found.label_names):
        raise ConfigError(
            f"--top-k: expected 1 to {len(found.label_names)}, the labels of {config.model}; found {config.top_k}"
        )
    if config.embedding == "distillation" and "WithTeacher" not in found.architecture:
        raise ConfigError(
            f"--embedding distillation: expected a model with a distillation head, found {found.architecture} in"
            f" {config.model}; use pooled, cls or patch-mean"
        )
    space_id = checkpoint.space_id(found, spec, config.embedding, decode_rules_version=decode.DECODE_RULES_VERSION)
    dim = None if config.embedding == "none" else found.embedding_dim
    identity: dict[str, object] = {
        "input": source.root,
        "include": sorted(set(config.include)),
        "exclude": sorted(set(config.exclude)),
        "limit": config.limit,
        "manifest": config.manifest,
        "space_id": space_id,
        "top_k": config.top_k,
        "embedding_dim": dim,
        "relabel": config.relabel,
    }
    base = state.newest(space_id)
    if base is not None and base.identity["top_k"] != config.top_k:
        raise ConflictError(
            f"--output {output.root}: space {space_id} holds {base.identity['top_k']} labels per image, this command"
            f" asks for --top-k {config.top_k}; use --top-k {base.identity['top_k']} or another --output"
        )
    base_files = catalog.files_of(output, base)
    if base is not None and base.run_seq not in state.retired:
        log.check_files(output, base)
    if is_empty and not (config.allow_empty and base is not None):
        raise nothing_to_label(source, scope, base)
    same_filters = base is None or all(base.identity[name] == identity[name] for name in ("include", "exclude"))
    return Request(
        source=source,
        output=output,
        rules=Rules(
            scope=scope,
            limit=config.limit,
            records_deletions=same_filters and config.limit is None and config.manifest is None,
            relabel=config.relabel,
        ),
        checkpoint=found,
        spec=spec,
        space_id=space_id,
        identity=identity,
        base=base,
        base_files=base_files,
    )


def _has_objects(source: Source, scope: Scope, max_image_bytes: int) -> bool:
    """Whether there seems to be an object in scope; raises if it may not be read.

    Looks at MAX_PAGES_LOOKED_AT pages; what is behind them is for planning to see.
    """
    pages = scope.pages(source)
    try:
        for page in islice(pages, MAX_PAGES_LOOKED_AT):
            in_scope = [info for info, is_in_scope in page if is_in_scope]
            if in_scope:
                _check_readable(source, in_scope, max_image_bytes)
                return True
        return next(pages, None) is not None
    except AbsentError as error:
        raise SourceError(f"--input {source.root}: {error}; check the name and the endpoint") from error


def nothing_to_label(source: Source, scope: Scope, base: Entry | None) -> ConfigError | SourceError:
    """What to say of a listing without an object in scope: it ends the run."""
    if base is not None:
        return SourceError(
            f"--input {source.root}: expected objects, found none, and an earlier night labeled some; check the prefix"
            " and the filters, or record all of them as deleted with --allow-empty"
        )
    if next(source.list_pages(), None):
        return ConfigError(
            f"--input {source.root}: none of its objects match --include {list(scope.include)} --exclude"
            f" {list(scope.exclude)}; nothing to label"
        )
    return SourceError(f"--input {source.root}: expected objects, found none; check the prefix")


def _check_readable(source: Source, infos: list[ObjectInfo], max_image_bytes: int) -> None:
    """Raise ForbiddenError if none of the smallest few may be read: then the identity is wrong, not the objects."""
    candidates = [info for info in infos if 0 < info.size_bytes <= max_image_bytes and not info.is_archived]
    refusal: ForbiddenError | None = None
    for info in sorted(candidates, key=lambda info: info.size_bytes)[:3]:
        try:
            source.get(info.key)
            return
        except ForbiddenError as error:
            refusal = error
        except SourceError:
            return
    if refusal is not None:
        raise ForbiddenError(f"--input {source.root}: may be listed but not read: {refusal}") from refusal


def _remembered_revision(config: Config, state: State) -> str | None:
    # Only a hub's branch can move; a folder or a URL has the weights it has.
    is_hub_id = config.model != checkpoint.DEMO and "://" not in config.model and not Path(config.model).is_dir()
    return state.remembered_revision(config.model) if is_hub_id else None


def footer_metadata(config: Config, request: Request, precision: str) -> dict[str, str]:
    """What the footer of every published file says; `precision` is what the model computes in, fp32 or bf16."""
    found, dim = request.checkpoint, request.identity["embedding_dim"]
    values: dict[str, object] = {
        "model_id": found.model_id,
        "model_revision": found.revision,
        "weights_digest": found.weights_digest,
        "label_set_digest": checkpoint.label_set_digest(found),
        "preprocess": json.dumps(asdict(request.spec), sort_keys=True),
        "decode_rules_version": decode.DECODE_RULES_VERSION,
        "space_id": request.space_id,
        "compute_dtype": precision,
        "image_stats": config.image_stats,
        "versions": json.dumps(versions(), sort_keys=True),
    }
    if dim is not None:
        values |= {
            "embedding_dim": dim,
            "embedding_dtype": "float32",
            "embedding_pooling": config.embedding,
            "embedding_normalization": "l2",
            "embedding_metric": "inner_product",
        }
    return {f"label_bucket.{name}": str(value) for name, value in values.items()}


@functools.cache
def versions() -> dict[str, str]:
    """Versions of what can change a result or explain a failure."""
    names = ("ray", "torch", "transformers", "pyarrow", "pillow", "numpy", "s3fs")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def worker_task(
    config: Config, request: Request, run_id: str, precision: str, *, has_stats: bool = False
) -> dataset.Task:
    """What workers have to know to do this run's units."""
    return dataset.Task(
        input_url=request.source.root,
        output_url=request.output.root,
        run_id=run_id,
        recipe=Recipe(
            spec=request.spec,
            limits=decode.DecodeLimits(max_bytes=config.max_image_bytes, max_pixels=config.max_image_px),
            has_stats=has_stats,
        ),
        object_deadline_s=config.object_deadline_s,
        stall_timeout_s=config.stall_timeout_s,
        model=portable(config.model),
        model_revision=request.checkpoint.revision,
        weights_digest=request.checkpoint.weights_digest,
        pooling=config.embedding,
        top_k=config.top_k,
        precision="bf16" if precision == "bf16" else "fp32",
        batch_size=config.batch_size,
    )


def portable(model: str) -> str:
    """`model` as workers with another working directory understand it."""
    return str(Path(model).resolve()) if "://" not in model and Path(model).is_dir() else model
