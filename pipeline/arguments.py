"""Arguments that several jobs take: numbers that are checked where they are read, and how much a job says.

A module of its own because jobs do not import each other. `label_bucket.py` has its flags from `config`.
"""

import argparse


def count(text: str) -> int:
    """A whole number, 0 or more; argparse says what it found instead."""
    return _whole(text, least=0)


def positive(text: str) -> int:
    """A whole number, 1 or more; argparse says what it found instead."""
    return _whole(text, least=1)


def _whole(text: str, *, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected a whole number, {least} or more, found {text!r}")
    return int(text)


def add_log_level(parser: argparse.ArgumentParser) -> None:
    """`--log-level`."""
    parser.add_argument(
        "--log-level",
        choices=("DEBUG", "INFO", "WARNING", "ERROR"),
        default="INFO",
        help="least severe messages shown; default INFO",
    )
