from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from flux_fp4.tests.unit.trt_runtime.block_inputs import block_inputs
from flux_fp4.trt_runtime.adapters import LowRank
from flux_fp4.trt_runtime.engine import Engine
from flux_fp4.trt_runtime.errors.run import BlockInputError, ShapeProfileError
from flux_fp4.trt_runtime.manifest import EngineManifest, load_manifest
from flux_fp4.trt_runtime.selection import Selection

DOUBLE, SINGLE = "double_blocks.0", "single_blocks.0"


class Doubling:
    """An executor that returns twice the token inputs in fp32 and remembers its calls."""

    loaded = True
    weight_bytes = 7
    activation_bytes = 0
    machine = None

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.inputs: Mapping[str, torch.Tensor] = {}
        self.selection = Selection()

    def use(self, selection: Selection) -> None:
        self.selection = selection

    def bytes_within(self, limit: int | None) -> int:
        return self.weight_bytes

    def limit(self, weight_bytes: int | None) -> None: ...

    def load(self, device: torch.device) -> None: ...

    def unload(self) -> None: ...

    def run(self, block: str, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.inputs = inputs
        names = ("img", "txt") if block == DOUBLE else ("x",)
        self.batches.append(inputs[names[0]].shape[0])
        return {f"{name}_out": 2 * inputs[name].float() for name in names}


@pytest.fixture(scope="module")
def manifest(built_folder: Path) -> EngineManifest:
    return load_manifest(built_folder / "sm120")


@pytest.fixture
def executor() -> Doubling:
    return Doubling()


@pytest.fixture
def engine(manifest: EngineManifest, executor: Doubling) -> Engine:
    return Engine(Path("tiny"), manifest, executor, "fake", "")


@pytest.mark.parametrize(
    ("batch", "parts"), [(1, [1]), (2, [2]), (3, [1, 2]), (5, [1, 2, 2]), (6, [2, 2, 2])]
)
def test_batch_above_the_profile_is_split(
    engine: Engine, executor: Doubling, manifest: EngineManifest, batch: int, parts: list[int]
) -> None:
    inputs = block_inputs(manifest.blocks[0], 40, 8, batch)
    outputs = engine.run(DOUBLE, inputs)
    assert executor.batches == parts
    assert torch.equal(outputs["img_out"], 2 * inputs["img"])
    assert torch.equal(outputs["txt_out"], 2 * inputs["txt"])


def test_inputs_of_batch_one_serve_the_whole_batch(
    engine: Engine, executor: Doubling, manifest: EngineManifest
) -> None:
    one = block_inputs(manifest.blocks[1], 40, 8)
    inputs = {**block_inputs(manifest.blocks[1], 40, 8, 3), "cos": one["cos"], "sin": one["sin"]}
    engine.run(SINGLE, inputs)
    assert executor.inputs["cos"].shape == (2, 48, 32)
    assert torch.equal(executor.inputs["cos"][1], one["cos"][0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_result_has_the_caller_s_type(
    engine: Engine, manifest: EngineManifest, dtype: torch.dtype
) -> None:
    inputs = {n: t.to(dtype) for n, t in block_inputs(manifest.blocks[1], 40, 8, 3).items()}
    assert engine.run(SINGLE, inputs)["x_out"].dtype == dtype


@pytest.mark.parametrize(
    ("img_tokens", "txt_tokens", "label"),
    [(31, 8, "image"), (257, 8, "image"), (40, 33, "text")],
)
def test_tokens_outside_the_profile_are_refused(
    engine: Engine, executor: Doubling, manifest: EngineManifest,
    img_tokens: int, txt_tokens: int, label: str,
) -> None:  # fmt: skip
    with pytest.raises(ShapeProfileError) as caught:
        engine.run(DOUBLE, block_inputs(manifest.blocks[0], img_tokens, txt_tokens))
    assert caught.value.label == label
    assert executor.batches == []


def test_single_block_knows_only_the_sum(engine: Engine, manifest: EngineManifest) -> None:
    engine.run(SINGLE, block_inputs(manifest.blocks[1], 280, 8))
    with pytest.raises(ShapeProfileError, match="33 to 288"):
        engine.run(SINGLE, block_inputs(manifest.blocks[1], 281, 8))


def wrong(name: str, value: torch.Tensor | None) -> dict[str, torch.Tensor | None]:
    return {name: value}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        pytest.param({"cos": None}, r"missing inputs \['cos'\]", id="missing"),
        pytest.param({"mask": torch.ones(1)}, r"unexpected inputs \['mask'\]", id="unexpected"),
        pytest.param({"x": torch.ones(48, 128)}, "'x' is", id="rank"),
        pytest.param({"x": torch.ones(1, 48, 64)}, "'x' is", id="hidden size"),
        pytest.param({"mod_gate": torch.ones(1, 48, 128)}, "'mod_gate' is", id="per token"),
        pytest.param({"sin": torch.ones(1, 47, 32)}, "'sin' is", id="tokens differ"),
        pytest.param({"mod_gate": torch.ones(3, 1, 128)}, "expected", id="batch differs"),
        pytest.param({"x": torch.ones(1, 48, 128, dtype=torch.int32)}, "int32", id="integers"),
        pytest.param({"x": torch.tensor(1.0)}, "'x' is", id="scalar"),
    ],
)
def test_inputs_that_do_not_match_are_refused(
    engine: Engine, executor: Doubling, manifest: EngineManifest,
    changes: dict[str, torch.Tensor | None], match: str,
) -> None:  # fmt: skip
    inputs = {**block_inputs(manifest.blocks[1], 40, 8, batch=2), **changes}
    given = {name: tensor for name, tensor in inputs.items() if tensor is not None}
    with pytest.raises(BlockInputError, match=match):
        engine.run(SINGLE, given)
    assert executor.batches == []


def test_rotary_tables_must_cover_text_and_image(engine: Engine, manifest: EngineManifest) -> None:
    inputs = block_inputs(manifest.blocks[0], 40, 8)
    longer = block_inputs(manifest.blocks[0], 41, 8)
    with pytest.raises(BlockInputError, match="rotary tables for 49"):
        engine.run(DOUBLE, {**inputs, "cos": longer["cos"], "sin": longer["sin"]})


def test_unknown_block_is_refused(engine: Engine) -> None:
    with pytest.raises(BlockInputError, match="2 other blocks"):
        engine.run("double_blocks.1", {})


def test_activation_estimate_is_linear_in_tokens_and_bounded_by_the_profile(
    engine: Engine, manifest: EngineManifest
) -> None:
    reported = max(entry.activation_bytes for entry in manifest.blocks)
    assert engine.activation_bytes(2, 256, 32) == reported
    assert engine.activation_bytes(9, 256, 32) == reported
    assert engine.activation_bytes(1, 256, 32) == pytest.approx(reported / 2, abs=1)
    assert engine.activation_bytes(1, 128, 16) == pytest.approx(reported / 4, abs=1)


def test_reference_engine_runs_every_block_of_a_real_engine(
    built_folder: Path, manifest: EngineManifest
) -> None:
    engine = Engine.open(built_folder / "sm120", "reference")
    assert (engine.backend_name, engine.loaded) == ("reference", False)
    assert engine.weight_bytes > 0
    engine.load(torch.device("cpu"))
    for entry in manifest.blocks:
        inputs = block_inputs(entry, 40, 8, batch=3)
        outputs = engine.run(entry.block, inputs)
        alone = engine.run(entry.block, {name: x[2:] for name, x in inputs.items()})
        for spec in entry.outputs:
            result = outputs[spec.name]
            assert result.shape == inputs[spec.name.removesuffix("_out")].shape
            assert result.dtype == torch.bfloat16
            assert torch.equal(result[2:], alone[spec.name])
    engine.unload()
    assert not engine.loaded


def test_adapters_go_to_the_executor(engine: Engine, executor: Doubling) -> None:
    adapters = {SINGLE: {"linear1": LowRank(torch.ones(128, 2), torch.ones(2, 896))}}
    selection = Selection(adapters)
    engine.use(selection)
    assert executor.selection is engine.selection is selection


def test_adapter_for_an_unknown_block_is_refused(engine: Engine, executor: Doubling) -> None:
    adapters = {"single_blocks.9": {"linear1": LowRank(torch.ones(128, 2), torch.ones(2, 896))}}
    with pytest.raises(BlockInputError, match=r"single_blocks\.9"):
        engine.use(Selection(adapters))
    assert executor.selection == Selection()


def test_variants_that_need_more_memory_are_reckoned_with(
    engine: Engine, executor: Doubling, manifest: EngineManifest
) -> None:
    reported = max(entry.activation_bytes for entry in manifest.blocks)
    executor.activation_bytes = 2 * reported
    assert engine.activation_bytes(2, 256, 32) == 2 * reported


def test_opening_says_what_the_checks_took(
    engine_copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "flux_fp4.trt_runtime.manifest"):
        Engine.open(engine_copy)
    assert "Checked 2 plans, 0.0 GB, in " in caplog.text
    assert "ONNX files" in caplog.text
    assert "digests of plans" in caplog.text
