"""The job from end to end: a real head, a real bucket, the project's own checkpoint, drawn and broken pictures."""

import hashlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import boto3
import numpy as np
import published
import pyarrow.compute as pc
import pytest
import torch
from cluster import JOB, ROOT, Head
from servers import S3Server
from transformers import DeiTForImageClassificationWithTeacher, DeiTImageProcessorPil

from pipeline.progress import Stage

NUM_IMAGES = 3000


@pytest.fixture(scope="module")
def pictures(head: Head, s3: S3Server) -> str:
    """A bucket of 3,000 drawn pictures, about 90 of them broken in every known way."""
    url = f"{s3.create_bucket('pictures')}/catalogue"
    command = [sys.executable, "jobs/draw_images.py", "--output", url, f"--num-images={NUM_IMAGES}"]
    subprocess.run([*command, "--seed=7", "--broken-fraction=0.03"], cwd=ROOT, env=head.environment, check=True)
    return url


@pytest.fixture(scope="module")
def labeled(head: Head, s3: S3Server, pictures: str) -> str:
    """The output of a submitted job over the pictures."""
    output = f"{s3.create_bucket('results')}/labels"
    job = ["python", "jobs/label_bucket.py", "--input", pictures, "--output", output, "--model", "demo"]
    done = head.submit("--", *job, "--image-stats")
    assert done.returncode == 0, done.stdout[-3000:]
    assert "exit code 0: published run 00000001-" in done.stdout
    assert re.search(
        r"limit: \w+ \(model waits \d+%, preparing waits \d+%, storage \d+% of preparing, [\d.]+ MB/s\)", done.stdout
    )
    return output


def test_a_submitted_job_accounts_for_every_object_of_a_bucket(labeled: str, pictures: str) -> None:
    listed = {f"{pictures}/{key}" for key in published.keys(pictures)}
    labels, failures = published.table(labeled, "labels"), published.table(labeled, "failures")
    labeled_uris, failed_uris = labels["uri"].to_pylist(), failures["uri"].to_pylist()
    assert len(listed) == NUM_IMAGES
    assert len(set(labeled_uris)) == len(labeled_uris)
    assert sorted([*labeled_uris, *failed_uris]) == sorted(listed)
    assert set(failed_uris) == {uri for uri in listed if "/broken/" in uri}
    (entry,), (report,) = published.entries(labeled), published.reports(labeled)
    assert entry["counts"] == {
        **dict.fromkeys(("filtered", "unchanged", "deleted"), 0),
        "listed": NUM_IMAGES,
        "labeled": len(labeled_uris),
        "failed": len(failed_uris),
    }
    assert report["counts"] == entry["counts"]
    assert report["exit_code"] == 0
    assert report["store"] == dict.fromkeys(
        ("creates_once", "notices_changes", "lists_what_it_wrote", "etag_is_md5"), True
    )
    assert report["bottleneck"]["stage"] in get_args(Stage)
    assert report["bottleneck"]["storage_bytes_per_s"] > 0
    kinds = failures["failure_kind"].value_counts().to_pylist()
    assert entry["failures"] == {each["values"]: each["counts"] for each in kinds}


def test_the_labels_are_those_of_the_pictures(labeled: str) -> None:
    labels = published.table(labeled, "labels")
    truth = [uri.split("/")[-2] for uri in labels["uri"].to_pylist()]
    top_1 = [names[0] for names in labels["label_names"].to_pylist()]
    assert np.mean([found == wanted for found, wanted in zip(top_1, truth, strict=True)]) >= 0.95


