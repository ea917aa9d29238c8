"""Duplicates of an index against brute force; who leads a group; what the files and the page say of them."""

import functools
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import browser
import nights
import numpy as np
import pyarrow.parquet as pq
import pytest
from browser import LAPTOP
from nights import DIM, Nights
from PIL import Image

from pipeline import catalog, duplicate_files, duplicates, index, index_build, index_encode, index_files, storage
from pipeline.duplicates import Options, find_duplicates
from pipeline.errors import ConfigError, ConflictError, SourceError
from pipeline.index_update import build_index

MIN_COSINE = 0.995
MD5 = "0123456789abcdef" * 2
SHA256 = "fedcba9876543210" * 4
Rows = dict[str, dict[str, Any]]
"""Key -> what is said of it, in place of what Nights says."""


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several files and blocks of everything for a few rows."""
    monkeypatch.setattr(catalog, "MAX_FILE_ROWS", 7)
    monkeypatch.setattr(index_encode, "SLICE_ROWS", 5)
    monkeypatch.setattr(index_files, "SLICE_BYTES", 300)
    monkeypatch.setattr(duplicates, "_SLICE_ROWS", 4)
    monkeypatch.setattr(duplicates, "_QUERIES", 3)
    monkeypatch.setattr(duplicate_files, "FILE_ROWS", 6)


class Case:
    """An output of nights, its index, and what is found in it."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = folder
        self.nights = Nights(storage.connect(f"{folder}/nights"))
        self.vectors: dict[str, list[float]] = {}

    def publish(self, rows: Rows, deleted: Sequence[str] = (), **build: Any) -> None:
        """A night in which these keys are labeled, and then the index of it."""

        def change(row: dict[str, Any]) -> dict[str, Any]:
            self.vectors[row["uri"]] = (changed := {**row, **rows[row["key"]]})["embedding"]
            return changed

        self.nights.publish(rows, deleted=deleted, change=change)
        for key in deleted:
            del self.vectors[f"{nights.ROOT}/{key}"]
        build_index(
            index_build.Options(
                **{"input": self.nights.output.root, "output": f"{self.folder}/index", "min_recall": 0, **build}
            )
        )

    def find(self, output: str = "found", **changes: Any) -> str:
        wanted: dict[str, Any] = {"index": f"{self.folder}/index", "output": f"{self.folder}/{output}"}
        return find_duplicates(Options(**{**wanted, "min_cosine": MIN_COSINE, **changes}))

    def place(self, output: str = "found", version: str | None = None) -> str:
        """The folder of the newest version of the index, or of another one."""
        return f"{self.folder}/{output}/{version or index.open_index(f'{self.folder}/index').info.version}"

    def read(self, name: str, output: str = "found") -> list[dict[str, Any]]:
        """The rows of all files of a kind; keys in place of uris."""
        store = storage.connect(self.place(output))
        files = [each for each in self.said(output)["files"] if each.startswith(name)]
        tables = [pq.read_table(BytesIO(store.get(each))) for each in files]
        expected = {"edges": duplicate_files.EDGES, "groups": duplicate_files.GROUPS}[name]
        assert all(table.schema.remove_metadata() == expected for table in tables)
        assert all(0 < len(table) <= duplicate_files.FILE_ROWS for table in tables) or len(tables) == 1
        rows = [row for table in tables for row in table.to_pylist()]
        return [{k: v[len(nights.ROOT) + 1 :] if "uri" in k else v for k, v in row.items()} for row in rows]

    def edges(self, kind: str, output: str = "found") -> dict[tuple[str, str], float]:
        found = [row for row in self.read("edges", output) if row["kind"] == kind]
        pairs = {(row["uri_a"], row["uri_b"]): row["cosine"] for row in found}
        assert len(pairs) == len(found)
        assert all(a < b for a, b in pairs)
        return pairs

    def groups(self, output: str = "found") -> list[list[tuple[str, str]]]:
        """Key and kind of the members of each group, as they are written."""
        found: dict[int, list[tuple[str, str]]] = {}
        for row in self.read("groups", output):
            found.setdefault(row["group_id"], []).append((row["uri"], row["kind"]))
            assert row["leader_uri"] == found[row["group_id"]][0][0]
        assert list(found) == list(range(1, len(found) + 1))
        assert [len(each) for each in found.values()] == sorted(map(len, found.values()), reverse=True)
        return list(found.values())

    def said(self, output: str = "found") -> dict[str, Any]:
        found: dict[str, Any] = json.loads(storage.connect(self.place(output)).get("duplicates.json"))
        return found

    def page(self, output: str = "found") -> str:
        return storage.connect(self.place(output)).get("duplicates.html").decode()

    def true_pairs(self) -> dict[tuple[str, str], float]:
        """All pairs of different images that are near, by brute force."""
        uris = sorted(self.vectors)
        vectors = np.array([self.vectors[uri] for uri in uris])
        cosines = vectors @ vectors.T
        keys = [uri[len(nights.ROOT) + 1 :] for uri in uris]
        near = np.argwhere(np.triu(cosines >= MIN_COSINE, 1)).tolist()
        return {(keys[a], keys[b]): cosines[a, b] for a, b in near}


