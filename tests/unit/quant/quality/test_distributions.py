"""FID and KID on features whose true distance is known, and on a network of its own."""

from __future__ import annotations

import math
import sys
from urllib.error import URLError

import pytest
import torch
from flux_fp4.quant.errors.quality import (
    MetricLibraryError,
    MetricWeightsError,
    TooFewPicturesError,
)
from flux_fp4.quant.quality.distributions import (
    features_of,
    frechet_distance,
    kernel_distance,
    load_inception,
)
from flux_fp4.quant.quality.pictures import BatchPictures
from quality_pictures import picture_batch, silent
from torch import Tensor, nn


def gaussian(count: int, mean: Tensor, scale: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    unit = torch.randn(count, len(mean), dtype=torch.float64, generator=generator)
    return mean + unit * scale


def exact(features: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """Shift and turn features until their mean and covariance are exactly the given ones."""
    centred = features - features.mean(0)
    covariance = centred.T @ centred / (len(features) - 1)
    return centred @ torch.linalg.inv(torch.linalg.cholesky(covariance)).T * scale + mean


def test_frechet_distance_of_gaussians_is_the_closed_form() -> None:
    """Of diagonal covariances: squared distance of the means plus that of the deviations."""
    zero, one = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    mean = torch.tensor([1.0, -2.0, 0.0, 0.5], dtype=torch.float64)
    scale = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
    first = exact(gaussian(200, zero, one, 1), zero, one)
    second = exact(gaussian(300, zero, one, 2), mean, scale)
    expected = (mean.square().sum() + (scale - 1).square().sum()).item()
    assert frechet_distance(first, second).value == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(first, first).value == pytest.approx(0, abs=1e-9)


def polynomial_distance(mean: Tensor) -> float:
    """E k(x,x') + E k(y,y') - 2 E k(x,y) for unit Gaussians, y shifted by ``mean``.

    With k(x, y) = (x.y / d + 1)**3: E k(u, v) = 1 + 3 m1 + 3 m2 + m3 in the moments of u.v / d, and
    for independent u ~ N(a, I), v ~ N(b, I): E u.v = a.b, E (u.v)**2 = (a.b)**2 + |a|**2 + |b|**2 +
    d, E (u.v)**3 = (a.b)**3 + 3 a.b (|a|**2 + |b|**2 + d) + 6 a.b.
    """
    size = len(mean)

    def kernel(a: Tensor, b: Tensor) -> float:
        dot, squares = float(a @ b), float(a @ a + b @ b)
        moments = (
            dot / size,
            (dot**2 + squares + size) / size**2,
            (dot**3 + 3 * dot * (squares + size) + 6 * dot) / size**3,
        )
        return 1 + 3 * moments[0] + 3 * moments[1] + moments[2]

    zero = torch.zeros_like(mean)
    return kernel(zero, zero) + kernel(mean, mean) - 2 * kernel(zero, mean)


def test_kernel_distance_of_gaussians_is_the_closed_form() -> None:
    size = 8
    zero, one = torch.zeros(size, dtype=torch.float64), torch.ones(size, dtype=torch.float64)
    mean = torch.full((size,), 0.8, dtype=torch.float64)
    found = kernel_distance(gaussian(2000, zero, one, 1), gaussian(2000, mean, one, 2))
    assert found.deviation is not None
    assert found.value == pytest.approx(polynomial_distance(mean), rel=0.1)
    assert found.deviation < found.value / 5
    same = kernel_distance(gaussian(2000, zero, one, 3), gaussian(2000, zero, one, 4))
    assert abs(same.value) < found.value / 20


def test_kernel_distance_is_the_same_every_time() -> None:
    first, second = torch.rand(150, 8).double(), torch.rand(150, 8).double()
    state = torch.get_rng_state()
    assert kernel_distance(first, second) == kernel_distance(first, second)
    assert torch.equal(torch.get_rng_state(), state)


def test_too_few_pictures_are_refused_with_the_number() -> None:
    with pytest.raises(TooFewPicturesError, match="at least 65") as caught:
        frechet_distance(torch.rand(64, 64).double(), torch.rand(500, 64).double())
    assert (caught.value.found, caught.value.needed) == (64, 65)
    with pytest.raises(TooFewPicturesError, match="at least 100"):
        kernel_distance(torch.rand(99, 4).double(), torch.rand(99, 4).double())


class ChannelMeans(nn.Module):
    def forward(self, pictures: Tensor) -> Tensor:
        assert pictures.dtype == torch.uint8
        return pictures.float().mean((2, 3)) / 255


def test_any_network_may_extract_features() -> None:
    batch = picture_batch(3, 0.1, seed=1)
    found = features_of(BatchPictures("small", batch), ChannelMeans(), "cpu", silent)
    assert found.shape == (3, 3)
    assert found.dtype == torch.float64
    assert torch.allclose(found.float(), batch.mean((1, 2)), atol=1 / 255)
    assert not math.isclose(found[0, 0].item(), found[1, 0].item())


def test_inception_without_weights_names_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_args: object, **_kwargs: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(
        "torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", unreachable
    )
    with pytest.raises(MetricWeightsError, match="FID cannot be computed") as caught:
        load_inception("fid", "cpu")
    assert caught.value.host == "github.com"


def test_inception_without_its_library_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchmetrics.image.fid._TORCH_FIDELITY_AVAILABLE", False)
    with pytest.raises(MetricLibraryError, match="KID cannot be computed") as caught:
        load_inception("kid", "cpu")
    assert caught.value.install.startswith(sys.executable)
    assert "torch-fidelity" in caught.value.install
