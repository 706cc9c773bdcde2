"""Run the tests with other versions of Python, torch, TensorRT-RTX and the rest, and record it.

Each row is one throwaway environment in the system's temporary folder, made by uv. What is then
really installed, and what its tests gave, goes to docs/compatibility.json and the table in
docs/compatibility.md, row by row.

It ends with 1 when a row failed or was not installed.

usage: matrix.py --comfyui FOLDER [--suite unit|build|start] [ROW ...]

ROW is the name of a row or a shell pattern such as 'torch*'; all rows without one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path

from matrix_results import (
    DATA,
    PAGE,
    RowResult,
    counts_of_junit,
    first_line,
    load_results,
    problems_of_junit,
    table,
    with_table,
)
from matrix_rows import (
    ROWS,
    Row,
    UnknownRowError,
    constraints_of,
    overrides_of,
    requirement_names,
    select_rows,
)
from pack_import import ROOT
from uv import find_uv_bin

BOOT = "tests/comfy/test_object_info.py"
"""A real ComfyUI starts with the pack in it."""
SUITES = {
    "start": ("tests/unit/trt_runtime/test_builder.py", BOOT),
    "unit": ("tests/unit", BOOT),
    "build": (
        "tests/unit/trt_runtime/test_builder.py",
        "tests/unit/trt_runtime/test_backend.py",
        "tests/unit/trt_runtime/test_build_log.py",
        "tests/unit/trt_runtime/test_reference.py",
        "tests/unit/quant/test_onnx_export.py",
        "tests/unit/quant/test_modelopt_calibration.py",
        "tests/unit/quant/test_nvfp4.py",
        "tests/unit/quant/test_fp8.py",
        "tests/unit/test_exported_engine.py",
        "tests/unit/test_flux2_blocks.py",
        "tests/unit/test_lora_variants.py",
        "tests/unit/test_mask_variants.py",
        "tests/unit/test_reference_matches_emulation.py",
        BOOT,
    ),
}
"""`start`: plans are really built, and ComfyUI starts. `build` adds exports, ModelOpt, the
reference backend and the plans for LoRA and masks; `unit` is all that needs no ComfyUI."""
TEST_SECONDS = 3600
REQUIREMENTS = ROOT / "requirements.txt"
UV = find_uv_bin()


class RowInstallError(Exception):
    """A row's packages cannot be installed together."""


def uv(*arguments: object) -> str:
    """Run uv and return what it printed.

    Raises:
        RowInstallError: uv failed; the message is its own.
    """
    # pyenv's shims run only the selected version: the interpreters behind them are found first
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    folders = [*map(str, sorted(pyenv.glob("versions/*/bin"))), os.environ["PATH"]]
    done = subprocess.run(
        [UV, *map(str, arguments)],
        env={**os.environ, "PATH": os.pathsep.join(folders)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RowInstallError(done.stderr)
    return done.stdout


def lowest_versions(python: str) -> list[str]:
    """Return the lowest versions that the pack's own requirements allow, as requirements."""
    resolved = uv(
        *("pip", "compile", "--quiet", "--resolution", "lowest-direct", "--no-annotate"),
        *("--no-header", "--python-version", python, REQUIREMENTS),
    ).splitlines()
    own = requirement_names(REQUIREMENTS.read_text().splitlines())
    names = requirement_names(resolved)
    return [line for name, line in zip(names, resolved, strict=True) if name in own]


def make_environment(row: Row, comfyui: Path, folder: Path) -> Path:
    """Create a row's environment in `folder` and return its interpreter.

    Raises:
        RowInstallError: no such Python, or packages that do not exist or do not fit together.
    """
    python = folder / "venv" / "bin" / "python"
    uv("venv", "--quiet", "--no-python-downloads", "--python", row.python, folder / "venv")
    pinned = (ROOT / "constraints" / "ci.txt").read_text().splitlines()
    lowest = lowest_versions(row.python) if row.others == "lowest" else []
    own = requirement_names(REQUIREMENTS.read_text().splitlines())
    constraints, overrides = folder / "constraints.txt", folder / "overrides.txt"
    constraints.write_text("\n".join(constraints_of(row, pinned, lowest)))
    overrides.write_text("\n".join(overrides_of(row, own)))
    uv(
        *("pip", "install", "--quiet", "--python", python, "-c", constraints),
        *("--overrides", overrides, "-r", comfyui / "requirements.txt", "-r", REQUIREMENTS),
        *("--group", f"{ROOT / 'pyproject.toml'}:dev"),
    )
    return python


def installed_versions(python: Path) -> dict[str, str]:
    """Return the versions of Python, torch and the pack's requirements in an environment."""
    names = requirement_names(REQUIREMENTS.read_text().splitlines())
    names = ["torch", "torchaudio", "torchvision", *names]
    program = (
        "import importlib.metadata as m, json, platform, sys;"
        "found = {name: m.version(name) for name in sys.argv[1:]};"
        "print(json.dumps({'python': platform.python_version(), **found}))"
    )
    done = subprocess.run(
        [python, "-c", program, *names], capture_output=True, text=True, check=True
    )
    return dict(json.loads(done.stdout))


def run_tests(python: Path, suite: str, comfyui: Path, folder: Path) -> dict[str, object]:
    """Run a suite and return the fields of `RowResult` that it decides."""
    report = folder / "report.xml"
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    try:
        done = subprocess.run(
            [*command, f"--basetemp={folder / 'tests'}", *SUITES[suite]],
            cwd=ROOT,
            env={**os.environ, "COMFYUI_PATH": str(comfyui)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=TEST_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return {"problems": (f"the tests did not end within {TEST_SECONDS} s",)}
    if not report.is_file():
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        return {"problems": (f"pytest ended with {done.returncode}: {' '.join(last)}",)}
    text = report.read_text(encoding="utf-8")
    return {**counts_of_junit(text), "problems": problems_of_junit(text)}


def run_row(row: Row, suite: str, comfyui: Path) -> RowResult:
    """Install a row, run its tests, delete it, and return what came of it."""
    today = datetime.now(timezone.utc).date().isoformat()
    with tempfile.TemporaryDirectory(prefix="flux-fp4-matrix-") as temporary:
        folder = Path(temporary)
        try:
            python = make_environment(row, comfyui, folder)
        except RowInstallError as error:
            problem = first_line(str(error).replace("\n", " "))
            return RowResult(row=row.name, date=today, suite=suite, problems=(problem,))
        return RowResult(
            row=row.name,
            date=today,
            suite=suite,
            versions=installed_versions(python),
            **run_tests(python, suite, comfyui, folder),
        )


def record(result: RowResult) -> None:
    """Write one result to the data and the page."""
    results = load_results().with_result(result)
    DATA.write_text(results.model_dump_json(indent=1) + "\n")
    PAGE.write_text(with_table(PAGE.read_text(), table(ROWS, results)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--suite", choices=SUITES, default="unit")
    parser.add_argument("rows", nargs="*", metavar="ROW")
    arguments = parser.parse_args()
    try:
        rows = select_rows(arguments.rows)
    except UnknownRowError as error:
        parser.error(str(error))
    failed = False
    for row in rows:
        result = run_row(row, arguments.suite, arguments.comfyui.absolute())
        record(result)
        print(f"{row.name}: {result.verdict}", *result.problems, sep="\n  ", flush=True)
        failed |= bool(result.problems)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
