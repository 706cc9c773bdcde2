"""Command `quality`: metrics of pictures, SQNR of a checkpoint, and how many prompts are enough."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import OptionError
from .folders import existing_checkpoint, model_folders
from .quantize import chosen_device

if TYPE_CHECKING:
    import numpy as np

    from ..quant.quality.report import QualityReport


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    from ..quant.quality.catalog import METRICS

    parser.add_argument(
        "inputs",
        nargs="*",
        metavar="FOLDER | CHECKPOINT",
        help="two folders of pictures with equal file names, the original model's first; or three, "
        "to compare two quantized models with each other as well; or the name of a quantized "
        "checkpoint",
    )
    parser.add_argument(
        "--metric",
        action="append",
        choices=tuple(METRICS),
        help="may be repeated (default: psnr and ssim, which need no download)",
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="one prompt per line in the order of the file names, or JSON from file name to prompt",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every value as JSON")
    parser.add_argument("--markdown", action="store_true", help="print tables of markdown")
    parser.add_argument(
        "--chart",
        type=Path,
        metavar="FILE",
        help="write a picture: the worst pairs with heat maps, or the SQNR by block",
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument(
        "--difference",
        type=float,
        metavar="D",
        help="without inputs: print how many prompts show a mean difference D",
    )
    parser.add_argument(
        "--deviation",
        type=float,
        metavar="S",
        help="with --difference: standard deviation of the paired differences",
    )


def run(chosen: argparse.Namespace) -> int:
    """Measure what the inputs are."""
    if not chosen.inputs:
        return _print_prompts_needed(chosen.difference, chosen.deviation)
    if chosen.difference is not None or chosen.deviation is not None:
        raise OptionError("--difference", "it goes with no input")
    if len(chosen.inputs) == 1:
        return _report_checkpoint(chosen)
    if len(chosen.inputs) > 3:
        raise OptionError("FOLDER", f"{len(chosen.inputs)} were given, two or three are compared")
    return _compare_folders(chosen)


def _print_prompts_needed(difference: float | None, deviation: float | None) -> int:
    from ..quant.quality.paired_statistics import POWER, SIGNIFICANCE, prompts_needed

    if difference is None or deviation is None:
        raise OptionError(
            "FOLDER", "give two folders, a checkpoint, or --difference and --deviation"
        )
    if difference == 0 or deviation < 0:
        raise OptionError("--difference", "it must not be 0, and --deviation not negative")
    count = prompts_needed(difference, deviation)
    print(
        f"{count:,} prompts show a mean difference of {difference:g} with a power of {POWER:.0%} "
        f"at p < {SIGNIFICANCE}, if paired differences have a standard deviation of {deviation:g}."
    )
    return 0


def _report_checkpoint(chosen: argparse.Namespace) -> int:
    from ..quant.quality.checkpoint_tables import sqnr_tables
    from ..quant.quantized_checkpoint import QuantizedCheckpoint
    from ..quant.summary import quantized_summary

    file = existing_checkpoint(model_folders(chosen.models), chosen.inputs[0])
    checkpoint = QuantizedCheckpoint.read(file)
    print(quantized_summary(checkpoint))
    print(f"\n{sqnr_tables(checkpoint.metadata, chosen.markdown)}")
    if chosen.json is not None:
        chosen.json.write_text(checkpoint.metadata.model_dump_json(include={"linears", "blocks"}))
    if chosen.chart is not None:
        from ..quant.quality.charts import sqnr_chart

        _save(chosen.chart, sqnr_chart(checkpoint.metadata, checkpoint.name))
    return 0


def _compare_folders(chosen: argparse.Namespace) -> int:
    from ..quant.quality.catalog import DEFAULT_METRICS
    from ..quant.quality.charts import picture_grid
    from ..quant.quality.evaluation import check_prompts, evaluate, load_metrics
    from ..quant.quality.grids import worst_pairs
    from ..quant.quality.pictures import paired_folders, read_prompts
    from .progress import CommandProgress

    names = tuple(dict.fromkeys(chosen.metric or DEFAULT_METRICS))
    originals, *tested = paired_folders([Path(folder) for folder in chosen.inputs])
    prompts = None if chosen.prompts is None else read_prompts(chosen.prompts, originals.labels)
    check_prompts(names, prompts)
    metrics = load_metrics(names, chosen_device(chosen.device))
    with CommandProgress() as progress:
        report = evaluate(originals, tested, prompts, metrics, progress)
    _print(report, chosen.markdown)
    if chosen.json is not None:
        chosen.json.write_text(report.model_dump_json(indent=1))
    if chosen.chart is not None:
        shown = tested[-1]
        pairs = worst_pairs(report, originals, shown)
        _save(chosen.chart, picture_grid(pairs, (originals.name, shown.name)))
    return 0


def _print(report: QualityReport, markdown: bool) -> None:
    from ..quant.quality.report import report_markdown, report_text

    print(report_markdown(report) if markdown else report_text(report))


def _save(file: Path, pixels: np.ndarray) -> None:
    from ..quant.chart_style import save_chart

    try:
        save_chart(pixels, file)
    except ValueError as error:
        # Pillow chooses the format by the suffix
        raise OptionError("--chart", f"{error}; a name that ends in .png is written") from error
