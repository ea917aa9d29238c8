"""A model's name -> its files on this node, and what every stage needs to know of them, without torch.

A module apart from `model`, because CPU workers need the preprocessing spec and the driver the space id, and neither
may pay for importing torch.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# Of the HTTP library, whose name differs between the hub client's versions.
from huggingface_hub.errors import HTTPError as TransportError  # type: ignore[attr-defined]

from pipeline import cache, schema, storage
from pipeline.errors import ConfigError

PreprocessMode = Literal["checkpoint", "paper", "fast"]
FAST_RULES_VERSION = 2
"""Part of the space id in mode `fast`: raised whenever its pixels change. In 1 Pillow resized."""
Pooling = Literal["pooled", "cls", "distillation", "patch-mean", "none"]
Architecture = Literal[
    "ViTForImageClassification", "DeiTForImageClassification", "DeiTForImageClassificationWithTeacher"
]

DEMO = "demo"
"""The model name that means the checkpoint shipped with this package."""

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_CONFIG = "config.json"
_PREPROCESSOR = "preprocessor_config.json"
_WANTED = re.compile(r"(config|preprocessor_config|model\.safetensors\.index)\.json|model(-[\w-]+)?\.safetensors")
_WANTED_GLOBS = [_CONFIG, _PREPROCESSOR, _INDEX, "model*.safetensors"]
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_PLACEHOLDER = re.compile(r"LABEL_\d+")
_CONVERTER, _CONVERSION = "SFconvertbot", "`safetensors` variant"
_DOWNLOAD_DEADLINE_S = 900.0
"""For one file of a checkpoint: 350 MB at 0.4 MB/s."""


@dataclass(frozen=True, kw_only=True)
class PreprocessSpec:
    """How an upright RGB image becomes the model's input; every field changes a label, so all go into the space id."""

    mode: PreprocessMode
    resize: Literal["squash", "shortest_edge", "none"]
    """`squash`: to `resize_hw_px` without keeping the aspect ratio (what the published files say). `shortest_edge`:
    that edge to `resize_hw_px[0]`, the other in proportion (how the paper evaluated)."""
    resize_hw_px: tuple[int, int]
    resample: int
    """`PIL.Image.Resampling` value; 3 is bicubic."""
    crop_px: int | None
    """Centre crop to this square, or None."""
    input_px: int
    """The model's input is uint8 (input_px, input_px, 3)."""
    rescale_factor: float
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose files lie in `folder` on this node. Elsewhere, `resolve(source, revision)` gives the same."""

    source: str
    """What `resolve` was asked for."""
    model_id: str
    """For people and for the output: the hub id, the URL, the folder's name, or `demo`."""
    revision: str
    """The commit for a model of the hub, `sha256:` and 12 hex digits of the weights' digest otherwise."""
    folder: str
    architecture: Architecture
    weights_digest: str
    """SHA-256, in hex, of the safetensors bytes (of several files: one after the other, by name)."""
    label_names: tuple[str, ...]
    """Position = label id."""
    input_px: int
    embedding_dim: int
    preprocessor_config: dict[str, Any]
    """preprocessor_config.json, with what its processor class would fill in; `preprocess.spec_from_config` reads it."""


class _Files(NamedTuple):
    folder: Path
    model_id: str
    commit: str | None


def resolve(model: str, revision: str | None = None, *, cache_dir: Path | None = None) -> Checkpoint:
    """Find a model's files, download them if need be (once per node), and read what they say.

    `model` is `demo`, a local folder, a URL of a folder in object storage, or the id of a model on the Hugging Face
    hub; a folder that exists wins over a hub id. `revision` is a branch, tag or commit of the hub, or the `sha256:…`
    that an earlier run recorded for another kind of source, which then must still have these weights.

    Downloads from object storage go below `cache_dir` (default: the folder in LABEL_BUCKET_CACHE, else
    label-bucket in the user's cache folder); the hub's own cache is where HF_HOME says.

    Raises ConfigError for a model or revision that does not exist, for one that cannot be reached, and for one that
    lacks safetensors weights, label names, a preprocessor config or a known architecture; SourceError if object
    storage cannot be read.
    """
    files = _fetch(model, revision, cache_dir)
    where = f"model {model}"
    config = _read_json(files.folder / _CONFIG, where)
    weights_digest = _digest_of(_weight_files(files.folder, where))
    found_revision = files.commit or f"sha256:{weights_digest[:12]}"
    if files.commit is None and revision not in (None, found_revision):
        raise ConfigError(f"{where}: expected revision {revision}, found {found_revision}: its weights are other ones")
    return Checkpoint(
        source=model,
        model_id=files.model_id,
        revision=found_revision,
        folder=str(files.folder),
        architecture=_architecture(config, where),
        weights_digest=weights_digest,
        label_names=_label_names(config, where),
        input_px=_input_px(config, where),
        embedding_dim=_positive_int(config, "hidden_size", where),
        preprocessor_config=_preprocessor_config(files.folder, config, where),
    )


