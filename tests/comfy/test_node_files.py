"""Names from workflows become paths below the model folder only; runs repeat when files change."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from comfy_in_process import import_comfyui
from comfy_server import ComfyClient
from error_examples import CORE_NODES
from pack_import import ROOT

import_comfyui()

import folder_paths  # noqa: E402
from flux_fp4.nodes import paths  # noqa: E402
from flux_fp4.nodes.all_in_one import quantized_name  # noqa: E402
from flux_fp4.nodes.build import TARGETS, build_spec  # noqa: E402
from flux_fp4.nodes.errors import (  # noqa: E402
    ArtifactNameError,
    ArtifactNotFoundError,
    SourceCheckpointError,
)
from flux_fp4.nodes.fingerprint import OutputLedger, OwnChanges, file_state  # noqa: E402
from flux_fp4.nodes.load import BACKENDS  # noqa: E402
from flux_fp4.nodes.quantize import source_state  # noqa: E402
from flux_fp4.nodes.recipe_inputs import (  # noqa: E402
    ADVANCED,
    options_from,
    recipe_input,
    recipe_state,
)
from flux_fp4.quant.errors.recipes import RecipeError  # noqa: E402
from flux_fp4.quant.quantized_checkpoint import up_to_date_checkpoint  # noqa: E402
from flux_fp4.quant.recipe import QuantizeOptions  # noqa: E402
from flux_fp4.trt_runtime import backend  # noqa: E402

BAD_NAMES = {
    "empty": "",
    "parent": "..",
    "here": ".",
    "up": "../x",
    "absolute": "/etc/passwd",
    "sub-folder": "a/b",
    "backslash": "a\\b",
    "drive": "C:x",
    "stream": "x:y",
    "null": "a\0b",
    "newline": "a\nb",
    "hidden": ".x",
    "trailing dot": "x.",
    "space around": " x",
    "device": "NUL",
    "device with suffix": "com1.txt",
    "wildcard": "*",
    "too long": "x" * 101,
}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty model folder with a second one behind it, and one source checkpoint."""
    roots = [str(tmp_path / "first"), str(tmp_path / "second")]
    sources = tmp_path / "diffusion_models"
    sources.mkdir()
    (sources / "flux.safetensors").write_bytes(b"x")
    (sources / "flux.gguf").write_bytes(b"x")
    folders = {
        paths.MODEL_FOLDER: (roots, {".safetensors"}),
        "diffusion_models": ([str(sources)], {".safetensors", ".gguf"}),
    }
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", folders)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


def make_checkpoint(root: Path, name: str, *, engine: str | None = None) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / f"{name}.safetensors").write_bytes(b"x")
    if engine:
        (folder / engine).mkdir()
        (folder / engine / paths.MANIFEST).write_text("{}")
    return folder


@pytest.mark.parametrize("name", BAD_NAMES.values(), ids=BAD_NAMES.keys())
def test_bad_names_never_become_paths(root: Path, name: str) -> None:
    (root / "first").mkdir()
    with pytest.raises(ArtifactNameError) as error:
        paths.new_checkpoint(name)
    assert error.value.name == name
    with pytest.raises(ArtifactNotFoundError):
        paths.quantized_checkpoint(name)
    for engine in (name, f"{name}/sm120", f"x/{name}"):
        with pytest.raises(ArtifactNotFoundError):
            paths.engine_folder(engine)
    with pytest.raises(SourceCheckpointError):
        paths.source_checkpoint(name)


@pytest.mark.parametrize("name", ["flux1-dev", "Flux 1.1 (mine)", "flüx", "x.y", "0"])
def test_plain_names_are_allowed(root: Path, name: str) -> None:
    expected = root / "first" / name / f"{name}.safetensors"
    assert paths.new_checkpoint(name) == expected


def test_traversal_to_a_real_engine_is_refused(root: Path) -> None:
    make_checkpoint(root / "outside", "x", engine="sm120")
    (root / "first").mkdir()
    with pytest.raises(ArtifactNotFoundError, match="Build TensorRT Engine"):
        paths.engine_folder("../outside/x/sm120")
    with pytest.raises(ArtifactNotFoundError):
        paths.quantized_checkpoint("../outside/x")


