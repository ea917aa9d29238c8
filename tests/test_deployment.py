"""The files of infra/ say what the job needs: no more rights, no less, and what they name exists."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import checkpoints
import pytest
from cluster import ROOT, Head
from deployment import asked, check_of, files, is_right, problems_of, problems_of_rights
from manifests import load, pods
from servers import S3Server

from pipeline.draw import draw_file

INFRA = ROOT / "infra"


def documents(name: str) -> dict[str, Any]:
    """Kind -> document, of a file of infra/kubernetes."""
    return {each["kind"]: each for each in load((INFRA / "kubernetes" / name).read_text())}


CLUSTER = documents("rayjob.yaml")["RayJob"]["spec"]["rayClusterSpec"]


# --- every file ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", files())
def test_a_file_is_right(name: str) -> None:
    assert problems_of(INFRA / name) == []


def test_the_script_of_what_a_commit_must_pass_is_right() -> None:
    assert problems_of(ROOT / ".ci" / "run") == []


BROKEN = [
    # file, what stands there, what stands there instead, what is said of it
    ("kubernetes/common.yaml", "podSelector: {matchLabels: {app", "podSelectr: {matchLabels: {app", "podSelectr"),
    ("kubernetes/common.yaml", "minAvailable: 1", "minAvailable: [1]", "minAvailable"),
    ("kubernetes/common.yaml", "minAvailable: 1", "maxUnavailable: 1", "expected a number as minAvailable"),
    ("kubernetes/common.yaml", "port: 8265,", "port: 8265, port: 8266,", "twice in one mapping: port"),
    ("kubernetes/common.yaml", "    image_stats =", "    image_stat =", "image_stat; did you mean image_stats?"),
    ("kubernetes/cronjob.yaml", "timeZone:", "timezone:", "timezone"),
    ("kubernetes/cronjob.yaml", "apiVersion: batch/v1\n", "apiVersion: batch/v2\n", "no such kind: batch/v2 CronJob"),
    ("kubernetes/cronjob.yaml", "readOnlyRootFilesystem: true, ", "", "expected the security context"),
    ("kubernetes/rayjob.yaml", "shutdownAfterJobFinishes:", "shutdownAfterJobFinished:", "shutdownAfterJobFinished"),
    ("kubernetes/rayjob.yaml", 'num-cpus: "0"', "num-cpus: 0", "0 is not of type 'string'"),
    ("kubernetes/rayjob.yaml", "serviceAccountName:", "serviceAcountName:", "serviceAcountName"),
    ("kubernetes/rayjob.yaml", "tolerations:\n", "toleration:\n", "toleration"),
    ("kubernetes/rayjob.yaml", "    authOptions: {mode: token}\n", "", "asks for no token"),
    ("kubernetes/rayjob.yaml", "lifecycle: *lifecycle\n", "terminationMessagePath: /tmp/x\n", "end without a word"),
    ("kubernetes/rayjob.yaml", 'rayVersion: "2.60.0"', 'rayVersion: "2.59.0"', "found 2.59.0"),
    ("kubernetes/rayjob.yaml", "nightly.toml", "nightly.tml", "nightly.tml"),
    ("kubernetes/raycronjob.yaml", "  schedule:", "  shedule:", "'schedule' is a required property"),
    ("kubernetes/raycronjob.yaml", "minReplicas: 1\n", "minReplicas: one\n", "'one' is not of type 'integer'"),
    ("kubernetes/raycronjob.yaml", "  runAsNonRoot: true\n", "  runAsNonRoot: false\n", "may be root"),
    (
        "kubernetes/raycronjob.yaml",
        "securityContext: *container\n        volumeMounts:",
        "securityContext: [*container]\n        volumeMounts:",
        "autosc",
    ),
    ("prometheus/podmonitor.yaml", "podMetricsEndpoints", "podMetricEndpoints", "podMetricEndpoints"),
    ("prometheus/podmonitor.yaml", "interval: 15s", "interval: 15 seconds", "does not match"),
    (
        "prometheus/alerts.yaml",
        "ray_label_bucket_retries_total",
        "ray_label_bucket_retry_total",
        "which nobody exports",
    ),
    ("prometheus/alerts.yaml", "        for: 30m", "        since: 30m", "since"),
    (
        "grafana/label_bucket.json",
        "ray_label_bucket_parts_total",
        "ray_label_bucket_part_total",
        "which nobody exports",
    ),
    ("iam/job.json", '"Effect": "Allow"', '"Efect": "Allow"', "no policy"),
    ("iam/job.json", '"s3:PutObject"', '"s3:*"', "s3:*"),
    ("iam/janitor.json", '"Action": ["s3:GetObject", "s3:PutObject", "s3:DeleteObject"],', "", "no policy"),
    ("iam/reader.json", '"s3:ListBucket"', '"s3:ListBuckets"', "s3:ListBuckets"),
    ("docker/Dockerfile", "WORKDIR /opt", "WORKDIR opt", "DL3000"),
    ("docker/Dockerfile", "--from=build ", "--from=builds ", "DL3022"),
    ("docker/Dockerfile", "COPY pipeline pipeline", "ADD pipeline pipeline", "DL3020"),
    ("docker/Dockerfile", "FROM scratch", "FORM scratch", "unexpected"),
    ("docker/Dockerfile", "USER 10001", "USER root", "runs as root"),
    ("docker/Dockerfile", "/etc/profile.d/", "/etc/profil.d/", "lacks PATH="),
    ("docker/Dockerfile", "ARG PYTHON=3.12", "ARG PYTHON=3.10", "found 3.10"),
    ("config/quickstart.toml", "limit = 1000", "limits = 1000", "limits; did you mean limit?"),
    ("config/nightly.toml", "top_k = 5 ", "top_k = 0 ", "top_k"),
    (
        "config/backfill.toml",
        "  # share of images: old corners of a bucket hold what no night has ever seen",
        "",
        "nothing is said of max_failed_fraction",
    ),
    ("config/backfill.toml", 'precision = "auto"', 'precision = "fp64"', "precision"),
    ("config/evaluate.toml", "fraction = 1.0", "fractoin = 1.0", "fractoin; did you mean fraction?"),
    ("config/evaluate.toml", "seed = 0", 'seed = "0"', "expected a number, found '0'"),
    ("ray/cluster.yaml", "max_workers: 20", "max_worker: 20", "max_worker"),
    ("ray/cluster.yaml", "InstanceType: c7i", "InstanceTyp: c7i", 'Unknown parameter in input: "InstanceTyp"'),
    ("ray/cluster.yaml", "    - --env RAY_AUTH_MODE=token\n", "", "RAY_AUTH_MODE=token"),
    ("ray/cluster.yaml", "  /etc/ray-token:", "  /etc/token:", "RAY_AUTH_TOKEN_PATH=/etc/token"),
    ("ray/cluster.yaml", "chmod a+r", "chmod a-r", "the container cannot read"),
    ("ray/cluster.yaml", "\nsetup_commands: []", "\nsetup_commands: [pip install ray]", "install another Ray"),
    ("ray/cluster.yaml", "min_workers: 4", "min_workers: 0", "would find no machine"),
    ("compose.yaml", "{TORCH_INDEX:", "{TORCH_INDX:", "the image takes no {'TORCH_INDX'}"),
    ("compose.yaml", "cap_drop: [ALL]", "cap_dorp: [ALL]", "cap_dorp"),
    ("compose.yaml", "service_completed_successfully", "service_completed", "depends_on"),
    ("compose.yaml", "127.0.0.1:9000:9000", "9000:9000", "is reached from elsewhere"),
    ("compose.yaml", "--broken-fraction", "--broken-share", "--broken-share"),
    ("compose.yaml", "--model demo", "--modle demo", "unknown flag --modle; did you mean --model?"),
    ("install.sh", '"$PWD $version $project"', "$PWD $version $project", "SC2086"),
    ("lock.sh", '"$@"', "$@", "SC2068"),
    ("quickstart.sh", "\nfi\n", "\n", "SC1"),
    ("test.sh", "set -euo pipefail", "set -eu", "goes on after an error"),
]


@pytest.mark.parametrize(("name", "right", "wrong", "problem"), BROKEN)
def test_a_file_that_is_broken_on_purpose_is_refused(
    name: str, right: str, wrong: str, problem: str, tmp_path: Path
) -> None:
    text = (INFRA / name).read_text()
    assert right in text
    copy = tmp_path / name
    copy.parent.mkdir(exist_ok=True)
    copy.write_text(text.replace(right, wrong, 1))
    assert problem in "\n".join(problems_of(copy))


def test_every_file_has_a_check_and_was_broken_on_purpose() -> None:
    assert {name for name, *_ in BROKEN} == set(files())
    assert all(check_of(INFRA / name) for name in files())


def fields(value: Any, where: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where every name stands that is no free choice, as that of a label is."""
    free = {"labels", "matchLabels", "annotations", "data", "nodeSelector", "rayStartParams", "limits", "requests"}
    free |= {"environment", "services", "file_mounts"}
    if isinstance(value, dict):
        for name, each in value.items():
            if name.startswith("x-"):  # of Compose, and already where it is referred to
                continue
            if not free & set(where[-1:]):
                yield (*where, name)
            yield from fields(each, (*where, name))
    elif isinstance(value, list):
        for number, each in enumerate(value):
            yield from fields(each, (*where, number))