def test_no_label_or_vector_ever_belongs_to_a_neighbour(labeled: str, pictures: str) -> None:
    """Every 15th row, broken neighbours between them, against transformers' own processor and forward pass."""
    from PIL import Image

    folder = ROOT / "pipeline" / "demo"
    network = DeiTForImageClassificationWithTeacher.from_pretrained(folder).train(False)
    processor = DeiTImageProcessorPil.from_pretrained(folder)
    rows = published.table(labeled, "labels").to_pylist()[::15]
    assert len(rows) > 150
    for row in rows:
        data = published.read(pictures, row["uri"].removeprefix(f"{pictures}/"))
        assert row["sha256"] == hashlib.sha256(data).hexdigest()
        pixels = processor(Image.open(io.BytesIO(data)).convert("RGB"), return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            tokens = network.deit(pixels).last_hidden_state
            logits = network(pixels).logits[0]
        scores, ids = logits.softmax(0).topk(5)
        assert row["label_ids"] == ids.tolist(), row["uri"]
        assert np.abs(np.array(row["label_scores"]) - scores.numpy()).max() < 1e-4
        vector = tokens[0, :2].mean(0).numpy()
        assert np.array(row["embedding"]) @ (vector / np.linalg.norm(vector)) > 0.99999, row["uri"]


def test_published_files_are_sorted_by_uri_and_every_vector_has_length_one(labeled: str) -> None:
    labels = published.table(labeled, "labels")
    vectors = np.array(labels["embedding"].to_pylist())
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-5
    assert pc.all(pc.equal(pc.list_value_length(labels["label_scores"]), 5)).as_py()
    (entry,) = published.entries(labeled)
    assert {file["key"] for file in entry["labels"]} == {
        key for key in published.keys(labeled) if key.startswith("labels/")
    }


def test_a_second_night_labels_only_what_is_new_or_changed_and_records_what_is_gone(
    head: Head, labeled: str, pictures: str
) -> None:
    client = boto3.client("s3")
    keys = sorted(key for key in published.keys(pictures) if not key.startswith("broken/"))
    gone, changed, source = keys[10], keys[500], keys[900]
    body = published.read(pictures, source)
    bucket = pictures.split("/")[2]
    client.delete_object(Bucket=bucket, Key=f"catalogue/{gone}")
    client.put_object(Bucket=bucket, Key=f"catalogue/{changed}", Body=body)
    client.put_object(Bucket=bucket, Key="catalogue/new/a b+c#%2Fé.png", Body=body)
    done = head.label_bucket("--input", pictures, "--output", labeled, "--model", "demo")
    assert done.returncode == 0, done.stderr
    entry = published.entries(labeled)[1]
    assert entry["counts"]["unchanged"] == NUM_IMAGES - 2
    assert (entry["counts"]["labeled"], entry["counts"]["deleted"]) == (2, 1)
    rows = [row for row in published.table(labeled, "labels").to_pylist() if row["run_seq"] == 2]
    assert [row["sha256"] for row in rows] == [None, None]  # this night did not ask for it
    assert [row["uri"] for row in rows] == sorted([f"{pictures}/{changed}", f"{pictures}/new/a b+c#%2Fé.png"])
    assert [row["uri"] for row in published.table(labeled, "deletions").to_pylist()] == [f"{pictures}/{gone}"]

    before = published.keys(labeled)
    idle = head.label_bucket("--input", pictures, "--output", labeled, "--model", "demo")
    assert idle.returncode == 0, idle.stderr
    assert "0 to label" in idle.stderr
    assert {key for key in published.keys(labeled) if key.startswith("labels/")} == {
        key for key in before if key.startswith("labels/")
    }


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(head: Head, pictures: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    done = head.label_bucket("--input", pictures, "--output", str(output), "--model", "demo", "--dry-run", "--limit=50")
    assert done.returncode == 0, done.stderr
    assert "50 to label in 1 units" in done.stderr
    assert "GB to read" in done.stderr
    assert not output.exists()


@pytest.mark.slow
def test_the_short_form_labels_a_local_folder_with_settings_from_a_file(head: Head, tmp_path: Path) -> None:
    images, output, config = tmp_path / "images", tmp_path / "out", tmp_path / "job.toml"
    command = [sys.executable, "jobs/draw_images.py", "--output", str(images), "--num-images=20", "--seed=1"]
    subprocess.run(command, cwd=ROOT, env=head.environment, check=True)
    (images / "notes.txt").write_text("not an image")
    config.write_text(f'input = "{images}"\noutput = "{output}"\nmodel = "demo"\nembedding = "none"\ntop_k = 3\n')
    done = head.submit("--", "jobs/label_bucket.py", "--config", str(config), "--exclude", "heart/*")
    assert done.returncode == 0, done.stdout[-3000:]
    labels = published.table(str(output), "labels")
    assert "embedding" not in labels.column_names
    assert {len(each) for each in labels["label_names"].to_pylist()} == {3}
    (entry,) = published.entries(str(output))
    assert entry["counts"]["filtered"] == sum(path.parent.name == "heart" for path in images.rglob("*.*"))
    assert entry["failures"] == {"not_an_image": 1}

    # Nothing after the script's name: Ray's own command line takes what looks like a flag unless `--` stands before it.
    variables = json.dumps({"env_vars": {"LABEL_BUCKET_CONFIG": str(config)}})
    bare = head.submit("--runtime-env-json", variables, "jobs/label_bucket.py")
    assert bare.returncode == 0, bare.stdout[-3000:]
    assert published.entries(str(output))[1]["counts"]["unchanged"] == entry["counts"]["labeled"] + 1


def test_without_an_address_the_job_starts_and_ends_its_own_ray(head: Head, tmp_path: Path) -> None:
    images, output = tmp_path / "images", tmp_path / "out"
    command = [sys.executable, "jobs/draw_images.py", "--output", str(images), "--num-images=10", "--seed=2"]
    subprocess.run(command, cwd=ROOT, env=head.environment, check=True)
    environment = {name: value for name, value in head.environment.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, str(JOB), "--input", str(images), "--output", str(output), "--model", "demo"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert published.table(str(output), "labels").num_rows == 10
    assert "exit code 0: published run" in done.stderr.splitlines()[-1]
    assert json.loads(published.read(str(output), "_log/00000001.json"))["kind"] == "run"
