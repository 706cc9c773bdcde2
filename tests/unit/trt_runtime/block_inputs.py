"""Inputs for a block of a manifest."""

from __future__ import annotations

import torch
from flux_fp4.trt_runtime.manifest import PlanEntry

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def block_inputs(
    entry: PlanEntry, img_tokens: int, txt_tokens: int, batch: int = 1
) -> dict[str, torch.Tensor]:
    """Return random inputs in the types of the contract; rotary tables are real ones."""
    sizes = {"B": batch, "N": img_tokens, "T": txt_tokens, "S": img_tokens + txt_tokens}
    random = torch.Generator().manual_seed(1)
    inputs = {}
    for spec in entry.inputs:
        shape = [sizes[dim] if isinstance(dim, str) else dim for dim in spec.shape]
        value = torch.randn(shape, generator=random)
        if spec.name in ("cos", "sin"):
            angles = torch.arange(shape[1])[:, None] * torch.logspace(0, -3, shape[2])
            value = getattr(torch, spec.name)(angles).expand(shape).contiguous()
        elif "mod" in spec.name:
            value = 0.1 * value
        inputs[spec.name] = value.to(DTYPES[spec.dtype])
    return inputs
