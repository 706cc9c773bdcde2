from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from block_inputs import block_inputs, embedded_sample
from flux_fp4.quant.block_quantizer import run_block
from flux_fp4.quant.emulation import emulated_block, emulated_linear
from flux_fp4.quant.errors.export import OnnxExportMissingError
from flux_fp4.quant.flux.config import block_linears
from flux_fp4.quant.onnx_export import export_blocks, export_missing, exported_blocks, onnx_path
from flux_fp4.quant.onnx_export.blocks import block_model
from flux_fp4.quant.onnx_export.contract import Variant
from flux_fp4.quant.onnx_export.graph import BlockGraph
from flux_fp4.quant.onnx_export.linears import nvfp4_linear
from flux_fp4.quant.quantized_checkpoint import (
    METADATA_KEY,
    QuantizedCheckpoint,
    is_in_plan,
)
from flux_fp4.quant.sqnr import sqnr_db
from mixed_checkpoint import FORMATS, linears_in_plans, save_mixed
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from tiny_flux import TINY, ignore_progress, random_flux

MAX_ONNX_BYTES = 300 * 1024


@pytest.fixture
def exported(quantized: QuantizedCheckpoint, tmp_path: Path) -> Path:
    """A copy of the quantized checkpoint with its ONNX files, free to be damaged."""
    path = tmp_path / quantized.path.name
    shutil.copy(quantized.path, path)
    export_blocks(path, ignore_progress)
    return path


def test_every_block_has_a_small_checked_file(exported: Path) -> None:
    paths = exported_blocks(exported)
    assert [path.stem for path in paths] == list(TINY.block_names)
    for path in paths:
        assert path.stat().st_size <= MAX_ONNX_BYTES, f"{path.name}: {path.stat().st_size} bytes"
        onnx.checker.check_model(str(path), full_check=True)


def test_no_file_holds_weight_data(exported: Path) -> None:
    for path in exported_blocks(exported):
        model = onnx.load(path, load_external_data=False)
        embedded = [
            tensor
            for tensor in model.graph.initializer
            if tensor.data_location != onnx.TensorProto.EXTERNAL
        ]
        # constants: ones of the layer norm, a handful of scalars and axes
        assert max(np.prod(tensor.dims, dtype=int) for tensor in embedded) == TINY.hidden_size
        assert sum(tensor.ByteSize() for tensor in embedded) < 2048


def test_external_data_are_the_tensors_of_the_checkpoint(
    exported: Path, quantized: QuantizedCheckpoint
) -> None:
    data = exported.read_bytes()
    for path in exported_blocks(exported):
        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                place = {entry.key: entry.value for entry in tensor.external_data}
                assert place["location"] == exported.name
                stored = quantized.load(f"{path.stem}.{tensor.name}")
                start, length = int(place["offset"]), int(place["length"])
                raw = stored.reshape(-1).view(torch.uint8).numpy().tobytes()
                assert data[start : start + length] == raw, tensor.name


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> QuantizedCheckpoint:
    """Every format in one checkpoint, exported."""
    names = linears_in_plans(random_flux())
    formats = {name: FORMATS[index % len(FORMATS)] for index, name in enumerate(names)}
    path = tmp_path_factory.mktemp("mixed") / "mixed.safetensors"
    checkpoint = save_mixed(random_flux(), path, formats)
    export_blocks(path, ignore_progress)
    return checkpoint


def test_every_format_is_external_data_without_a_copy(mixed: QuantizedCheckpoint) -> None:
    for path in exported_blocks(mixed.path):
        model = onnx.load(path, load_external_data=False)
        external = {
            tensor.name: {entry.key: entry.value for entry in tensor.external_data}
            for tensor in model.graph.initializer
            if tensor.data_location == onnx.TensorProto.EXTERNAL
        }
        in_plan = [n for n in mixed.tensors if n.startswith(f"{path.stem}.") and is_in_plan(n)]
        assert {f"{path.stem}.{name}" for name in external} == set(in_plan)
        for name, place in external.items():
            stored = mixed.tensors[f"{path.stem}.{name}"]
            assert (int(place["offset"]), int(place["length"])) == (stored.offset, stored.length)


