"""A parser, a command line and a TOML file -> one value per option; the same as text.

A module of its own because jobs other than `label_bucket.py` have their options in an argparse parser, not in `config`:
here a file's values go through the very checks that flags go through.
"""

import argparse
import json
import textwrap
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.config import did_you_mean

_UNSET = object()


def add_config(parser: argparse.ArgumentParser) -> None:
    """`--config` and `--print-config`."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="a TOML file with any of these, underscores for -")
    parser.add_argument(
        "--print-config", action="store_true", help="show every option with its value and where it is from, and end"
    )


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The value of every option: a flag wins over the file of --config, the file over the default.

    `parser` has the options of `add_config`. None for `arguments` is the process's own. SystemExit with code 2, after
    one line, for an unknown key, a wrong value, an unreadable file or a required option that neither has; with code 0
    after --help and --print-config.
    """
    parser.usage = parser.format_usage().removeprefix("usage: ")  # which says what is required, as it is now
    required = [each for each in _options(parser).values() if each.required]
    for option in required:
        option.required = False  # of either alone
    try:
        flags = _given(parser, arguments)
        path: Path | None = flags.get("config")
        keys = {} if path is None else _read(parser, path)
    finally:
        for option in required:
            option.required = True
    if flags.get("print_config"):
        print(_as_toml(parser, keys, flags), end="")
        raise SystemExit(0)
    missing = [each.option_strings[0] for each in required if each.dest not in keys | flags]
    if missing:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    return argparse.Namespace(**{name: parser.get_default(name) for name in _options(parser)} | keys | flags)


def _options(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    # argparse has no public list of them; tools that complete or document flags read this one.
    return {each.dest: each for each in parser._actions if each.dest != "help"}


def _given(parser: argparse.ArgumentParser, words: Sequence[str] | None) -> dict[str, Any]:
    """The options that are given, without defaults."""
    found = parser.parse_args(words, argparse.Namespace(**dict.fromkeys(_options(parser), _UNSET)))
    return {name: value for name, value in vars(found).items() if value is not _UNSET}


def _read(parser: argparse.ArgumentParser, path: Path) -> dict[str, Any]:
    try:
        keys = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        parser.error(f"expected a readable TOML file for --config, found {path}: {error}")
    known = {name: each for name, each in _options(parser).items() if name not in ("config", "print_config")}
    words: list[str] = []
    for name, value in keys.items():
        if name not in known:
            parser.error(f"unknown key in {path}: {name}{did_you_mean(name, known)} (see --help)")
        is_right, expected = _has_type(known[name], value)
        if not is_right:
            parser.error(f"{name} in {path}: expected {expected}, found {value!r}")
        words += _as_words(known[name], value)
    parser.exit_on_error = False
    try:
        return _given(parser, words)
    except argparse.ArgumentError as error:
        parser.error(f"{path}: {error}")
    finally:
        parser.exit_on_error = True


def _has_type(option: argparse.Action, value: Any) -> tuple[bool, str]:
    """Whether a value of TOML is of the kind that an option takes, and which kind that is."""
    if option.nargs == 0:
        return isinstance(value, bool), "true or false"
    if isinstance(option.nargs, int):
        are_texts = isinstance(value, list) and all(isinstance(each, str) for each in value)
        return are_texts and len(value) == option.nargs, f"a list of {option.nargs} texts"
    if option.type in (None, Path):
        return isinstance(value, str), "a text"
    return isinstance(value, int | float) and not isinstance(value, bool), "a number"


def _as_words(option: argparse.Action, value: Any) -> list[str]:
    flag, *opposite = option.option_strings
    if isinstance(value, bool):
        return [flag] if value else opposite  # of which a plain switch, which is off by itself, has none
    return [flag, *value] if isinstance(value, list) else [f"{flag}={value}"]


def _as_toml(parser: argparse.ArgumentParser, keys: Mapping[str, Any], flags: Mapping[str, Any]) -> str:
    """A file for --config that asks for the same: every option with its meaning and where its value comes from."""
    lines: list[str] = []
    for name, option in _options(parser).items():
        if name in ("config", "print_config"):
            continue
        if name in flags:
            value, origin = flags[name], option.option_strings[0]
        elif name in keys:
            value, origin = keys[name], f"{name} in {flags['config']}"
        else:
            value, origin = option.default, "default"
        lines += textwrap.wrap(option.help or "", 118, initial_indent="# ", subsequent_indent="# ")
        # JSON's texts, numbers, booleans and lists of texts are TOML's.
        text = json.dumps(value, ensure_ascii=False, default=str)
        lines += [f"# {name}: unset" if value is None else f"{name} = {text}  # {origin}", ""]
    return "\n".join(lines)
