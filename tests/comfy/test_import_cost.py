"""Registering the nodes and answering /object_info loads none of the heavy libraries."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pack_import import ROOT

# torch is absent here: ComfyUI itself imports it before any node pack.
HEAVY = (
    "modelopt", "tensorrt", "tensorrt_rtx", "onnx", "onnx_ir", "onnxruntime", "matplotlib",
    "torchmetrics",
)  # fmt: skip

PROGRAM = """
import asyncio, sys
from comfy.options import enable_args_parsing
enable_args_parsing()
import folder_paths, nodes
sys.path.insert(0, "{tools}")
before = set(sys.modules)
from pack_import import register_pack
register_pack()
import flux_fp4

async def schemas():
    extension = await flux_fp4.comfy_entrypoint()
    await extension.on_load()
    return [node.GET_NODE_INFO_V1() for node in await extension.get_node_list()]

assert len(asyncio.run(schemas())) == 15
print("LOADED", *{{name.partition(".")[0] for name in set(sys.modules) - before}})
"""


def test_schemas_load_nothing_heavy(comfyui_path: Path, tmp_path: Path) -> None:
    program = PROGRAM.format(tools=ROOT / "tests" / "tools")
    command = [sys.executable, "-c", program, "--cpu", "--base-directory", str(tmp_path)]
    done = subprocess.run(command, cwd=comfyui_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    loaded = done.stdout.rpartition("LOADED")[2].split()
    assert "flux_fp4" in loaded
    assert not set(loaded) & set(HEAVY)