def test_contract_lists_linears_by_format(mixed: QuantizedCheckpoint) -> None:
    for path in exported_blocks(mixed.path):
        model = onnx.load(path, load_external_data=False)
        props = {entry.key: entry.value for entry in model.metadata_props}
        dtypes = {linear: mixed.tensors[f"{path.stem}.{linear}.weight"].dtype
                  for linear in block_linears(path.stem)}  # fmt: skip
        for key, dtype in (("fp4_linears", "U8"), ("fp8_linears", "F8_E4M3")):
            expected = [linear for linear, stored in dtypes.items() if stored == dtype]
            assert json.loads(props[f"flux_fp4.{key}"]) == expected


def test_only_what_a_format_needs_is_in_the_graph(mixed: QuantizedCheckpoint) -> None:
    operators = {
        "nvfp4": {"Quantize": "TRT_FP4DynamicQuantize", "MatMul": "MatMul"},
        "nvfp4-awq": {"Quantize": "TRT_FP4DynamicQuantize", "Smooth": "Mul", "MatMul": "MatMul"},
        "nvfp4-svdquant": {
            "Quantize": "TRT_FP4DynamicQuantize", "Smooth": "Mul", "MatMul": "MatMul",
            "Down": "MatMul", "Up": "MatMul", "Branch": "Add",
        },
        "fp8": {"Quantize": "QuantizeLinear", "MatMul": "MatMul", "Rows": "Mul"},
        "bf16": {"MatMul": "MatMul"},
    }  # fmt: skip
    names = linears_in_plans(random_flux())
    for index, name in enumerate(names):
        stack, number, linear = name.split(".", 2)
        graph = block_model(mixed, f"{stack}.{number}").graph
        mine = {
            node.name.removeprefix(f"{linear}/"): node.op_type
            for node in graph
            if node.name.startswith(f"{linear}/") and "DQ" not in node.name
        }
        ignored = ("Bias", "Transpose", "Cast_")
        found = {part: op for part, op in mine.items() if not part.startswith(ignored)}
        assert found == operators[FORMATS[index % len(FORMATS)]], name


def test_file_stays_small_at_the_size_of_flux(
    tmp_path: Path, quantized: QuantizedCheckpoint
) -> None:
    path = tmp_path / "large.safetensors"
    config = TINY.model_copy(
        update={"hidden_size": 3072, "num_heads": 24, "depth": 1, "depth_single_blocks": 1}
    )
    _write_header_of_large_model(path, config.model_dump(), quantized)
    paths = export_blocks(path, ignore_progress)
    for onnx_file in paths:
        size = onnx_file.stat().st_size
        assert size <= MAX_ONNX_BYTES, f"{onnx_file.name}: {size} bytes"


def _write_header_of_large_model(
    path: Path, config: dict[str, object], like: QuantizedCheckpoint
) -> None:
    # a sparse file: real header, no data on disk
    factor = 3072 // TINY.hidden_size
    metadata = like.metadata.model_dump(mode="json") | {"config": config}
    header: dict[str, object] = {"__metadata__": {METADATA_KEY: json.dumps(metadata)}}
    offset = 0
    for name, place in sorted(like.tensors.items(), key=lambda item: item[1].offset):
        if name.startswith("single_blocks.1"):
            continue
        norm = name.endswith(("query_norm.scale", "key_norm.scale"))
        shape = place.shape if norm else tuple(factor * size for size in place.shape)
        length = place.length // max(1, int(np.prod(place.shape))) * int(np.prod(shape))
        header[name] = {
            "dtype": place.dtype,
            "shape": list(shape),
            "data_offsets": [offset, offset + length],
        }
        offset += length
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + offset)


