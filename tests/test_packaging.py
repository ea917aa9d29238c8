"""Rules as tests: what installs, what starts, what imports what, and that README and CONTRIBUTING are true of it."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pyarrow as pa
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from pipeline import schema
from pipeline.config import Config
from pipeline.errors import FailureKind
from pipeline.options import load_config

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / ".github" / "CONTRIBUTING.md").read_text()
LOCK = (ROOT / "requirements.lock").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DEPENDENCIES = [
    requirement
    for line in [
        *PROJECT["dependencies"],
        *(line for lines in PROJECT["optional-dependencies"].values() for line in lines),
    ]
    if (requirement := Requirement(line)).name != PROJECT["name"]
]
SCRIPTS = [*sorted((ROOT / "infra").glob("*.sh")), ROOT / ".ci" / "run", *sorted((ROOT / "jobs").glob("*.py"))]

ORDER = (
    *(
        "errors",
        "faults",
        "meter",
        "memory",
        "tasks",
        "arguments",
        "columns",
        "schema",
        "store",
        "cache",
        "store_s3_get",
        "store_s3",
        "store_local",
        "store_fsspec",
        "store_cloud",
        "range_file",
        "members",
        "store_container",
        "manifest",
        "store_manifest",
        "storage",
        "checkpoint",
        "config",
        "options",
        "argument_file",
        "log",
    ),
    *(
        "catalog",
        "listing",
        "diff",
        "survey",
        "plan",
        "fetch",
        "decode",
        "preprocess",
        "image_stats",
        "picture",
        "contain",
        "prepare",
        "canary",
        "encoder",
        "model",
        "predictor",
        "label",
    ),
    *("parts", "outcomes", "files", "drift", "publish"),
    *("view", "changes", "snapshot", "sheet", "capability"),
    *(
        "engine",
        "actor_log",
        "dataset",
        "progress",
        "telemetry",
        "charts",
        "samples",
        "report",
        "request",
        "planning",
        "predict",
    ),
    *("heartbeat", "run", "past_runs"),
    *("run_model", "verify_files", "verify_catalog", "verify_sample", "verify", "retention", "compact"),
    *("truth", "label_map", "metrics", "predictions", "answers", "evaluate", "pairs", "compare", "tables"),
    *("export_lance", "export"),
    *("index_files", "index_vectors", "index_log", "index"),
    *("index_recall", "index_encode", "index_cluster", "index_build", "index_update"),
    *("query", "search", "leaders", "duplicate_files", "duplicates"),
    *("shapes", "draw"),
)
"""Modules of the pipeline in the order of the data: each imports only from modules before it."""
DRAWING = {"shapes", "draw"}
"""The pictures that tests and the quickstart use; no part of the pipeline knows of them."""

MAX_LINES = 450


@cache
def imports(path: Path, *, module_level_only: bool = False) -> frozenset[str]:
    """Every module that a file names in an import; `from pipeline import x` counts as `pipeline.x`."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in _runtime_nodes(tree) if module_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def _runtime_nodes(tree: ast.Module) -> Iterator[ast.AST]:
    """What runs when the module is imported: nothing within functions or under TYPE_CHECKING."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        is_typing = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if not is_typing and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)


def importers(*names: str, module_level_only: bool = False) -> set[str]:
    """Files below pipeline/ and jobs/ that import one of the modules, or something within it."""
    return {
        path.relative_to(ROOT).as_posix()
        for folder in ("pipeline", "jobs")
        for path in sorted((ROOT / folder).glob("*.py"))
        for found in imports(path, module_level_only=module_level_only)
        if any(f"{found}.".startswith(f"{name}.") for name in names)
    }


# --- what installs ------------------------------------------------------------------------------------------------


def pins(python_version: str) -> dict[str, str]:
    """Name -> version of what the lock installs on Linux with a Python version (major.minor)."""
    environment = {"python_version": python_version, "python_full_version": f"{python_version}.0"}
    found: dict[str, str] = {}
    for line in re.findall(r"^[a-z0-9].*==.*", LOCK, re.MULTILINE):
        requirement = Requirement(line.removesuffix("\\"))
        if requirement.marker is None or requirement.marker.evaluate({**environment, "sys_platform": "linux"}):
            assert requirement.name not in found
            found[requirement.name] = str(requirement.specifier).removeprefix("==")
    return found


@pytest.mark.parametrize("python_version", ["3.11", "3.12", "3.13", "3.14"])
def test_lock_pins_every_dependency_but_torch_for_every_python(python_version: str) -> None:
    assert f"{python_version}.0" in SpecifierSet(PROJECT["requires-python"])
    pinned = pins(python_version)
    for requirement in DEPENDENCIES:
        if requirement.name != "torch":
            assert pinned[canonicalize_name(requirement.name)] in requirement.specifier


def test_every_pin_of_the_lock_has_hashes_and_none_names_a_place() -> None:
    blocks = re.split(r"^(?=[a-z0-9])", LOCK, flags=re.MULTILINE)[1:]
    assert len(blocks) > 100
    assert [block.splitlines()[0] for block in blocks if not re.search(r"--hash=sha256:[0-9a-f]{64}", block)] == []
    assert re.findall(r"://|--index|--extra-index|--find-links|^/", LOCK, re.MULTILINE) == []


def test_lock_has_no_package_that_depends_on_the_build_of_torch() -> None:
    assert re.findall(r"^(?:torch|triton|nvidia|cuda)\b.*", LOCK, re.MULTILINE) == []


# --- what starts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_can_be_started_by_its_path(script: Path) -> None:
    assert os.access(script, os.X_OK)
    assert script.read_text().startswith(
        ("#!/usr/bin/env bash\n", "#!/usr/bin/env python\n", "#!/usr/bin/env python3\n")
    )


@pytest.mark.parametrize("script", [each for each in SCRIPTS if each.suffix != ".py"], ids=lambda path: path.name)
def test_shell_script_stops_at_the_first_error(script: Path) -> None:
    assert "\nset -euo pipefail\n" in script.read_text()
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize("version", ["3.10.14", "3.15.0", "2.7.18"])
def test_install_refuses_a_python_it_cannot_use(version: str, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho {version}\n")
    python.chmod(0o755)
    ended = subprocess.run(
        ["bash", "infra/install.sh"],
        env={**os.environ, "PYTHON": str(python)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 1
    assert ended.stderr == (
        f"install: expected Python 3.11 to 3.14 as '{python}', found {version}; set PYTHON=/path/to/python3.11\n"
    )


# --- what imports what --------------------------------------------------------------------------------------------


def test_every_module_of_the_pipeline_has_its_place_in_the_order() -> None:
    assert sorted(ORDER) == sorted(path.stem for path in (ROOT / "pipeline").glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("name", ORDER)
def test_module_imports_only_from_modules_before_it(name: str) -> None:
    imported = {found.split(".")[1] for found in imports(ROOT / "pipeline" / f"{name}.py") if found[:9] == "pipeline."}
    before = set(ORDER[: ORDER.index(name)])
    assert imported <= (before & DRAWING if name in DRAWING else before - DRAWING)


def test_only_the_modules_that_choose_and_read_stores_know_fsspec() -> None:
    names = ("storage", "store_s3", "store_s3_get", "store_local", "store_fsspec", "store_cloud")
    allowed = {
        *(f"pipeline/{name}.py" for name in names),
        "pipeline/config.py",
        "pipeline/listing.py",
        "jobs/draw_images.py",
    }
    assert importers("fsspec", "s3fs", "botocore") <= allowed


def test_only_pipelines_and_what_silences_it_import_ray_data() -> None:
    pipelines = {f"pipeline/{name}.py" for name in ("dataset", "compact", "answers", "index_cluster")}
    assert importers("ray.data") <= {*pipelines, "pipeline/engine.py"}


def test_only_retention_decides_what_is_deleted_and_only_compact_deletes_it() -> None:
    calls = {path.stem for path in (ROOT / "pipeline").glob("*.py") if ".delete(" in path.read_text()}
    assert calls == {"compact"}
    assert importers("pipeline.retention") == {"pipeline/compact.py"}


def test_only_what_computes_the_model_and_its_training_import_torch() -> None:
    trains = {"jobs/train_demo.py"}
    computes = {f"pipeline/{name}.py" for name in ("encoder", "model", "predictor")}
    assert importers("torch", "transformers") <= computes | trains | {"pipeline/preprocess.py"}
    assert importers("torch", "transformers", module_level_only=True) <= computes | trains
    assert importers("pipeline.model", module_level_only=True) <= {"pipeline/predictor.py", *trains}
    assert importers("pipeline.predictor", module_level_only=True) == set()


def test_neither_driver_nor_cpu_workers_load_torch() -> None:
    code = "import sys, pipeline.run; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"


@pytest.mark.parametrize("path", sorted((ROOT / "pipeline").glob("*.py")), ids=lambda path: path.name)
def test_module_can_be_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES


# --- what the README says -----------------------------------------------------------------------------------------


def section(title: str, page: str = README) -> str:
    """The text below this title, up to the next one."""
    found = re.search(rf"^(##+) {re.escape(title)}\n(.*?)(?=^##|\Z)", page, re.MULTILINE | re.DOTALL)
    assert found, title
    return found[2]


def prose(page: str) -> str:
    """Markdown without its blocks of code, in which a # is no title."""
    return re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)


