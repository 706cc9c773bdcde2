"""The digest in the header is that of the tensors, and notices every changed byte."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from flux_fp4.quant.content_digest import check_content, content_digest
from flux_fp4.quant.errors.files import QuantizedCheckpointError
from flux_fp4.quant.quantized_checkpoint import QuantizedCheckpoint
from quantize_tiny import quantize
from tiny_flux import ignore_progress, random_flux, save_flux


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> QuantizedCheckpoint:
    folder = tmp_path_factory.mktemp("model")
    source = save_flux(random_flux(), folder / "source.safetensors")
    return quantize(source, folder / "tiny.safetensors")


def test_what_was_written_is_confirmed(checkpoint: QuantizedCheckpoint) -> None:
    steps: list[int] = []
    check_content(checkpoint, lambda _phase, done, _total: steps.append(done))
    assert steps == list(range(len(checkpoint.tensors)))


@pytest.mark.parametrize("name", ["img_in.weight", "single_blocks.0.linear1.weight_scale_2"])
def test_one_changed_bit_of_any_tensor_is_found(
    checkpoint: QuantizedCheckpoint, tmp_path: Path, name: str
) -> None:
    path = Path(shutil.copy(checkpoint.path, tmp_path / "tiny.safetensors"))
    with path.open("r+b") as file:
        file.seek(checkpoint.tensors[name].offset)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(QuantizedCheckpointError, match="wrong digest"):
        check_content(QuantizedCheckpoint.read(path), ignore_progress)


def test_names_count_and_their_order_does_not() -> None:
    digest = content_digest({"a": "1", "b": "2"})
    assert digest == content_digest({"b": "2", "a": "1"})
    assert digest != content_digest({"a": "2", "b": "1"})
