"""A labeled set, wherever it is -> its pictures, still encoded, each with what the set calls it.

    folder or bucket prefix of <class>/<file>    through our own listing, so with the uris of a labeling run
    hub id, Parquet, folder of data files        through `datasets`, streaming, which never decodes an image here

A module of its own because two very different sources become the same items here, and because this is the one that
reads with `datasets`.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

# Of the HTTP library, whose name differs between the hub client's versions.
from huggingface_hub.errors import HTTPError as TransportError  # type: ignore[attr-defined]

from pipeline import storage
from pipeline.errors import ConfigError, SourceError
from pipeline.meter import metered
from pipeline.storage import ObjectInfo, describe

DATA_SUFFIXES = (".parquet", ".arrow", ".tar", ".zip", ".json", ".jsonl", ".csv", ".tsv")
"""A folder with such a file is read by `datasets`, any other one is <class>/<file>."""
LABEL_COLUMNS = ("label", "labels", "class", "cls", "target", "fine_label")
"""Names by which a column of numbers or text is taken for the labels; a column of type ClassLabel always is."""
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_NO_LABEL = -1
"""What data sets without truth (test splits) have in a column of ClassLabel."""


@dataclass(frozen=True, kw_only=True)
class LabeledSet:
    """What is known of a set before its first picture is read. Picklable: `items` may run elsewhere."""

    root: str
    """URL of the folder or file, or the hub id."""
    split: str | None = None
    subset: str | None = None
    image_column: str | None = None
    """None: a folder of classes, listed by our own store."""
    label_column: str | None = None
    names: tuple[str, ...] | None = None
    """Its classes; None where only the rows say them."""
    num_images: int | None = None
    """None where nothing but reading tells."""
    num_outside: int = 0
    """Files beside the class folders, which are not read."""

    @property
    def is_folder(self) -> bool:
        """Whether items are objects of a store, to be fetched by who decodes them."""
        return self.image_column is None

    @property
    def uri_root(self) -> str:
        """An item's uri is this, a slash and its key."""
        part = "/".join(name for name in (self.subset, self.split) if name)
        return f"{self.root}#{part}" if part else self.root

    def __str__(self) -> str:
        return f"{self.root}, {self.subset}" if self.subset else self.root


class Item(NamedTuple):
    """One picture."""

    info: ObjectInfo
    """For a row of a table only key (its number) and size."""
    label: str | None
    """Name of its class, or a number as text where the set has no names; None where it has no label."""
    data: bytes | None
    """The encoded picture; None for an object that is still to be fetched."""


