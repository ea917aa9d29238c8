"""What is wrong with a file of infra/: a check for each, which takes a path, also that of a copy broken on purpose."""

import contextlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
import tomllib
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import botocore.session
import botocore.validate
import jsonschema
import monitoring
import yaml
from cluster import ROOT
from manifests import (
    load,
    problems_of_compose_schema,
    problems_of_manifest,
    problems_of_rules_as_a_resource,
)
from moto.iam.exceptions import MalformedPolicyDocument
from moto.iam.policy_validation import IAMPolicyDocumentValidator
from packaging.specifiers import SpecifierSet
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.sdk import get_docker_host_mount_location

from pipeline import argument_file
from pipeline.errors import ConfigError
from pipeline.options import load_config

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
(RAY_VERSION,) = [
    match[1] for each in PROJECT["dependencies"] if (match := re.fullmatch(r"ray\[.*\]==(\d+\.\d+)\.\*", each))
]
_ACTIONS = {"s3:ListBucket", "s3:GetObject", "s3:PutObject", "s3:DeleteObject"}
_PLACES = {"input": "s3://a", "output": "s3://b"}


def files() -> list[str]:
    """All of infra/, named from there."""
    return sorted(path.relative_to(ROOT / "infra").as_posix() for path in (ROOT / "infra").rglob("*") if path.is_file())


def problems_of(path: Path) -> list[str]:
    """Of a file of infra/, or a copy of it in a folder of the same name, or of .ci/run; [] if all is right."""
    return list(check_of(path)(path))


def is_right(path: Path) -> bool:
    """Whether nothing is wrong with it; ends at the first problem."""
    return next(check_of(path)(path), None) is None


def check_of(path: Path) -> Callable[[Path], Iterator[str]]:
    """The check for a file, by its name. KeyError if there is none."""
    checks: Mapping[str, Callable[[Path], Iterator[str]]] = {
        "kubernetes/*.yaml": _of_kubernetes,
        "prometheus/podmonitor.yaml": _of_kubernetes,
        "prometheus/alerts.yaml": _of_alerts,
        "grafana/*.json": _of_dashboard,
        "iam/*.json": _of_policy,
        "docker/Dockerfile": _of_dockerfile,
        "config/*.toml": _of_config,
        "ray/cluster.yaml": _of_machines,
        "compose.yaml": _of_compose,
        "*.sh": _of_script,
        ".ci/run": _of_script,
    }
    for pattern, check in checks.items():
        if path.match(pattern):
            return check
    raise KeyError(path)


# --- Kubernetes, Prometheus, Grafana ------------------------------------------------------------------------------


def _of_kubernetes(path: Path) -> Iterator[str]:
    text = path.read_text()
    problem = None
    for problem in problems_of_manifest(text):
        yield problem
    for document in load(text) if problem is None else []:
        if document["kind"] == "ConfigMap":
            for name, content in document["data"].items():
                yield from _of_config_text(name, content)
        elif document["kind"] == "RayJob":
            yield from _of_ray_job(document["spec"])
        elif document["kind"] == "RayCronJob":
            yield from _of_ray_job(document["spec"]["jobTemplate"])
        elif document["kind"] == "PodDisruptionBudget" and not isinstance(document["spec"].get("minAvailable"), int):
            # https://kubernetes.io/docs/tasks/run-application/configure-pdb/, arbitrary workloads and selectors
            yield f"expected a number as minAvailable, all that an operator's pods can have, found {document['spec']}"


def _of_ray_job(job: Mapping[str, Any]) -> Iterator[str]:
    cluster = job["rayClusterSpec"]
    if cluster.get("authOptions", {}).get("mode") != "token":
        yield "asks for no token"
    if not str(cluster.get("rayVersion")).startswith(f"{RAY_VERSION}."):
        yield f"expected Ray {RAY_VERSION}, found {cluster.get('rayVersion')}"
    script, *flags = shlex.split(job["entrypoint"])
    if not os.access(ROOT / script, os.X_OK):
        yield f"expected a job of this checkout, found {script}"
    for group in cluster["workerGroupSpecs"]:
        container = group["template"]["spec"]["containers"][0]
        if container.get("lifecycle") != {"preStop": {"exec": {"command": ["ray", "stop"]}}}:
            yield f"{group['groupName']}: its nodes end without a word"
    mounts = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    (folder,) = [each["mountPath"] for each in mounts if each["name"] == "config"]
    if flags != ["--config", f"{folder}/nightly.toml"]:
        yield f"expected --config {folder}/nightly.toml, found {flags}"


