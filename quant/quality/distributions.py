"""FID and KID: do two sets of pictures look alike as a whole.

Neither pairs pictures. What they compare are features of a network; Inception for published
numbers, or any other extractor for pictures that Inception does not know.
"""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from ..errors.quality import TooFewPicturesError
from ..progress import Progress
from .catalog import METRICS
from .loading import loaded
from .pictures import Pictures

INCEPTION_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"

KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000
"""Torchmetrics' and the authors' (Binkowski et al. 2018)."""
KID_LEAST_PICTURES = 100
"""A choice of this project: subsets of half of them spread enough to show a deviation."""

_SEED = 0


class DistributionValue(BaseModel):
    """A distance between two sets.

    Attributes:
        value: The distance.
        deviation: Of KID over its subsets; None for FID.
    """

    model_config = ConfigDict(frozen=True)

    value: float
    deviation: float | None = None


def load_inception(metric: str, device: str) -> nn.Module:
    """Return the Inception network of published FIDs: uint8 ``[n, 3, h, w]`` to ``[n, 2048]``.

    Raises:
        MetricLibraryError: torch-fidelity is missing.
        MetricWeightsError: The weights are neither here nor can be fetched.
    """
    network: nn.Module = loaded(METRICS[metric].title, _inception, INCEPTION_WEIGHTS, "github.com")
    return network.to(device)


def features_of(
    pictures: Pictures, extractor: nn.Module, device: str, progress: Progress
) -> Tensor:
    """Return the features ``[n, d]`` of all pictures in fp64.

    Args:
        pictures: The set.
        extractor: From a batch ``[1, 3, height, width]`` in uint8 to features ``[1, d]``.
        device: Of the extractor.
        progress: Called after each picture.
    """
    rows = []
    for index in range(len(pictures)):
        with torch.no_grad():
            row = extractor(pictures[index][None].to(device))
        rows.append(row.double().cpu())
        progress(f"Features of {pictures.name}", index + 1, len(pictures))
    return torch.cat(rows)


def frechet_distance(originals: Tensor, tested: Tensor) -> DistributionValue:
    """Return the Fréchet distance of two sets of features ``[n, d]`` (Heusel et al. 2017).

    Raises:
        TooFewPicturesError: There are not more pictures than features.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    count, size = min(len(originals), len(tested)), originals.shape[1]
    if count <= size:
        why = (
            f"{size:,} features are compared and with fewer their covariance is singular; the "
            "authors advise 10,000"
        )
        raise TooFewPicturesError(METRICS["fid"].title, count, size + 1, why)
    metric = FrechetInceptionDistance(feature=_Features(size), normalize=True)
    metric.update(originals, real=True)
    metric.update(tested, real=False)
    return DistributionValue(value=metric.compute().item())


def kernel_distance(originals: Tensor, tested: Tensor) -> DistributionValue:
    """Return the kernel distance of two sets of features ``[n, d]`` (Binkowski et al. 2018).

    The mean over random subsets, the same ones every time. It is unbiased, so it may be below 0.

    Raises:
        TooFewPicturesError: There are too few for subsets.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    count = min(len(originals), len(tested))
    if count < KID_LEAST_PICTURES:
        why = "it is a mean over random subsets"
        raise TooFewPicturesError(METRICS["kid"].title, count, KID_LEAST_PICTURES, why)
    metric = KernelInceptionDistance(
        feature=_Features(originals.shape[1]),
        subsets=KID_SUBSETS,
        subset_size=min(KID_SUBSET_SIZE, count // 2),
    )
    metric.update(originals, real=True)
    metric.update(tested, real=False)
    # torchmetrics draws the subsets from torch's global generator
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        mean, deviation = metric.compute()
    return DistributionValue(value=mean.item(), deviation=deviation.item())


class _Features(nn.Identity):
    """Hands features through: they are extracted once for both metrics."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.num_features = size


def _inception() -> nn.Module:
    from torchmetrics.image.fid import NoTrainInceptionV3

    return NoTrainInceptionV3(name="inception-v3-compat", features_list=["2048"])