def open_set(
    where: str,
    *,
    split: str | None = None,
    subset: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> LabeledSet:
    """Find a set, its columns and its classes; no picture is read.

    `where` is a folder or URL of <class>/<file> (the first part of the key is the class), a Parquet file or a glob of
    them, a folder that `datasets` can load, or the id of a data set on the Hugging Face hub; what exists wins over an
    id. Raises ConfigError for a set, subset, split or column that is not there, SourceError if it cannot be read or has
    no pictures.
    """
    if where.endswith(".parquet"):
        return _open_table(where, split, subset, image_column, label_column)
    is_url = "://" in where
    if not is_url and not Path(where).expanduser().is_dir():
        if not _HUB_ID.fullmatch(where):
            raise ConfigError(
                f"--dataset {where}: expected a folder, a URL, Parquet files or a hub id, found no such folder"
            )
        return _open_table(where, split, subset, image_column, label_column)
    data_file = _data_file(where)
    if data_file is None:
        if split or subset or image_column or label_column:
            raise ConfigError(
                f"--dataset {where}: a folder of <class>/<file> has no splits or columns; give the folder of the split"
                " itself"
            )
        return _open_folder(where)
    if is_url:
        raise ConfigError(f"--dataset {where}: expected <class>/<file>, found {data_file}; give URL/*.parquet instead")
    return _open_table(str(Path(where).expanduser().absolute()), split, subset, image_column, label_column)


def items(labeled: LabeledSet, *, limit: int | None = None, fraction: float = 1.0, seed: int = 0) -> Iterator[Item]:
    """The pictures in order of their keys, which is byte order: the same in every run.

    `fraction` keeps a share that depends on the uris and `seed` alone, `limit` the first so many of those. Raises
    SourceError or ConfigError as `open_set`.
    """
    found = _folder_items(labeled) if labeled.is_folder else _table_items(labeled)
    if fraction < 1:
        found = (item for item in found if _draw(f"{seed}/{labeled.uri_root}/{item.info.key}") < fraction)
    return islice(found, limit)


def _draw(text: str) -> float:
    """A number from 0 to 1 that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64


# --- folders ------------------------------------------------------------------------------------------------------


def _data_file(where: str) -> str | None:
    """A file that says how its folder is to be read, among the first thousand."""
    first = next(storage.connect(where).list_pages(), [])
    return next((info.key for info in first if info.key.endswith(DATA_SUFFIXES)), None)


def _open_folder(where: str) -> LabeledSet:
    counts: Counter[str] = Counter()
    num_outside = 0
    root = storage.normalize(where)
    for info in metered(_visible(root), f"listing {root}", None):
        name, slash, _ = info.key.partition("/")
        counts[name] += bool(slash)
        num_outside += not slash
    names = tuple(sorted(name for name, number in counts.items() if number))
    if not names:
        raise SourceError(
            f"--dataset {root}: expected pictures as <class>/<file>, found {num_outside} files and no folder with some"
        )
    return LabeledSet(root=root, names=names, num_images=counts.total(), num_outside=num_outside)


def _folder_items(labeled: LabeledSet) -> Iterator[Item]:
    for info in _visible(labeled.root):
        name, slash, _ = info.key.partition("/")
        if slash:
            yield Item(info, name, None)


def _visible(root: str) -> Iterator[ObjectInfo]:
    """Objects without those that an operating system or an editor hides."""
    for page in storage.connect(root).list_pages():
        yield from (info for info in page if not info.key.startswith(".") and "/." not in info.key)


# --- what `datasets` reads ----------------------------------------------------------------------------------------


def _open_table(
    where: str, split: str | None, subset: str | None, image_column: str | None, label_column: str | None
) -> LabeledSet:
    from datasets import ClassLabel

    by_split = _load(where, subset)
    if split is None and len(by_split) == 1:
        split = next(iter(by_split))
    if split not in by_split:
        raise ConfigError(
            f"--dataset {where}: expected --split to be one of its splits ({', '.join(by_split)}), found"
            f" {split or 'none given'}"
        )
    rows = by_split[split]
    features = dict(rows.features or {})
    label = _column("label", label_column, features, [name for name in features if _is_label(name, features[name])])
    image = _column("image", image_column, features, [name for name in features if _is_image(features[name])])
    sizes = getattr(rows.info, "splits", None) or {}
    return LabeledSet(
        root=where if _HUB_ID.fullmatch(where) and not Path(where).exists() else storage.normalize(where),
        split=split,
        subset=subset,
        image_column=image,
        label_column=label,
        names=tuple(features[label].names) if isinstance(features[label], ClassLabel) else None,
        num_images=(sizes[split].num_examples or None) if split in sizes else None,
    )


def _load(where: str, subset: str | None) -> dict[str, Any]:
    """Split -> `datasets.IterableDataset`."""
    import datasets
    from datasets.exceptions import DatasetNotFoundError
    from datasets.packaged_modules.parquet.parquet import ParquetConfig
    from pyarrow.dataset import ParquetFragmentScanOptions

    where = where.removeprefix("file://")
    try:
        if where.endswith(".parquet"):
            builder = datasets.load_dataset_builder("parquet", data_files={"data": where})
        else:
            builder = datasets.load_dataset_builder(where, subset)
        if isinstance(builder.config, ParquetConfig):
            # By default every row group that was read stays in memory until the file ends.
            builder.config.fragment_scan_options = ParquetFragmentScanOptions(pre_buffer=False)
        return dict(builder.as_streaming_dataset())
    except DatasetNotFoundError as error:
        raise ConfigError(
            f"--dataset {where}: no such folder here, and not on the hub or not for this login; check the name, accept"
            f" its terms on its page and run `hf auth login` ({_line(error)})"
        ) from error
    except FileNotFoundError as error:
        raise ConfigError(f"--dataset {where}: expected data files, found none ({_line(error)})") from error
    except (OSError, TransportError) as error:
        raise SourceError(
            f"--dataset {where}: no such folder here, and the hub cannot be reached ({_line(error)}); check the"
            " connection and HF_HUB_OFFLINE"
        ) from error
    except ValueError as error:
        raise ConfigError(f"--dataset {where}: cannot be loaded ({_line(error)})") from error


def _is_image(feature: Any) -> bool:
    from datasets import Image, Value

    if isinstance(feature, dict):
        return set(feature) == {"bytes", "path"}
    return isinstance(feature, Image) or (isinstance(feature, Value) and feature.dtype.endswith("binary"))


def _is_label(name: str, feature: Any) -> bool:
    from datasets import ClassLabel

    return isinstance(feature, ClassLabel) or (name in LABEL_COLUMNS and _is_plain(feature))


def _is_plain(feature: Any) -> bool:
    from datasets import Value

    return isinstance(feature, Value) and feature.dtype.startswith(("int", "uint", "string", "large_string"))


def _column(what: str, wanted: str | None, features: dict[str, Any], found: Sequence[str]) -> str:
    """The column to read: the one that is asked for, or the only one that can be meant."""
    from datasets import ClassLabel

    listed = ", ".join(f"{name} ({_type_name(feature)})" for name, feature in features.items()) or "none"
    if wanted is not None:
        fits = wanted in features and (
            _is_image(features[wanted])
            if what == "image"
            else isinstance(features[wanted], ClassLabel) or _is_plain(features[wanted])
        )
        if not fits:
            kinds = "images or bytes" if what == "image" else "one class, number or text per row"
            raise ConfigError(f"--{what}-column {wanted}: expected a column with {kinds}, found {listed}")
        return wanted
    if len(found) != 1:
        raise ConfigError(
            f"expected one {what} column, found {' and '.join(found) or 'none'} among {listed}; name it with"
            f" --{what}-column"
        )
    return found[0]


def _type_name(feature: Any) -> str:
    return str(getattr(feature, "dtype", None) or type(feature).__name__)


def _table_items(labeled: LabeledSet) -> Iterator[Item]:
    """Rows by their number, as `datasets` streams them."""
    import datasets

    assert labeled.image_column is not None
    rows = _load(labeled.root, labeled.subset)[str(labeled.split)]
    rows = rows.select_columns([labeled.image_column, labeled.label_column])
    if isinstance(rows.features[labeled.image_column], datasets.Image):
        rows = rows.cast_column(labeled.image_column, datasets.Image(decode=False))
    upcoming = iter(rows)
    number = 0
    while (row := _next_row(upcoming, labeled)) is not None:
        data = _bytes(row[labeled.image_column])
        yield Item(ObjectInfo(f"{number:010d}", len(data), None, None), _label(row, labeled), data)
        number += 1


def _next_row(rows: Iterator[dict[str, Any]], labeled: LabeledSet) -> dict[str, Any] | None:
    from datasets.exceptions import DatasetsError

    try:
        return next(rows, None)
    except (OSError, TransportError, ValueError, DatasetsError) as error:
        raise SourceError(f"--dataset {labeled}: cannot be read on ({_line(error)})") from error


def _label(row: dict[str, Any], labeled: LabeledSet) -> str | None:
    label = row[str(labeled.label_column)]
    if label is None or (labeled.names is not None and label == _NO_LABEL):
        return None
    return str(label) if labeled.names is None else labeled.names[int(label)]


def _bytes(image: Any) -> bytes:
    """The encoded picture; nothing where the row has none, which decoding calls empty."""
    if isinstance(image, dict):
        if image.get("bytes") is None and image.get("path"):
            folder, _, name = image["path"].rpartition("/")
            return storage.connect(folder or ".").get(name)
        image = image.get("bytes")
    return bytes(image or b"")


def _line(error: BaseException) -> str:
    return describe(error)[:300]
