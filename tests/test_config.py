"""What a command, an environment and a file become, and how each is refused."""

import json
import pickle
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.config import OTHER_VARIABLES, Config
from pipeline.errors import ConfigError
from pipeline.options import load_config

PLACES = ("--input", "s3://shop/photos", "--output", "s3://shop-labels")


def load(*flags: str, environ: Mapping[str, str] | None = None) -> Config:
    return load_config([*PLACES, *flags], environ or {})


def refusal(argv: Sequence[str], environ: Mapping[str, str] | None = None) -> str:
    """The one line with which the command is refused."""
    with pytest.raises(ConfigError) as caught:
        load_config(argv, environ or {})
    line = str(caught.value)
    assert caught.value.exit_code == 2
    assert "\n" not in line
    assert caught.value.__suppress_context__ or caught.value.__context__ is None, "a traceback would show two errors"
    return line


@pytest.fixture
def toml(tmp_path: Path) -> Any:
    def write(text: str) -> str:
        path = tmp_path / "nightly.toml"
        path.write_text(text)
        return str(path)

    return write


@pytest.mark.parametrize(
    ("name", "default", "in_file", "in_environ", "as_flag", "expected"),
    [
        ("top_k", 5, "7", "8", ["--top-k", "9"], (7, 8, 9)),
        ("precision", "auto", '"fp32"', "bf16", ["--precision", "auto"], ("fp32", "bf16", "auto")),
        (
            "run_date",
            None,
            "2026-11-20",
            "2026-11-21",
            ["--run-date=2026-11-22"],
            (date(2026, 11, 20), date(2026, 11, 21), date(2026, 11, 22)),
        ),
        ("dry_run", False, "true", "false", ["--dry-run"], (True, False, True)),
        ("abandon_run", False, "false", "true", ["--no-abandon-run"], (False, True, False)),
        ("max_failed_fraction", 0.05, "0.1", "0.2", ["--max-failed-fraction", "0.3"], (0.1, 0.2, 0.3)),
        ("include", (), '["a/**"]', "b/**", ["--include", "c/**"], (("a/**",), ("b/**",), ("c/**",))),
    ],
)
def test_flag_wins_over_environment_over_file_over_default(
    toml: Any, name: str, default: Any, in_file: str, in_environ: str, as_flag: list[str], expected: tuple[Any, ...]
) -> None:
    file = ["--config", toml(f"{name} = {in_file}\n")]
    environ = {f"LABEL_BUCKET_{name.upper()}": in_environ}
    found = [
        getattr(config, name)
        for config in (load(), load(*file), load(*file, environ=environ), load(*file, *as_flag, environ=environ))
    ]
    assert found == [default, *expected]


def test_file_and_environment_can_give_everything(toml: Any) -> None:
    path = toml('input = "s3://shop/photos"\noutput = "s3://shop-labels"\nmodel = "demo"\n')
    config = load_config([], {"LABEL_BUCKET_CONFIG": path, "LABEL_BUCKET_LIMIT": "10"})
    assert (config.input, config.model, config.limit, config.config) == ("s3://shop/photos", "demo", 10, Path(path))


def test_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LABEL_BUCKET_TOP_K", "3")
    assert load_config(PLACES).top_k == 3
    assert Config(input="s3://shop/photos", output="s3://shop-labels").top_k == 5


def test_empty_variable_counts_as_unset() -> None:
    assert load(environ={"LABEL_BUCKET_LIMIT": "", "LABEL_BUCKET_INCLUDE": ""}) == load()


@pytest.mark.parametrize(
    ("flag", "suggestion"),
    [
        ("--top_k=3", "--top-k"),
        ("--topk", "--top-k"),
        ("--max-fail-fraction", "--max-failed-fraction"),
        ("--inptu", "--input"),
        ("-dry-run", "--dry-run"),
        ("---dry-run", "--dry-run"),
        ("--no-limit", "--limit"),
    ],
)
def test_unknown_flag_is_one_line_with_a_suggestion(flag: str, suggestion: str) -> None:
    line = refusal([*PLACES, flag])
    assert f"unknown flag {flag.partition('=')[0]}; did you mean {suggestion}?" in line


def test_abbreviated_flag_is_unknown() -> None:
    assert "unknown flag --lim; did you mean --limit?" in refusal([*PLACES, "--lim", "3"])


def test_flag_unlike_any_other_gets_no_suggestion() -> None:
    line = refusal([*PLACES, "--zzz"])
    assert "unknown flag --zzz" in line
    assert "did you mean" not in line


