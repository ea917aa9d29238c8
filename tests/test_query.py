"""What one searches with: a picture becomes the vector that a night gives it, numbers only if they have a direction."""

import io
import json
from pathlib import Path

import checkpoints
import numpy as np
import pyarrow as pa
import pytest

from pipeline import checkpoint, decode, query, run_model, schema, storage
from pipeline.draw import DAMAGES, draw_file
from pipeline.errors import AbsentError, ConfigError, ConflictError
from pipeline.picture import Recipe
from pipeline.prepare import prepare_unit
from pipeline.preprocess import spec_from_config
from pipeline.run_model import Settings


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return checkpoints.write_small(tmp_path / "small")


@pytest.fixture
def settings(folder: Path) -> Settings:
    found = checkpoint.resolve(str(folder))
    spec = spec_from_config(found.preprocessor_config, mode="checkpoint", input_px=found.input_px)
    rules = decode.DECODE_RULES_VERSION
    return Settings(
        space_id=checkpoint.space_id(found, spec, "pooled", decode_rules_version=rules),
        model_id=found.model_id,
        model_revision=found.revision,
        weights_digest=found.weights_digest,
        spec=spec,
        pooling="pooled",
        precision="fp32",
        decode_rules_version=str(rules),
        top_k=3,
    )


def test_a_picture_gets_the_vector_and_labels_that_a_night_gives_it(
    settings: Settings, folder: Path, tmp_path: Path, bucket: str
) -> None:
    drawn = [draw_file(7, number) for number in range(3)]
    store = storage.connect(str(tmp_path / "in"))
    for number, file in enumerate(drawn):
        store.put(f"{number}.jpg", file.data)
    objects = pa.Table.from_pylist(
        [{**info._asdict(), "uri": f"{store.root}/{info.key}"} for page in store.list_pages() for info in page],
        schema.OBJECTS,
    )
    recipe = Recipe(spec=settings.spec, limits=decode.DEFAULT_LIMITS)
    decoded, _ = prepare_unit(store, objects, recipe, deadline_s=30)
    rows = run_model.labeler(settings, run_model.find(settings, [str(folder)]))(decoded).to_pylist()
    storage.connect(bucket).put("of/somebody's #1.jpg", drawn[1].data)
    names = [str(folder)]
    for place, row in [
        (str(tmp_path / "in" / "0.jpg"), rows[0]),
        (f"{bucket}/of/somebody's #1.jpg", rows[1]),
        (f"file://{tmp_path}/in/2.jpg", rows[2]),
    ]:
        found = query.picture(place, settings, names)
        assert np.dot(found.vector, row["embedding"]) > 1 - 1e-6
        assert [name for name, _ in found.labels] == row["label_names"]
        assert found.image.size == (row["width_px"], row["height_px"])


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_picture_is_refused_with_its_kind(settings: Settings, tmp_path: Path, damage: str) -> None:
    file = draw_file(7, 1)
    (tmp_path / "q.jpg").write_bytes(DAMAGES[damage](file.data, np.random.default_rng(1)))
    with pytest.raises(ConfigError, match=r"^--image .*/q\.jpg: (\w+): ") as raised:
        query.picture(str(tmp_path / "q.jpg"), settings, [])
    assert "\n" not in str(raised.value)


def test_a_picture_of_another_model_or_none_is_refused(settings: Settings, tmp_path: Path) -> None:
    other = checkpoints.write_small(tmp_path / "other", seed=1)
    (tmp_path / "q.jpg").write_bytes(draw_file(7, 1).data)
    with pytest.raises(ConflictError, match=r"^model .*/other: expected the model of space small-\w+, small with "):
        query.picture(str(tmp_path / "q.jpg"), settings, [str(other)])
    with pytest.raises(AbsentError, match=r"nothing\.jpg: not found"):
        query.picture(str(tmp_path / "nothing.jpg"), settings, [str(other)])
    with pytest.raises(ConfigError, match="expected the path or URL of a file, found s3://bucket"):
        query.picture("s3://bucket", settings, [])


def npy(values: object) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array(values))
    return file.getvalue()


@pytest.mark.parametrize("form", ["text", "json", "npy", "npy of one row", "s3"])
def test_numbers_become_a_vector_of_length_1(form: str, tmp_path: Path, bucket: str) -> None:
    given = [3.0, 0, -4, 1e300]
    text, file = json.dumps(given), tmp_path / "v"
    file.write_bytes({"json": text.encode(), "npy": npy(given), "npy of one row": npy([given])}.get(form, b""))
    storage.connect(bucket).put("v.json", text.encode())
    found = query.numbers({"text": f" {text}", "s3": f"{bucket}/v.json"}.get(form, str(file)), 4)
    assert found.dtype == np.float32
    assert found.shape == (4,)
    assert np.allclose(found, [0, 0, 0, 1])
    assert np.allclose(query.numbers("[3, 0, -4, 0]", 4), [0.6, 0, -0.8, 0])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[1, 2, 3]", "expected 4 numbers, as many as the index has, found shape (3,)"),
        ("[[1, 2, 3, 4], [1, 2, 3, 4]]", "found shape (2, 4)"),
        ("[1, NaN, 3, Infinity]", "found 2 NaN or infinite"),
        ("[0, 0, 0, 0]", "that are not all 0"),
        ("[1, 2, [3], 4]", "expected a list of 4 numbers, as JSON or .npy, found b'[1, 2, [3], 4]'"),
        ('[1, 2, "three", 4]', "expected a list of 4 numbers"),
        ("[1, 2, 3", "expected a list of 4 numbers"),
        (f"[1, 2, 3, {10**400}]", "expected a list of 4 numbers"),
        ("[]", "found shape (0,)"),
    ],
)
def test_numbers_without_a_direction_are_refused(text: str, found: str) -> None:
    with pytest.raises(ConfigError, match=r"^--vector: ") as raised:
        query.numbers(text, 4)
    assert found in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"\x93NUMPY\x01", b"\xff\xfe", npy([{}])], ids=["empty", "object", "cut", "bytes", "pickle"]
)
def test_files_without_numbers_are_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "v").write_bytes(data)
    with pytest.raises(ConfigError, match=r"^--vector .*/v: expected a list of 4 numbers, as JSON or \.npy, found b"):
        query.numbers(str(tmp_path / "v"), 4)
