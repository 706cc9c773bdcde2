"""The only file that knows ModelOpt: it calibrates the Linears of one block module.

ModelOpt 0.47 registers quantizers by module type, so the block must be plain ``torch.nn``. While
it calibrates, quantizers observe and do not quantize: the block's outputs stay full precision and
it runs on CPU, where ModelOpt cannot execute NVFP4 itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

from torch import nn

from .errors import CalibrationError, NotFiniteError

_NVFP4_INPUT = {
    "num_bits": (2, 1),
    "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)},
}
"""ModelOpt 0.47 ``configs/ptq/presets/model/nvfp4``: E2M1 in blocks of 16 with E4M3 scales."""


def input_amax(
    block: nn.Module, linears: Sequence[str], forward: Callable[[], None], block_name: str
) -> dict[str, float]:
    """Measure the largest input magnitude of each Linear by ModelOpt's max calibration.

    Args:
        block: The block; its Linears get quantizers, so it is of no other use afterwards.
        linears: Names relative to the block.
        forward: Runs every calibration sample through the block.
        block_name: For errors.

    Returns:
        ``amax`` by Linear.

    Raises:
        CalibrationError: A Linear saw only zeros.
        NotFiniteError: A Linear saw NaN or infinity.
    """
    with warnings.catch_warnings():
        # it warns of transformers' version, which its Hugging Face plugins alone would need
        warnings.filterwarnings("ignore", module=r"modelopt\.")
        import modelopt.torch.quantization as mtq

    enabled = [
        {"quantizer_name": f"{linear}.input_quantizer", "cfg": _NVFP4_INPUT} for linear in linears
    ]
    config = {
        "quant_cfg": [{"quantizer_name": "*", "enable": False}, *enabled],
        "algorithm": "max",
    }
    try:
        mtq.quantize(block, config, forward_loop=lambda _: forward())
    except AssertionError as error:  # MaxCalibrator asserts that what it sees is finite
        raise NotFiniteError(
            f"An activation of '{block_name}'", "Try other latents or prompts for calibration."
        ) from error
    measured = {}
    for linear in linears:
        amax = float(block.get_submodule(linear).input_quantizer.amax)  # type: ignore[arg-type]
        if amax == 0:
            raise CalibrationError(
                f"every input of '{block_name}.{linear}' was zero", "a sample must reach each layer"
            )
        measured[linear] = amax
    return measured
