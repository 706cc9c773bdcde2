"""From sets of pictures to a report: who is compared with whom, and what is left out."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import pytest
import torch
from flux_fp4.quant.errors.quality import PicturesError, PromptsError
from flux_fp4.quant.quality.evaluation import (
    LoadedMetrics,
    check_prompts,
    evaluate,
    load_metrics,
)
from flux_fp4.quant.quality.pictures import BatchPictures, Pictures
from flux_fp4.quant.quality.report import QualityReport, report_markdown, report_text
from quality_pictures import picture_batch, silent
from torch import Tensor, nn

COUNT = 12


class Brightness:
    """A metric of single pictures; longer prompts score higher."""

    def values(self, pictures: Pictures, prompts: Sequence[str], _progress: object) -> list[float]:
        return [
            pictures[index].float().mean().item() / 255 + len(prompt) / 100
            for index, prompt in enumerate(prompts)
        ]


class EightFeatures(nn.Module):
    def forward(self, pictures: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(pictures.float() / 255, (2, 2))[:, :2].flatten(1)


@pytest.fixture
def sets() -> list[BatchPictures]:
    clean = picture_batch(COUNT, 0.0, seed=1)
    darker = (picture_batch(COUNT, 0.05, seed=2) * 0.9).clone()
    noisy = picture_batch(COUNT, 0.2, seed=3)
    noisy[0] = clean[0]
    return [
        BatchPictures("bf16", clean),
        BatchPictures("ptq", darker),
        BatchPictures("qat", noisy),
    ]


def report_of(sets: Sequence[BatchPictures], metrics: LoadedMetrics) -> QualityReport:
    prompts = ["x" * (index % 5) for index in range(COUNT)]
    return evaluate(sets[0], sets[1:], prompts, metrics, silent)


def test_quantized_sets_are_compared_pair_by_pair(sets: list[BatchPictures]) -> None:
    metrics = load_metrics(("psnr", "ssim"), "cpu")
    metrics.picture["image_reward"] = Brightness()
    report = report_of(sets, metrics)
    compared = {(found.metric, found.first, found.second) for found in report.comparisons}
    assert compared == {
        ("psnr", "ptq", "qat"),
        ("ssim", "ptq", "qat"),
        ("image_reward", "bf16", "ptq"),
        ("image_reward", "bf16", "qat"),
        ("image_reward", "ptq", "qat"),
    }
    darker = next(x for x in report.comparisons if (x.metric, x.second) == ("image_reward", "ptq"))
    assert darker.result.difference == pytest.approx(-0.05, abs=0.01)
    assert darker.result.p_value < 1e-6
    assert darker.prompts_for_reference is not None


def test_equal_pictures_are_counted_and_left_out_of_the_mean(sets: list[BatchPictures]) -> None:
    report = report_of(sets, load_metrics(("psnr",), "cpu"))
    qat = next(found for found in report.values if found.pictures == "qat")
    assert qat.infinite == 1
    assert qat.values[0] == math.inf
    assert qat.mean is not None
    assert qat.mean.mean == pytest.approx(sum(qat.values[1:]) / (COUNT - 1))
    (comparison,) = report.comparisons
    assert comparison.result.count == COUNT - 1


def test_report_survives_json(sets: list[BatchPictures]) -> None:
    report = report_of(sets, load_metrics(("psnr", "ssim"), "cpu"))
    text = report.model_dump_json()
    json.loads(text, parse_constant=pytest.fail)
    assert QualityReport.model_validate_json(text) == report


def test_texts_hold_every_metric_and_doubt(sets: list[BatchPictures]) -> None:
    metrics = load_metrics(("psnr",), "cpu")
    metrics.picture["clip_score"] = Brightness()
    same = [sets[0], sets[1], BatchPictures("again", picture_batch(COUNT, 0.05, seed=2) * 0.9)]
    report = report_of(same, metrics)
    text = report_text(report)
    assert "12 pictures of 'ptq' and 'again', original 'bf16'" in text
    assert "Not told apart from no difference:" in text
    assert "CLIPScore from 'ptq' to 'again'" in text
    assert "| PSNR (dB) | higher | ptq |" in report_markdown(report)


def test_distributions_take_any_extractor(sets: list[BatchPictures]) -> None:
    report = report_of(sets, LoadedMetrics(distribution=("fid",), extractor=EightFeatures()))
    fid = {found.pictures: found.result.value for found in report.distances}
    assert fid["ptq"] > fid["qat"] > 0
    assert "distance" in report_text(report)


def test_one_pair_has_values_and_no_interval() -> None:
    first = BatchPictures("a", picture_batch(1, 0.0, seed=1))
    second = BatchPictures("b", picture_batch(1, 0.1, seed=1))
    report = evaluate(first, [second], None, load_metrics(("psnr",), "cpu"), silent)
    assert report.comparisons == ()
    assert report.values[0].mean is not None
    assert report.values[0].mean.interval is None
    assert "PSNR (dB)" in report_text(report)


def test_sets_of_unequal_number_are_refused(sets: list[BatchPictures]) -> None:
    fewer = BatchPictures("fewer", torch.zeros(COUNT - 1, 48, 40, 3))
    with pytest.raises(PicturesError, match="12 and 11 pictures"):
        evaluate(sets[0], [fewer], None, LoadedMetrics(), silent)


def test_metrics_that_read_prompts_are_refused_without() -> None:
    check_prompts(("psnr", "clip_iqa"), None)
    with pytest.raises(PromptsError, match="they are needed for CLIPScore and ImageReward"):
        check_prompts(("clip_score", "image_reward"), None)
