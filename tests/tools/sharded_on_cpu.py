"""The command line with accelerate's FSDP2 on CPU processes, which accelerate has for GPUs only.

It chooses FSDP by the process group's backend. Here it is told to take it with Gloo too; what it
then does with the model, and torch's own sharding below it, is what it does on GPUs.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from distill_in_fp64 import compute_in_fp64
from pack_import import register_pack

register_pack()

from accelerate import Accelerator  # noqa: E402
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin  # noqa: E402
from flux_fp4.cli.program import main  # noqa: E402
from flux_fp4.quant.training import accelerators  # noqa: E402
from torch.distributed.fsdp import FSDPModule  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "StudentBlock",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}


def shard_on_cpu(accelerator: Accelerator) -> None:
    """Let an accelerator shard, then check it as a GPU's would be."""
    state = accelerator.state
    state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin()
    check_launch(accelerator)


def prepare_and_look(self: Accelerator, *parts: Any) -> Any:
    """Shard, and make sure that everything is."""
    prepared = prepare(self, *parts)
    student = prepared[0]
    assert all(isinstance(block, FSDPModule) for block in student.blocks)
    assert all(isinstance(parameter, DTensor) for parameter in student.parameters())
    return prepared


if __name__ == "__main__":
    compute_in_fp64()
    os.environ.update(FSDP)
    check_launch, accelerators.check_launch = accelerators.check_launch, shard_on_cpu
    prepare, Accelerator.prepare = Accelerator.prepare, prepare_and_look
    sys.exit(main())
