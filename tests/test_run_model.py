"""The model of a run, found again: by any name under which its weights lie, and never another one."""

import dataclasses
import re
import shutil
from pathlib import Path

import checkpoints
import pytest

from pipeline import request, run_model, storage
from pipeline.config import Config
from pipeline.draw import draw_file
from pipeline.errors import ConfigError, ConflictError
from pipeline.log import State
from pipeline.run_model import Settings


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of the run's checkpoint."""
    return checkpoints.write_small(tmp_path / "small")


@pytest.fixture
def settings(folder: Path, tmp_path: Path) -> Settings:
    """What a run with that checkpoint says of itself."""
    storage.connect(str(tmp_path / "in")).put("a.png", draw_file(1, 1).data)
    config = Config(input=str(tmp_path / "in"), output=str(tmp_path / "out"), model=str(folder))
    output = storage.connect(config.output)
    asked = request.resolve(config, storage.connect(config.input), output, State(entries=[], open_claim=None))
    metadata = request.footer_metadata(config, asked, "fp32")
    found = run_model.settings_of(metadata, top_k=config.top_k)
    assert (found.spec, found.space_id, found.top_k) == (asked.spec, asked.space_id, 5)
    return found


def test_the_right_weights_are_found_under_any_name(settings: Settings, folder: Path) -> None:
    copy = shutil.copytree(folder, folder.with_name("copy"))
    other = checkpoints.write_small(folder.with_name("other"), seed=1)
    for names in ([str(folder)], [str(copy)], [None, "nowhere", str(other), str(copy)]):
        found = run_model.find(settings, names)
        assert found.weights_digest == settings.weights_digest
        assert run_model.labeler(settings, found).canary_vectors().shape == (20, 24)


def test_a_copy_of_a_hub_model_needs_no_revision(settings: Settings, folder: Path) -> None:
    of_hub = dataclasses.replace(settings, model_id="facebook/deit-small", model_revision="0123456789abcdef")
    assert run_model.find(of_hub, [str(folder)]).weights_digest == settings.weights_digest


def test_another_model_is_refused_with_both_named(settings: Settings, folder: Path) -> None:
    other = checkpoints.write_small(folder.with_name("other"), seed=1)
    with pytest.raises(
        ConflictError, match=rf"small with weights of SHA-256 {settings.weights_digest[:12]}…, found other"
    ):
        run_model.find(settings, [str(other)])
    with pytest.raises(ConfigError, match=r"model nowhere: .* found no such folder"):
        run_model.find(settings, ["nowhere", str(other)])


def test_other_settings_or_rules_than_those_of_the_space_are_refused(settings: Settings, folder: Path) -> None:
    found = run_model.find(settings, [str(folder)])
    other = dataclasses.replace(settings, spec=dataclasses.replace(settings.spec, resample=2))
    with pytest.raises(ConflictError, match=rf"expected settings that make the space {re.escape(settings.space_id)}"):
        run_model.labeler(other, found)
    with pytest.raises(ConfigError, match=r"was decoded by rules 0, this version has \d"):
        run_model.labeler(dataclasses.replace(settings, decode_rules_version="0"), found)
