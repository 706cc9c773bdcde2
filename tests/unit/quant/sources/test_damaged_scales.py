"""FP8 and NVFP4 files whose scales or marks are missing or wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoint_layouts import (
    comfy_mark,
    header_mark,
    nvfp4_state,
    nvfp4_weights,
    save_state,
    scaled_fp8_state,
)
from flux_fp4.quant.errors.sources import DamagedCheckpointError
from flux_fp4.quant.sources.source import open_source

State = dict[str, torch.Tensor]

LAYER = "single_blocks.0.linear2"


def nan_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.full(tensor.shape, float("nan")).to(tensor.dtype)


@pytest.mark.parametrize(
    ("key", "change", "reason"),
    [
        ("weight_scale", lambda t: None, f"its scale '{LAYER}.weight_scale' is missing"),
        ("weight_scale_2", lambda t: None, f"its scale '{LAYER}.weight_scale_2' is missing"),
        ("weight_scale", lambda t: t[:-1].clone(), r"has shape \[255, 80\] instead of \[256, 80\]"),
        ("weight_scale", lambda t: t.half(), "is F16 instead of F8_E4M3 or U8"),
        ("weight_scale_2", lambda t: torch.ones(3), r"has shape \[3\] instead of \[\] or \[1\]"),
        ("weight", lambda t: t.view(torch.int8), "is marked as NVFP4, but is I8"),
        ("weight", lambda t: t[:, :-1].clone(), r"but is U8 of shape \[256, 639\]"),
        ("weight_scale", nan_like, f"'{LAYER}.weight_scale' holds NaN"),
        ("weight_scale_2", nan_like, f"'{LAYER}.weight_scale_2' holds NaN"),
        ("weight_scale_2", torch.neg, "negative value"),
    ],
)
def test_damaged_nvfp4_names_tensor_and_fault(
    state: State,
    tmp_path: Path,
    key: str,
    change: object,
    reason: str,
) -> None:
    stored = nvfp4_state(state, nvfp4_weights(state), native=True)
    metadata = header_mark(stored, "nvfp4")
    changed = change(stored.pop(f"{LAYER}.{key}"))  # type: ignore[operator]
    if changed is not None:
        stored[f"{LAYER}.{key}"] = changed
    path = save_state(stored, tmp_path, metadata)
    with pytest.raises(DamagedCheckpointError, match=reason) as caught:
        open_source(path).packed(LAYER)
    assert "'tiny.safetensors'" in str(caught.value)
    assert "Get the file anew" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: None, "is FP8, but its scale .* is missing"),
        (lambda t: torch.ones(2), r"has shape \[2\] instead of \[\] or \[1\]"),
        (lambda t: torch.ones(255, 1), r"has shape \[255, 1\]"),
        (lambda t: t.int(), "is I32 instead of BF16 or F16 or F32"),
        (nan_like, f"'{LAYER}.weight_scale' holds NaN"),
        (lambda t: t / 0, f"'{LAYER}.weight_scale' holds NaN, infinity"),
    ],
    ids=["missing", "two", "rows", "dtype", "nan", "inf"],
)
def test_damaged_fp8_scale_names_tensor_and_fault(
    state: State, tmp_path: Path, change: object, reason: str
) -> None:
    stored = scaled_fp8_state(state, "weight_scale")
    changed = change(stored.pop(f"{LAYER}.weight_scale"))  # type: ignore[operator]
    if changed is not None:
        stored[f"{LAYER}.weight_scale"] = changed
    path = save_state(stored, tmp_path)
    with pytest.raises(DamagedCheckpointError, match=reason):
        open_source(path).tensors([f"{LAYER}.weight"])


def test_scale_of_an_unquantized_weight_is_refused(state: State, tmp_path: Path) -> None:
    stored = {**state, f"{LAYER}.weight_scale": torch.tensor(0.5)}
    with pytest.raises(DamagedCheckpointError, match="is BF16, but has a scale"):
        open_source(save_state(stored, tmp_path))


def test_mark_that_contradicts_the_dtype_is_refused(state: State, tmp_path: Path) -> None:
    stored = dict(state)
    comfy_mark("float8_e4m3fn")(LAYER, stored)
    with pytest.raises(DamagedCheckpointError, match="marked as float8_e4m3fn, but is stored as"):
        open_source(save_state(stored, tmp_path))


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ("[", "is not JSON"),
        ("[]", "is not a JSON object"),
        ('{"layers": 3}', "lists no layers"),
        ('{"layers": {"img_in": 3}}', "the mark of 'img_in' is 3, without a format"),
        ('{"layers": {"img_in": {}, "img_in": {}}}', "holds 'img_in' twice"),
    ],
)
def test_unreadable_header_mark_is_refused(
    state: State, tmp_path: Path, metadata: str, reason: str
) -> None:
    path = save_state(state, tmp_path, {"_quantization_metadata": metadata})
    with pytest.raises(DamagedCheckpointError, match=reason):
        open_source(path)


@pytest.mark.parametrize(
    ("mark", "reason"),
    [
        (b"{", "is not JSON"),
        (b'{"form": 1}', "without a format"),
        (b" " * 5000, "not a mark of a format"),
    ],
    ids=["cut", "no-format", "long"],
)
def test_unreadable_mark_is_refused(state: State, tmp_path: Path, mark: bytes, reason: str) -> None:
    stored = {**state, f"{LAYER}.comfy_quant": torch.tensor(list(mark), dtype=torch.uint8)}
    with pytest.raises(DamagedCheckpointError, match=reason):
        open_source(save_state(stored, tmp_path))
