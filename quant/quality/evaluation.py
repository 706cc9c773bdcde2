"""Measures sets of pictures with the chosen metrics, and compares what belongs together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from ..errors.quality import PromptsError
from ..progress import Progress
from .catalog import METRICS
from .distributions import features_of, frechet_distance, kernel_distance, load_inception
from .image_reward import ImageReward
from .pair_metrics import LPIPS, PSNR, SSIM, PairMetric, pair_values
from .paired_statistics import mean_value, paired_difference, prompts_needed
from .pictures import Pictures, check_counts
from .report import Comparison, Distance, MetricValues, QualityReport


class PictureMetric(Protocol):
    """Judges single pictures."""

    def values(self, pictures: Pictures, prompts: Sequence[str], progress: Progress) -> list[float]:
        """Return one value per picture."""


@dataclass
class LoadedMetrics:
    """Metrics that are ready to run.

    Attributes:
        pair: Of a picture and its partner, by name.
        picture: Of one picture, by name.
        distribution: Names of those of whole sets.
        extractor: Features for ``distribution``, see `features_of`.
        device: Of the extractor.
    """

    pair: dict[str, PairMetric] = field(default_factory=dict)
    picture: dict[str, PictureMetric] = field(default_factory=dict)
    distribution: tuple[str, ...] = ()
    extractor: nn.Module | None = None
    device: str = "cpu"


def load_metrics(names: Sequence[str], device: str) -> LoadedMetrics:
    """Load what the metrics need, before any time is spent on pictures.

    Raises:
        MetricLibraryError: A package is missing.
        MetricWeightsError: Weights are neither here nor can be fetched.
    """
    metrics = LoadedMetrics(device=device)
    if "psnr" in names:
        metrics.pair["psnr"] = PSNR()
    if "ssim" in names:
        metrics.pair["ssim"] = SSIM()
    if "lpips" in names:
        metrics.pair["lpips"] = LPIPS(device)
    _load_clip_metrics(metrics, [name for name in names if name.startswith("clip_")], device)
    if "image_reward" in names:
        metrics.picture["image_reward"] = ImageReward(device)
    metrics.distribution = tuple(name for name in names if METRICS[name].kind == "distribution")
    if metrics.distribution:
        metrics.extractor = load_inception(metrics.distribution[0], device)
    return metrics


def check_prompts(names: Sequence[str], prompts: Sequence[str] | None) -> None:
    """Check that metrics which judge by the prompt have prompts.

    Raises:
        PromptsError: They have none.
    """
    needing = [METRICS[name].title for name in names if METRICS[name].needs_prompts]
    if needing and prompts is None:
        raise PromptsError("There are no prompts", f"they are needed for {' and '.join(needing)}")


def evaluate(
    originals: Pictures,
    tested: Sequence[Pictures],
    prompts: Sequence[str] | None,
    metrics: LoadedMetrics,
    progress: Progress,
) -> QualityReport:
    """Measure one or more tested sets against the originals.

    Raises:
        PicturesError: The sets do not pair up.
        TooFewPicturesError: Metrics of whole sets need more.
    """
    sets = [originals, *tested]
    check_counts(sets)
    texts = [""] * len(originals) if prompts is None else prompts
    values: list[MetricValues] = []
    for pictures in tested:
        for name, found in pair_values(metrics.pair, originals, pictures, progress).items():
            values.append(_values(name, pictures.name, found))
    for name, metric in metrics.picture.items():
        for pictures in sets:
            found = metric.values(pictures, texts, progress)
            values.append(_values(name, pictures.name, found))
    return QualityReport(
        original=originals.name,
        tested=tuple(pictures.name for pictures in tested),
        pictures=tuple(originals.labels),
        values=tuple(values),
        comparisons=tuple(_comparisons(values)),
        distances=tuple(_distances(originals, tested, metrics, progress)),
    )


def _load_clip_metrics(metrics: LoadedMetrics, names: Sequence[str], device: str) -> None:
    if not names:
        return
    from .clip_metrics import CLIPIQA, CLIPScore, load_clip

    clip = load_clip(names[0], device)
    if "clip_score" in names:
        metrics.picture["clip_score"] = CLIPScore(clip, device)
    if "clip_iqa" in names:
        metrics.picture["clip_iqa"] = CLIPIQA(clip, device)


def _values(metric: str, pictures: str, found: Sequence[float]) -> MetricValues:
    finite = [value for value in found if math.isfinite(value)]
    return MetricValues(
        metric=metric,
        pictures=pictures,
        values=tuple(found),
        mean=mean_value(finite) if finite else None,
        infinite=len(found) - len(finite),
    )


def _comparisons(values: Sequence[MetricValues]) -> list[Comparison]:
    """Compare every two sets that were measured in the same way."""
    found = []
    for index, first in enumerate(values):
        for second in values[index + 1 :]:
            if first.metric != second.metric:
                continue
            pairs = [
                pair
                for pair in zip(first.values, second.values, strict=True)
                if math.isfinite(pair[0]) and math.isfinite(pair[1])
            ]
            if len(pairs) < 2:
                continue
            result = paired_difference(*zip(*pairs, strict=True))
            size = METRICS[first.metric].reference_difference
            found.append(
                Comparison(
                    metric=first.metric,
                    first=first.pictures,
                    second=second.pictures,
                    result=result,
                    prompts_for_reference=prompts_needed(size, result.deviation) if size else None,
                )
            )
    return found


def _distances(
    originals: Pictures, tested: Sequence[Pictures], metrics: LoadedMetrics, progress: Progress
) -> list[Distance]:
    if metrics.extractor is None:
        return []
    functions = {"fid": frechet_distance, "kid": kernel_distance}

    def features(pictures: Pictures) -> Tensor:
        assert metrics.extractor is not None
        return features_of(pictures, metrics.extractor, metrics.device, progress)

    reference = features(originals)
    found = []
    for pictures in tested:
        others = features(pictures)
        for name in metrics.distribution:
            result = functions[name](reference, others)
            found.append(Distance(metric=name, pictures=pictures.name, result=result))
    return found