def test_contract_describes_inputs_and_expectations(exported: Path) -> None:
    double, single, _ = (
        onnx.load(path, load_external_data=False) for path in exported_blocks(exported)
    )
    props = {entry.key: entry.value for entry in double.metadata_props}
    assert props["flux_fp4.block"] == "double_blocks.0"
    assert json.loads(props["flux_fp4.fp4_linears"]) == list(block_linears("double_blocks.0"))
    assert props["flux_fp4.fp8_attention"] == "1"
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*double.graph.input, *double.graph.output)
    }
    assert shapes["img"] == shapes["img_out"] == ["B", "N", 256]
    assert shapes["txt"] == shapes["txt_out"] == ["B", "T", 256]
    assert shapes["cos"] == shapes["sin"] == ["B", "S", 64]
    assert shapes["txt_mod2_gate"] == ["B", 1, 256]
    assert [value.name for value in single.graph.input] == [
        "x", "cos", "sin", "mod_shift", "mod_scale", "mod_gate",
    ]  # fmt: skip


class TRT_FP4DynamicQuantize(OpRun):  # noqa: N801  # onnx finds it by this name
    op_domain = "trt"

    def _run(
        self,
        x: np.ndarray,
        global_scale: np.ndarray,
        axis: int,
        block_size: int,
        scale_type: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        import ml_dtypes

        blocks = np.asarray(x, np.float32).reshape(*x.shape[:-1], -1, block_size)
        scale = np.abs(blocks).max(-1) / (np.float32(6) * global_scale)
        scale = np.minimum(scale, 448).astype(ml_dtypes.float8_e4m3fn)
        step = scale.astype(np.float32)[..., None] * global_scale
        scaled = np.divide(blocks, step, out=np.zeros_like(blocks), where=step > 0)
        return scaled.clip(-6, 6).astype(ml_dtypes.float4_e2m1fn).reshape(x.shape), scale


@pytest.mark.parametrize("block_name", ["double_blocks.0", "single_blocks.0"])
def test_onnx_reference_runs_the_file_as_torch_emulates_it(
    exported: Path, quantized: QuantizedCheckpoint, block_name: str
) -> None:
    module = random_flux().get_submodule(block_name)
    tensors = quantized.block_tensors(block_name)
    float_tensors = {
        name: tensor.float() for name, tensor in tensors.items() if name in module.state_dict()
    }
    module.load_state_dict({**module.state_dict(), **_without_packed(float_tensors)})
    state = embedded_sample()
    emulated = run_block(emulated_block(module, tensors), state)  # type: ignore[arg-type]
    inputs = block_inputs(module, state)  # type: ignore[arg-type]
    evaluator = ReferenceEvaluator(
        str(onnx_path(exported, block_name)), new_ops=[TRT_FP4DynamicQuantize]
    )
    results = evaluator.run(None, _bf16_feed(inputs, evaluator))
    actual = torch.from_numpy(np.asarray(results[0], np.float32))
    before = inputs["img" if "double" in block_name else "x"]
    db = sqnr_db(emulated.img - before, actual - before)
    # the file computes in bf16, the emulation in fp32: that flips FP4 codes all along the block
    assert db > 12, f"{block_name}: {db:.1f} dB"


def test_onnx_reference_runs_a_linear_to_bf16_rounding(
    quantized: QuantizedCheckpoint, tmp_path: Path
) -> None:
    path = tmp_path / quantized.path.name
    shutil.copy(quantized.path, path)
    graph = BlockGraph(QuantizedCheckpoint.read(path), "single_blocks.0")
    x = graph.input("x", ("B", "L", 256), graph.high_precision)
    y = nvfp4_linear(graph, "linear1", x, ("B", "L", 256))
    y.dtype = graph.high_precision
    ir.save(graph.model({"y": y}, {}), tmp_path / "linear.onnx")
    evaluator = ReferenceEvaluator(str(tmp_path / "linear.onnx"), new_ops=[TRT_FP4DynamicQuantize])
    values = torch.randn(1, 40, 256, generator=torch.Generator().manual_seed(2)).bfloat16().float()
    (actual,) = evaluator.run(None, _bf16_feed({"x": values}, evaluator))
    linear = emulated_linear("linear1", quantized.block_tensors("single_blocks.0"), bias=None)
    db = sqnr_db(linear(values), torch.from_numpy(np.asarray(actual, np.float32)))
    assert db > 40, f"{db:.1f} dB; bf16 rounds at about 50 dB"


def _without_packed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    linears = (*block_linears("double_blocks.0"), *block_linears("single_blocks.0"))
    packed = {f"{linear}.weight" for linear in linears}
    return {name: tensor for name, tensor in tensors.items() if name not in packed}


def _bf16_feed(
    inputs: dict[str, torch.Tensor], evaluator: ReferenceEvaluator
) -> dict[str, np.ndarray]:
    import ml_dtypes

    return {
        name: inputs[name].numpy()
        if name in ("cos", "sin")
        else inputs[name].numpy().astype(ml_dtypes.bfloat16)
        for name in evaluator.input_names
    }


def test_one_changed_weight_byte_changes_the_result(exported: Path) -> None:
    block = "single_blocks.1"
    module = random_flux().get_submodule(block)
    path = onnx_path(exported, block)
    inputs = block_inputs(module, embedded_sample())  # type: ignore[arg-type]

    def run() -> np.ndarray:
        evaluator = ReferenceEvaluator(str(path), new_ops=[TRT_FP4DynamicQuantize])
        return np.asarray(evaluator.run(None, _bf16_feed(inputs, evaluator))[0], np.float32)

    before = run()
    place = QuantizedCheckpoint.read(exported).tensors[f"{block}.linear2.weight"]
    data = bytearray(exported.read_bytes())
    data[place.offset] ^= 0x77
    exported.write_bytes(bytes(data))
    after = run()
    changed = np.flatnonzero((before != after).any(axis=(0, 1)))
    assert changed.tolist() == [0], "the first byte holds two inputs of output channel 0"


def test_export_of_other_tensors_is_stale(exported: Path, quantized: QuantizedCheckpoint) -> None:
    header = QuantizedCheckpoint.read(exported)
    path = onnx_path(exported, "double_blocks.0")
    model = onnx.load(path, load_external_data=False)
    for entry in model.metadata_props:
        if entry.key == "flux_fp4.checkpoint_digest":
            assert entry.value == header.metadata.content_digest
            entry.value = "0" * 64
    onnx.save(model, path)
    with pytest.raises(OnnxExportMissingError, match="of another checkpoint"):
        exported_blocks(exported)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("mask", [False, True])
def test_missing_block_is_named(exported: Path, lora: bool, mask: bool) -> None:
    path = onnx_path(exported, "single_blocks.1", Variant(lora, mask))
    path.unlink()
    with pytest.raises(OnnxExportMissingError, match=rf"'{path.name}' is missing"):
        exported_blocks(exported)


def test_what_is_complete_is_not_exported_again(exported: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in exported_blocks(exported)}
    assert export_missing(exported, ignore_progress) == tuple(before)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    first = next(iter(before))
    first.unlink()
    assert export_missing(exported, ignore_progress) == tuple(before)
    assert first.is_file()


def test_cancel_leaves_whole_files_only(quantized: QuantizedCheckpoint, tmp_path: Path) -> None:
    path = tmp_path / quantized.path.name
    shutil.copy(quantized.path, path)

    def cancel(phase: str, done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_blocks(path, cancel)
    names = sorted(entry.name for entry in tmp_path.iterdir() if entry.name != ".onnx.lock")
    forms = ("", ".lora", ".lora.mask", ".mask")
    assert names == sorted([*(f"double_blocks.0{form}.onnx" for form in forms), path.name])
    for name in names[:2]:
        onnx.checker.check_model(str(tmp_path / name), full_check=True)


def test_unquantized_linears_become_plain_matmuls(tmp_path: Path) -> None:
    from unquantized_checkpoint import save_unquantized

    checkpoint = save_unquantized(random_flux(), tmp_path / "plain.safetensors")
    graph = block_model(checkpoint, "double_blocks.0").graph
    operators = {node.op_type for node in graph}
    assert "MatMul" in operators
    assert not operators & {"TRT_FP4DynamicQuantize", "DequantizeLinear", "QuantizeLinear"}