def test_lists_hold_what_is_complete(root: Path) -> None:
    make_checkpoint(root / "first", "a", engine="sm120")
    make_checkpoint(root / "second", "b", engine="sm121")
    (root / "first" / "empty" / "sm120").mkdir(parents=True)
    (root / "first" / "a" / "sm121").mkdir()  # a build that did not finish
    (root / "second" / "b" / "double_blocks.0.onnx").write_bytes(b"x")
    os.utime(root / "first" / "a" / "sm120" / paths.MANIFEST, ns=(1, 1))
    assert paths.quantized_checkpoints() == ["a", "b"]
    assert paths.exported_checkpoints() == ["b"]
    assert paths.engines() == ["b/sm121", "a/sm120"]
    assert paths.engine_folder("b/sm121") == root / "second" / "b" / "sm121"
    assert paths.engine_checkpoint(paths.engine_folder("b/sm121")).name == "b.safetensors"
    assert paths.new_checkpoint("b").parent.parent.name == "second"  # where it already is
    assert paths.source_checkpoints() == ["flux.safetensors"]


def test_model_folder_is_registered_with_its_extension(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = str(root / "extra")
    # as extra_model_paths.yaml leaves it: a path, and an empty set of extensions
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {"flux_fp4": ([extra], set())})
    paths.register_model_folder()
    folders, extensions = folder_paths.folder_names_and_paths["flux_fp4"]
    assert folders == [extra, os.path.join(folder_paths.models_dir, "flux_fp4")]
    assert extensions == {".safetensors"}


def test_ledger_ignores_what_the_node_did_itself(tmp_path: Path) -> None:
    file, ledger = tmp_path / "x", OutputLedger()
    first = ledger.fingerprint("5")
    file.write_text("made")
    ledger.record("5", [file])
    assert ledger.fingerprint("5") == first
    assert ledger.fingerprint("6") == first


@pytest.mark.parametrize("change", [Path.unlink, lambda file: file.write_text("other text")])
def test_ledger_notices_changes_by_others_once(tmp_path: Path, change: Any) -> None:
    file, ledger = tmp_path / "x", OutputLedger()
    file.write_text("made")
    first = ledger.fingerprint("5")
    ledger.record("5", [file])
    change(file)
    second = ledger.fingerprint("5")
    assert second != first
    file.write_text("made again")
    ledger.record("5", [file])
    assert ledger.fingerprint("5") == second


def test_a_file_that_a_node_replaced_itself_counts_as_unchanged_for_it(tmp_path: Path) -> None:
    file, changes = tmp_path / "manifest.json", OwnChanges()
    file.write_text("stale")
    first = changes.state("5", file)
    for text in ("built again", "and once more, longer"):
        with changes.watched("5", file):
            file.write_text(text)
        assert file_state(file) != first
        assert changes.state("5", file) == first
        # not for another node, which loaded what was there before
        assert changes.state("6", file) == file_state(file)
    file.write_text("by somebody else, longer still")
    assert changes.state("5", file) == file_state(file)


def test_file_state_of_nothing_is_none(tmp_path: Path) -> None:
    assert file_state(tmp_path / "absent") is None


def test_absent_checkpoint_is_not_up_to_date(tmp_path: Path) -> None:
    absent = tmp_path / "x.safetensors"
    assert up_to_date_checkpoint(tmp_path, absent, QuantizeOptions(), None) is None


def test_all_in_one_names_differ_by_folder_and_every_option() -> None:
    changes: list[dict[str, Any]] = [
        {"recipe": "nvfp4-max", "fp8_attention": True},
        {"recipe": "nvfp4-max", "fp8_attention": False},
        {"recipe": "nvfp4-max", "fp8_attention": True, "modulation": "fp8"},
        {"recipe": "nvfp4-max", "fp8_attention": True, "modulation": "nvfp4"},
        {"recipe": "nvfp4-max", "fp8_attention": True, "percentile": 99.9},
        {"recipe": "nvfp4-max", "fp8_attention": True, "percentile": 99.0},
        {"recipe": "nvfp4-max", "fp8_attention": True, "headroom": 1.0},
        {"recipe": "auto", "fp8_attention": True},
        {"recipe": "auto", "fp8_attention": True, "quality_floor": 22.5},
        {"recipe": "auto", "fp8_attention": True, "size_limit": 6.5},
        {"recipe": "auto", "fp8_attention": True, "quality_floor": 22.5, "size_limit": 6.5},
    ]
    checkpoints = ("flux.safetensors", "mine/flux.safetensors", "old\\flux.safetensors")
    names = [quantized_name(c, options_from(**change)) for c in checkpoints for change in changes]
    assert len(set(names)) == len(names)
    assert all(paths.name_fault(name) is None for name in names)
    assert {"flux-nvfp4-max", "flux-auto-20dB", "mine-flux-auto-22.5dB-6.5GiB"} <= set(names)


def test_every_advanced_input_has_its_default_in_options() -> None:
    """What the widgets show and what they mean when a workflow lacks them is the same."""
    shown = {entry.id: entry.default for entry in ADVANCED}
    assert options_from("auto", True, **shown) == options_from("auto", True)
    assert options_from("nvfp4-max", True, **shown) == QuantizeOptions()


