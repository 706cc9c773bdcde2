"""What each way to quantize does to the small trained model: the tables of docs/quality.md.

    python benchmarks/quality_table.py [rows]   measure rows, or all, and write the page
    python benchmarks/quality_table.py --list   names of the rows

Every row is measured once and kept in .cache/quality; delete its file to measure it again. What
was never measured on this machine keeps the line that the page has of it.

The model is emulated in torch, block by block as plans compute. Pictures are drawn from the same
noise for all rows; nothing of a recipe was chosen by them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "tools"))

from pack_import import register_pack  # noqa: E402

register_pack()

import small_model_files  # noqa: E402
from comfy_in_process import import_comfyui  # noqa: E402

import_comfyui()

from flux_fp4.quant.sources.source import open_source  # noqa: E402
from quality_measures import (  # noqa: E402
    Gauge,
    Result,
    Statistic,
    closed,
    confidence,
    frechet,
    kernel,
    with_interval,
)
from quality_rows import (  # noqa: E402
    ATTENTION,
    HALVES,
    MODULATION,
    OTHERS,
    RECIPES,
    REFINEMENTS,
    SCALES,
    TRAINING,
    Made,
    Row,
    Workshop,
)
from small_model.samples import Digits  # noqa: E402
from small_model.sampling import original_model  # noqa: E402
from torch import Tensor  # noqa: E402

FOLDER = ROOT / ".cache" / "quality"
PAGE = ROOT / "docs" / "quality.md"

ORIGINAL = Row("original", lambda workshop: Made(original_model(workshop.source), 0, 0.0, 0.0))

TABLES = {
    "recipes": RECIPES,
    "halves": HALVES,
    "attention": ATTENTION,
    "scales": SCALES,
    "training": TRAINING,
    "refinements": REFINEMENTS,
    "modulation": MODULATION,
    "others": OTHERS,
}
"""By the name of the marks in the page. Rows may be in several."""

BASELINE = RECIPES[0]
"""The gap from this to the original is what others close in parts."""


def all_rows() -> list[Row]:
    """Return every row once, the original first."""
    by_name = {row.name: row for rows in TABLES.values() for row in rows}
    return [ORIGINAL, *by_name.values()]


def stored(row: Row) -> Path:
    """Return where a row's result is kept."""
    return FOLDER / f"{row.file_name}.npz"


def measure(rows: Sequence[Row]) -> Tensor:
    """Measure rows that were not measured before; return the features of real digits."""
    digits, data = Digits.load(), small_model_files.DATA
    source = open_source(data / small_model_files.DIFFUSION_MODEL)
    gauge = Gauge(original_model(source), data / small_model_files.VAE, digits)
    FOLDER.mkdir(parents=True, exist_ok=True)
    workshop = Workshop(source, digits, FOLDER)
    for row in rows:
        if not stored(row).is_file():
            result = gauge.result(row.make(workshop))
            result.save(stored(row))
            print(f"{row.name}: {result.velocity_db:.2f} dB, {result.seconds:.0f} s", flush=True)
    return gauge.real_features()


def table(rows: Sequence[Row], real: Tensor, before: str) -> Iterator[str]:
    """Yield the lines of a table, of its rows that were measured, now or as it was before."""
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in before.splitlines()}
    yield (
        "| | velocity | flow loss | FID | KID x 1000 | digits read | confidence | of FID's gap "
        "| of KID's gap | of confidence's gap | in plans | more operations | seconds |"
    )
    yield "|---" * 13 + "|"
    for row in (ORIGINAL, *rows):
        if stored(row).is_file():
            yield f"| {' | '.join(_cells(row, real))} |"
        elif row.name in lines:
            yield lines[row.name]


def _cells(row: Row, real: Tensor) -> list[str]:
    found, original, baseline = (Result.load(stored(row)) for row in (row, ORIGINAL, BASELINE))
    cells = [row.name, f"{found.velocity_db:.2f} dB", f"{found.loss:.4f}"]
    cells += [
        _plus_minus(frechet(real), [found], 3),
        _plus_minus(kernel(real), [found], 1),
        f"{found.read.mean():.1%}",
        _plus_minus(confidence, [found], 3),
    ]
    gap = [found, baseline, original]
    parted = row not in (ORIGINAL, BASELINE)
    measures = (frechet(real), kernel(real), confidence)
    cells += [_percent(closed(measure), gap) if parted else "" for measure in measures]
    made = [f"{found.plan_bytes / 1e6:.2f} MB", f"{found.extra_operations:.1%}"]
    made += [f"{found.seconds:.0f}"]
    cells += made if found.plan_bytes else [""] * len(made)
    if row is ORIGINAL:
        cells[1] = ""
    return cells


def _plus_minus(measure: Statistic, results: Sequence[Result], digits: int) -> str:
    value, half = with_interval(measure, results)
    return f"{value:.{digits}f} ± {half:.{digits}f}"


def _percent(measure: Statistic, results: Sequence[Result]) -> str:
    value, half = with_interval(measure, results)
    return f"{value:.0%} ± {half:.0%}"


def write_page(real: Tensor) -> None:
    """Put the tables between their marks in the page."""
    text = PAGE.read_text(encoding="utf-8")
    for name, rows in TABLES.items():
        start, end = f"<!-- table {name} -->\n", f"<!-- end of table {name} -->\n"
        before, rest = text.split(start)
        old, after = rest.split(end)
        lines = "".join(f"{line}\n" for line in table(rows, real, old))
        text = f"{before}{start}{lines}{end}{after}"
    PAGE.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="row")
    parser.add_argument("--list", action="store_true")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(row.name for row in all_rows()))
        return
    chosen = [row for row in all_rows() if not arguments.rows or row.name in arguments.rows]
    real = measure([ORIGINAL, BASELINE, *chosen])
    write_page(real)


if __name__ == "__main__":
    main()
