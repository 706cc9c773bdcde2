"""Results of the version matrix: read from pytest's report, kept as data, shown as a table."""

from __future__ import annotations

from pathlib import Path

import pytest
from matrix_results import (
    BEGIN,
    DATA,
    END,
    PAGE,
    Results,
    RowResult,
    counts_of_junit,
    first_line,
    load_results,
    problems_of_junit,
    table,
    with_table,
)
from matrix_rows import ROWS, Row
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from . import test_architecture

PROJECT = test_architecture.PYPROJECT["project"]

# what pytest 9.2 wrote for one test of each outcome
REPORT = """<?xml version="1.0" encoding="utf-8"?>
<testsuites name="pytest tests"><testsuite name="pytest" errors="1" failures="1" skipped="1"
 tests="5" time="0.046" timestamp="2026-11-25T17:10:00" hostname="host">
<testcase classname="tests.unit.test_a" name="test_good" time="0.001" />
<testcase classname="tests.unit.test_a" name="test_good_too" time="0.001" />
<testcase classname="tests.unit.test_a" name="test_bad[x]" time="0.001">
<failure message="AssertionError: 1 | 2&#10;assert False">def test_bad(): ...</failure></testcase>
<testcase classname="tests.unit.test_a" name="test_set_up" time="0.001">
<error message="failed on setup with &quot;OSError: gone&quot;">...</error></testcase>
<testcase classname="tests.unit.test_a" name="test_elsewhere" time="0.001">
<skipped type="pytest.skip" message="no GPU">...</skipped></testcase>
</testsuite></testsuites>"""

FIRST = Row("first", python="3.12")
SECOND = Row("second", python="3.13", pins={"torch": "2.15.0"})
VERSIONS = {"python": "3.12.1", "torch": "2.11.0", "numpy": "2.5.5", "rich": "15.0.0"}


def result(**fields: object) -> RowResult:
    return RowResult(**{"row": "first", "date": "2026-11-25", "suite": "unit", **fields})


def test_counts_of_a_report() -> None:
    assert counts_of_junit(REPORT) == {"passed": 2, "failed": 2, "skipped": 1}


def test_problems_of_a_report_are_tests_with_their_first_line() -> None:
    assert problems_of_junit(REPORT) == (
        "tests.unit.test_a::test_bad[x]: AssertionError: 1 | 2",
        'tests.unit.test_a::test_set_up: failed on setup with "OSError: gone"',
    )


def test_first_line_skips_empty_lines_and_is_cut() -> None:
    assert first_line("\n \n  a\nb") == "a"
    assert first_line("") == ""
    assert len(first_line("x" * 1000)) == 300


@pytest.mark.parametrize(
    ("fields", "verdict"),
    [
        ({"versions": VERSIONS, "passed": 1234}, "1,234 passed"),
        ({"versions": VERSIONS, "passed": 2, "skipped": 1}, "2 passed, 1 skipped"),
        ({"versions": VERSIONS, "passed": 2, "failed": 1}, "**1 of 3 failed**"),
        ({"versions": VERSIONS, "problems": ("out of time",)}, "no test ran"),
        (
            {"problems": ("error: because torch==2.15.0 has no wheels with a matching Python",)},
            "no wheel",
        ),
        ({"problems": ("error: because there is no version of onnx==9",)}, "no wheel"),
        ({"problems": ("error: a conflicts with b",)}, "does not install"),
    ],
    ids=["passed", "skipped", "failed", "none ran", "no tag", "no version", "conflict"],
)
def test_verdict(fields: dict[str, object], verdict: str) -> None:
    assert result(**fields).verdict == verdict


def test_new_result_replaces_the_older_one_of_its_row_only() -> None:
    results = Results().with_result(result(passed=1)).with_result(result(row="second"))
    results = results.with_result(result(passed=2))
    assert [(r.row, r.passed) for r in results.results] == [("first", 2), ("second", 0)]


def test_table_shows_installed_versions_and_failures() -> None:
    failed = result(versions=VERSIONS, failed=1, passed=1, problems=("test_a: 1 | 2",))
    lines = table([FIRST], Results().with_result(failed)).splitlines()
    assert lines[2] == (
        "| `first` | 3.12.1 | 2.11.0 |  |  |  |  | 2.5.5 | unit | **1 of 2 failed** | 2026-11-25 |"
    )
    assert lines[-1] == r"- `first`: test_a: 1 \| 2"
    assert {line.count(" | ") for line in lines[:1] + lines[2:3]} == {len(lines[1].split("|")) - 3}


def test_row_that_does_not_install_shows_what_it_asked_for() -> None:
    missing = result(row="second", problems=("no wheels",))
    lines = table([SECOND], Results().with_result(missing)).splitlines()
    assert lines[2].startswith("| `second` | 3.13 | 2.15.0 |")
    assert "does not install" in lines[2]


def test_row_that_was_not_run_is_in_the_table() -> None:
    lines = table([FIRST, SECOND], Results().with_result(result(versions=VERSIONS))).splitlines()
    assert "not run" in lines[3]


def test_table_replaces_only_what_is_between_the_markers() -> None:
    page = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert with_table(page, "new") == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    with pytest.raises(ValueError, match="has no"):
        with_table("no markers", "new")


def test_results_survive_the_file(tmp_path: Path) -> None:
    results = Results().with_result(result(versions=VERSIONS, problems=("a",)))
    path = tmp_path / "results.json"
    path.write_text(results.model_dump_json())
    assert load_results(path) == results
    assert load_results(tmp_path / "none.json") == Results()


def test_page_shows_the_recorded_results() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_table(page, table(ROWS, load_results()))


def test_every_recorded_result_belongs_to_a_row() -> None:
    assert DATA.is_file()
    assert {r.row for r in load_results().results} <= {row.name for row in ROWS}


def test_lowest_row_ran_with_the_declared_bounds() -> None:
    """A bound that is moved has to be tried: `make matrix ROWS=lowest`."""
    (lowest,) = (r for r in load_results().results if r.row == "lowest")
    assert lowest.passed > 0
    assert lowest.failed == 0
    declared = [Requirement(line) for line in PROJECT["dependencies"]]
    bounds = {r.name: bound_of(r.specifier) for r in declared}
    bounds["python"] = bound_of(SpecifierSet(PROJECT["requires-python"]))
    for name, bound in bounds.items():
        installed = Version(lowest.versions[name]).release
        assert installed[: len(bound)] == bound, name


def bound_of(specifiers: SpecifierSet) -> tuple[int, ...]:
    (bound,) = (Version(s.version) for s in specifiers if s.operator == ">=")
    return bound.release