@pytest.mark.parametrize("part", ["model-00002-of-00002", "model.safetensors.index"])
def test_exchanged_shard_is_noticed(root: Path, part: str) -> None:
    folder = root / "diffusion_models" / "flux"
    folder.mkdir()
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for shard in shards:
        (folder / shard).write_bytes(b"x")
    weight_map = {f"tensor{i}": shard for i, shard in enumerate(shards)}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    name = "flux/model.safetensors.index.json"
    before = source_state(name)
    assert source_state(name) == before
    (changed,) = folder.glob(f"{part}*")
    os.utime(changed, ns=(1, 1))
    assert source_state(name) != before
    assert source_state(None) == []


def test_edited_recipe_is_noticed(root: Path) -> None:
    file = root / "second" / "recipes" / "mine.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("x")
    before = recipe_state("mine")
    os.utime(file, ns=(1, 1))
    assert recipe_state("mine") != before
    assert recipe_state("nvfp4-max") is None
    assert recipe_state(None) is None


def test_recipe_of_the_pack_cannot_be_replaced_by_a_file(root: Path) -> None:
    file = root / "first" / "recipes" / "fp8.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("name: fp8\nsummary: Not FP8.\nlinears: bf16\n")
    assert options_from("fp8", True).recipe.linears == "fp8"
    assert recipe_input().options.count("fp8") == 1


def test_budget_needs_a_recipe_that_has_one() -> None:
    assert options_from("auto", True, quality_floor=30.0).recipe.auto.floor_db == 30
    assert options_from("auto", True, size_limit=5.0).recipe.auto.floor_db is None
    with pytest.raises(RecipeError, match=r"'nvfp4-max' .* no quality floor"):
        options_from("nvfp4-max", True, quality_floor=30.0)


def test_targets_are_folder_names_of_their_specs() -> None:
    for target in TARGETS:
        spec = build_spec(target, 2.0, 1, 512)
        assert spec.folder_name == target
        assert spec.profile.max_img_tokens == 8192  # 2 megapixels in 16 x 16 pixel patches


def test_backends_are_those_of_the_runtime() -> None:
    assert set(BACKENDS) == {"auto", backend.REFERENCE, *backend.PACKAGES}


def test_locale_repeats_the_schema(client: ComfyClient, object_info: dict[str, Any]) -> None:
    texts = client.get("/i18n")["en"]["nodeDefs"]
    for node_id, info in object_info.items():
        if not node_id.startswith("FluxFP4"):
            continue
        assert texts[node_id]["display_name"] == info["display_name"]
        assert texts[node_id]["description"] == info["description"]
        inputs = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
        expected = {
            name: {"name": spec[1].get("display_name", name), "tooltip": spec[1]["tooltip"]}
            for name, spec in inputs.items()
        }
        assert texts[node_id]["inputs"] == expected
        tooltips = [entry["tooltip"] for entry in texts[node_id]["outputs"].values()]
        assert tooltips == info["output_tooltips"]


def test_texts_name_only_nodes_of_comfyui_that_exist(object_info: dict[str, Any]) -> None:
    core = {info["display_name"] or name for name, info in object_info.items()}
    assert core >= CORE_NODES
    sources = [
        p for folder in ("nodes", "quant", "trt_runtime") for p in (ROOT / folder).rglob("*.py")
    ]
    text = "\n".join(re.sub(r'"\s*\n\s*f?"', "", path.read_text()) for path in sources)
    quoted = set(re.findall(r"'((?:CLIP|Edit|Load|VAE) [A-Z][\w ()]+)'", text))
    assert quoted - {"Load FLUX FP4 Engine"} <= CORE_NODES


def test_texts_name_only_nodes_that_exist(object_info: dict[str, Any]) -> None:
    own = {info["display_name"] for name, info in object_info.items() if "FluxFP4" in name}
    assert len(own) == 15
    sources = [
        p for folder in ("nodes", "quant", "trt_runtime") for p in (ROOT / folder).rglob("*.py")
    ]
    # adjacent string literals are one text, wherever the source breaks the line
    text = "\n".join(re.sub(r'"\s*\n\s*f?"', "", path.read_text()) for path in sources)
    verbs = ("Quantize ", "Export ", "Build ", "Inspect ", "FLUX ")
    quoted = {name for _, name in re.findall(r"""(['"])([A-Z][\w /]+)\1""", text)}
    ours = {name for name in quoted if name.startswith(verbs)} - {"FLUX FP4"}  # the category
    assert own <= quoted
    assert ours <= own, ours - own