def _of_alerts(path: Path) -> Iterator[str]:
    text = path.read_text()
    yield from (problems := problems_of_rules_as_a_resource(text))
    if not problems:
        yield from monitoring.problems_of_rules(text)


def _of_dashboard(path: Path) -> Iterator[str]:
    yield from monitoring.problems_of_dashboard(path.read_text())


# --- rights -------------------------------------------------------------------------------------------------------


def _of_policy(path: Path) -> Iterator[str]:
    """Whether IAM would take it, and whether it names single rights; which of them are needed, real nights tell."""
    text = path.read_text()
    try:
        IAMPolicyDocumentValidator(text).validate()
    except MalformedPolicyDocument as error:
        yield f"no policy: {error}"
        return
    for statement in json.loads(text)["Statement"]:
        actions = _listed(statement.get("Action", []))
        if statement["Effect"] != "Allow" or not statement.get("Sid"):
            yield f"expected a statement with a Sid that allows, found {statement}"
        if not actions or set(actions) - _ACTIONS:
            yield f"{statement.get('Sid')}: expected some of {sorted(_ACTIONS)}, found {actions}"
        for resource in _listed(statement["Resource"]):
            is_bucket = re.fullmatch(r"arn:aws:s3:::[a-z0-9-]+", resource) is not None
            if is_bucket != (actions == ["s3:ListBucket"]):
                yield f"{statement.get('Sid')}: {actions} on {resource}"


def allowed_by(policy: Mapping[str, Any], action: str, resource: str) -> set[tuple[str, str]]:
    """The (Sid, action) of each right that allows it."""
    return {
        (statement["Sid"], action)
        for statement in policy["Statement"]
        if statement["Effect"] == "Allow" and action in _listed(statement["Action"])
        for each in _listed(statement["Resource"])
        if resource == each or (each.endswith("/*") and resource.startswith(each[:-1]))
    }


def problems_of_rights(policy: Mapping[str, Any], wanted: set[tuple[str, str]]) -> list[str]:
    """Whether it grants all (action, resource) that were asked for, and nothing that was not."""
    found = [
        f"does not allow {action} on {resource}"
        for action, resource in wanted
        if not allowed_by(policy, action, resource)
    ]
    used = {right for action, resource in wanted for right in allowed_by(policy, action, resource)}
    for statement in policy["Statement"]:
        rights = {(statement["Sid"], action) for action in _listed(statement["Action"])}
        found += [f"{sid}: nobody asked for {action}" for sid, action in sorted(rights - used)]
    return found


def asked(requests: list[tuple[str, str]]) -> set[tuple[str, str]]:
    """The (action, resource) of each request to S3, as IAM names them."""
    found = set()
    for method, path_and_query in requests:
        path, _, query = path_and_query.partition("?")
        bucket, _, key = path.lstrip("/").partition("/")
        if not key and method == "GET" and "list-type=2" in query:
            found.add(("s3:ListBucket", f"arn:aws:s3:::{bucket}"))
        elif not key and method == "HEAD":
            found.add(("s3:ListBucket", f"arn:aws:s3:::{bucket}"))  # HeadBucket needs that right
        elif method == "POST" and "delete" in query:
            found.add(("s3:DeleteObject", f"arn:aws:s3:::{bucket}/any"))
        else:
            action = {"GET": "GetObject", "HEAD": "GetObject", "PUT": "PutObject", "DELETE": "DeleteObject"}[method]
            found.add((f"s3:{action}", f"arn:aws:s3:::{bucket}/{key}"))
    return found


def _listed(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value]


# --- image --------------------------------------------------------------------------------------------------------