@pytest.mark.slow
@pytest.mark.parametrize("name", [each for each in files() if each.endswith(".yaml") and "raycronjob" not in each])
def test_no_field_can_be_misspelt(name: str, tmp_path: Path) -> None:
    """All but raycronjob.yaml: its template is rayjob.yaml's."""
    copy = tmp_path / name
    copy.parent.mkdir(exist_ok=True)
    text = (INFRA / name).read_text()
    unseen = []
    for document in load(text):
        for *where, last in fields(document):
            broken = json.loads(json.dumps(document))
            parent = broken
            for each in where:
                parent = parent[each]
            parent[f"{last}x"] = parent.pop(last)
            copy.write_text(json.dumps(broken))  # JSON is YAML
            if is_right(copy):
                unseen.append((*where, last))
    assert unseen == []


# --- Kubernetes ---------------------------------------------------------------------------------------------------


def test_there_are_pods_of_the_head_two_worker_groups_the_submitter_and_the_scheduler() -> None:
    found = {
        path.name: [pod for each in load(path.read_text()) for pod in pods(each)] for path in INFRA.glob("*/*.yaml")
    }
    assert {name: len(each) for name, each in found.items() if each} == {
        "rayjob.yaml": 4,
        "raycronjob.yaml": 4,
        "cronjob.yaml": 1,
    }
    assert [group["groupName"] for group in CLUSTER["workerGroupSpecs"]] == ["cpu", "gpu-spot"]


