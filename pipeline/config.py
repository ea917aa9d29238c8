"""The one schema of a run: a frozen, checked `Config`.

A module of its own because help text, defaults, names and checks come from the fields below, wherever a value was
given; a later option is one more field here, and its section of --help in `options`.
"""

import difflib
import importlib.util
import os
import re
from collections.abc import Iterable, Mapping
from datetime import date, datetime
from pathlib import Path
from typing import Annotated, Literal, Self

import fsspec
from fsspec.registry import known_implementations
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from pipeline import storage
from pipeline.checkpoint import Pooling, PreprocessMode
from pipeline.members import SUFFIX

ENV_PREFIX = "LABEL_BUCKET_"

OTHER_VARIABLES: Mapping[str, str] = {
    "LABEL_BUCKET_CACHE": "folder on each node that keeps downloaded checkpoints",
    "LABEL_BUCKET_PHOTOS": "folder of photos that the tests also run on",
    "LABEL_BUCKET_CRASH_AT": "named point at which the tests make a process die",
}
"""Variables with the prefix that are no option; any further one is an error."""


def did_you_mean(name: str, known: Iterable[str], prefix: str = "", suffix: str = "") -> str:
    """What to add to an error about an unknown name: the known one that is nearest, if one is near."""
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {prefix}{close[0]}{suffix}?" if close else ""


def _input_location(value: str) -> str:
    """As `_location`, also of the containers below one: webdataset+s3://bucket/shards."""
    kind, plus, inner = value.partition("+")
    return f"{kind}+{storage.normalize(_location(inner))}" if plus and kind in SUFFIX else _location(value)


def _location(value: str) -> str:
    """An absolute local path, or a URL without trailing slashes, of a store that fsspec can open here.

    Symbolic links stay: a link that moves to another folder every night is the same source every night.
    """
    # A password may hold a slash, so what tells it is a colon with anything but a port behind it, or where none can be.
    if re.search(r"://[^/@]*:(?!\d*(?:/|$))|\bs3a?://[^/]*:", value):
        raise ValueError(
            "expected a URL without credentials, found a colon before its path, as before a password; use the store's"
            " own credentials"
        )
    if not value.strip() or "\0" in value:
        raise ValueError(f"expected a folder or a URL, found {value!r}")
    if "::" in value:
        raise ValueError(f"expected one folder or URL, found the chain {value!r}; name the store itself")
    protocol, separator, path = value.partition("://")
    if not separator:
        protocol, colon, path = value.partition(":")
        if colon and protocol in known_implementations:
            raise ValueError(f"expected {protocol}://{path.lstrip('/')}, found {value!r}")
        path, protocol = value, "file"
    if protocol in ("file", "local"):
        try:
            return os.path.normpath(Path(path).expanduser().absolute())
        except RuntimeError:
            raise ValueError(f"expected a user of this machine after the ~, found {value!r}") from None
    if protocol not in known_implementations:
        close = did_you_mean(protocol, fsspec.available_protocols(), "", "://")
        raise ValueError(f"expected a folder, s3:// or another protocol of fsspec, found {protocol}://{close}")
    entry = known_implementations[protocol]
    if importlib.util.find_spec(entry["class"].partition(".")[0]) is None:
        raise ValueError(f"{protocol}:// needs a package that is not installed: {entry.get('err', entry['class'])}")
    if protocol in ("http", "https") and "@" in path.partition("/")[0]:
        raise ValueError("expected a URL without credentials, found some before its @; use the store's own credentials")
    if protocol in ("http", "https") and "?" in path:
        raise ValueError(f"expected a {protocol}:// prefix to list, found one with a query, which may hold a secret")
    if not path.strip("/"):
        raise ValueError(f"expected {protocol}://bucket/prefix, found {value!r} without a bucket")
    return f"{protocol}://{path.rstrip('/')}"


def _comparable(location: str) -> str:
    """`location` in a form that is equal for two names of one place: s3:// and s3a://, a link and its target."""
    kind, plus, inner = location.partition("+")
    protocol, separator, path = (inner if plus and kind in SUFFIX else location).partition("://")
    if protocol == "file":
        location, separator = path, ""
    if not separator:
        # Path.resolve raises on a loop of links.
        return os.path.realpath(location).rstrip("/")
    return f"{known_implementations[protocol]['class']}://{path}"


def _model_name(value: str) -> str:
    if not value.strip():
        raise ValueError("expected a hub id, a folder, a URL or 'demo', found nothing")
    return _location(value) if ":" in value else value


def _plain_date(value: object) -> object:
    # Pydantic also takes seconds since 1970 and midnights, none of which anyone means here.
    if isinstance(value, datetime) or not isinstance(value, str | date | None):
        raise ValueError(f"expected a date as YYYY-MM-DD, found {value}")
    if isinstance(value, str) and not re.fullmatch(r"\d{4}-\d\d-\d\d", value):
        raise ValueError(f"expected a date as YYYY-MM-DD, found {value!r}")
    return value


def _globs(value: tuple[str, ...]) -> tuple[str, ...]:
    if not all(glob.strip() for glob in value):
        raise ValueError(f"expected globs such as '*.jpg', found an empty one in {list(value)}")
    return value


Location = Annotated[str, AfterValidator(_location)]
InputLocation = Annotated[str, AfterValidator(_input_location)]
Globs = Annotated[tuple[str, ...], AfterValidator(_globs)]


