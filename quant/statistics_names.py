"""The name of a folder of calibration statistics; told without torch."""

from __future__ import annotations


def statistics_name(source_digest: str, calibration_digest: str) -> str:
    """Name the folder by what statistics depend on: the model and the samples."""
    return f"{source_digest[:16]}-{calibration_digest[:16]}"
