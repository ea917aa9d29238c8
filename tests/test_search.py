"""Searching: whatever is asked with, the answers are the nearest images of the view; what is gone is never one."""

import json
import re
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import browser
import checkpoints
import nights
import numpy as np
import pytest
from browser import LAPTOP
from cluster import ROOT, Head
from nights import DIM, Nights
from PIL import Image
from servers import S3Server

from pipeline import index, schema, search, storage, view
from pipeline.draw import draw_file
from pipeline.errors import ConfigError
from pipeline.index_build import Options as BuildOptions
from pipeline.index_update import build_index
from pipeline.search import Options

DEIT = "deit-01234567"
NUM_IMAGES = 3000


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Nights:
    """An output after nights of two spaces in which every fate occurs, and `search` beside it, an index of it."""
    folder = tmp_path_factory.mktemp("search")
    output = nights.several(storage.connect(str(folder / "out")))
    build_index(BuildOptions(input=output.output.root, output=str(folder / "search"), space=DEIT))
    return output


def place(several: Nights) -> str:
    return several.output.root.removesuffix("out") + "search"


def asked(several: Nights, **question: Any) -> search.Result:
    return search.search(Options(index=place(several), **question))


def uris(result: search.Result) -> list[str]:
    return [each["uri"] for each in result.answers]


def cosines(several: Nights, vector: list[float]) -> dict[str, float]:
    """Uri -> its true cosine, the greatest first, without the code that searches."""
    found = {
        uri: float(np.dot(vector, nights._vector(uri.removeprefix(f"{nights.ROOT}/")))) for uri in several.current[DEIT]
    }
    return dict(sorted(found.items(), key=lambda item: -item[1]))


# --- questions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [False, True])
def test_an_image_of_the_index_is_answered_by_the_others_nearest_first(several: Nights, exact: bool) -> None:
    key = "b b/03.jpg"
    truth = cosines(several, nights._vector(key))
    assert next(iter(truth)) == f"{nights.ROOT}/{key}"
    by_uri = asked(several, uri=f"{nights.ROOT}/{key}", k=5, exact=exact)
    assert uris(by_uri) == list(truth)[1:6]
    assert [each["score"] for each in by_uri.answers] == pytest.approx(list(truth.values())[1:6], abs=1e-6)
    by_id = asked(several, image_id=schema.image_id(f"{nights.ROOT}/{key}"), k=5, exact=exact)
    assert by_id.answers == by_uri.answers


def test_numbers_are_answered_whatever_their_length_and_wherever_they_are(several: Nights, tmp_path: Path) -> None:
    vector = np.random.default_rng(1).normal(size=DIM)
    truth = list(cosines(several, (vector / np.linalg.norm(vector)).tolist()))[:4]
    np.save(tmp_path / "v.npy", vector * 1000)
    (tmp_path / "v.json").write_text(json.dumps(vector.tolist()))
    for text in (json.dumps((vector * 7).tolist()), str(tmp_path / "v.npy"), str(tmp_path / "v.json")):
        assert uris(asked(several, vector=text, k=4)) == truth


def test_a_label_alone_gives_its_images_the_surest_first(several: Nights) -> None:
    result = asked(several, text_label="cat", k=24)
    wanted = {uri for uri in several.current[DEIT] if nights.label_of(uri.removeprefix(f"{nights.ROOT}/")) == "cat"}
    assert set(uris(result)) == wanted
    assert result.score_name == "probability"
    assert {each["score"] for each in result.answers} == {0.75}
    assert asked(several, text_label="cat", min_score=0.8).answers == []


