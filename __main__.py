"""Runs the command line: ``python -m flux_fp4``, or ``python`` with the path of this folder."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path


def _package_name() -> str:
    """Return the package that this file belongs to; started by its path, it becomes flux_fp4."""
    if __package__:
        return __package__
    folder = Path(__file__).absolute().parent
    # Python put this folder first on the path, where "nodes" or "tests" would shadow others.
    sys.path[:] = [entry for entry in sys.path if Path(entry).absolute() != folder]
    spec = importlib.util.spec_from_file_location(
        "flux_fp4", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"{folder} is not a package")
    module = importlib.util.module_from_spec(spec)
    sys.modules["flux_fp4"] = module
    spec.loader.exec_module(module)
    return "flux_fp4"


if __name__ == "__main__":
    sys.exit(importlib.import_module(f"{_package_name()}.cli.program").main())
