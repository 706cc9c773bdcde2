"""Any text in a widget or on a link becomes a path inside a registered folder, or an error of ours.

`tests/attacks/test_names.py` does the same with the command line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from comfy_in_process import import_comfyui
from hypothesis import example, given
from mutations import names

import_comfyui()

import folder_paths  # noqa: E402
from flux_fp4.nodes import paths, reports, stages  # noqa: E402, F401  # not in an example's time
from flux_fp4.nodes.build import BuildEngine  # noqa: E402
from flux_fp4.nodes.calibration import CalibrationSamples  # noqa: E402
from flux_fp4.nodes.errors import NodeError  # noqa: E402
from flux_fp4.nodes.export import ExportONNX  # noqa: E402
from flux_fp4.nodes.inspect_checkpoint import Inspect  # noqa: E402
from flux_fp4.nodes.load import LoadEngine  # noqa: E402
from flux_fp4.nodes.native import SaveNative  # noqa: E402
from flux_fp4.nodes.quantize import Quantize, QuantizeModel, source_state  # noqa: E402
from flux_fp4.nodes.recipe_inputs import options_from, recipe_state  # noqa: E402
from flux_fp4.quant import onnx_export  # noqa: E402, F401
from flux_fp4.quant.errors import QuantError  # noqa: E402

OURS = (NodeError, QuantError)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two model folders and one of sources, and files of the same kinds outside of all."""
    base = tmp_path_factory.mktemp("models")
    for root in (base / "flux_fp4", base / "second", base):
        for name in ("x", "outside"):
            (root / name / "sm120").mkdir(parents=True)
            (root / name / "sm120" / paths.MANIFEST).write_text("{}")
            (root / name / f"{name}.safetensors").write_bytes(b"x")
        (root / "recipes").mkdir()
        (root / "secret.yaml").write_text("{}")
    sources = base / "diffusion_models"
    (sources / "x").mkdir(parents=True)
    for file in (base / "secret.safetensors", sources / "x.safetensors", sources / "x" / "x.bin"):
        file.write_bytes(b"x")
    roots = [str(base / "flux_fp4"), str(base / "second")]
    with pytest.MonkeyPatch.context() as patch:
        folders = {
            paths.MODEL_FOLDER: (roots, {".safetensors"}),
            "diffusion_models": ([str(sources)], {".safetensors", ".bin"}),
        }
        patch.setattr(folder_paths, "folder_names_and_paths", folders)
        patch.setattr(folder_paths, "filename_list_cache", {})
        for node in (ExportONNX, BuildEngine, SaveNative, LoadEngine, Inspect):
            # ComfyUI sets it on the class that it makes for each run
            patch.setattr(node, "hidden", SimpleNamespace(unique_id="1"))
        yield base


def is_inside(path: Path, base: Path) -> bool:
    roots = [base / name for name in ("flux_fp4", "second", "diffusion_models")]
    resolved = path.resolve()
    return any(resolved.is_relative_to(root.resolve()) and resolved != root for root in roots)


RESOLVERS: list[Callable[[str], Any]] = [
    paths.new_checkpoint,
    paths.samples_file,
    paths.native_checkpoint,
    paths.quantized_checkpoint,
    paths.engine_folder,
    paths.user_recipe,
    paths.source_checkpoint,
    paths.source_files,
]


@pytest.mark.parametrize("resolve", RESOLVERS, ids=lambda function: function.__name__)
@given(name=names)
@example(name="../outside")
@example(name="../outside/sm120")
@example(name="../secret")
@example(name="../secret.safetensors")
@example(name="x/x.bin")
@example(name="\ud800")
@example(name="x" * 5000)
def test_every_text_stays_inside_or_is_refused(
    base: Path, resolve: Callable[[str], Any], name: str
) -> None:
    try:
        found = resolve(name)
    except OURS:
        return
    files = found if isinstance(found, list) else [found]
    assert files
    assert all(is_inside(path, base) for path in files)


FINGERPRINTS: dict[str, Callable[[str], Any]] = {
    "load": lambda name: LoadEngine.fingerprint_inputs(name),
    "inspect": lambda name: Inspect.fingerprint_inputs(name),
    "export": lambda name: ExportONNX.fingerprint_inputs(name),
    "build": lambda name: BuildEngine.fingerprint_inputs(name),
    "native": lambda name: SaveNative.fingerprint_inputs(name, name),
    "recipe": recipe_state,
    "options": lambda name: options_from(name, True),
    "source": source_state,
}


@pytest.mark.parametrize("ask", FINGERPRINTS.values(), ids=list(FINGERPRINTS))
@given(name=names)
@example(name="\ud800")
@example(name="../secret")
def test_what_nodes_ask_before_they_run_raises_only_our_errors(
    base: Path, ask: Callable[[str], Any], name: str
) -> None:
    try:
        ask(name)
    except OURS as error:
        refusal = str(error)
    else:
        return
    assert refusal


@given(name=names)
@example(name="\ud800")
def test_validation_answers_every_text(base: Path, name: str) -> None:
    for verdict in (
        CalibrationSamples.validate_inputs(save_as=name),
        Quantize.validate_inputs(name),
        QuantizeModel.validate_inputs(name),
    ):
        assert verdict is True or isinstance(verdict, str)
    if Quantize.validate_inputs(name) is True:
        assert is_inside(paths.new_checkpoint(name), base)


@given(name=names)
def test_nothing_is_run_under_a_name_that_does_not_exist(base: Path, name: str) -> None:
    if name in ("x", "outside", "x/sm120", "outside/sm120"):
        return
    for execute in (
        lambda: LoadEngine.execute(name, "reference"),
        lambda: Inspect.execute(name.replace("/", "\\")),
        lambda: ExportONNX.execute(name),
    ):
        with pytest.raises(OURS):
            execute()