def _of_dockerfile(path: Path) -> Iterator[str]:
    text = path.read_text()
    yield from _linted(["hadolint", "--no-color", "-"], text)
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE)
    names = {name for line in copied for name in line.split()}
    if names != let_in or not all((ROOT / name).exists() for name in names):
        yield f"copies {sorted(names)}, let in are {sorted(let_in)}"
    (python,) = re.findall(r"^ARG PYTHON=(\S+)$", text, re.MULTILINE) or ["none"]
    if not re.fullmatch(r"\d+\.\d+", python) or not SpecifierSet(PROJECT["requires-python"]).contains(f"{python}.0"):
        yield f"expected a Python {PROJECT['requires-python']}, found {python}"
    if not re.search(r"^USER [1-9]\d*$", text.rpartition("\nFROM ")[2], re.MULTILINE):
        yield "runs as root"
    for needed in (
        "--require-hashes -r requirements.lock",
        "RAY_AUTH_MODE=token",
        # For `ray up`, which runs its commands in login shells, and through the head's container.
        'PATH=/opt/venv/bin:\\$PATH" > /etc/profile.d/',
        "openssh-client rsync",
        # The same line as in install.sh, so that both install the pinned torch.
        r"""sed -n 's/^ *"\(torch==[^"]*\)",$/\1/p' pyproject.toml""",
    ):
        if needed not in text:
            yield f"lacks {needed}"


def _of_script(path: Path) -> Iterator[str]:
    yield from _linted(["shellcheck", "--color=never", "--format=gcc", "-"], path.read_text())
    if "\nset -euo pipefail\n" not in path.read_text():
        yield "goes on after an error"


def _linted(command: list[str], text: str) -> Iterator[str]:
    # Installed beside the interpreter, whether or not its environment is activated.
    program = shutil.which(command[0], path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]]))
    if program is None:
        raise FileNotFoundError(f"expected {command[0]} in this environment, found none; bash infra/install.sh")
    ended = subprocess.run([program, *command[1:]], input=text, capture_output=True, text=True, check=False)
    yield from (ended.stdout + ended.stderr).splitlines()
    if ended.returncode and not ended.stdout + ended.stderr:
        yield f"{command[0]} ended with {ended.returncode}"


# --- options ------------------------------------------------------------------------------------------------------


def _of_config(path: Path) -> Iterator[str]:
    """Whether the job that it names takes it, and whether every value has its reason."""
    text = path.read_text()
    lines = text.splitlines()
    named = set(
        re.findall(rf"^# +python (jobs/\w+\.py) --config infra/config/{re.escape(path.name)}", text, re.MULTILINE)
    )
    if not lines[0].startswith("# ") or len(named) != 1:
        yield f"expected what it is for and the command of one job on top, found {lines[0]}"
        return
    try:
        given = tomllib.loads(text)
        taken = _taken(named.pop(), path, given)
    except (ValueError, ConfigError) as error:
        yield f"no configuration: {error}"
        return
    for name, value in given.items():
        if taken[name] != value:
            yield f"{name} = {value!r} became {taken[name]!r}"
        (number,) = [number for number, line in enumerate(lines) if line.startswith(f"{name} = ")]
        has_reason = "# " in lines[number] or lines[number - 1].startswith("# ")
        if not has_reason and name not in ("input", "output"):
            yield f"nothing is said of {name}"


