"""PSNR and SSIM against the formulas; LPIPS on a network that was really loaded by torchvision."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from flux_fp4.quant.errors.quality import MetricWeightsError, PicturesError
from flux_fp4.quant.quality.pair_metrics import LPIPS, PSNR, SSIM, pair_values
from flux_fp4.quant.quality.pictures import BatchPictures
from quality_pictures import gradient_picture, silent
from torch import Tensor


def noisy(picture: Tensor, deviation: float) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return (picture + deviation * torch.randn(picture.shape, generator=generator)).clamp(0, 1)


def test_psnr_is_the_formula() -> None:
    picture = gradient_picture()
    other = noisy(picture, 0.1)
    expected = 10 * math.log10(1 / ((picture - other) ** 2).mean().item())
    assert PSNR().value(picture, other) == pytest.approx(expected, abs=1e-4)
    assert PSNR().value(picture, picture) == math.inf


def gaussian_means(channel: Tensor) -> Tensor:
    """Weighted means in windows of 11 pixels, sigma 1.5, where the window fits."""
    offsets = torch.arange(-5, 6).double()
    weights = torch.exp(-(offsets**2) / (2 * 1.5**2))
    weights /= weights.sum()
    windows = channel.double().unfold(0, 11, 1).unfold(1, 11, 1)
    return torch.einsum("hwij,i,j->hw", windows, weights, weights)


def ssim_by_hand(first: Tensor, second: Tensor) -> float:
    """Formula 13 of Wang et al. 2004, mean over places and channels."""
    c1, c2 = 0.01**2, 0.03**2
    ratios = []
    for x, y in zip(first[0].double(), second[0].double(), strict=True):
        mean_x, mean_y = gaussian_means(x), gaussian_means(y)
        variance_x = gaussian_means(x * x) - mean_x**2
        variance_y = gaussian_means(y * y) - mean_y**2
        covariance = gaussian_means(x * y) - mean_x * mean_y
        ratios.append(
            ((2 * mean_x * mean_y + c1) * (2 * covariance + c2))
            / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))
        )
    return torch.stack(ratios).mean().item()


@pytest.mark.parametrize("deviation", [0.02, 0.2])
def test_ssim_is_the_formula(deviation: float) -> None:
    picture = gradient_picture()
    other = noisy(picture, deviation)
    assert SSIM().value(picture, other) == pytest.approx(ssim_by_hand(picture, other), abs=1e-4)


def test_ssim_of_equal_pictures_is_one() -> None:
    assert SSIM().value(gradient_picture(), gradient_picture()) == pytest.approx(1.0)


def test_ssim_of_a_picture_smaller_than_its_window_is_refused() -> None:
    small = gradient_picture()[..., :10, :20]
    with pytest.raises(PicturesError, match="20x10"):
        SSIM().value(small, small)


@pytest.fixture
def random_squeezenet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put random weights where torchvision looks for what it has downloaded before."""
    from torchvision.models import SqueezeNet1_1_Weights, squeezenet1_1

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub" / "checkpoints" / Path(SqueezeNet1_1_Weights.DEFAULT.url).name
    file.parent.mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(squeezenet1_1(weights=None).state_dict(), file)


@pytest.mark.usefixtures("random_squeezenet")
def test_lpips_grows_with_the_difference() -> None:
    metric, picture = LPIPS("cpu", "squeeze"), gradient_picture()
    distances = [metric.value(picture, noisy(picture, deviation)) for deviation in (0, 0.02, 0.2)]
    assert distances[0] == 0
    assert 0 < distances[1] < distances[2]


def test_lpips_without_weights_names_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from urllib.error import URLError

    def unreachable(*_args: object, **_kwargs: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(MetricWeightsError, match="psnr and ssim need no download") as caught:
        LPIPS("cpu")
    assert caught.value.host == "download.pytorch.org"
    assert "no route to host" in caught.value.reason


def test_partners_of_different_size_are_refused() -> None:
    first = BatchPictures("a", torch.zeros(1, 16, 16, 3))
    second = BatchPictures("b", torch.zeros(1, 16, 24, 3))
    with pytest.raises(PicturesError, match="16x16 and 24x16"):
        pair_values({"psnr": PSNR()}, first, second, silent)