def test_word_that_is_no_flag_is_named() -> None:
    assert "'b.jpg'" in refusal([*PLACES, "--include", "a.jpg", "b.jpg"])


def test_flag_without_its_value_is_named() -> None:
    assert "--top-k" in refusal([*PLACES, "--top-k"])


@pytest.mark.parametrize(("key", "suggestion"), [("top-k", "top_k"), ("exclud", "exclude"), ("config", "")])
def test_unknown_key_is_one_line_with_file_and_suggestion(toml: Any, key: str, suggestion: str) -> None:
    path = toml(f'{key} = "3"\n')
    line = refusal([*PLACES, "--config", path])
    assert f"{path}: {key}" in line
    assert (f"did you mean {suggestion}?" in line) == bool(suggestion)


def test_unknown_variable_is_one_line_with_a_suggestion() -> None:
    line = refusal(PLACES, {"LABEL_BUCKET_TOPK": "3"})
    assert "unknown environment variable LABEL_BUCKET_TOPK; did you mean LABEL_BUCKET_TOP_K?" in line
    assert "did you mean" not in refusal(PLACES, {"LABEL_BUCKET_ZZZ": "3"})


def test_variables_of_tests_and_cache_are_known() -> None:
    assert load(environ=dict.fromkeys(OTHER_VARIABLES, "x")) == load()
    assert "LABEL_BUCKET_CACHE" in OTHER_VARIABLES


def test_variables_of_a_kubernetes_service_named_label_bucket_are_ignored() -> None:
    names = ["SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_GCS", "PORT", "PORT_6379_TCP", "HEAD_SVC_PORT_6379_TCP_ADDR"]
    assert load(environ={f"LABEL_BUCKET_{name}": "tcp://10.0.0.1:6379" for name in names}) == load()


def test_globs_come_from_all_three_sources(toml: Any) -> None:
    expected = ("*.jpg", "a/**")
    assert load("--include", "*.jpg", "--include", "a/**").include == expected
    assert load(environ={"LABEL_BUCKET_INCLUDE": "*.jpg, a/**"}).include == expected
    assert load(environ={"LABEL_BUCKET_INCLUDE": '["*.jpg", "a/**"]'}).include == expected
    assert load("--config", toml('include = ["*.jpg", "a/**"]\n')).include == expected


