"""Errors of the quality metrics; a metric that cannot run never gives a number."""

from __future__ import annotations

from . import QuantError

PYTHON_VARIABLE = "FLUX_FP4_IMAGEREWARD_PYTHON"
"""Names the interpreter that has the package; not a widget, because a workflow must not choose what
is executed."""

WITHOUT_DOWNLOADS = "psnr and ssim need no download."


class QualityError(QuantError):
    """Root of every error that measuring quality raises on purpose."""


class MetricLibraryError(QualityError):
    """A Python package that a metric needs is not installed, or cannot be imported.

    Attributes:
        metric: Title of the metric.
        reason: What Python says.
        install: The command that installs it.
    """

    def __init__(self, metric: str, reason: str, install: str) -> None:
        self.metric, self.reason, self.install = metric, reason, install
        super().__init__(
            f"{metric} cannot be computed: {reason}. Install what it needs with: {install} - or "
            f"leave it out; {WITHOUT_DOWNLOADS}"
        )


class MetricWeightsError(QualityError):
    """The weights of a metric's network are not on this machine and could not be fetched.

    Attributes:
        metric: Title of the metric.
        weights: File or repository of the weights.
        host: Where its library looks for them.
        reason: What the library says.
    """

    def __init__(self, metric: str, weights: str, host: str, reason: str) -> None:
        self.metric, self.weights, self.host, self.reason = metric, weights, host, reason
        super().__init__(
            f"{metric} cannot be computed: its weights '{weights}' are not on this machine and "
            f"could not be fetched from {host} ({reason}). Allow access to {host} once, or leave "
            f"the metric out; {WITHOUT_DOWNLOADS}"
        )


class TooFewPicturesError(QualityError):
    """A metric over distributions needs more pictures.

    Attributes:
        metric: Title of the metric.
        found: How many there are.
        needed: The least number.
        why: What takes so many.
    """

    def __init__(self, metric: str, found: int, needed: int, why: str) -> None:
        self.metric, self.found, self.needed, self.why = metric, found, needed, why
        super().__init__(
            f"{metric} of {found} pictures would say nothing: at least {needed:,} in each set are "
            f"needed, because {why}. Make more pictures, or leave the metric out."
        )


class PicturesError(QualityError):
    """Two sets of pictures cannot be compared.

    Attributes:
        found: What was given.
        limit: What is needed.
        next_step: What to do about it.
    """

    def __init__(self, found: str, limit: str, next_step: str) -> None:
        self.found, self.limit, self.next_step = found, limit, next_step
        super().__init__(f"{found}; {limit}. {next_step}")


class PromptsError(QualityError):
    """Prompts are missing or do not belong to the pictures.

    Attributes:
        found: What was given.
        limit: What is needed.
    """

    def __init__(self, found: str, limit: str) -> None:
        self.found, self.limit = found, limit
        super().__init__(
            f"{found}; {limit}. Enter one prompt per line, in the order of the pictures."
        )


class ImageRewardFailedError(QualityError):
    """The process ended in a way that is neither a missing library nor missing weights.

    Attributes:
        code: Its exit code.
        last_line: The end of what it wrote.
    """

    def __init__(self, code: int, last_line: str) -> None:
        self.code, self.last_line = code, last_line
        super().__init__(
            f"ImageReward's process ended with code {code}: {last_line}. Run the package's "
            f"own example with the Python that {PYTHON_VARIABLE} names, or leave the metric out."
        )