def test_the_nightly_job_is_the_one_off_job() -> None:
    assert (
        documents("raycronjob.yaml")["RayCronJob"]["spec"]["jobTemplate"] == documents("rayjob.yaml")["RayJob"]["spec"]
    )


def test_the_network_policy_means_the_pods_of_every_cluster_and_the_disruption_budget_their_heads() -> None:
    common = documents("common.yaml")
    head = CLUSTER["headGroupSpec"]["template"]["metadata"]["labels"]
    others = [group["template"]["metadata"]["labels"] for group in CLUSTER["workerGroupSpecs"]]
    others += [documents("rayjob.yaml")["RayJob"]["spec"]["submitterPodTemplate"]["metadata"]["labels"]]
    means = common["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"].items()
    assert all(means <= each.items() for each in (head, *others))
    # The operator adds the label of the kind of node, and keeps a name that the template gives.
    held = common["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"].items()
    assert held <= {**head, "ray.io/node-type": "head"}.items()
    assert not any(held <= {**each, "ray.io/node-type": "worker"}.items() for each in others)
    (web,) = [each for each in common["NetworkPolicy"]["spec"]["egress"] if "ipBlock" in each["to"][0]]
    assert web["to"][0]["ipBlock"]["except"] == ["169.254.0.0/16"]