@pytest.fixture
def case(tmp_path: Path) -> Iterator[Case]:
    made = Case(tmp_path)
    # Whatever else a test is about: nothing that is said is untrue.
    yield made
    if made.vectors and storage.get_or_none(storage.connect(made.place()), "duplicates.json"):
        truth = made.true_pairs()
        for pair, cosine in made.edges("near").items():
            assert cosine == pytest.approx(truth[pair], abs=1e-6)


def unit(values: Any) -> list[float]:
    vector = np.asarray(values, np.float64)
    return list((vector / np.linalg.norm(vector)).astype(np.float32).tolist())


def direction(number: int) -> list[float]:
    """One of many directions, no two of which are near."""
    return unit(np.random.default_rng(number).normal(size=DIM))


def turned(vector: list[float], degrees: float, seed: int = 0) -> list[float]:
    """A vector so far from another one; 5.7 degrees are a cosine of 0.995."""
    away = np.random.default_rng([7, seed]).normal(size=DIM)
    away -= np.dot(away, vector) * np.asarray(vector)
    angle = np.radians(degrees)
    return unit(np.cos(angle) * np.asarray(vector) + np.sin(angle) * away / np.linalg.norm(away))


def different(count: int) -> Rows:
    return {f"other/{number:02d}.jpg": {"embedding": direction(1000 + number)} for number in range(count)}


def families(count: int, size: int) -> Rows:
    """Images around some directions: some near, some not."""
    return {
        f"f{family}/{member}.jpg": {"embedding": turned(direction(family), member * 1.7, member)}
        for family in range(count)
        for member in range(size)
    }


# --- exact copies -------------------------------------------------------------------------------------------------


def test_equal_sha256_or_else_equal_md5_and_size_are_the_same_content(case: Case) -> None:
    other = SHA256[::-1]
    rows: Rows = {
        "sha/2.jpg": {"sha256": SHA256},
        "sha/1.jpg": {"sha256": SHA256},
        "md5/1.jpg": {"etag": MD5},
        "md5/2.jpg": {"etag": MD5},
        "md5/size.jpg": {"etag": MD5, "size_bytes": 11},
        "multipart/1.jpg": {"etag": f"{MD5}-2"},
        "multipart/2.jpg": {"etag": f"{MD5}-2"},
        "local/1.jpg": {"etag": "10-1763784000000000000-77"},
        "none.jpg": {"etag": None},
        # One MD5 with two contents: anybody can make these.
        "forged/1.jpg": {"etag": MD5[::-1], "sha256": other},
        "forged/2.jpg": {"etag": MD5[::-1], "sha256": other[::-1].replace("f", "0")},
        # A night without --image-stats, then one with it.
        "mixed/old.jpg": {"etag": MD5[1:] + "0"},
        "mixed/older.jpg": {"etag": MD5[1:] + "0"},
        "mixed/new.jpg": {"etag": MD5[1:] + "0", "sha256": "0" * 64},
        "mixed/elsewhere.jpg": {"etag": "a-2", "sha256": "0" * 64},
    }
    case.publish({key: {"embedding": direction(number), **row} for number, (key, row) in enumerate(rows.items())})
    said = case.find()
    assert case.edges("exact") == {
        ("sha/1.jpg", "sha/2.jpg"): 1,
        ("md5/1.jpg", "md5/2.jpg"): 1,
        ("mixed/elsewhere.jpg", "mixed/new.jpg"): 1,
        ("mixed/elsewhere.jpg", "mixed/old.jpg"): 1,
        ("mixed/elsewhere.jpg", "mixed/older.jpg"): 1,
    }
    assert case.edges("near") == {}
    assert "of 15 rows, 5 exact copies (4 rows without a digest: label with --image-stats)" in said
    assert case.said()["num_without_digest"] == 4