@pytest.mark.parametrize("glob", ["a,b.jpg", "[ab].jpg", '"x".jpg', "{a,b}/*", "null", "[0-9]", "ä 🙂/**", "123"])
def test_glob_of_a_flag_or_a_json_list_keeps_its_characters(glob: str) -> None:
    assert load("--include", glob, "--exclude", glob).exclude == (glob,)
    assert load(environ={"LABEL_BUCKET_INCLUDE": json.dumps([glob])}).include == (glob,)
    if "," not in glob:
        assert load(environ={"LABEL_BUCKET_INCLUDE": glob}).include == (glob,)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--top-k", "0"], "--top-k: expected greater than or equal to 1, found '0'"),
        (["--top-k", "1001"], "--top-k: expected less than or equal to 1000, found '1001'"),
        (["--top-k", "many"], "--top-k: expected a valid integer"),
        (["--limit", "0"], "--limit: expected greater than 0, found '0'"),
        (["--limit", "-3"], "--limit: expected greater than 0, found '-3'"),
        (["--batch-size", "0"], "--batch-size"),
        (["--gpu-actors", "0"], "--gpu-actors"),
        (["--max-failed-fraction", "1.5"], "--max-failed-fraction: expected less than or equal to 1, found '1.5'"),
        (["--max-failed-fraction", "nan"], "--max-failed-fraction"),
        (["--object-deadline-s", "inf"], "--object-deadline-s: expected a finite number, found 'inf'"),
        (["--max-image-bytes", "0"], "--max-image-bytes"),
        (["--max-image-px", "1e3x"], "--max-image-px"),
        (["--precision", "fp16"], "--precision: expected 'auto', 'fp32' or 'bf16', found 'fp16'"),
        (["--device", "gpu"], "--device: expected 'auto', 'cpu' or 'cuda', found 'gpu'"),
        (["--embedding", "mean"], "--embedding: expected 'pooled', 'cls'"),
        (["--preprocess", "quick"], "--preprocess: expected 'checkpoint', 'paper' or 'fast', found 'quick'"),
        (["--log-level", "LOUD"], "--log-level"),
        (["--run-date", "22.11.2026"], "--run-date: expected a date as YYYY-MM-DD, found '22.11.2026'"),
        (["--run-date", "1764000000"], "--run-date: expected a date as YYYY-MM-DD"),
        (["--run-date", "2026-02-30"], "--run-date"),
        (["--include", ""], "--include: expected globs such as '*.jpg', found an empty one in ['']"),
        (["--exclude", "*.tmp", "--exclude", " "], "--exclude: expected globs"),
        (["--model", ""], "--model: expected a hub id"),
        (["--model", "foo://x"], "--model: expected a folder, s3:// or another protocol of fsspec, found foo://"),
        (["--revision", ""], "--revision"),
        (["--config", "/no/such.toml"], "found none at /no/such.toml"),
    ],
)
def test_bad_value_is_one_line_that_names_the_flag_and_the_value(flags: list[str], expected: str) -> None:
    assert expected in refusal([*PLACES, *flags])


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("", "expected a folder or a URL, found ''"),
        ("s33://shop/photos", "found s33://; did you mean s3://?"),
        ("S3://shop/photos", "found S3://"),
        ("s3:/shop/photos", "expected s3://shop/photos, found 's3:/shop/photos'"),
        ("s3://", "without a bucket"),
        ("simplecache::s3://shop/photos", "found the chain"),
        ("https://shop.example/photos?signature=hunter2", "found one with a query"),
        ("s3://key:hunter2@shop/photos", "without credentials"),
        ("s3://AKIA:hunter2/cd+ef@shop/photos", "without credentials"),
        ("https://me:hunter2/2@shop/photos", "without credentials"),
        ("s3://AKIA:hunter2", "without credentials"),
        ("s3a://AKIA:1/hunter2@shop/photos", "without credentials"),
        ("simplecache::ftp://me:hunter2@shop/photos", "without credentials"),
        ("https://token@shop/photos", "without credentials"),
        ("dvc://shop/photos", "needs a package that is not installed"),
        ("~nobody-here/photos", "expected a user of this machine after the ~, found '~nobody-here/photos'"),
        ("a\0b", "expected a folder or a URL, found 'a\\x00b'"),
    ],
)
def test_bad_url_is_one_line_without_a_secret(location: str, expected: str) -> None:
    as_input = refusal(["--input", location, "--output", "labels"])
    as_output = refusal(["--input", "photos", "--output", location])
    assert as_input.startswith("--input: ")
    assert as_output.startswith("--output: ")
    for line in (as_input, as_output):
        assert expected in line
        assert "hunter2" not in line


def test_bad_value_names_the_variable_or_the_file_it_came_from(toml: Any) -> None:
    assert refusal(PLACES, {"LABEL_BUCKET_TOP_K": "0"}).startswith("LABEL_BUCKET_TOP_K: ")
    path = toml("top_k = 0\n")
    assert refusal([*PLACES, "--config", path]).startswith(f"top_k in {path}: ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("limit = true", "limit in"),
        ('include = "*.jpg"', "expected a list, found '*.jpg'"),
        ("include = [3]", "expected a valid string, found 3"),
        ("run_date = 20261122", "expected a date as YYYY-MM-DD, found 20261122"),
        ("run_date = 2026-11-22T00:00:00", "expected a date as YYYY-MM-DD"),
        ("top_k = ", "expected a readable TOML file"),
        ("[label]\ntop_k = 3", "unknown key"),
    ],
)
def test_bad_line_of_a_file_is_one_line(toml: Any, text: str, expected: str) -> None:
    assert expected in refusal([*PLACES, "--config", toml(text)])


def test_file_that_is_not_text_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "nightly.toml"
    path.write_bytes(b"\xff\xfe\x00")
    assert str(path) in refusal([*PLACES, "--config", str(path)])


def test_all_bad_values_are_named_at_once() -> None:
    line = refusal([*PLACES, "--top-k", "0", "--limit", "0"])
    assert "--top-k" in line
    assert "--limit" in line