def anchors(page: str) -> set[str]:
    """What a link to a title of this page may end with, by the rules of the pages of GitHub."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def columns(text: str) -> dict[str, str]:
    """Name -> type of a Markdown table whose first two columns they are, the first as `code`."""
    return dict(re.findall(r"^\| `([a-z0-9_]+)` \| ([^|]+?) \|", text, re.MULTILINE))


@pytest.mark.parametrize(
    ("title", "wanted"),
    [("labels/", schema.labels(64)), ("failures/", schema.FAILURES), ("deletions/", schema.DELETIONS)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_readme_lists_the_columns_of_every_published_folder(title: str, wanted: pa.Schema) -> None:
    types = {field.name: f"{field.type}{'' if field.nullable else ', never null'}" for field in wanted}
    types["embedding"] = "fixed_size_list<element: float not null>[D], never null"
    assert columns(section(title)) == {name: types[name].replace("item: ", "") for name in wanted.names}


def test_readme_explains_every_flag() -> None:
    flags = {"--" + name.replace("_", "-") for name in Config.model_fields}
    assert set(re.findall(r"^\| `(--[a-z-]+)", section("Options"), re.MULTILINE)) == flags


def test_readme_explains_every_flag_of_verification() -> None:
    help_text = subprocess.run(
        [sys.executable, "jobs/verify_labels.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    flags = set(re.findall(r"^  (--[a-z-]+)", help_text, re.MULTILINE)) - {"--log-level", "--config", "--print-config"}
    assert set(re.findall(r"^\| `(--[a-z-]+)", section("Verify"), re.MULTILINE)) == flags


def test_readme_explains_every_kind_of_failure() -> None:
    assert set(columns(section("Kinds of failure"))) == {str(kind) for kind in FailureKind}


def test_contributing_says_what_every_file_of_the_code_is_for() -> None:
    files = [each for folder in ("jobs", "pipeline", "infra") for each in (ROOT / folder).glob("*.*")]
    expected = {path.name for path in files if path.suffix in (".py", ".sh") and path.stem != "__init__"}
    assert set(re.findall(r"^  (\w+\.\w+) ", section("Map of the code", CONTRIBUTING), re.MULTILINE)) == expected


def test_the_map_of_the_code_has_the_modules_in_their_order() -> None:
    listed = re.findall(
        r"^  (\w+)\.py ", section("Map of the code", CONTRIBUTING).partition("\npipeline/")[2], re.MULTILINE
    )
    assert tuple(listed) == ORDER


def test_readme_gives_a_reason_for_every_dependency() -> None:
    decisions = section("Decisions")
    unexplained = {each.name for each in DEPENDENCIES if not re.search(rf"`{re.escape(each.name)}\b", decisions)}
    assert unexplained == set()


def test_readme_names_the_exit_codes_that_help_names() -> None:
    help_text = subprocess.run(
        [sys.executable, "jobs/label_bucket.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    codes = re.findall(r"^ +(\d+)  \w", help_text, re.MULTILINE)
    assert len(codes) == 6
    assert set(codes) | {"1"} == set(re.findall(r"^\| (\d+) \|", section("Exit codes"), re.MULTILINE))


@pytest.mark.parametrize("page", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_page_names_files_that_exist(page: str) -> None:
    named = re.findall(r"(?<![\w/])((?:infra|jobs|tests|pipeline)/[\w/]+\.\w+)", page)
    assert {"infra/test.sh"} <= set(named)
    assert {each for each in named if not (ROOT / each).is_file()} == set()


def test_readme_begins_with_the_two_commands() -> None:
    assert re.findall(r"^(bash \S+)", section("Two commands"), re.MULTILINE) == [
        "bash infra/quickstart.sh",
        "bash infra/test.sh",
    ]


@pytest.mark.parametrize("path", [ROOT / "README.md", ROOT / ".github" / "CONTRIBUTING.md"], ids=lambda path: path.stem)
def test_links_of_page_lead_to_titles_and_files_that_exist(path: Path) -> None:
    page = path.read_text()
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)) if "://" not in link]
    assert links
    for link in links:
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target.read_text()), link


def test_titles_of_readme_have_anchors_of_their_own() -> None:
    assert len(anchors(README)) == len(re.findall(r"^#+ ", prose(README), re.MULTILINE))


def test_picture_of_readme_is_small_enough_for_its_front_page() -> None:
    pictures = re.findall(r"!\[.{40,}?\]\((\S+)\)", README)
    assert [(ROOT / each).stat().st_size < 400_000 for each in pictures] == [True]


def test_tables_for_athena_have_the_columns_of_every_published_folder() -> None:
    statements = re.findall(
        r"CREATE EXTERNAL TABLE (\w+) \(\n(.*?)\n\)\n(.*?);$", section("Athena"), re.MULTILINE | re.DOTALL
    )
    labels = schema.labels(64)
    wanted = {"labels": labels, "snapshots": labels, "failures": schema.FAILURES, "deletions": schema.DELETIONS}
    assert [name for name, _, _ in statements] == list(wanted)
    for name, columns_text, rest in statements:
        assert columns_text.replace(",", " ").split() == [
            word for field in wanted[name] for word in (field.name, athena_type(field.type))
        ]
        assert f"LOCATION 's3://shop-labels/{name}/'" in rest
    (partitions,) = re.findall(r"PARTITIONED BY \((.*)\)", statements[0][2])
    assert re.findall(r"(\w+) string", partitions) == re.findall(
        r"/(\w+)=", section("What you get").partition("\n  failures")[0]
    )
    assert set(re.findall(r"'projection\.(\w+)\.type'", statements[0][2])) == {"space", "run_date"}


def athena_type(kind: pa.DataType) -> str:
    """What Athena, with Hive's names of types, calls a type of a Parquet column."""
    if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        return f"array<{athena_type(kind.value_type)}>"
    if pa.types.is_timestamp(kind):
        return "timestamp"
    return {"int32": "int", "int64": "bigint", "float": "float", "string": "string", "bool": "boolean"}[str(kind)]


