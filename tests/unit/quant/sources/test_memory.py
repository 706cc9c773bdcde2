"""Reading block by block takes the memory of a block, not that of the checkpoint."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_layouts import diffusers_state, header_mark, save_sharded, save_state
from flux_fp4.quant.flux.model import tensor_shapes
from pack_import import ROOT
from tiny_flux import TINY

State = dict[str, torch.Tensor]

LARGE = TINY.model_copy(
    update={"hidden_size": 1024, "num_heads": 8, "depth": 2, "depth_single_blocks": 8}
)
"""10 blocks of 28 to 72 MB in bf16."""


MEASURE = """
import sys
from pathlib import Path
import pack_import

pack_import.register_pack()
import torch
from flux_fp4.quant.sources.source import open_source

def resident():
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])

source = open_source(Path(sys.argv[1]))
source.submodule("single_blocks.0")  # what torch and safetensors load once
before, largest, peak, after = resident(), 0, 0, 0
for block in source.config.block_names:
    tensors = source.submodule(block)
    largest = max(largest, sum(tensor.nbytes for tensor in tensors.values()))
    for tensor in tensors.values():
        tensor.view(torch.uint8).sum()  # touch every page
    peak = max(peak, resident() - before)
    del tensor, tensors
    after = max(after, resident() - before)
print(largest, peak, after)
"""
"""In a process of its own, whose memory no other test has touched."""


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
    shapes = tensor_shapes(LARGE)
    state = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    total = sum(tensor.nbytes for tensor in state.values())
    command = [sys.executable, "-c", MEASURE, str(write(state, tmp_path))]
    # glibc returns what is freed above this size at once; by default it keeps tens of MB
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    folder = ROOT / "tests" / "tools"
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=True)
    largest, peak, after = map(int, done.stdout.split())
    assert total > 4 * largest
    message = f"peak {peak / largest:.2f}, afterwards {after / largest:.2f} of the largest block"
    assert peak < 1.7 * largest, message
    assert after < 0.1 * largest, message
