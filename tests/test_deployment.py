"""The files of infra/ say what the job needs: no more rights, no less, and what they name exists."""

import fnmatch
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import yaml
from cluster import ROOT, Head
from packaging.specifiers import SpecifierSet
from ray.autoscaler._private.util import prepare_config, validate_config
from servers import S3Server

from pipeline.draw import draw_file
from pipeline.options import load_config

KUBERNETES = ROOT / "infra" / "kubernetes"
DOCKERFILE = (ROOT / "infra" / "docker" / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def documents(name: str) -> dict[str, Any]:
    """Kind -> document."""
    return {each["kind"]: each for each in yaml.safe_load_all((KUBERNETES / name).read_text())}


def every_pod() -> Iterator[tuple[str, dict[str, Any]]]:
    """Where, and the spec of a pod, of all manifests."""

    def below(where: str, value: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        if isinstance(value, dict):
            if "containers" in value:
                yield where, value
            for name, each in value.items():
                yield from below(f"{where}.{name}", each)
        elif isinstance(value, list):
            for number, each in enumerate(value):
                yield from below(f"{where}[{number}]", each)

    for path in sorted(KUBERNETES.glob("*.yaml")):
        for kind, document in documents(path.name).items():
            yield from below(f"{path.name} {kind}", document)


PODS = dict(every_pod())
CLUSTER = documents("rayjob.yaml")["RayJob"]["spec"]["rayClusterSpec"]


# --- Kubernetes ---------------------------------------------------------------------------------------------------


def test_there_are_pods_of_the_head_two_worker_groups_the_submitter_and_the_scheduler() -> None:
    assert len(PODS) == 4 + 4 + 1
    assert [group["groupName"] for group in CLUSTER["workerGroupSpecs"]] == ["cpu", "gpu-spot"]


@pytest.mark.parametrize("where", PODS)
def test_no_pod_is_root_writes_to_its_root_or_can_become_more_than_it_is(where: str) -> None:
    pod = PODS[where]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    volumes = {each["name"] for each in pod["volumes"]}
    for container in pod["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["limits"]["memory"]
        assert container["resources"]["requests"]["cpu"]
        assert {each["name"] for each in container["volumeMounts"]} == volumes


def test_every_cluster_has_a_token_and_the_version_of_ray_that_is_pinned() -> None:
    assert CLUSTER["authOptions"] == {"mode": "token"}
    (pinned,) = [re.search(r"==(\d+\.\d+)", each)[1] for each in PROJECT["dependencies"] if each.startswith("ray[")]  # type: ignore[index]
    assert CLUSTER["rayVersion"].startswith(f"{pinned}.")
    assert "RAY_AUTH_MODE=token" in DOCKERFILE


def test_the_nightly_job_is_the_one_off_job() -> None:
    assert (
        documents("raycronjob.yaml")["RayCronJob"]["spec"]["jobTemplate"] == documents("rayjob.yaml")["RayJob"]["spec"]
    )


def test_the_network_policy_and_the_disruption_budget_mean_the_pods_of_every_cluster() -> None:
    common = documents("common.yaml")
    labels = [CLUSTER["headGroupSpec"]["template"]["metadata"]["labels"]]
    labels += [group["template"]["metadata"]["labels"] for group in CLUSTER["workerGroupSpecs"]]
    labels += [documents("rayjob.yaml")["RayJob"]["spec"]["submitterPodTemplate"]["metadata"]["labels"]]
    for selector in ("podSelector", "selector"):
        (spec,) = [each["spec"] for each in common.values() if selector in each.get("spec", {})]
        assert all(spec[selector]["matchLabels"].items() <= each.items() for each in labels)
    (web,) = [each for each in common["NetworkPolicy"]["spec"]["egress"] if "ipBlock" in each["to"][0]]
    assert web["to"][0]["ipBlock"]["except"] == ["169.254.0.0/16"]


def test_only_the_gpu_group_takes_gpus_and_it_may_be_empty() -> None:
    cpu, gpu = CLUSTER["workerGroupSpecs"]
    wanted = [group["template"]["spec"]["containers"][0]["resources"]["limits"] for group in (cpu, gpu)]
    assert "nvidia.com/gpu" not in wanted[0]
    assert wanted[1]["nvidia.com/gpu"] == "1"
    assert gpu["minReplicas"] == 0
    assert CLUSTER["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_the_command_and_the_config_map_are_ones_that_the_job_takes(tmp_path: Path) -> None:
    command, *flags = documents("rayjob.yaml")["RayJob"]["spec"]["entrypoint"].split()
    assert (ROOT / command).stat().st_mode & 0o111
    (file,) = documents("common.yaml")["ConfigMap"]["data"].items()
    (tmp_path / file[0]).write_text(file[1])
    (mount,) = [
        each["mountPath"]
        for each in CLUSTER["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMounts"]
        if each["name"] == "config"
    ]
    assert flags == ["--config", f"{mount}/{file[0]}"]
    config = load_config(["--config", str(tmp_path / file[0])], {})
    assert (config.input, config.output, config.image_stats) == ("s3://shop/photos", "s3://shop-labels", True)


@pytest.mark.parametrize("path", sorted((ROOT / "infra" / "config").glob("*.toml")), ids=lambda path: path.stem)
def test_an_example_config_is_one_that_the_job_takes_and_says_why_every_value_is_what_it_is(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ")
    places = {"input": "s3://a", "output": "s3://b"}
    given = tomllib.loads(path.read_text())
    flags = [word for name, url in places.items() if name not in given for word in (f"--{name}", url)]
    config = load_config(["--config", str(path), *flags], {})
    for name, value in given.items():
        assert config.model_dump(mode="json")[name] == value
        (number,) = [number for number, line in enumerate(lines) if line.startswith(f"{name} = ")]
        said = "# " in lines[number] or lines[number - 1].startswith("# ")
        assert said or name in ("input", "output"), f"{path.name}: nothing is said of {name}"


# --- virtual machines, one machine --------------------------------------------------------------------------------


def test_ray_takes_the_cluster_of_virtual_machines_and_its_nodes_ask_for_a_token() -> None:
    config = yaml.safe_load((ROOT / "infra" / "ray" / "cluster.yaml").read_text())
    validate_config(prepare_config(config))
    options = " ".join(config["docker"]["run_options"])
    assert "RAY_AUTH_MODE=token" in options
    (mounted,) = config["file_mounts"]
    assert f"--volume {mounted}:/etc/ray-token:ro" in options
    assert "RAY_AUTH_TOKEN_PATH=/etc/ray-token" in options
    assert config["available_node_types"]["gpu-spot"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}


def test_the_store_of_a_development_machine_is_reached_from_there_alone_and_its_jobs_take_their_flags() -> None:
    compose = yaml.safe_load((ROOT / "infra" / "compose.yaml").read_text())
    services = compose["services"]
    published = [port for each in services.values() for port in each.get("ports", [])]
    assert published
    assert all(port.startswith("127.0.0.1:") for port in published)
    for name in ("draw", "label"):
        job = services[name]
        assert job["read_only"]
        assert job["cap_drop"] == ["ALL"]
        assert (ROOT / "infra" / job["build"]["context"] / job["build"]["dockerfile"]).is_file()
        python, script, *flags = job["command"].split()
        assert python == "python"
        assert (ROOT / script).is_file()
    config = load_config(flags, {})
    assert (config.input, config.output, config.model) == ("s3://pictures/in", "s3://labels/out", "demo")


# --- image --------------------------------------------------------------------------------------------------------


def test_the_image_takes_only_what_is_there_and_let_in() -> None:
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    names = {name for line in copied for name in line.split()}
    assert names == let_in
    assert all((ROOT / name).exists() for name in names)


def test_the_image_has_a_python_that_is_supported_and_no_root() -> None:
    (python,) = re.findall(r"^ARG PYTHON=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert SpecifierSet(PROJECT["requires-python"]).contains(f"{python}.0")
    last_stage = DOCKERFILE.rpartition("\nFROM ")[2]
    assert re.search(r"^USER [1-9]\d*$", last_stage, re.MULTILINE)
    assert "--require-hashes -r requirements.lock" in DOCKERFILE
    # The same line as in install.sh, so that both install the pinned torch.
    assert r"""sed -n 's/^ *"\(torch==[^"]*\)",$/\1/p' pyproject.toml""" in DOCKERFILE


# --- rights -------------------------------------------------------------------------------------------------------


def allowed_by(policy: Mapping[str, Any], action: str, resource: str) -> str | None:
    """The Sid of the statement that allows it."""
    for statement in policy["Statement"]:
        actions, resources = (
            value if isinstance(value, list) else [value] for value in (statement["Action"], statement["Resource"])
        )
        is_meant = action in actions and any(fnmatch.fnmatchcase(resource, each) for each in resources)
        if is_meant and statement["Effect"] == "Allow":
            return str(statement["Sid"])
    return None


def asked(requests: list[tuple[str, str]]) -> set[tuple[str, str]]:
    """The (action, resource) of each request, as IAM names them."""
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


@pytest.mark.slow
def test_the_rights_of_the_job_the_janitor_and_readers_are_those_that_they_use(
    head: Head, s3: S3Server, tmp_path: Path
) -> None:
    policies = {
        name: json.loads((ROOT / "infra" / "iam" / f"{name}.json").read_text()) for name in ("job", "janitor", "reader")
    }
    for bucket in ("shop", "shop-labels"):
        s3.client.create_bucket(Bucket=bucket)
    for number in range(70):
        file = draw_file(5, number, broken_fraction=0.05)
        s3.client.put_object(Bucket="shop", Key=f"photos/{file.path}", Body=file.data)
    model = str(checkpoints.write_small(tmp_path / "model"))
    nightly = ("--input", "s3://shop/photos", "--output", "s3://shop-labels", "--model", model, "--gpu-actors=1")

    def used(name: str, command: Any) -> set[str]:
        before = len(s3.requests)
        done = command()
        assert done.returncode == 0, done.stderr
        found = {each: allowed_by(policies[name], *each) for each in asked(s3.requests[before:])}
        assert [each for each, sid in found.items() if sid is None] == []
        return {sid for sid in found.values() if sid is not None}

    assert used("job", lambda: head.label_bucket(*nightly)) == {"ListBoth", "ReadPhotos", "ReadAndAddLabels"}
    s3.client.delete_object(Bucket="shop", Key=s3.client.list_objects_v2(Bucket="shop")["Contents"][0]["Key"])
    used("job", lambda: head.label_bucket(*nightly, "--full"))
    before = len(s3.requests)
    compaction = ("--output", "s3://shop-labels", "--keep-runs=1", "--grace-hours=0")
    assert used("janitor", lambda: head.compact_labels(*compaction)) == {"ListLabels", "ReplaceAndRemoveLabels"}
    refused = [each for each in asked(s3.requests[before:]) if allowed_by(policies["job"], *each) is None]
    assert {action for action, _ in refused} == {"s3:DeleteObject"}
    assert allowed_by(policies["reader"], "s3:GetObject", "arn:aws:s3:::shop-labels/labels/part.parquet")
    assert not allowed_by(policies["reader"], "s3:PutObject", "arn:aws:s3:::shop-labels/labels/part.parquet")
