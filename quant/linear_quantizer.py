"""One Linear of a block into the tensors of the quantized checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from .errors.sources import UnsupportedWeightError
from .fp8 import quantize_weight_fp8
from .low_rank import low_rank_branch
from .modelopt_calibration import awq_pre_quant_scale
from .nvfp4 import E2M1_MAX, E4M3_MAX, NVFP4Weight, quantize_weight
from .recipe import Format, QuantizeOptions, Recipe
from .smoothing import best_scale
from .statistics import LinearStatistics, spread

_SMOOTHING_OUTPUTS = 256
"""Outputs of a Linear that smoothing looks at, evenly spaced. Its scales belong to the inputs, so a
sample of outputs tells the error of each choice as well (``test_linear_quantizer.py`` compares),
and takes a small part of the time at FLUX.1-dev's size; docs/adr/0007 has what 1,024 cost."""

_BRANCH_SEED = 0
"""Of the randomized range finder: the same weight always gives the same branch."""


def smoothing_scales(
    weights: Mapping[str, Tensor],
    statistics: Mapping[str, LinearStatistics],
    recipe: Recipe,
    formats: Mapping[str, Format],
    heartbeat: Callable[[], None],
) -> dict[str, Tensor]:
    """Return the ``pre_quant_scale`` of every NVFP4 Linear of a block that the recipe smooths.

    Args:
        weights: ``[N, K]`` by Linear.
        statistics: By Linear; their rows are what errors are measured on.
        recipe: Says whether there is smoothing at all.
        formats: By Linear.
        heartbeat: Called many times; may raise to cancel.

    Returns:
        bf16 ``[K]`` by Linear; empty without smoothing. bf16 because the plan multiplies in it.
    """
    if recipe.smoothing == "none":
        return {}
    linears = {
        linear: (
            weight[spread(len(weight), _SMOOTHING_OUTPUTS)],
            statistics[linear].rows.to(weight),
        )
        for linear, weight in weights.items()
        if formats[linear] == "nvfp4"
    }
    if not linears:
        return {}
    awq = awq_pre_quant_scale(linears, heartbeat=heartbeat)
    return {
        linear: best_scale(
            linear,
            weight,
            rows,
            statistics[linear].channel_amax,
            awq[linear],
            recipe.scale_search,
            heartbeat,
        )
        for linear, (weight, rows) in linears.items()
    }


def quantize_linear(
    name: str,
    weight: Tensor,
    packed: NVFP4Weight | None,
    statistics: LinearStatistics,
    options: QuantizeOptions,
    chosen: Format,
    pre_quant_scale: Tensor | None = None,
) -> dict[str, Tensor]:
    """Quantize one Linear.

    Args:
        name: Full name, for errors.
        weight: ``[N, K]`` in the type the checkpoint stores.
        packed: The same weight where the checkpoint holds it in NVFP4 already: taken over as it is.
        statistics: Of its input.
        options: The recipe and the activation range.
        chosen: The format.
        pre_quant_scale: bf16 ``[K]``: the input will be multiplied by it, the weight is divided.

    Returns:
        Tensors by name relative to the Linear, see ``quantized_checkpoint``.

    Raises:
        UnsupportedWeightError: NVFP4 cannot hold the weight, or a search is asked for of a weight
            that is NVFP4 already.
        NotFiniteError: The weight holds NaN or infinity.
    """
    if chosen == "bf16":
        return {"weight": weight.bfloat16()}
    amax = activation_amax(statistics, options, pre_quant_scale)
    if chosen == "fp8":
        fp8 = quantize_weight_fp8(weight, name)
        input_scale = torch.tensor(amax / E4M3_MAX)
        return {"weight": fp8.values, "weight_scale": fp8.scale, "input_scale": input_scale}
    tensors = {}
    recipe = options.recipe
    if packed is not None:
        check_keeps_packed(name, recipe)
    else:
        if pre_quant_scale is not None:
            weight = weight.float() / pre_quant_scale.float()
            tensors["pre_quant_scale"] = pre_quant_scale
        importance = _importance(statistics, pre_quant_scale).to(weight.device)
        quantize = partial(
            quantize_weight, linear=name, search=recipe.scale_search, importance=importance
        )
        if recipe.low_rank is not None:
            branch = low_rank_branch(
                weight.float(),
                recipe.low_rank.rank,
                recipe.low_rank.method,
                recipe.low_rank.refinements,
                quantize,
                _BRANCH_SEED,
            )
            tensors |= {"svd_down": branch.down, "svd_up": branch.up}
            weight, packed = branch.residual, branch.quantized
        packed = packed or quantize(weight)
    # second-level activation scale of NVFP4: ModelOpt 0.47 export_onnx.py, amax / (6 * 448)
    input_scale = torch.tensor(amax / (E2M1_MAX * E4M3_MAX))
    return tensors | {
        "weight": packed.packed,
        "weight_scale": packed.block_scale,
        "weight_scale_2": packed.global_scale,
        "input_scale": input_scale,
    }


def check_keeps_packed(name: str, recipe: Recipe) -> None:
    """Refuse recipes that would have to quantize an NVFP4 weight a second time.

    Raises:
        UnsupportedWeightError: The recipe searches scales, smooths or splits off a branch.
    """
    if recipe.scale_search != "max" or recipe.smoothing != "none" or recipe.low_rank:
        raise UnsupportedWeightError(
            name,
            "the checkpoint holds it in NVFP4 already",
            f"recipe '{recipe.name}' needs the original weights; 'nvfp4-max' takes NVFP4 over",
        )


def activation_amax(
    statistics: LinearStatistics, options: QuantizeOptions, pre_quant_scale: Tensor | None
) -> float:
    """Return the magnitude that the input's scale must reach.

    With smoothing, the largest magnitude of the multiplied input follows exactly from that of each
    channel; its quantile is taken to shrink in proportion.
    """
    seen = statistics.range
    amax = seen.at(options.percentile)
    if pre_quant_scale is not None:
        scaled = statistics.channel_amax * pre_quant_scale.float().cpu()
        amax *= scaled.amax().item() / seen.amax
    return max(options.headroom * amax, torch.finfo(torch.float32).tiny * E2M1_MAX * E4M3_MAX)


def _importance(statistics: LinearStatistics, pre_quant_scale: Tensor | None) -> Tensor:
    if pre_quant_scale is None:
        return statistics.mean_square
    return statistics.mean_square * pre_quant_scale.float().cpu().square()