def _taken(job: str, path: Path, given: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the job makes of it, as JSON."""
    if job == "jobs/label_bucket.py":
        flags = [word for name, url in _PLACES.items() if name not in given for word in (f"--{name}", url)]
        return load_config(["--config", str(path), *flags], {}).model_dump(mode="json")
    parser = runpy.run_path(str(ROOT / job))["_parser"]()
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            found: Namespace = argument_file.parse(parser, ["--config", str(path)])
    except SystemExit:
        raise ValueError(said.getvalue().strip().splitlines()[-1]) from None
    as_json: Mapping[str, Any] = json.loads(json.dumps(vars(found), default=str))
    return as_json


def _of_config_text(name: str, text: str) -> Iterator[str]:
    """Of a file within a ConfigMap."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_text(text)
        try:
            load_config(["--config", f"{folder}/{name}"], {})
        except ConfigError as error:
            yield f"{name}: {error}"


# --- virtual machines, one machine --------------------------------------------------------------------------------


def _of_machines(path: Path) -> Iterator[str]:
    try:
        (config,) = load(path.read_text())
        validate_config(prepare_config(config))
    except (yaml.YAMLError, jsonschema.ValidationError, ValueError, KeyError, AssertionError) as error:
        yield f"no cluster: {error}"
        return
    # What Ray leaves open: of the provider, and of machines, which are requests to EC2.
    if config["provider"].keys() != {"type", "region", "cache_stopped_nodes"}:
        yield f"expected a provider's type, region and cache_stopped_nodes, found {config['provider']}"
    nodes = config["available_node_types"]
    if nodes.keys() != {"head", "cpu", "gpu-spot"} or nodes["head"]["resources"] != {"CPU": 0}:
        yield f"expected nodes head, on which nothing is scheduled, cpu and gpu-spot, found {nodes}"
        return
    for name, node in nodes.items():
        yield from (f"{name}: {problem}" for problem in _of_run_instances(node["node_config"]))
    if nodes["gpu-spot"]["node_config"].get("InstanceMarketOptions") != {"MarketType": "spot"}:
        yield "gpu-spot are no spot machines"
    if not all(nodes[name].get("min_workers") for name in ("cpu", "gpu-spot")):
        yield "a run would find no machine, and begin without"
    options = " ".join(config["docker"]["run_options"])
    (mounted,) = config["file_mounts"]
    for needed in ("RAY_AUTH_MODE=token", f"RAY_AUTH_TOKEN_PATH={mounted}"):
        if needed not in options:
            yield f"expected {needed} among the options of docker, found {options}"
    on_host = f"{get_docker_host_mount_location(config['cluster_name'])}{mounted}"
    if config.get("initialization_commands") != [f"chmod a+r {on_host}"]:
        yield f"the container cannot read {on_host}"
    if config.get("setup_commands") != [] or config.get("head_setup_commands") != []:
        yield "expected no setup commands, by default those of Ray, which install another Ray"


@cache
def _run_instances() -> Any:
    return botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape


def _of_run_instances(parameters: Mapping[str, Any]) -> Iterator[str]:
    """Of what EC2 is asked for, by the service's own description."""
    all_of_them = {"MinCount": 1, "MaxCount": 1, **parameters}
    report = botocore.validate.ParamValidator().validate(all_of_them, _run_instances())
    if report.has_errors():
        yield report.generate_report()
    for needed in ("InstanceType", "IamInstanceProfile"):
        if needed not in parameters:
            yield f"lacks {needed}"


def _of_compose(path: Path) -> Iterator[str]:
    try:
        (compose,) = load(path.read_text())
    except yaml.YAMLError as error:
        yield f"no YAML: {error}"
        return
    yield from (problems := problems_of_compose_schema({k: v for k, v in compose.items() if not k.startswith("x-")}))
    if problems:
        return
    services = compose["services"]
    for name, service in services.items():
        named = {each.partition(":")[0] for each in service.get("volumes", [])}
        if unknown := {each for each in named if "/" not in each} - compose.get("volumes", {}).keys():
            yield f"{name}: mounts {unknown}"
        if unknown := set(service.get("depends_on", [])) - services.keys():
            yield f"{name}: waits for {unknown}"
        if public := [port for port in service.get("ports", []) if not port.startswith("127.0.0.1:")]:
            yield f"{name}: is reached from elsewhere at {public}"
        if "build" in service:
            yield from (f"{name}: {problem}" for problem in _of_compose_job(service))


def _of_compose_job(service: Mapping[str, Any]) -> Iterator[str]:
    if not service.get("read_only") or service.get("cap_drop") != ["ALL"]:
        yield "writes to its root or keeps capabilities"
    if not (ROOT / "infra" / service["build"]["context"] / service["build"].get("dockerfile", "Dockerfile")).is_file():
        yield f"is built from nothing: {service['build']}"
    taken = re.findall(r"^ARG (\w+)", (ROOT / "infra" / "docker" / "Dockerfile").read_text(), re.MULTILINE)
    if unknown := service["build"].get("args", {}).keys() - set(taken):
        yield f"the image takes no {unknown}"
    python, script, *flags = service["command"].split()
    if python != "python" or not (ROOT / script).is_file():
        yield f"expected a job of this checkout, found {service['command']}"
        return
    parse: Callable[[list[str]], Any] = (
        partial(load_config, environ={})
        if script == "jobs/label_bucket.py"
        else runpy.run_path(str(ROOT / script))["_parser"]().parse_args
    )
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parse(flags)
    except (ConfigError, SystemExit) as error:
        yield f"{script}: {error} {said.getvalue()}"
