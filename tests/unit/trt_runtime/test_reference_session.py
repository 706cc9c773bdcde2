"""How ONNX Runtime runs the reference's graphs."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime
import pytest
from flux_fp4.trt_runtime.reference_graph import reference_model
from flux_fp4.trt_runtime.reference_session import session_options


@pytest.mark.parametrize("block", ["double_blocks.0", "single_blocks.0"])
def test_matrices_are_multiplied_as_they_lie(
    built_folder: Path, tmp_path: Path, block: str
) -> None:
    model, matrices = reference_model(built_folder / f"{block}.onnx")
    options = session_options()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    optimized = onnx.load(tmp_path / "optimized.onnx")
    readers = [node for node in optimized.graph.node if set(node.input) & matrices.keys()]
    assert len(readers) == len(matrices)
    for node in readers:
        transposed = {attribute.name: attribute.i for attribute in node.attribute}
        assert (node.op_type, transposed.get("transB")) == ("FusedMatMul", 1)