def test_missing_places_are_named_with_every_way_to_give_them() -> None:
    line = refusal([])
    for way in ("--input", "LABEL_BUCKET_INPUT", "--output", "LABEL_BUCKET_OUTPUT"):
        assert way in line


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("s3://shop/photos", "s3://shop/photos"),
        ("s3://shop/photos/", "s3://shop/photos"),
        ("s3://shop/photos", "s3://shop/photos/labels"),
        ("s3://shop", "s3://shop/labels/"),
        ("s3://shop/photos", "s3a://shop/photos/labels"),
        ("photos", "./photos/"),
        ("photos", "photos/../photos/labels"),
        ("photos", "file://{cwd}/photos/labels"),
        ("photos", "link/labels"),
        ("link", "photos/labels"),
        ("/", "labels"),
    ],
)
def test_output_inside_the_input_is_refused_with_both_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, target: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    Path("link").symlink_to("photos")
    line = refusal(["--input", source, "--output", target.format(cwd=tmp_path)])
    assert "expected --output outside --input" in line
    assert line.count("--input ") == 1
    assert line.count("--output ") >= 2


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("s3://shop/photos", "s3://shop/photos-labels"),
        ("s3://shop/photos", "s3://shop"),
        ("s3://shop/photos", "https://shop/photos"),
        ("s3://shop/photos", "photos"),
        ("photos", "photos-labels"),
    ],
)
def test_output_beside_or_above_the_input_is_accepted(source: str, target: str) -> None:
    assert load_config(["--input", source, "--output", target], {}).output.endswith(target)


def test_loop_of_links_is_left_to_whoever_opens_it(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    assert load_config(["--input", str(loop), "--output", str(tmp_path / "labels")], {}).input == str(loop)


def test_places_are_stored_in_one_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tonight").mkdir()
    Path("current").symlink_to("tonight")
    config = load_config(["--input", "x/../current/", "--output", "s3://shop//labels/"], {})
    assert config.input == str(tmp_path / "current")
    assert config.output == "s3://shop//labels"


def test_the_printed_config_is_a_file_that_asks_for_the_same_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*PLACES, "--include", "*.jpg", "--include", "ä/**", "--run-date=2026-11-26", "--max-failed-fraction=0.5"]
    with pytest.raises(SystemExit) as ended:
        load_config([*flags, "--print-config"], {"LABEL_BUCKET_IMAGE_STATS": "true"})
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    (tmp_path / "same.toml").write_text(printed)
    same = load_config(["--config", str(tmp_path / "same.toml")], {})
    wanted = load_config(flags, {"LABEL_BUCKET_IMAGE_STATS": "true"})
    assert same.model_copy(update={"config": None}) == wanted
    for name in Config.model_fields.keys() - {"config"}:
        assert re.search(rf"^(# )?{name}(:| =)", printed, re.MULTILINE), name
    assert 'run_date = "2026-11-26"  # --run-date' in printed
    assert "image_stats = true  # LABEL_BUCKET_IMAGE_STATS" in printed
    assert "top_k = 5  # default" in printed
    with pytest.raises(ConfigError, match="--input is missing"):
        load_config(["--print-config"], {})


def test_help_is_grouped_and_names_every_flag_variable_and_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load_config(["--help"], {})
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for name, field in Config.model_fields.items():
        assert f"  --{name.replace('_', '-')}" in text
        assert field.description
        assert " ".join(field.description.split()) in " ".join(text.split())
    for name in OTHER_VARIABLES:
        assert name in text
    for code in (0, 2, 3, 4, 5, 143):
        assert f"{code:5}  " in text
    assert text.index("what to label:") < text.index("--input URL  ") < text.index("the model:")
    assert "facebook/deit-small-distilled-patch16-224" in text


def test_flags_of_the_interface_exist() -> None:
    names = (
        "input output model revision run-date limit include exclude top-k embedding preprocess precision device "
        "batch-size gpu-actors max-failed-fraction abandon-run dry-run config log-level"
    )
    assert {name.replace("-", "_") for name in names.split()} <= Config.model_fields.keys()


def test_config_is_frozen_and_survives_pickle_and_json() -> None:
    config = load("--run-date", "2026-11-22", "--include", "*.jpg")
    with pytest.raises(ValidationError, match="frozen"):
        config.top_k = 3
    assert pickle.loads(pickle.dumps(config)) == config
    assert Config.model_validate(config.model_dump(mode="json")) == config
    assert config.model_dump(mode="json")["run_date"] == "2026-11-22"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [([], "changed"), (["--retry-failed"], "failed"), (["--full"], "all"), (["--full", "--retry-failed"], "all")],
)
def test_what_is_labeled_again_follows_from_the_flags(flags: list[str], expected: str) -> None:
    assert load(*flags).relabel == expected


def test_reading_the_config_imports_neither_torch_nor_ray_nor_a_store() -> None:
    code = "import sys, pipeline.options; print({'torch', 'ray', 's3fs', 'transformers'} & sys.modules.keys())"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "set()"
