"""No name leads out of the models folder, neither to read nor to write, from the command line too.

`tests/comfy/test_names_stay_inside.py` does the same with the nodes.
"""

from __future__ import annotations

import ntpath
import sys
import unicodedata
from pathlib import Path

import pytest
from flux_fp4.cli.program import FAILED, main
from flux_fp4.quant.model_folders import ModelFolders, name_fault
from hypothesis import assume, example, given
from hypothesis import strategies as st
from mutations import names


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with a checkpoint, an engine and a recipe, and the same outside of it."""
    base = tmp_path_factory.mktemp("models")
    for folder in (base / "flux_fp4", base):
        for name in ("x", "outside"):
            (folder / name / "sm120").mkdir(parents=True)
            (folder / name / "sm120" / "manifest.json").write_text("{}")
            (folder / name / f"{name}.safetensors").write_bytes(b"x")
        (folder / "recipes").mkdir()
        for recipe in (folder / "recipes" / "secret.yaml", folder / "secret.yaml"):
            recipe.write_text("{}")
    return base / "flux_fp4"


def is_inside(path: Path, root: Path) -> bool:
    return path.resolve().is_relative_to(root.resolve()) and path.resolve() != root.resolve()


def contents(base: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in base.rglob("*") if path.is_file()}


@given(name=names)
@example(name="../outside")
@example(name="../outside/sm120")
@example(name="../secret")
@example(name="\ud800")
@example(name="x/../../outside/sm120")
def test_what_is_read_lies_inside(root: Path, name: str) -> None:
    folders = ModelFolders([root, root.parent / "missing"])
    for found in (folders.checkpoint(name), folders.engine(name), folders.recipe(name)):
        assert found is None or is_inside(found, root)
    assert (name_fault(name) is None) or folders.checkpoint(name) is None


@given(name=names)
@example(name="CON")
@example(name="a\ud800")
def test_what_is_written_lies_inside_under_its_own_name(root: Path, name: str) -> None:
    assume(name_fault(name) is None)
    folders = ModelFolders([root])
    for path in (folders.new_checkpoint(name), folders.samples(name)):
        assert is_inside(path, root)
        new = not path.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        written = [p for p in path.parent.iterdir() if p.samefile(path)]
        assert [p.name for p in written] == [path.name]
        if new:
            path.unlink()


@given(name=names)
def test_a_name_that_is_allowed_is_plain_on_every_system(root: Path, name: str) -> None:
    assume(name_fault(name) is None)
    assert ntpath.basename(name) == name == Path(name).name
    assert not ntpath.splitdrive(name)[0]
    assert not any(unicodedata.category(letter) in ("Cs", "Cc") for letter in name)
    if sys.version_info >= (3, 13):
        assert not ntpath.isreserved(name)


@pytest.mark.parametrize(
    "name", ["NUL", "con", "Com1", "lpt9.txt", "COM¹", "lpt²", "CONIN$", "conout$", "nul .txt"]
)
def test_devices_of_windows_are_no_names(name: str) -> None:
    assert name_fault(name) == "Windows reserves it for a device"


@pytest.mark.parametrize("command", ["export", "build", "verify", "quantize", "recipe"])
@given(name=names.filter(lambda text: "\0" not in text))
@example(name="../outside")
@example(name="../outside/sm120")
@example(name="\udc80")
def test_commands_stay_inside(
    root: Path, command: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(root.parent)
    arguments = [command, "--models", str(root), "--", name]
    if command in ("quantize", "recipe"):
        missing = str(root / "missing.safetensors")
        options = ["--models", str(root), "--samples", missing]
        if command == "recipe":
            arguments = ["quantize", *options, f"--recipe={name}", "--", missing, "new"]
            assume(name_fault(name) is not None or name not in ("secret",))
        else:
            arguments = ["quantize", *options, "--", missing, name]
    assert main(arguments) == FAILED
    assert contents(root.parent) == before
    # the two words that argparse itself would print do not occur: it was our own refusal
    printed = capsys.readouterr()
    assert printed.err.strip()
    assert "Traceback" not in printed.err


@given(number=st.integers(0, 0x10FFFF))
def test_every_character_is_allowed_or_named(number: int) -> None:
    fault = name_fault(f"a{chr(number)}b")
    assert fault is None or repr(chr(number)) in fault