def space_id(checkpoint: Checkpoint, spec: PreprocessSpec, pooling: Pooling, *, decode_rules_version: int) -> str:
    """`<slug>-<8 hex>`: the name of the space that these labels and vectors live in.

    The hash covers everything that changes a vector or a label: weights, architecture, input size, preprocessing,
    pooling and normalization, the decoder's EXIF and colour rules, and the label set. The slug is the model's name,
    for people. The result is safe as a file name and as a value of a Hive partition.
    """
    ingredients = {
        "weights": checkpoint.weights_digest,
        "architecture": checkpoint.architecture,
        "input_px": checkpoint.input_px,
        "preprocess": asdict(spec),
        "pooling": pooling,
        "normalization": "l2",
        "decode_rules": decode_rules_version,
        "labels": label_set_digest(checkpoint),
    }
    if spec.mode == "fast":
        ingredients["fast_rules"] = FAST_RULES_VERSION
    name = checkpoint.model_id.rstrip("/").rpartition("/")[2].lower()
    slug = re.sub(r"[^a-z0-9.]+", "-", name).strip("-.")[:64]
    return f"{slug or 'model'}-{schema.digest(ingredients)[:8]}"


def label_set_digest(checkpoint: Checkpoint) -> str:
    """SHA-256, in hex, of the label names in id order."""
    return schema.digest(checkpoint.label_names)


# --- where the files are ------------------------------------------------------------------------------------------


def _fetch(model: str, revision: str | None, cache_dir: Path | None) -> _Files:
    if model == DEMO:
        return _Files(Path(__file__).parent / "demo", DEMO, None)
    if "://" in model:
        url = storage.normalize(model)
        if not url.startswith("file://"):
            return _Files(_download(url, cache_dir or cache.default_dir()), url, None)
        model = url.removeprefix("file://")
    folder = Path(model).expanduser()
    if folder.is_dir():
        return _Files(folder.resolve(), folder.resolve().name, None)
    if _HUB_ID.fullmatch(model):
        snapshot = _from_hub(model, revision)
        return _Files(snapshot, model, snapshot.name)
    raise ConfigError(
        f"model {model}: expected demo, a folder, a URL of one, or a hub id (owner/name), found no such folder"
    )


def _download(url: str, cache_dir: Path) -> Path:
    """The checkpoint's files below `url` as a folder on this node: one process downloads, the others wait for it."""
    store = storage.connect(url)
    listed = [info for page in store.list_pages() for info in page if "/" not in info.key]
    wanted = [info for info in listed if _WANTED.fullmatch(info.key)]
    if not any(info.key == _CONFIG for info in wanted):
        raise ConfigError(f"model {url}: expected a folder with {_CONFIG}, found {_some(i.key for i in listed)}")
    if not any(info.key.endswith(".safetensors") for info in wanted):
        raise _no_weights(f"model {url}", [info.key for info in listed])
    # Another etag is another folder, so an overwritten checkpoint is never mixed with the files of the old one.
    content = schema.digest([url, [[info.key, info.etag, info.size_bytes] for info in wanted]])

    def download(folder: Path) -> None:
        for info in wanted:
            (folder / info.key).write_bytes(store.get(info.key, listed=info, deadline_s=_DOWNLOAD_DEADLINE_S))

    return cache.once(cache_dir / "checkpoints" / content[:24], download, f"model {url}")


def _from_hub(model: str, revision: str | None) -> Path:
    """The snapshot folder of a hub model; its name is the commit."""
    try:
        folder = _snapshot(model, revision or "main")
        if revision is None and not _has_weights(folder):
            folder = _snapshot(model, _conversion(model) or "main")
        return folder
    except RevisionNotFoundError as error:
        raise ConfigError(f"model {model}: the hub has no revision {revision or 'main'} of it") from error
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"model {model}: no such folder here and no such model on the hub; check the name, or set HF_TOKEN if it is"
            " private"
        ) from error
    except HFValidationError as error:
        raise ConfigError(f"model {model}: not a valid hub id: {storage.describe(error)}") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, TransportError, OSError) as error:
        raise ConfigError(
            f"model {model}: no such folder here, not in this machine's hub cache, and the hub cannot be reached"
            f" ({_first_line(error)}); check the connection and HF_HUB_OFFLINE, run `hf download {model}` where there"
            " is one, or give a folder or URL with the files"
        ) from error


def _snapshot(model: str, revision: str) -> Path:
    # Falls back to the hub's cache by itself when there is no connection; a commit in the cache costs no request.
    return Path(snapshot_download(model, revision=revision, allow_patterns=_WANTED_GLOBS))


