"""The only file that knows ModelOpt: AWQ scales of Linears.

ModelOpt 0.47 cannot execute NVFP4 on a CPU; here its weights go through our own, registered as one
of ModelOpt's quantization backends for as long as it calibrates.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from unittest.mock import patch

import torch
from torch import Tensor, nn

from .errors.calibration import OTHER_SAMPLES, CalibrationError, NotFiniteError
from .nvfp4 import fake_quantize_weight

_NVFP4 = {
    "num_bits": (2, 1),
    "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)},
}
"""ModelOpt 0.47 ``configs/ptq/presets/model/nvfp4``: E2M1 in blocks of 16 with E4M3 scales."""

_BACKEND = "flux_fp4_nvfp4"


def awq_pre_quant_scale(
    linears: Mapping[str, tuple[Tensor, Tensor]],
    alpha_step: float = 0.1,
    heartbeat: Callable[[], None] | None = None,
) -> dict[str, Tensor]:
    """Find by how much to scale each input channel of some Linears, by ModelOpt's ``awq_lite``.

    The input is multiplied by the scale and the weight divided by it, so that channels with large
    inputs get more of the weight's precision (AWQ, Lin et al. 2023, arXiv:2306.00978). For every
    alpha from 0 to 1 the scale is ``mean|w| ** (1 - alpha) / mean|x| ** alpha``, where w counts in
    parts of its block's largest value, normalized so that smallest times largest scale is 1. The
    alpha with the smallest output error, weight quantized and input not, wins.

    Args:
        linears: By name, the weight ``[N, K]`` and inputs ``[R, K]`` to measure the error on. They
            are computed with in fp32 on the weight's device, one Linear at a time.
        alpha_step: Step of the grid; ModelOpt's default 0.1 tries 11 values.
        heartbeat: Called before each of them; raises to cancel.

    Returns:
        fp32 ``[K]`` by name, on the weight's device.

    Raises:
        CalibrationError: A Linear has no inputs or only zeros.
        NotFiniteError: An input is NaN or infinite.
    """
    scales = {}
    with _cpu_nvfp4(_load_modelopt(), heartbeat) as mtq:
        for name, (weight, rows) in linears.items():
            _check_rows(name, rows)
            scales[name] = _awq_scale(mtq, weight, rows, alpha_step)
    return scales


def _awq_scale(mtq: ModuleType, weight: Tensor, rows: Tensor, alpha_step: float) -> Tensor:
    outputs, inputs = weight.shape
    linear = nn.Linear(inputs, outputs, bias=False, device="meta")
    # ModelOpt scales it in place at the end: never the caller's own
    smoothed = weight.to(torch.float32, copy=True)
    linear.weight = nn.Parameter(smoothed, requires_grad=False)
    rows = rows.to(smoothed)
    quantizer = {**_NVFP4, "backend": _BACKEND}
    config = {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*weight_quantizer", "cfg": quantizer},
            {"quantizer_name": "*input_quantizer", "cfg": quantizer},
        ],
        "algorithm": {"method": "awq_lite", "alpha_step": alpha_step},
    }
    model = mtq.quantize(nn.Sequential(linear), config, forward_loop=lambda model: model(rows))
    return model[0].input_quantizer.pre_quant_scale.clone()


def _check_rows(name: str, rows: Tensor) -> None:
    if not torch.isfinite(rows).all():
        raise NotFiniteError(
            f"An input of '{name}'",
            OTHER_SAMPLES,
        )
    if not rows.any():
        raise CalibrationError(
            f"'{name}' has {len(rows)} inputs and none but zeros", "a sample must reach each layer"
        )


@contextmanager
def _cpu_nvfp4(mtq: ModuleType, heartbeat: Callable[[], None] | None) -> Iterator[ModuleType]:
    from modelopt.torch.quantization import conversion, model_calib
    from modelopt.torch.quantization.nn import register_quant_backend, unregister_quant_backend

    def quantize(inputs: Tensor, quantizer: nn.Module) -> Tensor:
        if heartbeat:
            heartbeat()
        return fake_quantize_weight(inputs)

    def silence(*values: object, **options: object) -> None:
        pass

    register_quant_backend(_BACKEND, quantize)
    try:
        # three lines per Linear, past logging
        with (
            patch.object(conversion, "print", silence, create=True),
            patch.object(model_calib, "print_rank_0", silence),
        ):
            yield mtq
    finally:
        unregister_quant_backend(_BACKEND)


def _load_modelopt() -> ModuleType:
    # takes some 20 s, so nothing but its use imports it
    with warnings.catch_warnings():
        # it warns of transformers' version, which its Hugging Face plugins alone would need
        warnings.filterwarnings("ignore", module=r"modelopt\.")
        import modelopt.torch.quantization as mtq
    return mtq
