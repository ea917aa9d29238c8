"""A file of --config beside the flags of jobs that use argparse."""

import re
import runpy
import tomllib
from argparse import ArgumentParser, Namespace
from pathlib import Path

import pytest
from cluster import ROOT

from pipeline import argument_file


def parser_of(job: str) -> ArgumentParser:
    made = runpy.run_path(str(ROOT / "jobs" / f"{job}.py"))["_parser"]()
    assert isinstance(made, ArgumentParser)
    return made


@pytest.fixture(scope="module")
def parser() -> ArgumentParser:
    return parser_of("evaluate_checkpoint")


def parsed(parser: ArgumentParser, file: Path, text: str, *flags: str) -> Namespace:
    file.write_text(text)
    return argument_file.parse(parser, ["--config", str(file), *flags])


def test_a_flag_wins_over_the_file_and_the_file_over_the_default(parser: ArgumentParser, tmp_path: Path) -> None:
    text = 'model = "demo"\nlimit = 7\nfraction = 1\nseed = -3\nignore_unmapped = true\njson = "a.json"\n'
    text += 'compare = ["a", "b"]\n'
    found = parsed(parser, tmp_path / "x.toml", text)
    assert (found.model, found.limit, found.fraction, found.seed) == ("demo", 7, 1.0, -3)
    assert (found.ignore_unmapped, found.json, found.compare) == (True, Path("a.json"), ["a", "b"])
    assert (found.preprocess, found.log_level, found.dataset) == ("all", "INFO", None)
    found = parsed(parser, tmp_path / "x.toml", text, "--limit=9", "--no-ignore-unmapped", "--seed", "0")
    assert (found.model, found.limit, found.ignore_unmapped, found.seed) == ("demo", 9, False, 0)


def test_without_a_file_it_is_what_argparse_says(parser: ArgumentParser) -> None:
    flags = ["--model", "demo", "--limit", "3"]
    assert argument_file.parse(parser, flags) == parser.parse_args(flags)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('modle = "demo"', "unknown key in FILE: modle; did you mean model? (see --help)"),
        ('config = "other.toml"', "unknown key in FILE: config (see --help)"),
        ("limit = true", "limit in FILE: expected a number, found True"),
        ('limit = "7"', "limit in FILE: expected a number, found '7'"),
        ("limit = 0", "FILE: argument --limit: expected a whole number, 1 or more, found '0'"),
        ("seed = 1.5", "FILE: argument --seed: invalid int value: '1.5'"),
        ("model = 3", "model in FILE: expected a text, found 3"),
        ('precision = "fp16"', "FILE: argument --precision: invalid choice: 'fp16'"),
        ('ignore_unmapped = "yes"', "ignore_unmapped in FILE: expected true or false, found 'yes'"),
        ('compare = ["a"]', "compare in FILE: expected a list of 2 texts, found ['a']"),
        ("model = ", "expected a readable TOML file for --config, found FILE: "),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(
    parser: ArgumentParser, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    file = tmp_path / "x.toml"
    with pytest.raises(SystemExit) as stopped:
        parsed(parser, file, text)
    assert stopped.value.code == 2
    assert message.replace("FILE", str(file)) in capsys.readouterr().err.splitlines()[-1]


def test_a_file_that_is_not_there_is_one_line(parser: ArgumentParser, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        argument_file.parse(parser, ["--config", "/nowhere/x.toml"])
    assert "expected a readable TOML file for --config, found /nowhere/x.toml" in capsys.readouterr().err


def test_what_print_config_prints_says_where_values_are_from_and_asks_for_the_same(
    parser: ArgumentParser, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, flags = tmp_path / "x.toml", ["--limit", "9", "--json", "a ü.json"]
    text = 'model = "demo"\ncompare = ["a#b", "c"]\nlimit = 7\n'
    with pytest.raises(SystemExit) as stopped:
        parsed(parser, file, text, *flags, "--print-config")
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert f'model = "demo"  # model in {file}\n' in printed
    assert "limit = 9  # --limit\n" in printed
    assert 'preprocess = "all"  # default\n' in printed
    assert "# revision: unset\n" in printed
    assert not {"config", "print_config"} & tomllib.loads(printed).keys()
    wanted = vars(parsed(parser, file, text, *flags))
    (tmp_path / "y.toml").write_text(printed)
    assert vars(argument_file.parse(parser, ["--config", str(tmp_path / "y.toml")])) | {"config": file} == wanted


@pytest.mark.parametrize("job", ["build_index", "compact_labels", "verify_labels"])
def test_what_is_required_may_stand_in_the_file_and_is_asked_for_where_it_stands_nowhere(
    job: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser, file = parser_of(job), tmp_path / "x.toml"
    assert "--output URL" in parser.format_usage()
    for _ in range(2):
        assert (
            parsed(parser, file, 'input = "a"\noutput = "b"\n' if job == "build_index" else 'output = "b"').output
            == "b"
        )
        with pytest.raises(SystemExit) as stopped:
            parsed(parser, file, 'space = "demo-9cdf48b3"\n')
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert re.search(r"error: the following arguments are required: (--input, )?--output\n$", error)
        assert "[--output URL]" not in error


def test_a_switch_is_true_or_false(tmp_path: Path) -> None:
    parser, file = parser_of("verify_labels"), tmp_path / "x.toml"
    for text, is_on in (("true", True), ("false", False)):
        found = parsed(parser, file, f'output = "b"\nno_listing = {text}\n')
        assert (found.no_listing, found.no_checksums) == (is_on, False)
    assert parsed(parser, file, 'output = "b"\nno_listing = false\n', "--no-listing").no_listing is True