def test_filters_leave_what_they_say(several: Nights) -> None:
    truth = cosines(several, nights._vector("top.jpg"))
    cats = [uri for uri in truth if nights.label_of(uri.removeprefix(f"{nights.ROOT}/")) == "cat"]
    assert uris(asked(several, uri=f"{nights.ROOT}/top.jpg", k=20, label="cat")) == [
        uri for uri in cats if not uri.endswith("/top.jpg")
    ]
    near = [uri for uri, cosine in truth.items() if cosine >= 0.2][1:]
    assert uris(asked(several, uri=f"{nights.ROOT}/top.jpg", k=20, min_score=0.2)) == near
    assert 0 < len(near) < 15


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (
            {"text_label": "cart"},
            r"--text-label: expected the best label of some image of index .*, such as 'cat', found",
        ),
        (
            {"uri": "s3://photos/in/top.jpg", "label": "dog"},
            r"--label: expected the best label of some .*, found 'dog'",
        ),
        (
            {"uri": "s3://photos/in/a/02b.jpg"},
            r"expected a uri of index .*, all of which are below s3://photos/in/, foun",
        ),
        (
            {"text_label": "CAT"},
            r"--text-label: expected the best label of some image of index .*, such as 'cat', found 'CAT'$",
        ),
        (
            {"text_label": "cat", "label": "cat"},
            r"--label: expected something to search with, found --text-label, which is no search$",
        ),
        (
            {"text_label": "cat", "exact": True},
            r"--exact: expected something to search with, found --text-label, which is no search$",
        ),
        (
            {"uri": "s3://photos/in/top.jpg", "min_score": float("nan")},
            r"--min-score: expected a number, found nan$",
        ),
        ({"image_id": 12345}, r"--image-id 12345: expected one image of index .*, found none"),
        ({"vector": "[1, 2]"}, r"--vector: expected 8 numbers, as many as the index has, found shape \(2,\)"),
        ({"vector": "[" + "0, " * 7 + "0]"}, r"--vector: expected finite numbers that are not all 0"),
        ({"uri": "s3://photos/in/top.jpg", "k": 100}, r"-k: expected 1 to \d+, the rows of index .*, found 100"),
        ({"text_label": "cat", "space": "other"}, r"expected one of its spaces \(deit-01234567\), found other"),
    ],
)
def test_a_question_that_makes_no_sense_is_refused(several: Nights, question: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        asked(several, **question)


def test_an_image_id_of_two_images_is_no_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = Nights(storage.connect(str(tmp_path / "out")))
    with monkeypatch.context() as patch:
        patch.setattr(schema, "image_id", lambda _: 7)
        output.publish(["a.jpg", "b.jpg"])
    build_index(BuildOptions(input=output.output.root, output=str(tmp_path / "search")))
    with pytest.raises(
        ConfigError, match=r"expected one image of index .*, found s3://photos/in/a.jpg and s3://photos/"
    ):
        search.search(Options(index=str(tmp_path / "search"), image_id=7, k=1))


# --- answers ------------------------------------------------------------------------------------------------------


def test_a_table_hides_nothing_of_a_key(tmp_path: Path) -> None:
    output = Nights(storage.connect(str(tmp_path / "out")))
    output.publish(["a\x1b[31mred\n.jpg", "\u202egpj.exe", "b.jpg"])
    build_index(BuildOptions(input=output.output.root, output=str(tmp_path / "search")))
    table = search.as_table(search.search(Options(index=str(tmp_path / "search"), uri=f"{nights.ROOT}/b.jpg", k=2)))
    assert "a\\x1b[31mred\\n.jpg" in table
    assert "\\u202egpj.exe" in table
    assert len(table.splitlines()) == 5
    assert not [char for char in table.replace("\n", "") if not char.isprintable()]


def test_json_holds_what_the_table_shows(several: Nights) -> None:
    result = asked(several, uri=f"{nights.ROOT}/top.jpg", k=3)
    said = json.loads(search.as_json(result))
    assert [each["uri"] for each in said["answers"]] == uris(result)
    assert said["answers"][0]["label_names"][1] == "none"
    assert said["index"].startswith(f"{place(several)}/index/{DEIT}/00000007-")


# --- pictures -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gallery(head: Head, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """in/ with drawn pictures, broken ones and one of an odd name; out/, a night over it; search/, its index."""
    folder = tmp_path_factory.mktemp("gallery")
    for number in range(40):
        file = draw_file(5, number, broken_fraction=0.1)
        path = folder / "in" / (f"<b>{number}</b> 'é'.jpg" if number == 7 else file.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.data)
    checkpoint = checkpoints.write_small(folder / "model")
    options = ("--input", str(folder / "in"), "--output", str(folder / "out"), "--model", str(checkpoint))
    done = head.label_bucket(*options, "--gpu-actors=1", "--max-failed-fraction=1")
    assert done.returncode == 0, done.stderr
    build_index(BuildOptions(input=str(folder / "out"), output=str(folder / "search")))
    return folder


def command(gallery: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "search_images.py"), "--index", str(gallery / "search"), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_picture_finds_itself_with_the_labels_it_has(gallery: Path) -> None:
    row = next(iter(view.batches(storage.connect(str(gallery / "out"))))).to_pylist()[3]
    done = command(gallery, "--image", row["uri"], "-k", "2", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["answers"][0]["uri"] == row["uri"]
    assert said["answers"][0]["score"] == pytest.approx(1, abs=1e-5)
    assert [each["name"] for each in said["labels"]] == row["label_names"]
    assert [each["score"] for each in said["labels"]] == pytest.approx(row["label_scores"], abs=1e-5)


def test_another_model_than_the_indexs_is_refused(gallery: Path, tmp_path: Path) -> None:
    other = checkpoints.write_small(tmp_path / "other", seed=9)
    picture = next(path for path in (gallery / "in").rglob("*.jpg") if path.parent.name != "broken")
    done = command(gallery, "--image", str(picture), "--model", str(other))
    assert done.returncode == 5
    assert re.fullmatch(
        r"search_images: exit code 5: model .*other: expected the model of space model-[0-9a-f]{8}, model with weights"
        r" of SHA-256 [0-9a-f]{12}…, found other with [0-9a-f]{12}…\n",
        done.stderr,
    )


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--image", "nowhere.jpg"], 3, "search_images: exit code 3: read file://.*nowhere.jpg: not found"),
        (["--image", __file__], 2, "search_images: exit code 2: --image .*: not_an_image: "),
        (["--text-label", "x", "--uri", "y"], 2, "not allowed with argument"),
        ([], 2, "one of the arguments --image --uri --image-id --vector --text-label is required"),
    ],
)
def test_a_command_that_cannot_be_answered_says_why(
    gallery: Path, arguments: list[str], code: int, message: str
) -> None:
    done = command(gallery, *arguments)
    assert done.returncode == code
    assert re.search(message, done.stderr)
    assert "Traceback" not in done.stderr
    assert not done.stdout