def test_many_copies_of_one_picture_are_one_edge_each_and_hide_nothing_near(case: Case) -> None:
    copies = {f"copy/{number:02d}.jpg": {"embedding": direction(0), "sha256": SHA256} for number in range(40)}
    near: Rows = {"near.jpg": {"embedding": turned(direction(0), 3)}}
    case.publish({**copies, **near, **different(4)})
    case.find()
    assert set(case.edges("exact")) == {("copy/00.jpg", f"copy/{number:02d}.jpg") for number in range(1, 40)}
    assert set(case.edges("near")) == {("copy/00.jpg", "near.jpg")}
    assert case.groups() == [
        [("copy/00.jpg", "leader"), *((key, "exact") for key in sorted(copies)[1:]), ("near.jpg", "near")]
    ]


def test_after_an_update_the_smallest_uri_stands_for_a_content(case: Case) -> None:
    case.publish({"m.jpg": {"embedding": direction(0), "etag": MD5}, **different(20)})
    case.publish({"a.jpg": {"embedding": direction(0), "etag": MD5}}, update=True)
    assert index.open_index(f"{case.folder}/index").info.base_version is not None
    case.publish({"z.jpg": {"embedding": turned(direction(0), 2), "etag": MD5}}, ["other/03.jpg"], update=True)
    case.find()
    assert set(case.edges("exact")) == {("a.jpg", "m.jpg"), ("a.jpg", "z.jpg")}
    assert case.groups() == [[("a.jpg", "leader"), ("m.jpg", "exact"), ("z.jpg", "exact")]]


# --- near-duplicates ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factory", ["exact", "IVF1,Flat"])
def test_all_near_pairs_are_found_with_their_cosines(case: Case, factory: str) -> None:
    case.publish(families(5, 6), factory=factory)
    case.find()
    truth = case.true_pairs()
    assert 10 < len(truth) < 5 * 15
    found = case.edges("near")
    assert found.keys() == truth.keys()
    assert found == pytest.approx(truth, abs=1e-6)
    assert case.said()["num_near_pairs"] == len(truth)


def test_codes_of_an_index_only_propose_and_true_vectors_decide(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "MARGIN", 0.1)  # four bits err by so much
    case.publish(families(5, 6), factory="IVF1,SQ4")
    case.find()
    found = case.edges("near")
    assert found == pytest.approx(case.true_pairs(), abs=1e-6)
    opened = index.open_index(f"{case.folder}/index")
    row = opened.ordinal_of(f"{nights.ROOT}/f0/0.jpg")
    coded = opened.search(opened.true_vectors([row]), 2).cosines_QK[0, 1]
    assert abs(coded - found["f0/0.jpg", "f0/1.jpg"]) > 1e-4


def test_a_picture_with_more_neighbours_than_edges_has_all_of_them_in_its_group(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "NUM_NEIGHBOURS", 3)
    crowd = {f"c/{number:02d}.jpg": {"embedding": turned(direction(0), 2, number)} for number in range(40)}
    case.publish({**crowd, "c/far.jpg": {"embedding": turned(direction(0), 12)}, **different(4)})
    case.find()
    assert [sorted(key for key, _ in group) for group in case.groups()] == [sorted(crowd)]
    edges = case.edges("near")
    assert {b for a, b in edges if a == "c/00.jpg"} == set(crowd) - {"c/00.jpg"}
    assert case.said()["num_crowded"] == 40
    assert len(edges) < 40 * 39 / 2


