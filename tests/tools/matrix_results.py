"""What became of each row of the version matrix: data, and the table in docs/compatibility.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from matrix_rows import Row
from pack_import import ROOT
from pydantic import BaseModel, ConfigDict

DATA = ROOT / "docs" / "compatibility.json"
PAGE = ROOT / "docs" / "compatibility.md"
BEGIN, END = "<!-- table of compatibility.json: make matrix -->", "<!-- end of table -->"

COLUMNS = {
    "python": "Python",
    "torch": "torch",
    "tensorrt-rtx": "TensorRT-RTX",
    "nvidia-modelopt": "ModelOpt",
    "onnx": "onnx",
    "onnxruntime": "ONNX Runtime",
    "numpy": "NumPy",
}
"""Shown versions by the names under which they are recorded."""
SHOWN_PROBLEMS = 5
NO_WHEEL = ("has no wheels with a matching", "there is no version of")
"""What uv 0.13 says when the index has no such file."""


class RowResult(BaseModel):
    """One row as it was run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    row: str
    date: str
    """Day of the run, ISO 8601."""
    suite: str
    """Key of `matrix.SUITES`: which tests ran."""
    versions: dict[str, str] = {}
    """What the environment held, Python included; empty when it could not be made."""
    passed: int = 0
    failed: int = 0
    """Tests that failed, or could not be collected or set up."""
    skipped: int = 0
    problems: tuple[str, ...] = ()
    """The first failures, or why no test ran."""

    @property
    def verdict(self) -> str:
        """One phrase for the table."""
        if not self.versions:
            missing = any(words in problem for words in NO_WHEEL for problem in self.problems)
            return "no wheel" if missing else "does not install"
        ran = self.passed + self.failed
        if ran == 0:
            return "no test ran"
        skipped = f", {self.skipped:,} skipped" if self.skipped else ""
        if self.failed:
            return f"**{self.failed:,} of {ran:,} failed**{skipped}"
        return f"{self.passed:,} passed{skipped}"


class Results(BaseModel):
    """The content of docs/compatibility.json."""

    model_config = ConfigDict(extra="forbid")

    results: tuple[RowResult, ...] = ()

    def with_result(self, result: RowResult) -> Results:
        """Return results in which `result` takes the place of the row's older one."""
        kept = (old for old in self.results if old.row != result.row)
        return Results(results=tuple(sorted((*kept, result), key=lambda r: r.row)))


def load_results(path: Path = DATA) -> Results:
    """Read the recorded results; none yet without a file."""
    return Results.model_validate_json(path.read_text()) if path.is_file() else Results()


def counts_of_junit(report: str) -> dict[str, int]:
    """Return `passed`, `failed` and `skipped` of a JUnit XML report of pytest."""
    suites = list(ElementTree.fromstring(report).iter("testsuite"))
    tests, skipped = (sum(int(s.get(key, 0)) for s in suites) for key in ("tests", "skipped"))
    failed = sum(int(s.get(key, 0)) for s in suites for key in ("failures", "errors"))
    return {"passed": tests - failed - skipped, "failed": failed, "skipped": skipped}


def problems_of_junit(report: str) -> tuple[str, ...]:
    """Return the first failed tests, each with the first line of what it raised."""
    problems = [
        f"{case.get('classname')}::{case.get('name')}: {first_line(problem.get('message', ''))}"
        for case in ElementTree.fromstring(report).iter("testcase")
        for problem in (*case.findall("failure"), *case.findall("error"))
    ]
    return tuple(problems[:SHOWN_PROBLEMS])


def first_line(text: str) -> str:
    """Return the first line that says something, cut to 300 characters."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")[:300]


def table(rows: Sequence[Row], results: Results) -> str:
    """Return the Markdown table of all rows, run or not, and below it what failed."""
    by_row = {result.row: result for result in results.results}
    lines = [
        f"| row | {' | '.join(COLUMNS.values())} | tests | result | day |",
        "|---" * (len(COLUMNS) + 4) + "|",
        *(_line(row, by_row.get(row.name)) for row in rows),
    ]
    failures = [
        f"- `{row.name}`: {problem.replace('|', chr(92) + '|')}"
        for row in rows
        if row.name in by_row
        for problem in by_row[row.name].problems
    ]
    if failures:
        lines += ["", "What failed, up to five of a row:", "", *failures]
    return "\n".join(lines)


def with_table(page: str, rendered: str) -> str:
    """Return the text of a page with the table between its markers replaced."""
    before, found, rest = page.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not (found and closed):
        raise ValueError(f"The page has no '{BEGIN}' followed by '{END}'.")
    return f"{before}{BEGIN}\n{rendered}\n{END}{after}"


def _line(row: Row, result: RowResult | None) -> str:
    # a row without an environment shows what it asked for
    asked = {"python": row.python, **row.pins}
    versions = (result.versions if result else {}) or asked
    shown = " | ".join(versions.get(name, "") for name in COLUMNS)
    outcome = f"{result.suite} | {result.verdict} | {result.date}" if result else " | not run | "
    return f"| `{row.name}` | {shown} | {outcome} |"
