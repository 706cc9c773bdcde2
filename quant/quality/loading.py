"""Turns what libraries say about missing packages and weights into one kind of error each."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from ..errors.quality import MetricLibraryError, MetricWeightsError

EXTRA = "torchmetrics torch-fidelity transformers"
"""Packages of all metrics but ImageReward."""


def loaded(metric: str, load: Callable[[], Any], weights: str, host: str) -> Any:
    """Return what ``load`` returns.

    Args:
        metric: Title of the metric.
        load: Builds the network; its library fetches weights that are not on this machine.
        weights: What has to be fetched.
        host: From where.

    Raises:
        MetricLibraryError: A package is missing.
        MetricWeightsError: The weights are missing.
    """
    try:
        return load()
    except ImportError as error:
        install = f"{sys.executable} -m pip install {EXTRA}"
        raise MetricLibraryError(metric, _first_line(error), install) from error
    except OSError as error:
        # urllib's and transformers' errors of the network are OSErrors
        raise MetricWeightsError(metric, weights, host, _first_line(error)) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
