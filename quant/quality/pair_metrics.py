"""Metrics of a picture and its partner: one number for each pair."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from ..errors.quality import PicturesError
from ..progress import Progress
from .catalog import METRICS
from .loading import loaded
from .pictures import Pictures

SSIM_WINDOW = 11
"""Pixels; a Gaussian window with sigma 1.5 (Wang et al. 2004)."""


class PairMetric(Protocol):
    """Compares a picture with the original's."""

    def value(self, original: Tensor, tested: Tensor) -> float:
        """Return the metric of two pictures ``[1, 3, height, width]`` of floats from 0 to 1."""


class PSNR:
    """Peak signal-to-noise ratio in dB, peak 1; infinite for equal pictures."""

    def value(self, original: Tensor, tested: Tensor) -> float:
        """See `PairMetric`."""
        from torchmetrics.functional.image import peak_signal_noise_ratio

        return peak_signal_noise_ratio(tested, original, data_range=1.0).item()


class SSIM:
    """Structural similarity, mean over the three channels; 1 for equal pictures."""

    def value(self, original: Tensor, tested: Tensor) -> float:
        """See `PairMetric`.

        Raises:
            PicturesError: The pictures are smaller than the window.
        """
        from torchmetrics.functional.image import structural_similarity_index_measure

        height, width = original.shape[-2:]
        if min(height, width) < SSIM_WINDOW:
            raise PicturesError(
                f"SSIM cannot be computed of pictures of {width}x{height} pixels",
                f"its window is {SSIM_WINDOW} pixels wide",
                "Leave it out, or draw larger pictures.",
            )
        _, everywhere = structural_similarity_index_measure(
            tested, original, sigma=1.5, data_range=1.0, return_full_image=True
        )
        # torchmetrics' own mean counts mirrored borders too; the paper's and scikit-image's do not.
        edge = SSIM_WINDOW // 2
        return everywhere[..., edge:-edge, edge:-edge].mean().item()


class LPIPS:
    """Distance between deep features, as people see it (Zhang et al. 2018); 0 for equal pictures.

    AlexNet, which the authors advise for judging. torchmetrics brings the weights of the heads,
    torchvision fetches those of the network.
    """

    def __init__(self, device: str, network: str = "alex") -> None:
        self._device = device
        self._metric: nn.Module = loaded(
            METRICS["lpips"].title,
            lambda: _lpips(network),
            f"the ImageNet weights of torchvision's {network}",
            "download.pytorch.org",
        ).to(device)

    def value(self, original: Tensor, tested: Tensor) -> float:
        """See `PairMetric`."""
        with torch.no_grad():
            distance = self._metric(tested.to(self._device), original.to(self._device))
        return float(distance)


def pair_values(
    metrics: dict[str, PairMetric], originals: Pictures, tested: Pictures, progress: Progress
) -> dict[str, list[float]]:
    """Return each metric's value for each pair.

    Raises:
        PicturesError: Two partners differ in size.
    """
    values: dict[str, list[float]] = {name: [] for name in metrics}
    for index, label in enumerate(originals.labels):
        pair = [as_floats(pictures[index]) for pictures in (originals, tested)]
        sizes = [tuple(picture.shape[-2:]) for picture in pair]
        if sizes[0] != sizes[1]:
            written = " and ".join(f"{width}x{height}" for height, width in sizes)
            raise PicturesError(
                f"The pictures '{label}' have the sizes {written}",
                "they are compared pixel by pixel",
                "Draw both at the same size.",
            )
        for name, metric in metrics.items():
            values[name].append(metric.value(*pair))
        progress(f"Comparing {tested.name} with {originals.name}", index + 1, len(originals))
    return values


def as_floats(picture: Tensor) -> Tensor:
    """Return ``[1, 3, height, width]`` from 0 to 1 of a uint8 picture ``[3, height, width]``."""
    return picture[None].float() / 255


def _lpips(network: str) -> Callable[..., Tensor]:
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    return LearnedPerceptualImagePatchSimilarity(net_type=network, normalize=True)  # type: ignore[arg-type]