def test_a_group_is_led_by_the_most_pixels_then_the_most_bytes_then_the_smallest_uri(case: Case) -> None:
    def family(number: int, **sizes: tuple[int, int, int]) -> Rows:
        return {
            f"{number}/{name}.jpg": {
                "embedding": turned(direction(number), 2, place),
                **dict(zip(("width_px", "height_px", "size_bytes"), size, strict=True)),
            }
            for place, (name, size) in enumerate(sizes.items())
        }

    case.publish(
        {
            **family(
                0, a=(640, 480, 9000), b=(50_000, 50_000, 10), c=(640, 480, 10)
            ),  # more pixels than an int32 holds
            **family(1, a=(640, 480, 10), b=(480, 640, 11)),
            **family(2, a=(640, 480, 10), b=(480, 640, 10), c=(640, 480, 10), d=(640, 480, 10)),
        }
    )
    case.find()
    assert [group[0] for group in case.groups()] == [
        ("2/a.jpg", "leader"),
        ("0/b.jpg", "leader"),
        ("1/b.jpg", "leader"),
    ]


def test_a_copy_is_in_the_group_of_its_content_and_exact_only_to_the_leader(case: Case) -> None:
    case.publish(
        {
            "big.jpg": {"embedding": direction(0), "width_px": 800, "sha256": SHA256},
            "big copy.jpg": {"embedding": direction(0), "width_px": 800, "sha256": SHA256},
            "small.jpg": {"embedding": turned(direction(0), 3), "etag": MD5},
            "small copy.jpg": {"embedding": turned(direction(0), 3), "etag": MD5},
            **different(3),
        }
    )
    case.find()
    assert case.groups() == [
        [("big copy.jpg", "leader"), ("big.jpg", "exact"), ("small copy.jpg", "near"), ("small.jpg", "near")]
    ]
    cosine = pytest.approx(np.cos(np.radians(3)), abs=1e-6)
    assert [row["cosine"] for row in case.read("groups")] == [1, 1, cosine, cosine]
    assert set(case.edges("near")) == {("big copy.jpg", "small copy.jpg")}
    assert case.said()["num_duplicates"] == 3
    assert case.said()["duplicate_bytes"] == 30


def test_a_chain_of_pictures_is_not_one_group(case: Case) -> None:
    first, other = np.eye(DIM)[:2]
    chain = [unit(np.cos(angle) * first + np.sin(angle) * other) for angle in np.radians(np.arange(0, 24, 4))]
    case.publish({f"{number}.jpg": {"embedding": vector} for number, vector in enumerate(chain)})
    case.find()
    assert [[key for key, _ in group] for group in case.groups()] == [
        ["0.jpg", "1.jpg"],
        ["2.jpg", "3.jpg"],
        ["4.jpg", "5.jpg"],
    ]
    assert len(case.edges("near")) == 5


def test_perceptual_hashes_are_compared_bit_by_bit_where_both_are_known(case: Case) -> None:
    hashes = {"a": -1, "b": 0, "c": 7, "d": None}
    case.publish(
        {
            f"{key}.jpg": {"embedding": turned(direction(0), 1, n), "phash": value}
            for n, (key, value) in enumerate(hashes.items())
        }
    )
    case.find()
    found = {row["uri_a"][0] + row["uri_b"][0]: row["phash_distance"] for row in case.read("edges")}
    assert found == {"ab": 64, "ac": 61, "ad": None, "bc": 3, "bd": None, "cd": None}
    assert [row["phash_distance"] for row in case.read("groups") if row["uri"] == "b.jpg"] == [64]


def test_one_is_not_several_and_nearly_is_not_equal(case: Case) -> None:
    case.publish(
        {
            "a.jpg": {"embedding": direction(0), "sha256": SHA256},
            "b.jpg": {"embedding": direction(0), "sha256": SHA256},
            "c.jpg": {"embedding": turned(direction(0), 1.6)},
        }
    )
    said = case.find()
    assert "of 3 rows, 1 exact copy (1 row without a digest" in said
    assert "; 1 pair with a cosine of 0.995 or more; 1 group, with 2 rows of 0.0 MB beside the best; " in said
    page = Text(case.page())
    assert "1 exact copy, 1 near pair, 1 group, 1 shown" in page.shown
    assert "0.9996" in page.shown
    assert "1.0000" in page.shown  # the copy
    assert "nav" not in page.tags


