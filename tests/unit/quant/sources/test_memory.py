"""Reading block by block takes the memory of a block, not that of the checkpoint."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_layouts import diffusers_state, header_mark, save_sharded, save_state
from flux_fp4.quant.flux.model import tensor_shapes
from flux_fp4.quant.sources.source import open_source
from tiny_flux import TINY

State = dict[str, torch.Tensor]

LARGE = TINY.model_copy(
    update={"hidden_size": 1024, "num_heads": 8, "depth": 2, "depth_single_blocks": 8}
)
"""10 blocks of 28 to 72 MB in bf16."""


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def fp8(state: State, folder: Path) -> Path:
    stored: State = {}
    for name, tensor in state.items():
        stored[name] = tensor
        if tensor.ndim == 2:
            stored[name] = tensor.to(torch.float8_e4m3fn)
            stored[f"{name.removesuffix('.weight')}.weight_scale"] = torch.tensor(0.5)
    return save_state(stored, folder, header_mark(stored, "float8_e4m3fn"))


@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="Requires: /proc/self/statm (Linux)"
)
@pytest.mark.parametrize(
    "write",
    [
        save_state,
        lambda state, folder: save_sharded(diffusers_state(state), folder),
        fp8,
    ],
    ids=["bfl", "diffusers-sharded", "fp8-scaled"],
)
def test_memory_is_that_of_a_block(write: Callable[[State, Path], Path], tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(shape, generator=generator).bfloat16()
        for name, shape in tensor_shapes(LARGE).items()
    }
    total = sum(tensor.nbytes for tensor in state.values())
    path = write(state, tmp_path)
    del state
    gc.collect()
    source = open_source(path)
    before = resident_bytes()
    largest = peak = after = 0
    for block in source.config.block_names:
        tensors = source.submodule(block)
        largest = max(largest, sum(tensor.nbytes for tensor in tensors.values()))
        sum(float(tensor.float().sum()) for tensor in tensors.values())  # touch every page
        peak = max(peak, resident_bytes() - before)
        del tensors
        after = max(after, resident_bytes() - before)
    assert total > 4 * largest
    message = f"peak {peak / largest:.2f}, afterwards {after / largest:.2f} of the largest block"
    # the allocator keeps some of what it freed; the file's pages must all be gone
    assert peak < 2.0 * largest, message
    assert after < 1.0 * largest, message
