"""The one schema of a run. In: flags, environment variables and a TOML file; out: one frozen, checked `Config`.

A module of its own because help text, defaults, names and checks of all three sources come from the fields below; a
later option is one more field here and nothing elsewhere.
"""

import argparse
import difflib
import importlib.util
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Self

import fsspec
from fsspec.registry import known_implementations
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from pipeline.checkpoint import Pooling, PreprocessMode
from pipeline.errors import BudgetError, ConfigError, ConflictError, SourceError

ENV_PREFIX = "LABEL_BUCKET_"

OTHER_VARIABLES: Mapping[str, str] = {
    "LABEL_BUCKET_CACHE": "folder on each node that keeps downloaded checkpoints",
    "LABEL_BUCKET_PHOTOS": "folder of photos that the tests also run on",
    "LABEL_BUCKET_CRASH_AT": "named point at which the tests make a process die",
}
"""Variables with the prefix that are no option; any further one is an error."""

# A Kubernetes Service named label-bucket… puts these into every pod of its namespace:
# https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables
_SERVICE_LINK = re.compile(r"_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)$")

_GROUPS: Mapping[str, Mapping[str, str | None]] = {
    "what to label": {"input": "URL", "include": "GLOB", "exclude": "GLOB", "limit": "IMAGES"},
    "the model": {"model": "NAME", "revision": "COMMIT", "preprocess": None},
    "what is written": {
        "output": "URL",
        "top_k": "LABELS",
        "embedding": None,
        "image_stats": None,
        "run_date": "YYYY-MM-DD",
    },
    "with which means": {"device": None, "precision": None, "batch_size": "IMAGES", "gpu_actors": "ACTORS"},
    "what an image may cost": {"max_image_bytes": "BYTES", "max_image_px": "PIXELS", "object_deadline_s": "SECONDS"},
    "every night": {"retry_failed": None, "full": None, "allow_empty": None},
    "the run": {
        "max_failed_fraction": "SHARE",
        "stall_timeout_s": "SECONDS",
        "price_per_hour": "DOLLARS",
        "dry_run": None,
        "abandon_run": None,
        "single_writer": None,
        "config": "FILE",
        "log_level": None,
    },
}
"""The sections of --help: field -> placeholder of its value, None where the choices say it."""


def _location(value: str) -> str:
    """An absolute local path, or a URL without trailing slashes, of a store that fsspec can open here.

    Symbolic links stay: a link that moves to another folder every night is the same source every night.
    """
    if re.search(r"://[^/@]*:[^/@]*@", value):
        raise ValueError("expected a URL without credentials, found a password in it; use the store's own credentials")
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
        close = _did_you_mean(protocol, fsspec.available_protocols(), "", "://")
        raise ValueError(f"expected a folder, s3:// or another protocol of fsspec, found {protocol}://{close}")
    entry = known_implementations[protocol]
    if importlib.util.find_spec(entry["class"].partition(".")[0]) is None:
        raise ValueError(f"{protocol}:// needs a package that is not installed: {entry.get('err', entry['class'])}")
    if protocol in ("http", "https") and "?" in path:
        raise ValueError(f"expected a {protocol}:// prefix to list, found one with a query, which may hold a secret")
    if not path.strip("/"):
        raise ValueError(f"expected {protocol}://bucket/prefix, found {value!r} without a bucket")
    return f"{protocol}://{path.rstrip('/')}"


def _comparable(location: str) -> str:
    """`location` in a form that is equal for two names of one place: s3:// and s3a://, a link and its target."""
    protocol, separator, path = location.partition("://")
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

    input: Location
    """Folder or URL whose images are labeled, with everything below it."""
    output: Location
    """Folder or URL that receives labels/, failures/ and the log; not below --input."""
    include: Globs = ()
    """Label only keys (paths relative to --input) that match one of these; repeat the flag for several. In the
    environment: separated by commas, or a JSON list. Unset: every key."""
    exclude: Globs = ()
    """Leave out keys that match one of these, also included ones; written like --include. Unset: none."""
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
    """Images per forward pass, 1 to 1024. Unset: chosen for the device."""
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
    """Stop after the plan: say what would be done and write no labels."""
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


def load_config(argv: Sequence[str], environ: Mapping[str, str] | None = None) -> Config:
    """The run's config from `argv` (without the program's name), `environ` (default: the process's) and a TOML file.

    A flag wins over the environment, the environment over the file of --config, the file over the default. An empty
    variable counts as unset.

    Raises:
        ConfigError: an unknown flag, variable or key, a missing or wrong value, an unreadable file; one line.
        SystemExit: with code 0, after --help.
    """
    flags = _read_flags(argv)
    variables = _read_environment(os.environ if environ is None else environ)
    path = flags.get("config", variables.get("config"))
    keys = {} if path is None else _read_file(Path(path))
    origins = {
        **{name: f"{name} in {path}" for name in keys},
        **{name: ENV_PREFIX + name.upper() for name in variables},
        **{name: _flag(name) for name in flags},
    }
    try:
        return Config.model_validate({**keys, **variables, **flags})
    except ValidationError as error:
        problems = [_explain(problem, origins) for problem in error.errors(include_url=False)]
        raise ConfigError("; ".join(problems)) from None


def _read_flags(argv: Sequence[str]) -> dict[str, Any]:
    known, unknown = _parser().parse_known_args(argv)
    for word in unknown:
        if not word.startswith("-"):
            raise ConfigError(f"expected flags only, found {word!r} by itself; quote values with spaces or wildcards")
        name = word.partition("=")[0]
        raise ConfigError(f"unknown flag {name}{_did_you_mean(name, map(_flag, Config.model_fields))} (see --help)")
    return vars(known)


