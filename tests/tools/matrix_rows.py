"""The rows of the version matrix: which Python and which packages each of them installs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

BASE_PYTHON = "3.12"

TORCH_COMPANIONS = ("cuda-", "nvidia-c", "nvidia-n", "torchaudio", "torchvision", "triton")
"""Beginnings of the names of what goes with a torch, such as its CUDA libraries."""


class UnknownRowError(ValueError):
    """A pattern on the command line names no row."""

    def __init__(self, pattern: str) -> None:
        super().__init__(
            f"No row is called '{pattern}'. Rows: {', '.join(row.name for row in ROWS)}."
        )
        self.pattern = pattern


@dataclass(frozen=True)
class Row:
    """One environment."""

    name: str
    python: str = BASE_PYTHON
    pins: Mapping[str, str] = field(default_factory=dict)
    """Exact versions that this row is about."""
    others: Literal["pinned", "lowest", "newest"] = "pinned"
    """Versions of all other packages: those of `constraints/ci.txt`, the lowest that the pack's own
    requirements allow (what only ComfyUI or the tests require is then as new as it gets), or the
    newest that fit together."""


def _torch(version: str, torchaudio: str = "2.11.0") -> Row:
    # torchaudio names no torch in its metadata, so a resolver would always take the newest
    major, minor, _ = version.split(".")
    return Row(f"torch{major}.{minor}", pins={"torch": version, "torchaudio": torchaudio})


ROWS = (
    Row("python3.12"),
    Row("python3.10", python="3.10"),
    Row("python3.11", python="3.11"),
    Row("python3.13", python="3.13"),
    Row("tensorrt-rtx1.5", pins={"tensorrt-rtx": "1.5.0.114"}),
    Row("tensorrt-rtx1.6", pins={"tensorrt-rtx": "1.6.1.120"}),
    _torch("2.9.1", "2.9.1"),
    _torch("2.10.0", "2.10.0"),
    _torch("2.12.1"),
    _torch("2.13.0"),
    _torch("2.14.1"),
    _torch("2.15.0"),
    Row("lowest", "3.10", {"torch": "2.9.1", "torchaudio": "2.9.1"}, "lowest"),
    Row("newest", "3.13", {"torch": "2.14.1", "torchaudio": "2.11.0"}, "newest"),
)
"""The first row is that of `make setup`, the next vary one thing each, the last two all."""


def select_rows(patterns: Sequence[str]) -> list[Row]:
    """Return the rows whose names match a shell pattern, in the order of `ROWS`; all without one.

    Raises:
        UnknownRowError: a pattern matches none.
    """
    for pattern in patterns:
        if not any(fnmatchcase(row.name, pattern) for row in ROWS):
            raise UnknownRowError(pattern)
    return [
        row
        for row in ROWS
        if not patterns or any(fnmatchcase(row.name, pattern) for pattern in patterns)
    ]


def requirement_names(lines: Sequence[str]) -> list[str]:
    """Return the normalized names in the lines of a requirements file."""
    return [canonicalize_name(Requirement(line).name) for line in lines]


def pins_of(row: Row) -> list[str]:
    """Return the row's exact versions as requirements."""
    return [f"{name}=={version}" for name, version in row.pins.items()]


def constraints_of(row: Row, pinned: Sequence[str], lowest: Sequence[str]) -> list[str]:
    """Return the constraints to install a row with.

    Args:
        row: the row.
        pinned: lines of `constraints/ci.txt`.
        lowest: the lowest versions of the pack's own requirements.
    """
    lines = {"pinned": pinned, "lowest": lowest, "newest": ()}[row.others]
    names = requirement_names(lines)
    return [
        *(line for name, line in zip(names, lines, strict=True) if not _is_varied(name, row)),
        *pins_of(row),
    ]


def overrides_of(row: Row, own: Sequence[str]) -> list[str]:
    """Return the pins of a row on what the pack requires itself.

    They replace the pack's own bounds, so that a row can try what these exclude.

    Args:
        row: the row.
        own: names of the pack's requirements.
    """
    return [f"{name}=={version}" for name, version in row.pins.items() if name in own]


def _is_varied(name: str, row: Row) -> bool:
    if "torch" in row.pins and name.startswith(TORCH_COMPANIONS):
        return True
    # tensorrt-rtx also pins its parts, named tensorrt-rtx-cu13-...
    return any(name == pin or name.startswith(f"{pin}-") for pin in row.pins)