def test_nothing_is_an_answer_too(case: Case) -> None:
    case.publish({"only.jpg": {"embedding": direction(0)}})
    assert "of 1 row, 0 exact copies (1 row without a digest: label with --image-stats); 0 pairs with" in case.find()
    assert (case.read("edges"), case.read("groups")) == ([], [])
    assert "0 groups" in case.page()


# --- what is refused ----------------------------------------------------------------------------------------------


def test_too_many_pairs_are_refused_before_they_fill_memory(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "MAX_PAIRS", 20)
    case.publish({f"{n}.jpg": {"embedding": turned(direction(0), 1, n)} for n in range(9)})
    with pytest.raises(
        ConfigError, match=r"--min-cosine 0.995: expected at most 20 neighbours, found more in 3 of 9 rows; raise it"
    ):
        case.find()
    assert not list(storage.list_keys(storage.connect(f"{case.folder}/found"), ""))


@pytest.mark.parametrize("min_cosine", [0, -0.5, 1.01, float("nan")])
def test_a_threshold_that_is_no_cosine_is_refused(case: Case, min_cosine: float) -> None:
    with pytest.raises(ConfigError, match="--min-cosine: expected above 0, at most 1, found"):
        find_duplicates(Options(index="nowhere", output=str(case.folder), min_cosine=min_cosine))


@pytest.mark.slow
def test_each_version_of_an_index_has_a_folder_of_duplicates_of_one_threshold(case: Case) -> None:
    case.publish(families(3, 4))
    said = case.find()
    assert said.startswith(f"wrote {storage.connect(case.place()).root}: of 12 rows, ")
    first = index.open_index(f"{case.folder}/index").info.version

    def parquet(version: str) -> dict[str, bytes]:
        found = Path(case.place(version=version))
        return {path.name: path.read_bytes() for path in found.iterdir() if path.suffix == ".parquet"}

    before = parquet(first)
    assert {"edges.parquet", "edges-00001.parquet", "groups.parquet"} <= set(before)
    case.find(sheet_groups=1)
    assert parquet(first) == before
    with pytest.raises(
        ConflictError,
        match=rf"found/{first}: expected a folder for duplicates of {first} at 0.9, found one of .*\"min_",
    ):
        case.find(min_cosine=0.9)
    case.publish(different(1), update=True)
    second = index.open_index(f"{case.folder}/index").info.version
    case.find()
    assert {path.name for path in Path(f"{case.folder}/found").iterdir()} == {first, second}
    assert parquet(first) == before
    case.find(version=first)
    assert parquet(first) == before