def test_the_page_shows_the_thumbnails_and_says_why_one_is_missing(gallery: Path, tmp_path: Path) -> None:
    odd = f"file://{gallery}/in/<b>7</b> 'é'.jpg"
    page = tmp_path / "near.html"
    found = index.open_index(str(gallery / "search"))
    others = [uri for uri in found.rows([0, 1])["uri"].to_pylist() if uri != odd]
    gone = Path(others[0].removeprefix("file://"))
    data = gone.read_bytes()
    try:
        gone.unlink()
        done = command(gallery, "--uri", odd, "-k", str(found.info.num_rows - 1), "--html", str(page))
    finally:
        gone.write_bytes(data)
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    assert text.count("<img ") == found.info.num_rows - 2
    assert text.count(": not found</") == 1
    assert "<b>7" not in text
    assert "&lt;b&gt;7&lt;/b&gt;" in text
    shot = browser.screenshot(text, tmp_path, LAPTOP)
    pixels = np.asarray(shot).reshape(-1, 3).astype(int)
    colourful = (pixels.max(axis=1) - pixels.min(axis=1) > 60).mean()
    assert colourful > 0.1  # drawn pictures are; the page is gray
    assert len({tuple(each) for each in pixels[::97]}) > 200


# --- the whole way ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_on_s3_an_unseen_picture_finds_its_class_and_nothing_that_went_in_the_second_night(
    head: Head, s3: S3Server
) -> None:
    client, gallery, tables = s3.client, s3.create_bucket("gallery"), s3.create_bucket("search")
    bucket = gallery.removeprefix("s3://")
    source, output, place = f"{gallery}/in", f"{tables}/labels", f"{tables}/index-of-labels"
    draw = [sys.executable, str(ROOT / "jobs" / "draw_images.py"), "--output"]
    subprocess.run([*draw, source, f"--num-images={NUM_IMAGES}", "--seed=7"], env=head.environment, check=True)
    label = ("--input", source, "--output", output, "--model", "demo")
    first = head.label_bucket(*label)
    assert first.returncode == 0, first.stderr
    assert "recall@10 " in build_index(BuildOptions(input=output, output=place))

    unseen = [draw_file(99, number) for number in range(20)]
    client.put_object(Bucket=bucket, Key="unseen/picture", Body=unseen[0].data)
    num_right = []
    for number, file in enumerate(unseen[:3]):
        client.put_object(Bucket=bucket, Key=f"unseen/{number}", Body=file.data)
        answers = search.search(Options(index=place, image=f"{gallery}/unseen/{number}")).answers
        num_right.append(sum(each["uri"].split("/")[-2] == file.path.split("/")[0] for each in answers))
    assert min(num_right) >= 9

    found = index.open_index(place)
    all_uris = [uri for table in found.all_rows(["uri"]) for uri in table["uri"].to_pylist()]
    assert len(all_uris) == NUM_IMAGES
    deleted, overwritten, broken = all_uris[:40], all_uris[100:120], all_uris[200:210]
    keys = {uri: uri.removeprefix(f"{gallery}/") for uri in all_uris}
    client.delete_objects(Bucket=bucket, Delete={"Objects": [{"Key": keys[uri]} for uri in deleted]})
    for number, uri in enumerate(overwritten):
        client.put_object(Bucket=bucket, Key=keys[uri], Body=draw_file(77, number).data)
    for uri in broken:
        client.put_object(Bucket=bucket, Key=keys[uri], Body=b"\xff\xd8\xff\xe0 no picture follows")
    for number, file in enumerate(unseen):
        client.put_object(Bucket=bucket, Key=f"in/new/{number}", Body=file.data)
    second = head.label_bucket(*label)
    assert second.returncode == 0, second.stderr
    build_index(BuildOptions(input=output, output=place, update=True))
    updated = index.open_index(place)
    assert updated.info.base_version == found.info.version
    now = {uri for table in updated.all_rows(["uri"]) for uri in table["uri"].to_pylist()}
    assert now == {*all_uris, *(f"{gallery}/in/new/{number}" for number in range(20))} - {*deleted, *broken}
    for uri in (*deleted, *broken):
        with pytest.raises(ConfigError, match="found none such"):
            updated.ordinal_of(uri)
    everything = updated.search(found.true_vectors([found.ordinal_of(uri) for uri in deleted[:3]]), len(now))
    assert all(set(updated.rows(row)["uri"].to_pylist()) == now for row in everything.ordinals_QK)
    itself = search.search(Options(index=place, image=f"{gallery}/in/new/0", k=1)).answers[0]
    assert itself["uri"] == f"{gallery}/in/new/0"
    assert itself["score"] == pytest.approx(1, abs=1e-5)
    with Image.open(BytesIO(unseen[0].data)) as picture:
        assert (itself["width_px"], itself["height_px"]) == picture.size
