"""The layers, the dependency lists and the import cost of the pack."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = ("cli", "nodes", "quant", "trt_runtime")
SOURCES = [
    ROOT / "__init__.py",
    ROOT / "__main__.py",
    *(p for name in PACKAGES for p in (ROOT / name).rglob("*.py")),
]
HEAVY = ("torch", "modelopt", "tensorrt", "tensorrt_rtx", "onnx", "onnx_ir", "onnxruntime")

# A copy of the repository's rules over a package with one fault in it.
CLEAN = {
    "__init__.py": "",
    "cli/__init__.py": "",
    "nodes/__init__.py": "",
    "quant/__init__.py": "",
    "quant/recipe.py": "",
    "trt_runtime/__init__.py": "",
    "trt_runtime/backend.py": "",
}
VIOLATIONS = {
    "siblings": ("quant/recipe.py", "from ..trt_runtime import backend\n"),
    "no-comfyui": ("trt_runtime/backend.py", "import folder_paths\n"),
    "no-comfyui-through-nodes": ("quant/recipe.py", "from .. import nodes\n"),
    "no-comfyui-in-cli": ("cli/__init__.py", "from .. import nodes\n"),
    "cli-on-top": ("quant/recipe.py", "from .. import cli\n"),
    "quant-no-tensorrt": ("quant/recipe.py", "import tensorrt_rtx\n"),
    "runtime-no-modelopt": ("trt_runtime/backend.py", "import modelopt.torch\n"),
}
BANNED = {
    "comfy in quant": ("quant/recipe.py", "import comfy.utils\n"),
    "nodes in trt_runtime": ("trt_runtime/engine.py", "import nodes\n"),
    "tensorrt in nodes": ("trt_runtime/engine.py", "import tensorrt_rtx\n"),
}


def write_package(folder: Path, fault: tuple[str, str] | None) -> None:
    files = {**CLEAN, **({fault[0]: fault[1]} if fault else {})}
    files["pyproject.toml"] = (ROOT / "pyproject.toml").read_text()
    for name, text in files.items():
        path = folder / "flux_fp4" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    program = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    return subprocess.run(
        [sys.executable, "-c", program, "--config", "flux_fp4/pyproject.toml", "--no-cache"],
        cwd=folder,
        env={"PYTHONPATH": str(folder), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )


def ruff_banned_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--select", "TID251", "."]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def modules_after(statement: str) -> set[str]:
    """Return the top-level modules loaded by `statement` in a fresh interpreter."""
    program = f"{statement}\nimport sys\nprint(*{{n.partition('.')[0] for n in sys.modules}})"
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, cwd=ROOT / "tests" / "tools", capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_pack_import_loads_nothing_heavy() -> None:
    loaded = modules_after("import pack_import; pack_import.register_pack()")
    assert "flux_fp4" in loaded
    assert not loaded & {*HEAVY, "numpy", "pydantic"}


def test_pack_import_check_sees_a_heavy_module() -> None:
    assert "numpy" in modules_after("import numpy")


def test_requirements_equal_pyproject_dependencies() -> None:
    requirements = (ROOT / "requirements.txt").read_text().splitlines()
    assert requirements == PYPROJECT["project"]["dependencies"]


def test_requirements_are_lower_bounds_without_torch() -> None:
    requirements = [Requirement(line) for line in PYPROJECT["project"]["dependencies"]]
    assert "torch" not in {requirement.name for requirement in requirements}
    assert {s.operator for requirement in requirements for s in requirement.specifier} == {">="}


def test_packages_list_equals_folders() -> None:
    folders = {
        ".".join(("flux_fp4", *path.parent.relative_to(ROOT).parts))
        for path in SOURCES
        if path.name == "__init__.py"
    }
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == folders


def test_every_folder_with_sources_is_a_package() -> None:
    assert not {p.parent for p in SOURCES if not (p.parent / "__init__.py").is_file()}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_own_modules_are_imported_relatively(path: Path) -> None:
    own = {"flux_fp4", *PACKAGES}
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        assert not [name for name in names if name.partition(".")[0] in own], ast.unparse(node)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_interrupt_is_never_swallowed(path: Path) -> None:
    """ComfyUI's interrupt derives from BaseException: only `finally` may see it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None
            assert "BaseException" not in ast.unparse(node.type), f"line {node.lineno}"


def test_import_contracts_keep_a_clean_package(tmp_path: Path) -> None:
    write_package(tmp_path, None)
    done = lint_imports(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("contract", VIOLATIONS, ids=str)
def test_import_contracts_catch_a_violation(tmp_path: Path, contract: str) -> None:
    write_package(tmp_path, VIOLATIONS[contract])
    done = lint_imports(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "BROKEN" in done.stdout


def test_banned_imports_keep_a_clean_package(tmp_path: Path) -> None:
    write_package(tmp_path, ("trt_runtime/backend.py", "import tensorrt_rtx\n"))
    done = ruff_banned_imports(tmp_path / "flux_fp4")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("case", BANNED, ids=str)
def test_banned_imports_catch_a_violation(tmp_path: Path, case: str) -> None:
    write_package(tmp_path, BANNED[case])
    done = ruff_banned_imports(tmp_path / "flux_fp4")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "TID251" in done.stdout
