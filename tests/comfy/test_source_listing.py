"""Which checkpoints can be chosen, and that no other name becomes a path."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoint_layouts import diffusers_state, save_sharded
from comfy_in_process import import_comfyui
from tiny_flux import TINY, random_flux

import_comfyui()

import folder_paths  # noqa: E402
from flux_fp4.nodes import paths  # noqa: E402
from flux_fp4.nodes.all_in_one import quantized_name  # noqa: E402
from flux_fp4.nodes.errors import SourceCheckpointError  # noqa: E402
from flux_fp4.quant.recipe import QuantizeOptions  # noqa: E402
from flux_fp4.quant.sources.source import open_source  # noqa: E402

INDEX = "FLUX.1-dev/transformer/diffusion_pytorch_model.safetensors.index.json"
SHARD = "FLUX.1-dev/transformer/diffusion_pytorch_model-00001-of-00003.safetensors"


@pytest.fixture
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Two folders of diffusion models; the second has a sharded FLUX as downloaded."""
    first, second = tmp_path / "models", tmp_path / "other"
    for root in (first, second, tmp_path / "checkpoints"):
        root.mkdir()
    (first / "flux.safetensors").write_bytes(b"x")
    (first / "flux.gguf").write_bytes(b"x")
    (first / "model.safetensors.index.json").write_text("{}")
    (tmp_path / "checkpoints" / "sdxl.safetensors").write_bytes(b"x")
    state = {name: value.bfloat16() for name, value in random_flux().state_dict().items()}
    save_sharded(diffusers_state(state), (second / INDEX).parent)
    folders = {
        "diffusion_models": ([str(first), str(second)], {".safetensors", ".gguf"}),
        "checkpoints": ([str(tmp_path / "checkpoints")], {".safetensors"}),
    }
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", folders)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return first, second


def test_shards_are_listed_as_one_by_their_index(roots: tuple[Path, Path]) -> None:
    assert paths.source_checkpoints() == [INDEX, "flux.safetensors"]


def test_listed_index_opens(roots: tuple[Path, Path]) -> None:
    path = paths.source_checkpoint(INDEX)
    assert path == roots[1] / INDEX
    source = open_source(path)
    assert (source.layout, source.config) == ("diffusers-sharded", TINY)


def test_shards_without_index_are_listed(roots: tuple[Path, Path]) -> None:
    (roots[1] / INDEX).unlink()
    assert SHARD in paths.source_checkpoints()
    assert INDEX not in paths.source_checkpoints()


@pytest.mark.parametrize(
    "name",
    [
        SHARD,
        "model.safetensors.index.json",
        "flux.gguf",
        "sdxl.safetensors",
        "../checkpoints/sdxl.safetensors",
        "checkpoints/sdxl.safetensors",
        f"../other/{INDEX}",
        f"/{INDEX}",
        f"./{INDEX}",
        INDEX.replace("/", "\\"),
        INDEX.replace("/", "//"),
        f"{INDEX}\0",
        f"{INDEX}/../diffusion_pytorch_model.safetensors.index.json",
        "",
    ],
)
def test_names_that_are_not_listed_never_become_paths(roots: tuple[Path, Path], name: str) -> None:
    with pytest.raises(SourceCheckpointError):
        paths.source_checkpoint(name)


def test_index_of_another_folder_is_not_used(roots: tuple[Path, Path]) -> None:
    # the same names in both folders; ComfyUI takes the first, whose index is missing
    folder = (roots[0] / SHARD).parent
    folder.mkdir(parents=True)
    (roots[0] / SHARD).write_bytes(b"x")
    assert SHARD in paths.source_checkpoints()


def test_quantized_name_of_an_index_is_a_plain_folder_name(roots: tuple[Path, Path]) -> None:
    name = quantized_name(INDEX, QuantizeOptions())
    assert name.startswith("FLUX.1-dev-transformer-diffusion_pytorch_model-")
    assert "index" not in name
    assert paths.name_fault(name) is None