def _conversion(model: str) -> str | None:
    """The pull request in which the hub's own converter offers a model's weights as safetensors.

    Several of the published DeiT models have pickled weights on main and this request open (deit-base-patch16-224:
    refs/pr/3). transformers' `safetensors_conversion` uses it in the same way, trusting that author alone.
    """
    requests = HfApi().get_repo_discussions(model, discussion_type="pull_request", discussion_status="open")
    conversions = (request for request in requests if request.author == _CONVERTER and _CONVERSION in request.title)
    return next((request.git_reference for request in conversions), None)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


# --- what the files say -------------------------------------------------------------------------------------------


def _read_json(path: Path, where: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        found = _some(entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else "no folder"
        raise ConfigError(f"{where}: expected a file {path.name}, found {found} in {path.parent}") from None
    except (ValueError, OSError) as error:
        raise ConfigError(f"{where}: cannot read {path}: {_first_line(error)}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{where}: expected a JSON object in {path}, found {type(content).__name__}")
    return content


def _has_weights(folder: Path) -> bool:
    return (folder / _WEIGHTS).is_file() or (folder / _INDEX).is_file()


def _weight_files(folder: Path, where: str) -> list[Path]:
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    if not (folder / _INDEX).is_file():
        raise _no_weights(where, [entry.name for entry in folder.iterdir()])
    names = set(_read_json(folder / _INDEX, where).get("weight_map", {}).values())
    files = [folder / name for name in sorted(names) if _WANTED.fullmatch(str(name))]
    missing = sorted(map(str, names - {file.name for file in files if file.is_file()}))
    if missing or not files:
        raise ConfigError(f"{where}: {_INDEX} names weight files that are not there: {_some(missing)}")
    return files


def _no_weights(where: str, names: list[str]) -> ConfigError:
    return ConfigError(
        f"{where}: expected {_WEIGHTS}, found {_some(names)}; pickled weights are never loaded, so convert them with"
        " save_pretrained, or give the --revision that holds safetensors"
    )


def _digest_of(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            hashlib.file_digest(stream, lambda: digest)
    return digest.hexdigest()


def _architecture(config: dict[str, Any], where: str) -> Architecture:
    # Never guessed from model_type: the two-head class loads a one-head checkpoint with random heads and a warning.
    match config.get("architectures"):
        case [name] if name in get_args(Architecture):
            return cast(Architecture, name)
        case found:
            expected = ", ".join(get_args(Architecture))
            raise ConfigError(f"{where}: expected one architecture out of {expected}; found {found}")


def _label_names(config: dict[str, Any], where: str) -> tuple[str, ...]:
    id2label = config.get("id2label")
    if not isinstance(id2label, dict) or not id2label:
        raise ConfigError(f"{where}: expected label names as id2label in {_CONFIG}, found none; add them")
    names = [id2label.get(str(label_id)) for label_id in range(len(id2label))]
    if any(name is None for name in names):
        raise ConfigError(f"{where}: expected the ids 0 to {len(names) - 1} in id2label, found {_some(id2label)}")
    if any(_PLACEHOLDER.fullmatch(str(name)) for name in names):
        raise ConfigError(f"{where}: expected label names in id2label, found placeholders ({names[0]}, …); name them")
    return tuple(map(str, names))


def _preprocessor_config(folder: Path, config: dict[str, Any], where: str) -> dict[str, Any]:
    # The files of the four published non-distilled models name neither a processor nor a filter. transformers'
    # AutoImageProcessor takes both from model_type: the class, and that class's default filter.
    family, resample = ("ViT", 2) if config.get("model_type") == "vit" else ("DeiT", 3)
    found = _read_json(folder / _PREPROCESSOR, where)
    if "image_processor_type" in found or "feature_extractor_type" in found:
        return found
    return {"image_processor_type": f"{family}ImageProcessor", "resample": resample} | found


def _input_px(config: dict[str, Any], where: str) -> int:
    if config.get("num_channels", 3) != 3:
        raise ConfigError(f"{where}: expected num_channels 3, found {config['num_channels']}")
    match config.get("image_size"):
        case [height, width] if height == width:
            return _positive_int({"image_size": height}, "image_size", where)
        case _:
            return _positive_int(config, "image_size", where)


def _positive_int(config: dict[str, Any], name: str, where: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or value <= 0:
        raise ConfigError(f"{where}: expected a positive whole number as {name} in {_CONFIG}, found {value}")
    return value


def _some(names: Any) -> str:
    """The first few of `names`, for a message."""
    names = sorted(names)
    return ", ".join(names[:5]) + (f", … ({len(names)} in all)" if len(names) > 5 else "") if names else "nothing"
