"""What counts as an object of the bucket: globs, folder markers, order."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import S3Server

from pipeline import storage
from pipeline.listing import Scope
from pipeline.storage import Store

KEYS = ["a.jpg", "b.png", "a/c.jpg", "a/b/d.jpg", "a/b/e.PNG", "ab/f.jpg", "line\nbreak/g\n.jpg", "[x]{y}.jpg"]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    for key in KEYS:
        path = tmp_path / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return storage.connect(str(tmp_path))


def in_scope(store: Store, include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()) -> set[str]:
    listed = [each for page in Scope(include=include, exclude=exclude).pages(store) for each in page]
    assert [info.key for info, _ in listed] == sorted(KEYS, key=str.encode)  # what is out of scope is still listed
    return {info.key for info, is_in_scope in listed if is_in_scope}


@pytest.mark.parametrize(
    ("include", "expected"),
    [
        ((), set(KEYS)),
        (("*.jpg",), {key for key in KEYS if key.endswith(".jpg")}),
        (("*.PNG",), {"a/b/e.PNG"}),
        (("a/*",), {"a/c.jpg"}),
        (("a/**",), {"a/c.jpg", "a/b/d.jpg", "a/b/e.PNG"}),
        (("a/*.jpg", "*.png"), {"a/c.jpg", "b.png"}),
        (("**/b/*",), {"a/b/d.jpg", "a/b/e.PNG"}),
        (("?.jpg",), {"a.jpg", "a/c.jpg", "a/b/d.jpg", "ab/f.jpg"}),
        (("[[]x]{y}.jpg",), {"[x]{y}.jpg"}),
        (("line\nbreak/*",), {"line\nbreak/g\n.jpg"}),
        (("a",), set()),
        (("c.jpg",), {"a/c.jpg"}),
    ],
)
def test_include_globs_choose(store: Store, include: tuple[str, ...], expected: set[str]) -> None:
    assert in_scope(store, include) == expected


def test_exclude_wins_over_include(store: Store) -> None:
    assert in_scope(store, ("a/**",), ("*.PNG", "a/c*")) == {"a/b/d.jpg"}
    assert in_scope(store, exclude=("**",)) == set()


@given(st.lists(st.sampled_from(["*.jpg", "a/**", "a/*", "?.*", "*/b/*", "**"]), max_size=3), st.data())
@settings(deadline=None, max_examples=30, derandomize=True)
def test_more_includes_never_lose_and_more_excludes_never_gain(include: list[str], data: st.DataObject) -> None:
    memory = storage.connect("memory://globs")
    for key in KEYS:
        memory._filesystem.pipe_file(f"/globs/{key}", b"x")  # type: ignore[attr-defined]
    exclude = data.draw(st.lists(st.sampled_from(["*.png", "a/b/*", "*.PNG"]), max_size=2))
    chosen = in_scope(memory, ("*.png", *include))
    assert chosen <= in_scope(memory, ("*.png", *include, "ab/*"))
    assert in_scope(memory, ("*.png", *include), tuple(exclude)) <= chosen


def test_folder_markers_are_filtered_and_other_empty_objects_are_not(s3: S3Server, bucket: str) -> None:
    sizes = {"": 0, "album/": 0, "album/empty.jpg": 0, "album/slash/": 3, "x.jpg": 1}
    for key, size_bytes in sizes.items():
        s3.client.put_object(Bucket=bucket[5:], Key=f"in/{key}", Body=bytes(size_bytes))
    listed = [each for page in Scope().pages(storage.connect(f"{bucket}/in")) for each in page]
    assert [(info.key, is_in_scope) for info, is_in_scope in listed] == [
        ("", False),  # what a console writes for the folder that is the source's root
        ("album/", False),
        ("album/empty.jpg", True),
        ("album/slash/", True),
        ("x.jpg", True),
    ]
