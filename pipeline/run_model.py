"""What a run says of its labeling -> the same model again, as it was then: checkpoint, preprocessing, token, precision.

In: the metadata that a claim holds, and names under which the checkpoint may lie. Out: a `Labeler` that is proven to
make the run's space. A module of its own because checking labels and searching by a picture both stand or fall with its
being that model and no other.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pipeline import checkpoint, decode
from pipeline.checkpoint import Checkpoint, PreprocessSpec
from pipeline.errors import ConfigError, ConflictError, LabelBucketError, SourceError
from pipeline.label import Labeler
from pipeline.progress import Report
from pipeline.storage import Store


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that makes a label and a vector from a picture. Runs with equal settings share a `Labeler`."""

    space_id: str
    model_id: str
    model_revision: str
    weights_digest: str
    spec: PreprocessSpec
    pooling: checkpoint.Pooling
    precision: Literal["fp32", "bf16"]
    decode_rules_version: str
    top_k: int


def settings_of(metadata: Mapping[str, str], *, top_k: int) -> Settings:
    """The settings that the metadata of a claim, or of a file's footer, describes."""
    values = {name.removeprefix("label_bucket."): value for name, value in metadata.items()}
    pooling: Any = values.get("embedding_pooling", "none")
    return Settings(
        space_id=values["space_id"],
        model_id=values["model_id"],
        model_revision=values["model_revision"],
        weights_digest=values["weights_digest"],
        spec=_spec(json.loads(values["preprocess"])),
        pooling=pooling,
        precision="bf16" if values["compute_dtype"] == "bf16" else "fp32",
        decode_rules_version=values["decode_rules_version"],
        top_k=top_k,
    )


def _spec(values: Mapping[str, Any]) -> PreprocessSpec:
    lists = {name: tuple(each) for name, each in values.items() if isinstance(each, list)}  # JSON knows no tuples
    return PreprocessSpec(**{**values, **lists})


def reported_name(output: Store, run_id: str) -> str | None:
    """Where a run found its checkpoint, from its report: a claim has only the folder's name. None without a report."""
    try:
        report = Report.read(output, run_id)
    except SourceError:
        return None
    return str(report.config["model"]) if report is not None and "model" in report.config else None


def find(wanted: Settings, names: Iterable[str | None]) -> Checkpoint:
    """The first checkpoint of these names that has the wanted weights.

    Raises what is wrong with the first name: ConfigError if it is not to be had, ConflictError if another model lies
    there, with both named.
    """
    errors: list[LabelBucketError] = []
    for name in dict.fromkeys(filter(None, names)):
        # A hub has every commit; a folder or a URL has the weights it has, and so has a copy of a hub's model.
        is_commit = name == wanted.model_id and not wanted.model_revision.startswith("sha256:")
        try:
            found = checkpoint.resolve(name, wanted.model_revision if is_commit else None)
        except (ConfigError, SourceError) as error:
            errors.append(error)
            continue
        if found.weights_digest == wanted.weights_digest:
            return found
        errors.append(
            ConflictError(
                f"model {name}: expected the model of space {wanted.space_id}, {wanted.model_id} with weights of"
                f" SHA-256 {wanted.weights_digest[:12]}…, found {found.model_id} with {found.weights_digest[:12]}…"
            )
        )
    raise errors[0]


def labeler(wanted: Settings, found: Checkpoint, *, batch_size: int | None = None) -> Labeler:
    """The wanted model, on CPU: a few pictures are not worth waiting for a GPU. `batch_size` as in `Labeler`.

    Raises ConfigError if this version decodes pictures in another way, and ConflictError if the settings do not make
    their space.
    """
    rules = str(decode.DECODE_RULES_VERSION)
    if wanted.decode_rules_version != rules:
        raise ConfigError(
            f"space {wanted.space_id} was decoded by rules {wanted.decode_rules_version}, this version has {rules}"
        )
    named = checkpoint.space_id(found, wanted.spec, wanted.pooling, decode_rules_version=decode.DECODE_RULES_VERSION)
    if named[-8:] != wanted.space_id[-8:]:  # what stands before is the model's name, which may be another one here
        older = "; of mode fast it may be one of other rules than this version's" if wanted.spec.mode == "fast" else ""
        raise ConflictError(
            f"expected settings that make the space {wanted.space_id}, found those that make {named}{older}"
        )
    return Labeler(
        model=found.source,
        revision=found.revision,
        weights_digest=found.weights_digest,
        spec=wanted.spec,
        pooling=wanted.pooling,
        top_k=wanted.top_k,
        device="cpu",
        precision=wanted.precision,
        batch_size=batch_size,
    )
