"""Flags, environment variables and a TOML file -> one `Config`, and what --help says.

A module of its own because where a value comes from is another matter than what it means: names, texts, defaults and
checks are the fields of `config`.
"""

import argparse
import json
import os
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import CliSettingsSource, EnvSettingsSource, TomlConfigSettingsSource

from pipeline.config import ENV_PREFIX, OTHER_VARIABLES, Config, did_you_mean
from pipeline.errors import BudgetError, ConfigError, ConflictError, SourceError

# A Kubernetes Service named label-bucket… puts these into every pod of its namespace:
# https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables
_SERVICE_LINK = re.compile(r"_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)$")

_GROUPS: Mapping[str, Mapping[str, str | None]] = {
    "what to label": {"input": "URL", "include": "GLOB", "exclude": "GLOB", "manifest": "URL", "limit": "IMAGES"},
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
        "probe_writes": None,
        "abandon_run": None,
        "single_writer": None,
        "config": "FILE",
        "log_level": None,
    },
}
"""The sections of --help: field -> placeholder of its value, None where the choices say it."""


def load_config(argv: Sequence[str], environ: Mapping[str, str] | None = None) -> Config:
    """The run's config from `argv` (without the program's name), `environ` (default: the process's) and a TOML file.

    A flag wins over the environment, the environment over the file of --config, the file over the default. An empty
    variable counts as unset.

    Raises:
        ConfigError: an unknown flag, variable or key, a missing or wrong value, an unreadable file; one line.
        SystemExit: with code 0, after --help and --print-config.
    """
    flags = _read_flags(argv)
    is_only_shown = flags.pop("print_config", False)
    variables = _read_environment(os.environ if environ is None else environ)
    path = flags.get("config", variables.get("config"))
    keys = {} if path is None else _read_file(Path(path))
    origins = {
        **{name: f"{name} in {path}" for name in keys},
        **{name: ENV_PREFIX + name.upper() for name in variables},
        **{name: _flag(name) for name in flags},
    }
    try:
        config = Config.model_validate({**keys, **variables, **flags})
    except ValidationError as error:
        problems = [_explain(problem, origins) for problem in error.errors(include_url=False)]
        raise ConfigError("; ".join(problems)) from None
    if is_only_shown:
        print(_as_toml(config, origins), end="")
        raise SystemExit(0)
    return config


def _as_toml(config: Config, origins: Mapping[str, str]) -> str:
    """A file for --config that asks for the same run: every option with its meaning and where its value comes from."""
    values, lines = config.model_dump(mode="json"), list[str]()
    for title, names in _GROUPS.items():
        lines.append(f"# --- {title} ---\n")
        for name in (each for each in names if each != "config"):
            meaning = " ".join((Config.model_fields[name].description or "").split())
            lines += textwrap.wrap(meaning, 118, initial_indent="# ", subsequent_indent="# ")
            # JSON's texts, numbers, booleans and lists of texts are TOML's.
            value = json.dumps(values[name], ensure_ascii=False)
            is_set = values[name] not in (None, [])
            lines.append(f"{name} = {value}  # {origins.get(name, 'default')}" if is_set else f"# {name}: unset")
            lines.append("")
    return "\n".join(lines)


def _read_flags(argv: Sequence[str]) -> dict[str, Any]:
    known, unknown = _parser().parse_known_args(argv)
    for word in unknown:
        if not word.startswith("-"):
            raise ConfigError(f"expected flags only, found {word!r} by itself; quote values with spaces or wildcards")
        name = word.partition("=")[0]
        raise ConfigError(f"unknown flag {name}{did_you_mean(name, map(_flag, Config.model_fields))} (see --help)")
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
    groups["config"][0].add_argument(
        "--print-config", action="store_true", help="show every option with its value and where it is from, and end"
    )
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
        raise ConfigError(f"unknown {what} {prefix}{name}{did_you_mean(name, known, prefix)} (see --help)")


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