def test_only_the_gpu_group_takes_gpus_and_it_may_be_empty() -> None:
    cpu, gpu = CLUSTER["workerGroupSpecs"]
    wanted = [group["template"]["spec"]["containers"][0]["resources"]["limits"] for group in (cpu, gpu)]
    assert "nvidia.com/gpu" not in wanted[0]
    assert wanted[1]["nvidia.com/gpu"] == "1"
    assert gpu["minReplicas"] == 0
    assert CLUSTER["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_the_config_map_is_the_one_that_the_cluster_mounts() -> None:
    (name,) = documents("common.yaml")["ConfigMap"]["data"]
    assert name == "nightly.toml"
    (volume,) = [each for each in CLUSTER["headGroupSpec"]["template"]["spec"]["volumes"] if each["name"] == "config"]
    assert volume["configMap"]["name"] == documents("common.yaml")["ConfigMap"]["metadata"]["name"]


# --- rights -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_rights_of_the_job_the_janitor_and_readers_are_those_that_they_use(
    head: Head, s3: S3Server, tmp_path: Path
) -> None:
    for bucket in ("shop", "shop-labels"):
        s3.client.create_bucket(Bucket=bucket)
    for number in range(70):
        file = draw_file(5, number, broken_fraction=0.05)
        s3.client.put_object(Bucket="shop", Key=f"photos/{file.path}", Body=file.data)
    model = str(checkpoints.write_small(tmp_path / "model"))
    nightly = ("--input", "s3://shop/photos", "--output", "s3://shop-labels", "--model", model, "--gpu-actors=1")
    wanted: dict[str, set[tuple[str, str]]] = {}

    def record(name: str, done: Callable[[], subprocess.CompletedProcess[str]]) -> None:
        before = len(s3.requests)
        ended = done()
        assert ended.returncode == 0, ended.stderr
        wanted.setdefault(name, set()).update(asked(s3.requests[before:]))

    record("job", lambda: head.label_bucket(*nightly))
    s3.client.delete_object(Bucket="shop", Key=s3.client.list_objects_v2(Bucket="shop")["Contents"][0]["Key"])
    record("job", lambda: head.label_bucket(*nightly, "--full"))
    code = "from pipeline import storage, view; print(sum(map(len, view.batches(storage.connect('s3://shop-labels')))))"
    command = [sys.executable, "-c", code]
    record("reader", lambda: subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False))
    compaction = ("--output", "s3://shop-labels", "--keep-runs=1", "--grace-hours=0")
    record("janitor", lambda: head.compact_labels(*compaction))

    for name in ("job", "janitor", "reader"):
        policy = json.loads((INFRA / "iam" / f"{name}.json").read_text())
        assert problems_of_rights(policy, wanted[name]) == []
        for number, statement in enumerate(policy["Statement"]):
            less = [each for place, each in enumerate(policy["Statement"]) if place != number]
            assert problems_of_rights({"Statement": less}, wanted[name])
            more = {**statement, "Action": "s3:PutObjectAcl"}
            assert problems_of_rights({"Statement": [*policy["Statement"], more]}, wanted[name]) == [
                f"{statement['Sid']}: nobody asked for s3:PutObjectAcl"
            ]
    job = json.loads((INFRA / "iam" / "job.json").read_text())
    refused = problems_of_rights(job, wanted["janitor"])
    assert {each.split(" on ")[0] for each in refused} - {"ReadPhotos: nobody asked for s3:GetObject"} == {
        "does not allow s3:DeleteObject"
    }
