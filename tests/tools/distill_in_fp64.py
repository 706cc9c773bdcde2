"""The command line computing in fp64 what is not rounded to FP4.

In fp32, sums in another order end an ulp apart, that moves some activation over the border between
two codes, and a loss by a hundredth. In fp64 next to nothing lies so close to a border, and runs of
one and of several processes can be compared digit by digit.
"""

from __future__ import annotations

import sys

import torch
from pack_import import register_pack

register_pack()

from flux_fp4.cli.program import main  # noqa: E402
from flux_fp4.quant import stack  # noqa: E402


def compute_in_fp64() -> None:
    """Let `--precision auto` be fp64."""
    stack.compute_dtype = lambda device: torch.float64


if __name__ == "__main__":
    compute_in_fp64()
    sys.exit(main())
