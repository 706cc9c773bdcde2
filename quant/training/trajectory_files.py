"""Trajectories on disk: one safetensors file for some of them, made in any order by any process."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..calibration import CalibrationSample, Conditioning
from ..safetensors_header import read_header
from ..whole_files import make_folder, whole_file
from .trajectories import TrajectoryOptions, prompts_digest

PER_FILE = 32
"""Trajectories that are sampled side by side: at 1024 x 1024 pixels their activations take 0.9 GB
of FLUX.1-dev's width in bf16, and each block that is loaded serves all of them."""

_KEY = "flux_fp4_trajectories"
_WAIT_SECONDS = 0.5


@dataclass(frozen=True)
class _Place:
    """Where a point is, and which others it can be computed together with."""

    path: Path
    index: int
    t: float
    prompt: int
    shape: tuple[int, ...]


class TrajectoryFolder:
    """The trajectories of one model for one set of prompts and options.

    Attributes:
        path: The folder; it need not exist.
        files: How many files it has when it is complete.
    """

    def __init__(
        self,
        root: Path,
        source_digest: str,
        prompts: Sequence[Conditioning],
        options: TrajectoryOptions,
        dtype: torch.dtype,
    ) -> None:
        """Name the folder below ``root`` by what the trajectories depend on."""
        self._prompts = prompts
        self._options = options
        self._identity = {
            "version": 1,
            "source": source_digest,
            "prompts": prompts_digest(prompts),
            "options": options.model_dump(mode="json"),
            "dtype": str(dtype),
        }
        digest = blake3(json.dumps(self._identity).encode()).hexdigest()
        self.path = root / digest[:16]
        self.files = -(-options.count // PER_FILE)

    def numbers(self, file: int) -> range:
        """Return the numbers of the trajectories in a file."""
        return range(file * PER_FILE, min((file + 1) * PER_FILE, self._options.count))

    def holds(self, file: int) -> bool:
        """Tell whether a file is there, whole and of this identity."""
        try:
            return bool(self._header(file)["identity"] == self._identity)
        except (OSError, SafetensorError, KeyError, ValueError):
            return False  # what cannot be read is made again

    def write(self, file: int, points: Sequence[tuple[int, CalibrationSample]]) -> None:
        """Store what ``sample_trajectories`` gave; the file takes its name when it is whole.

        Raises:
            DiskFullError, FileWriteError: The system refuses to write.
        """
        tensors = {}
        for index, (_, sample) in enumerate(points):
            tensors[f"{index}.latent"] = sample.latent.contiguous()
            tensors[f"{index}.velocity"] = sample.velocity.contiguous()
        numbers = [{"t": sample.t, "prompt": prompt} for prompt, sample in points]
        header = {"identity": self._identity, "file": file, "points": numbers}
        make_folder(self.path)
        data = save(tensors, {_KEY: json.dumps(header)})
        with whole_file(self._file(file), len(data)) as stream:
            stream.write(data)

    def wait(self, heartbeat: Callable[[], None]) -> None:
        """Return when every file is there; other processes make those that are missing.

        A file is waited for and no collective call, because such calls time out.
        """
        for file in range(self.files):
            while not self.holds(file):
                heartbeat()
                time.sleep(_WAIT_SECONDS)

    def points(self) -> TrajectoryPoints:
        """Return all points; the folder must be complete."""
        return TrajectoryPoints(self._prompts, list(self._places()))

    def _places(self) -> Iterator[_Place]:
        for file in range(self.files):
            path = self._file(file)
            shapes = read_header(path).tensors
            for index, point in enumerate(self._header(file)["points"]):
                text = self._prompts[point["prompt"]].context.shape[1]
                shape = (text, *shapes[f"{index}.latent"].shape)
                yield _Place(path, index, point["t"], point["prompt"], shape)

    def _file(self, file: int) -> Path:
        return self.path / f"{file:05d}.safetensors"

    def _header(self, file: int) -> dict[str, Any]:
        header = json.loads(read_header(self._file(file)).metadata[_KEY])
        if header["file"] != file:
            raise ValueError(file)
        return dict(header)


class TrajectoryPoints:
    """Points of trajectories, read when they are asked for.

    Attributes:
        prompts: Number of the prompt of each point.
        shapes: Of each point: only equal ones can be computed together.
    """

    def __init__(self, prompts: Sequence[Conditioning], places: Sequence[_Place]) -> None:
        self._conditioning, self._places = prompts, places
        self.prompts = [place.prompt for place in places]
        self.shapes = [(*place.shape, *_joined(prompts[place.prompt])) for place in places]

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._places)

    def __getitem__(self, index: int) -> CalibrationSample:
        """Read one point; its velocity is the original's prediction."""
        place = self._places[index]
        with safe_open(place.path, framework="pt") as file:
            latent = file.get_tensor(f"{place.index}.latent")
            velocity = file.get_tensor(f"{place.index}.velocity")
        return CalibrationSample(latent, place.t, self._conditioning[place.prompt], velocity)


def _joined(prompt: Conditioning) -> tuple[object, ...]:
    """Return what else decides the number of tokens and their places."""
    return (prompt.reference_method, *(tuple(latent.shape) for latent in prompt.references))
