"""Calibration samples as one safetensors file.

Prompts are stored once, however many samples use them; numbers are in the header:

    conditioning.<i>.context, .pooled, .concat, .reference.<k>
    sample.<i>.latent, .velocity
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from .calibration import CalibrationSample, CalibrationSet, Conditioning
from .errors.calibration import CalibrationFileError
from .safetensors_header import read_header
from .whole_files import make_folder, whole_file

_KEY = "flux_fp4_samples"
_MAX_BYTES = 16 << 30
_FLOATS = ("F32", "F16", "BF16")


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _ConditioningNumbers(_Strict):
    guidance: float | None = Field(allow_inf_nan=False)
    reference_method: str | None = Field(max_length=100)
    references: int = Field(ge=0, le=64)


class _SampleNumbers(_Strict):
    t: float = Field(gt=0, lt=1)
    conditioning: int = Field(ge=0)


class _Numbers(_Strict):
    format_version: Literal[1] = 1
    digest: str
    seed: int
    timesteps: int = Field(ge=1)
    conditioning: tuple[_ConditioningNumbers, ...]
    samples: tuple[_SampleNumbers, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _conditioning_is_there(self) -> _Numbers:
        if max(sample.conditioning for sample in self.samples) >= len(self.conditioning):
            raise ValueError("a sample names conditioning that is not in the file")
        return self


def save_samples(calibration: CalibrationSet, path: Path) -> None:
    """Write samples; the file takes its name when it is whole.

    Raises:
        DiskFullError, FileWriteError: The system refuses to write; ``path`` is as before.
    """
    # samples of one picture and prompt share the object
    distinct = {id(sample.conditioning): sample.conditioning for sample in calibration.samples}
    place = {key: index for index, key in enumerate(distinct)}
    tensors: dict[str, Tensor] = {}
    for index, condition in enumerate(distinct.values()):
        tensors |= _conditioning_tensors(f"conditioning.{index}", condition)
    for index, sample in enumerate(calibration.samples):
        tensors[f"sample.{index}.latent"] = sample.latent
        tensors[f"sample.{index}.velocity"] = sample.velocity
    numbers = _Numbers(
        digest=calibration.digest(),
        seed=calibration.seed,
        timesteps=calibration.timesteps,
        conditioning=tuple(
            _ConditioningNumbers(
                guidance=condition.guidance,
                reference_method=condition.reference_method,
                references=len(condition.references),
            )
            for condition in distinct.values()
        ),
        samples=tuple(
            _SampleNumbers(t=sample.t, conditioning=place[id(sample.conditioning)])
            for sample in calibration.samples
        ),
    )
    # clones: safetensors refuses tensors that share memory
    stored = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    make_folder(path.parent)
    # as bytes: safetensors' own writing to a file tells a full disk in words only
    data = save(stored, {_KEY: numbers.model_dump_json()})
    with whole_file(path, len(data)) as file:
        file.write(data)


def load_samples(path: Path) -> CalibrationSet:
    """Read samples that ``save_samples`` wrote.

    Raises:
        CalibrationFileError: The file is none, was changed, or is of another version.
    """
    numbers = _checked_numbers(path)
    try:
        tensors = load_file(path)
        conditioning = [
            _conditioning(f"conditioning.{index}", entry, tensors)
            for index, entry in enumerate(numbers.conditioning)
        ]
        samples = tuple(
            CalibrationSample(
                tensors[f"sample.{index}.latent"],
                entry.t,
                conditioning[entry.conditioning],
                tensors[f"sample.{index}.velocity"],
            )
            for index, entry in enumerate(numbers.samples)
        )
    except (OSError, SafetensorError) as error:
        raise CalibrationFileError(path.name, f"it cannot be read ({error})") from error
    except KeyError as error:
        raise CalibrationFileError(path.name, f"it lacks {error}") from error
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise CalibrationFileError(path.name, f"'{name}' holds NaN or infinity")
    calibration = CalibrationSet(samples, numbers.seed, numbers.timesteps)
    if calibration.digest() != numbers.digest:
        raise CalibrationFileError(path.name, "its content is not what its header says")
    return calibration


def _checked_numbers(path: Path) -> _Numbers:
    """Read the header: what is not of the expected types and shapes is not loaded at all."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise CalibrationFileError(path.name, f"it is larger than {_MAX_BYTES >> 30} GiB")
        header = read_header(path)
        numbers = _Numbers.model_validate_json(header.metadata.get(_KEY, "null"))
    except (OSError, SafetensorError) as error:
        raise CalibrationFileError(path.name, f"it cannot be read ({error})") from error
    except ValidationError as error:
        if _KEY not in header.metadata:
            reason = f"its header has no '{_KEY}' entry"
        else:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            reason = f"its header is not of this version ({where}: {first['msg']})"
        raise CalibrationFileError(path.name, reason) from error
    for name, tensor in header.tensors.items():
        text = name.endswith((".context", ".pooled"))
        dimensions = 4 if not text else (3 if name.endswith(".context") else 2)
        if tensor.dtype not in _FLOATS or len(tensor.shape) != dimensions or tensor.shape[0] != 1:
            found = f"{tensor.dtype} {list(tensor.shape)}"
            raise CalibrationFileError(path.name, f"'{name}' is {found}")
    return numbers


def _conditioning_tensors(start: str, condition: Conditioning) -> dict[str, Tensor]:
    tensors = {f"{start}.context": condition.context}
    if condition.pooled is not None:
        tensors[f"{start}.pooled"] = condition.pooled
    if condition.concat is not None:
        tensors[f"{start}.concat"] = condition.concat
    for index, reference in enumerate(condition.references):
        tensors[f"{start}.reference.{index}"] = reference
    return tensors


def _conditioning(
    start: str, numbers: _ConditioningNumbers, tensors: Mapping[str, Tensor]
) -> Conditioning:
    return Conditioning(
        tensors[f"{start}.context"],
        tensors.get(f"{start}.pooled"),
        numbers.guidance,
        tensors.get(f"{start}.concat"),
        tuple(tensors[f"{start}.reference.{index}"] for index in range(numbers.references)),
        numbers.reference_method,
    )