def test_a_full_local_disk_is_said(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case.publish(families(1, 3))
    monkeypatch.setattr("tempfile.TemporaryFile", functools.partial(open, "/dev/full", "w+b"))
    with pytest.raises(SourceError, match=r"expected room for 0.0 GB of vectors, found OSError: .*set TMPDIR"):
        case.find()


# --- pictures -----------------------------------------------------------------------------------------------------

COLOURS = [(220, 30, 20), (20, 200, 40), (30, 40, 210)]


def pictures(store: storage.Store, files: dict[str, bytes]) -> Rows:
    """Rows of real files below the input of the nights."""
    for key, data in files.items():
        store.put(key, data)
    listed = {info.key: info for page in store.list_pages() for info in page}
    return {
        key: {
            "embedding": turned(direction(number // 3), number % 3, number),
            "etag": listed[key].etag,
            "size_bytes": listed[key].size_bytes,
            "width_px": 400 - number,
        }
        for number, key in enumerate(files)
    }


def solid(colour: tuple[int, int, int]) -> bytes:
    file = BytesIO()
    Image.new("RGB", (400, 300), colour).save(file, "PNG")
    return file.getvalue()


class Text(HTMLParser):
    """What a page shows, without its style, and the tags that it is made of."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.shown = ""
        self.num_pictures = 0
        self.feed(page.replace("<style", "<!--").replace("</style>", "-->"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.num_pictures += tag == "img"

    def handle_data(self, data: str) -> None:
        self.shown += data


def test_the_page_shows_the_largest_groups_and_why_a_picture_is_not_there(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = storage.connect(str(tmp_path / "in"))
    monkeypatch.setattr(nights, "ROOT", source.root)
    monkeypatch.setattr(duplicate_files, "SHEET_TILES", 4)
    names = ("a/<script>alert(1)<", "a/gone", "a/other", "b/1", "b/2", "b/broken", "c/1", "c/2", "c/3")
    files = {f"{name}.png": solid(COLOURS[n // 3]) for n, name in enumerate(names)}
    rows = pictures(source, {**files, "b/broken.png": files["b/1.png"][:60]})
    (tmp_path / "in/a/gone.png").unlink()
    source.put("a/other.png", solid((0, 0, 0)))
    case.publish({**rows, **{f"d/{n}.png": {"embedding": turned(direction(9), 1, n)} for n in range(5)}})
    case.find(sheet_groups=3)
    page = Text(case.page())
    assert page.num_pictures == 3
    assert "script" not in page.tags
    assert "a/<script>alert(1)<.png" in page.shown
    for text in ("missing: ", "changed: ", "truncated: ", "Group 1: 5 pictures", "4 of them shown", "cat 0.750"):
        assert text in page.shown, text
    assert "4 groups, 3 shown" in page.shown


def test_a_source_that_cannot_be_read_takes_nothing_but_the_pictures(
    case: Case, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nights, "ROOT", "http+nonsense://photos")
    case.publish(families(1, 3))
    case.find()
    assert len(case.edges("near")) == 3
    assert Text(case.page()).shown.count("No picture: ") == 3
    assert "the page lacks 3 pictures" in caplog.text


def test_browser_shows_the_pictures_of_a_group(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = storage.connect(str(tmp_path / "in"))
    monkeypatch.setattr(nights, "ROOT", source.root)
    case.publish(pictures(source, {f"{number}.png": solid(colour) for number, colour in enumerate(COLOURS)}))
    case.find()
    shot = np.asarray(browser.screenshot(case.page(), tmp_path, LAPTOP), int)
    for colour in COLOURS:
        assert (abs(shot - colour).max(axis=2) <= 6).sum() > 100 * 75, colour


def test_duplicates_of_a_bucket_are_found_by_its_etags_and_written_to_it(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = storage.connect(f"{bucket}/in")
    monkeypatch.setattr(nights, "ROOT", source.root)
    case = Case(bucket)
    same = solid(COLOURS[0])
    case.publish(pictures(source, {"a.png": same, "x/b.png": same, "c.png": solid(COLOURS[1])}))
    case.find()
    assert set(case.edges("exact")) == {("a.png", "x/b.png")}
    assert case.said()["num_without_digest"] == 0
    assert Text(case.page()).num_pictures == 3


# --- command ------------------------------------------------------------------------------------------------------


def dups(*arguments: str) -> tuple[int, str]:
    """Exit code and the last line of the command."""
    command = [sys.executable, "jobs/search_images.py", "dups", *arguments]
    root = Path(__file__).resolve().parent.parent
    ended = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    return ended.returncode, ended.stderr.splitlines()[-1]


def test_command_says_by_its_exit_code_what_became_of_it(case: Case) -> None:
    case.publish(families(3, 4), factory="IVF1,Flat")
    where = ("--index", f"{case.folder}/index", "--output", f"{case.folder}/found")
    code, said = dups(*where)
    assert code == 0
    assert said.startswith(f"search_images: exit code 0: wrote file://{case.place()}: of 12 rows, ")
    assert case.said()["min_cosine"] == MIN_COSINE
    assert len(case.edges("near")) == len(case.true_pairs())
    code, said = dups(*where, "--min-cosine", "0.9", "--sheet-groups", "0")
    assert (code, said[:28]) == (5, "search_images: exit code 5: ")
    assert dups("--index", f"{case.folder}/found", "--output", f"{case.folder}/x")[0] == 2
    assert dups(*where, "--min-cosine", "2")[0] == 2
    assert dups(*where, "--sheet-groups", "some")[0] == 2
    for path in Path(f"{case.folder}/nights/labels").rglob("*.parquet"):
        path.unlink()
    assert dups(*where)[0] == 5