class Config(BaseSettings):
    """Everything a run was asked for; immutable. `Config(...)` in code reads neither environment nor files.

    `model_dump(mode="json")` is the text for reports: no field can hold a secret, because URLs with credentials are
    refused.
    """

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        env_prefix=ENV_PREFIX,
        cli_hide_none_type=True,
        cli_implicit_flags=True,
        cli_kebab_case=True,
        cli_parse_none_str="unset",
    )

    input: InputLocation
    """Folder or URL whose images are labeled, with everything below it. webdataset+URL: the images in its .tar shards;
    parquet+URL: those in the rows of its Parquet files."""
    output: Location
    """Folder or URL that receives labels/, failures/ and the log; not below --input."""
    include: Globs = ()
    """Label only keys (paths relative to --input) that match one of these; repeat the flag for several. In the
    environment: separated by commas, or a JSON list. Unset: every key."""
    exclude: Globs = ()
    """Leave out keys that match one of these, also included ones; written like --include. Unset: none."""
    manifest: Location | None = None
    """Label only the objects that this file names, or a folder of such files: Parquet, CSV or JSON lines with a column
    uri, and etag and size_bytes where they are known. What it leaves out stays as it is. Unset: all below --input."""
    limit: int | None = Field(default=None, gt=0)
    """Only the first so many images, in key order; such a run records no deletions. Unset: all."""

    model: Annotated[str, AfterValidator(_model_name)] = "facebook/deit-small-distilled-patch16-224"
    """Checkpoint: a hub id, a folder, a URL, or demo (the small one that comes with this program)."""
    revision: str | None = Field(default=None, min_length=1)
    """Commit, tag or branch on the hub. Unset: the one this output remembers; the first time, what main is then."""
    preprocess: PreprocessMode = "checkpoint"
    """checkpoint: exactly as the checkpoint's own file says; paper: as the published accuracies were measured
    (shortest edge, then centre crop); fast: nearly checkpoint, for a third of the work on photos of 3 megapixels."""

    top_k: int = Field(default=5, ge=1, le=1000)
    """Labels per image, best first, 1 to 1000."""
    embedding: Pooling = "pooled"
    """Which tokens make the embedding. pooled: CLS, for distilled models the mean of both tokens; none: no such
    column."""
    image_stats: bool = False
    """Also write the bytes' SHA-256, a perceptual hash, sharpness and mean luminance of each image; otherwise null."""
    run_date: Annotated[date | None, BeforeValidator(_plain_date)] = None
    """The date in the names of what is written. Unset: today in UTC, kept when the run is resumed another day."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: GPUs if the cluster has any; cuda: refuse to start without one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Number format of the forward pass. auto: bf16 on GPUs, fp32 on CPUs; files always hold float32."""
    batch_size: int | None = Field(default=None, ge=1, le=1024)
    """Images per forward pass, 1 to 1024. Unset: up to 512 on GPUs, by their memory, 8 on CPUs."""
    gpu_actors: int | None = Field(default=None, ge=1)
    """Model replicas, one GPU each. Unset: every GPU the cluster has; without GPUs, CPU replicas by its CPUs."""

    max_image_bytes: int = Field(default=64 * 2**20, ge=1)
    """Larger objects are not fetched and become failures (too_large)."""
    max_image_px: int = Field(default=50_000_000, ge=1)
    """Images whose header says more width × height are not decoded and become failures (bomb_pixels)."""
    object_deadline_s: float = Field(default=30.0, gt=0, allow_inf_nan=False)
    """Time for one object, retries included; after it, the failure is unavailable and the next night tries again."""

    retry_failed: bool = False
    """Try all objects again that have no label, also those whose failure is not expected to pass by itself."""
    full: bool = False
    """Label every object anew, changed or not."""
    allow_empty: bool = False
    """Go on where every object that was known is gone, and record that: otherwise an empty listing ends the run."""

    max_failed_fraction: float = Field(default=0.05, ge=0, le=1)
    """Share of all images in scope that may fail, 0 to 1; above it nothing is published, and a larger one continues."""
    stall_timeout_s: float = Field(default=1800.0, gt=0, allow_inf_nan=False)
    """Where nothing moves for so long, what is left is begun anew; if nothing at all was done, the run ends."""
    price_per_hour: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """What the whole cluster costs, in dollars: the report then says what a million images do. Unset: it does not."""
    dry_run: bool = False
    """Write nothing: check, plan, try a sample of the images, and say what would be done and how long it would take."""
    probe_writes: bool = False
    """With --dry-run: also try whether --output can be written. Leaves two small objects below its _runs/."""
    abandon_run: bool = False
    """Give up the unfinished run of this output, instead of resuming it."""
    single_writer: bool = False
    """State that no other run ever works on this output: needed on stores that ignore If-None-Match."""
    config: Path | None = None
    """TOML file with any of these options, named with underscores: top_k = 3. Unset: no file."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Least severe messages shown."""

    @field_validator("*", mode="before")
    @classmethod
    def _check_no_boolean_is_a_number(cls, value: object, info: ValidationInfo) -> object:
        # Pydantic would read `limit = true` as 1.
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError(f"expected no boolean, found {str(value).lower()}")
        return value

    @model_validator(mode="after")
    def _check_output_is_outside_input(self) -> Self:
        source, target = _comparable(self.input), _comparable(self.output)
        if f"{target}/".startswith(f"{source}/"):
            where = "equal to" if source == target else "inside"
            raise ValueError(
                f"expected --output outside --input, found --output {self.output} {where} --input {self.input}, "
                "so that the next run would label its own results; choose another --output"
            )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what the caller gives: `load_config` alone reads the other sources."""
        return (init_settings,)

    @property
    def relabel(self) -> Literal["changed", "failed", "all"]:
        """Which of the objects that have an outcome are labeled again."""
        return "all" if self.full else "failed" if self.retry_failed else "changed"
