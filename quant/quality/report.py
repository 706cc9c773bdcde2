"""What was measured, as data (JSON), as text and as markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pydantic import BaseModel, ConfigDict

from .catalog import METRICS
from .distributions import DistributionValue
from .paired_statistics import CONFIDENCE, POWER, SIGNIFICANCE, MeanValue, PairedDifference
from .tables import Row, markdown_table, text_table

_FROZEN = ConfigDict(frozen=True, ser_json_inf_nan="strings")

Table = Callable[[Row, Sequence[Row]], str]


class MetricValues(BaseModel):
    """One metric of one set.

    Attributes:
        metric: Name of the metric.
        pictures: Name of the set; metrics of pairs compare it with the originals.
        values: One per picture.
        mean: Of the finite values; None if there are none.
        infinite: How many were infinite: pictures equal to the original, in PSNR.
    """

    model_config = _FROZEN

    metric: str
    pictures: str
    values: tuple[float, ...]
    mean: MeanValue | None
    infinite: int


class Comparison(BaseModel):
    """One metric of two sets, picture by picture.

    Attributes:
        metric: Name of the metric.
        first: Name of a set.
        second: Name of another one.
        result: Statistics of ``second - first``.
        prompts_for_reference: Prompts that would show the published difference between FP4 PTQ and
            FP4 QAT, with the spread found here; None where none was published.
    """

    model_config = _FROZEN

    metric: str
    first: str
    second: str
    result: PairedDifference
    prompts_for_reference: int | None


class Distance(BaseModel):
    """One metric of a whole set against the originals."""

    model_config = _FROZEN

    metric: str
    pictures: str
    result: DistributionValue


class QualityReport(BaseModel):
    """Everything that was measured.

    Attributes:
        original: Name of the set that the others are compared with.
        tested: Names of the others.
        pictures: Name of each picture.
        values: By metric and set.
        comparisons: By metric and two sets.
        distances: By metric and set.
    """

    model_config = _FROZEN

    original: str
    tested: tuple[str, ...]
    pictures: tuple[str, ...]
    values: tuple[MetricValues, ...]
    comparisons: tuple[Comparison, ...]
    distances: tuple[Distance, ...]

    def of(self, metric: str, pictures: str) -> tuple[float, ...] | None:
        """Return the values of a metric of a set, if it was measured."""
        for found in self.values:
            if (found.metric, found.pictures) == (metric, pictures):
                return found.values
        return None


def report_text(report: QualityReport) -> str:
    """Write a report with aligned columns."""
    return _written(report, text_table)


def report_markdown(report: QualityReport) -> str:
    """Write a report with tables of markdown."""
    return _written(report, markdown_table)


def _written(report: QualityReport, table: Table) -> str:
    count = len(report.pictures)
    tested = " and ".join(f"'{name}'" for name in report.tested)
    parts = [f"{count:,} pictures of {tested}, original '{report.original}'"]
    if report.values:
        parts.append(table(*_value_rows(report)))
    if report.distances:
        parts.append(table(*_distance_rows(report)))
    if report.comparisons:
        parts.append(table(*_comparison_rows(report)))
        parts.append(_explanation(report))
    return "\n\n".join(parts)


def _value_rows(report: QualityReport) -> tuple[Row, list[Row]]:
    header = ("metric", "better", "pictures", "mean", f"{CONFIDENCE:.0%} interval", "equal")
    rows: list[Row] = []
    for found in report.values:
        info = METRICS[found.metric]
        mean = interval = "-"
        if found.mean is not None:
            mean = f"{found.mean.mean:.{info.digits}f}"
            interval = _interval(found.mean.interval, info.digits)
        better = "higher" if info.higher_is_better else "lower"
        equal = str(found.infinite) if found.infinite else ""
        rows.append((info.title, better, found.pictures, mean, interval, equal))
    return header, rows


def _distance_rows(report: QualityReport) -> tuple[Row, list[Row]]:
    rows: list[Row] = []
    for found in report.distances:
        info, result = METRICS[found.metric], found.result
        spread = "" if result.deviation is None else f"{result.deviation:.{info.digits}f}"
        rows.append((info.title, found.pictures, f"{result.value:.{info.digits}f}", spread))
    return ("metric", "pictures", "distance", "deviation over subsets"), rows


def _comparison_rows(report: QualityReport) -> tuple[Row, list[Row]]:
    header = (
        "metric", "from", "to", "difference", "by Student", "by bootstrap", "p", "d_z",
        "would show", "prompts", "prompts PTQ-QAT",
    )  # fmt: skip
    rows: list[Row] = []
    for found in report.comparisons:
        info, result = METRICS[found.metric], found.result
        rows.append(
            (
                info.title,
                found.first,
                found.second,
                f"{result.difference:+.{info.digits}f}",
                _interval(result.t_interval, info.digits),
                _interval(result.bootstrap_interval, info.digits),
                f"{result.p_value:.2g}",
                f"{result.effect_size:+.2f}",
                f"{result.detectable:.{info.digits}f}",
                _count(result.prompts_needed),
                _count(found.prompts_for_reference),
            )
        )
    return header, rows


def _explanation(report: QualityReport) -> str:
    lines = [
        f"Differences are paired, intervals at {CONFIDENCE:.0%}. would show: the smallest "
        f"difference that so many pictures show with a power of {POWER:.0%} at p < {SIGNIFICANCE}; "
        "prompts: so many would show the difference found."
    ]
    if any(found.prompts_for_reference for found in report.comparisons):
        lines.append(
            "prompts PTQ-QAT: so many would show the difference that was published between FP4 PTQ "
            "and FP4 QAT of FLUX.1-dev, with the spread found here."
        )
    unsure = [
        f"{METRICS[found.metric].title} from '{found.first}' to '{found.second}'"
        for found in report.comparisons
        if found.result.p_value >= SIGNIFICANCE
    ]
    if unsure:
        lines.append(f"Not told apart from no difference: {'; '.join(unsure)}.")
    return "\n".join(lines)


def _interval(interval: tuple[float, float] | None, digits: int) -> str:
    return "-" if interval is None else f"{interval[0]:.{digits}f} to {interval[1]:.{digits}f}"


def _count(count: int | None) -> str:
    return "-" if count is None else f"{count:,}"