def _read_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    ours = {name: value for name, value in environ.items() if name.startswith(ENV_PREFIX)}
    for name in ours:
        if name not in OTHER_VARIABLES and not _SERVICE_LINK.search(name):
            _refuse_unknown(
                "environment variable", name.removeprefix(ENV_PREFIX), map(str.upper, Config.model_fields), ENV_PREFIX
            )
    return _Environment(ours)()


def _read_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        # TomlConfigSettingsSource takes a missing file for an empty one.
        raise ConfigError(f"expected a TOML file for --config, found none at {path}")
    try:
        keys = TomlConfigSettingsSource(Config, path)()
    except (OSError, ValueError) as error:
        raise ConfigError(f"expected a readable TOML file for --config, found {path}: {error}") from None
    for key in keys:
        _refuse_unknown(f"key in {path}:", key, Config.model_fields.keys() - {"config"})
    return keys


class _Environment(EnvSettingsSource):
    """Reads from a given mapping, and globs as text separated by commas or as a JSON list."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        super().__init__(Config)
        self.env_vars = {name.lower(): value for name, value in environ.items() if value}

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        try:
            globs = json.loads(value)
        except ValueError:
            globs = None
        # `[0-9]` is a glob as well as JSON, so only a list of texts is taken for JSON.
        if isinstance(globs, list) and all(isinstance(glob, str) for glob in globs):
            return globs
        return [glob.strip() for glob in value.split(",")]


def _parser() -> argparse.ArgumentParser:
    """Parser with one flag per field of `Config`; flags that are not given are absent from its namespace."""
    parser = _Parser(
        prog="label_bucket.py",
        usage="%(prog)s --input URL --output URL [options]",
        description="Label every image below --input, and write labels and embeddings below --output as Parquet.",
        epilog=_EPILOG,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    groups: dict[str, tuple[Any, str | None]] = {}
    for title, names in _GROUPS.items():
        group = parser.add_argument_group(title)
        groups |= {name: (group, placeholder) for name, placeholder in names.items()}

    def add_flag(_: object, *names: str, dest: str, **options: Any) -> None:
        group, placeholder = groups[dest]
        options |= {"metavar": placeholder} if placeholder else {}
        options["help"] = options["help"].removesuffix(" (default: ())").removesuffix(" (default: unset)")
        group.add_argument(*names, dest=dest, **options)

    # This source writes the flags; argparse reads them, because the source's own reader takes [ab].jpg for a JSON
    # list and a,b.jpg for two globs.
    CliSettingsSource(Config, root_parser=parser, add_argument_method=add_flag)
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see --help") from None


def _explain(problem: ErrorDetails, origins: Mapping[str, str]) -> str:
    """One line for one of pydantic's errors: where the value came from, what was expected, what was found."""
    message = (
        problem["msg"]
        .removeprefix("Value error, ")
        .replace("Input should be ", "expected ")
        .replace("a valid tuple", "a list")
    )
    if not problem["loc"]:
        return message
    name = str(problem["loc"][0])
    if problem["type"] == "missing":
        return f"{_flag(name)} is missing: give the flag, {ENV_PREFIX}{name.upper()}, or {name} in the --config file"
    found = "" if problem["type"] == "value_error" else f", found {problem['input']!r}"
    return f"{origins.get(name, name)}: {message}{found}"


def _refuse_unknown(what: str, name: str, known: Iterable[str], prefix: str = "") -> None:
    known = set(known)
    if name not in known:
        raise ConfigError(f"unknown {what} {prefix}{name}{_did_you_mean(name, known, prefix)} (see --help)")


def _did_you_mean(name: str, known: Iterable[str], prefix: str = "", suffix: str = "") -> str:
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {prefix}{close[0]}{suffix}?" if close else ""


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


_EPILOG = f"""\
where a value comes from, first one wins:
  1. the flag                --top-k 3
  2. the environment         {ENV_PREFIX}TOP_K=3        (every flag, in capitals; empty counts as unset)
  3. the file of --config    top_k = 3                   (TOML, every flag with underscores)
  4. the default
  Unknown flags, {ENV_PREFIX}* variables and keys are errors. Globs in each of the three:
      --include '*.jpg' --include 'a/**'      {ENV_PREFIX}INCLUDE='*.jpg,a/**'      include = ["*.jpg", "a/**"]
  Credentials are never options: each store reads its own (for s3:// the AWS environment and ~/.aws).

further environment variables:
{"".join(f"  {name:24}{meaning}" + chr(10) for name, meaning in OTHER_VARIABLES.items())}
exit codes:
    0  published, or with --dry-run planned
  {ConfigError.exit_code:3}  configuration: this command cannot work as given
  {SourceError.exit_code:3}  source or permission: --input or --output cannot be read or written, or no answer
  {BudgetError.exit_code:3}  too many images failed: look at them, or raise --max-failed-fraction and run again
  {ConflictError.exit_code:3}  accounting or conflict: another run or schema, or a sum that is off; nothing published
  143  stopped; the same command resumes

examples:
  label_bucket.py --input photos --output labels --model demo
  label_bucket.py --input s3://shop/photos --output s3://shop-labels --run-date 2026-11-22
  label_bucket.py --input s3://shop/photos --output s3://shop-labels --include '**/*.jpg' --limit 1000 --dry-run
  label_bucket.py --config nightly.toml --max-failed-fraction 0.2
"""
