"""Statistics on disk: one safetensors file per block, in a folder named by model and samples."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from blake3 import blake3
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .calibration import SampleState
from .statistics import BlockStatistics, LinearStatistics, RangeStatistics
from .statistics_names import statistics_name
from .whole_files import make_folder, only_writer, whole_file

_VERSION = "3"
_DIGEST = "digest"
"""Of the tensors: scales come from them, and a damaged one would go unnoticed."""
_VELOCITY = "velocity_sqnr_db.txt"
_STATE = ("img", "txt", "vec", "cos", "sin", "shared_mods")


class StatisticsFolder:
    """The statistics of one model under one set of samples.

    Attributes:
        path: The folder; it need not exist.
    """

    def __init__(self, root: Path, source_digest: str, calibration_digest: str) -> None:
        """Name the folder below ``root`` by what the statistics depend on."""
        self.path = root / statistics_name(source_digest, calibration_digest)
        self._identity = {
            "version": _VERSION,
            "source": source_digest,
            "calibration": calibration_digest,
        }

    def read(self, block: str) -> BlockStatistics | None:
        """Return a block's statistics, or None if they have to be collected (again)."""
        path = self._file(block)
        try:
            with safe_open(path, framework="pt") as file:
                found = file.metadata() or {}
                digest = found.pop(_DIGEST, None)
                if found != self._identity | {"block": block}:
                    return None
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            return None  # a cache: what cannot be read is made again
        return _from_tensors(tensors) if digest == _digest(tensors) else None

    def holds(self, block: str) -> bool:
        """Tell by its header whether a block's statistics are there."""
        try:
            with safe_open(self._file(block), framework="pt") as file:
                found = file.metadata() or {}
                return (self._identity | {"block": block}).items() <= found.items()
        except (OSError, SafetensorError):
            return False

    def only_writer(self, waiting: Callable[[], None]) -> contextlib.AbstractContextManager[None]:
        """Make the folder and hold its lock, so that two processes do not measure the same.

        Args:
            waiting: Called every 0.1 s while another process has the lock; may raise to cancel.
        """
        make_folder(self.path)
        return only_writer(self.path / ".lock", self.path, ".+", waiting)

    def write(self, block: str, statistics: BlockStatistics) -> None:
        """Store a block's statistics; the file takes its name when it is whole."""
        make_folder(self.path)
        # as bytes: safetensors' own writing to a file tells a full disk in words only
        tensors = _to_tensors(statistics)
        identity = self._identity | {"block": block, _DIGEST: _digest(tensors)}
        data = save(tensors, identity)
        with whole_file(self._file(block), len(data)) as file:
            file.write(data)

    def velocity_sqnr_db(self) -> float | None:
        """Return what ``write_velocity_sqnr_db`` stored, or None."""
        try:
            db = float((self.path / _VELOCITY).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return None if math.isnan(db) else db

    def write_velocity_sqnr_db(self, db: float) -> None:
        """Store how well the model predicts the velocity of the samples."""
        with whole_file(self.path / _VELOCITY) as file:
            file.write(f"{db}\n".encode())

    def _file(self, block: str) -> Path:
        return self.path / f"{block}.safetensors"


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = blake3()
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _to_tensors(statistics: BlockStatistics) -> dict[str, Tensor]:
    tensors = {}
    for linear, entry in statistics.linears.items():
        tensors[f"linears.{linear}.quantiles"] = entry.range.quantiles
        tensors[f"linears.{linear}.channel_amax"] = entry.channel_amax
        tensors[f"linears.{linear}.mean_square"] = entry.mean_square
        tensors[f"linears.{linear}.rows"] = entry.rows
    for part, entry_range in statistics.attention.items():
        tensors[f"attention.{part}.quantiles"] = entry_range.quantiles
    for index, probe in enumerate(statistics.probes):
        for name in _STATE:
            value = getattr(probe, name)
            if value is not None:
                tensors[f"probes.{index}.{name}"] = value.contiguous()
    return tensors


def _from_tensors(tensors: Mapping[str, Tensor]) -> BlockStatistics:
    linears = {
        name.removeprefix("linears.").removesuffix(".rows"): LinearStatistics(
            RangeStatistics(tensors[name.removesuffix("rows") + "quantiles"]),
            tensors[name.removesuffix("rows") + "channel_amax"],
            tensors[name.removesuffix("rows") + "mean_square"],
            rows,
        )
        for name, rows in tensors.items()
        if name.endswith(".rows")
    }
    attention = {
        part: RangeStatistics(tensors[f"attention.{part}.quantiles"]) for part in ("q", "k", "v")
    }
    probes: list[SampleState] = []
    while f"probes.{len(probes)}.img" in tensors:
        start = f"probes.{len(probes)}"
        probes.append(SampleState(*(tensors.get(f"{start}.{name}") for name in _STATE)))  # type: ignore[arg-type]
    return BlockStatistics(linears, attention, tuple(probes))
