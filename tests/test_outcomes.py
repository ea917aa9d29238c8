"""What parts add up to: the failure budget, the accounts, and what a range's parts hold."""

import hashlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from test_plan import Place
from test_publish import CLAIM, run_range

from pipeline import outcomes, parts
from pipeline.errors import BudgetError, ConflictError
from pipeline.outcomes import RangeTotals
from pipeline.plan import Range

COUNTS = {"listed": 1000, "filtered": 100, "unchanged": 300, "planned": 600, "known": 400, "kept": 3, "deleted": 7}


def totals(labeled: int, failed: int) -> RangeTotals:
    failures = {"corrupt": failed} if failed else {}
    return RangeTotals(range_id="00000", sha256="", num_labeled=labeled, label_bytes=0, failures=failures)


# --- budget and accounts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failures", "fraction", "is_allowed"),
    [
        ({}, 0.0, True),
        ({"corrupt": 20}, 0.0, True),  # the floor
        ({"corrupt": 21}, 0.0, False),
        ({"corrupt": 45}, 0.05, True),  # 5 % of the 900 in scope, also those that are not tonight's
        ({"corrupt": 40, "missing": 6}, 0.05, False),
        ({"not_an_image": 600}, 0.0, True),
        ({"not_an_image": 500, "truncated": 21}, 0.0, False),
        ({"corrupt": 600}, 1.0, True),
    ],
)
def test_the_budget_is_a_share_of_all_objects_in_scope(
    failures: dict[str, int], fraction: float, is_allowed: bool
) -> None:
    if is_allowed:
        outcomes.check_budget(failures, COUNTS, fraction)
        return
    with pytest.raises(BudgetError, match=r"of 900 objects failed, \d+ are allowed") as caught:
        outcomes.check_budget(failures, COUNTS, fraction)
    assert all(f"{number} {kind}" in str(caught.value) for kind, number in failures.items())


@pytest.mark.parametrize(("labeled", "failed"), [(600, 0), (0, 600), (590, 10)])
def test_accounts_that_add_up_pass(labeled: int, failed: int) -> None:
    outcomes.check_accounts(Range(range_id="00000", counts=COUNTS), totals(labeled, failed), CLAIM, num_in_catalog=410)


@pytest.mark.parametrize(
    ("changes", "labeled", "failed"),
    [
        ({}, 599, 0),
        ({}, 600, 1),
        ({"listed": 1001}, 600, 0),
        ({"unchanged": 299}, 600, 0),
        ({"unchanged": 299}, 601, 0),  # adds up to what was listed, but is not what was planned
        ({"filtered": 101}, 599, 0),
    ],
)
def test_one_object_too_many_or_too_few_is_a_conflict(changes: dict[str, int], labeled: int, failed: int) -> None:
    with pytest.raises(ConflictError, match="do not add up, nothing was published: listed"):
        outcomes.check_accounts(
            Range(range_id="00000", counts={**COUNTS, **changes}), totals(labeled, failed), CLAIM, num_in_catalog=410
        )


def test_an_object_of_the_last_catalog_that_is_neither_listed_nor_deleted_is_a_conflict() -> None:
    with pytest.raises(
        ConflictError, match="the last catalog has 411 objects, of which 400 are listed, 3 out of scope and 7"
    ):
        outcomes.check_accounts(Range(range_id="00000", counts=COUNTS), totals(600, 0), CLAIM, num_in_catalog=411)


# --- parts of a range ---------------------------------------------------------------------------------------------


def test_a_range_is_summarized_once_and_its_catalog_rows_are_tonights_outcomes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outcomes, "MAX_FILE_ROWS", 20)
    place = Place(tmp_path)
    listed = place.write({f"{number:02d}": number for number in range(50)})
    claim, planned = run_range(place, {"03": "corrupt", "41": "missing", "47": "corrupt"})
    found = outcomes.summarize_range(place.output, claim.run_id, claim.run_seq, planned.range_id)
    assert (found.num_labeled, found.failures) == (47, {"corrupt": 2, "missing": 1})
    outcome = outcomes.read_outcome(place.output, claim.run_id, found)
    assert [part.unit_id for part in outcome.parts] == [unit_id for unit_id, _ in place.units(planned)]
    for part in outcome.parts:
        data = place.output.get(parts.part_key(claim.run_id, planned.range_id, part.unit_id))
        assert part.sha256 == hashlib.sha256(data).hexdigest()
    tables = list(outcomes.read_fresh(place.output, outcome))
    assert [len(table) for table in tables] == [21, 21, 8]
    rows = [row for table in tables for row in table.to_pylist()]
    assert [(row["key"], row["etag"], row["size_bytes"]) for row in rows] == [
        (info.key, info.etag, info.size_bytes) for info in listed.values()
    ]
    assert {row["key"]: row["failure_kind"] for row in rows if row["failure_kind"]} == {
        "03": "corrupt",
        "41": "missing",
        "47": "corrupt",
    }
    assert {row["run_seq"] for row in rows} == {7}
    before = place.keys()
    assert outcomes.summarize_range(place.output, claim.run_id, claim.run_seq, planned.range_id) == found
    assert place.keys() == before


def test_a_unit_without_a_part_is_a_conflict_and_named(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.write({f"{number:02d}": 1 for number in range(20)})
    claim, planned = run_range(place, {})
    unit_id = planned.chunks[0].unit_ids[1]
    (place.output_folder / parts.part_key(claim.run_id, planned.range_id, unit_id)).unlink()
    with pytest.raises(
        ConflictError, match=f"{unit_id}.parquet: expected the part of a unit that was done, found none"
    ):
        outcomes.summarize_range(place.output, claim.run_id, claim.run_seq, planned.range_id)


def test_an_outcome_that_is_not_the_sealed_one_is_a_conflict(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.write({"a": 1})
    claim, planned = run_range(place, {})
    found = outcomes.summarize_range(place.output, claim.run_id, claim.run_seq, planned.range_id)
    with pytest.raises(ConflictError, match=r"range-00000\.json: is not the file that run .* was sealed with"):
        outcomes.read_outcome(place.output, claim.run_id, replace(found, sha256="0"))


def test_failures_of_ranges_add_up() -> None:
    assert outcomes.failures_of([totals(1, 2), totals(0, 0), totals(5, 1)]) == Counter(corrupt=3)