def test_steps_of_readme_put_names_of_ones_own_wherever_they_are_needed(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "infra", tmp_path / "infra")
    steps = section("Run it on your cluster")
    lines = re.findall(r"^(?:PHOTOS=|IMAGE=|sed -i ).*$", steps, re.MULTILINE)
    assert len(lines) == 5
    # Only the lines that edit files: what they talk to is not here.
    subprocess.run(["bash", "-euc", "\n".join(lines)], cwd=tmp_path, check=True)
    (dry_run,) = re.findall(r"^job=\$\((sed .*) \| kubectl", steps, re.MULTILINE)
    one_off = subprocess.run(["bash", "-euc", dry_run], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    edited = "".join(
        path.read_text() for folder in ("iam", "kubernetes") for path in sorted((tmp_path / "infra" / folder).iterdir())
    )
    assert re.findall(r"shop|123456789012|label-bucket:cuda", edited) == []
    policy = json.loads((tmp_path / "infra" / "iam" / "job.json").read_text())
    (resource,) = [each["Resource"] for each in policy["Statement"] if each["Sid"] == "ReadPhotos"]
    assert resource == "arn:aws:s3:::my-photos/catalogue/*"
    common = yaml.safe_load_all((tmp_path / "infra" / "kubernetes" / "common.yaml").read_text())
    (toml,) = [each["data"]["nightly.toml"] for each in common if each["kind"] == "ConfigMap"]
    (tmp_path / "nightly.toml").write_text(toml)
    command = yaml.safe_load(one_off)["spec"]["entrypoint"].split()
    config = load_config(["--config", str(tmp_path / "nightly.toml"), *command[3:]], {})
    assert (config.input, config.output, config.dry_run) == ("s3://my-photos/catalogue", "s3://my-labels", True)
