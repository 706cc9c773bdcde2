"""What the pack requires can be installed together with what ComfyUI requires."""

from __future__ import annotations

from pathlib import Path

import pytest
from pack_import import ROOT
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name


def read_requirements(path: Path) -> dict[str, SpecifierSet]:
    lines = [line.partition("#")[0].strip() for line in path.read_text().splitlines()]
    found = [Requirement(line) for line in lines if line]
    return {canonicalize_name(r.name): r.specifier for r in found}


def fit_together(own: SpecifierSet, theirs: SpecifierSet) -> bool:
    """Tell whether a version exists that both allow.

    Bounds that include their own version meet, if they meet at all, at one that either names.
    """
    both = own & theirs
    named = [s.version.removesuffix(".*") for s in both if s.operator != "!="]
    return not named or any(both.contains(version, prereleases=True) for version in named)


def test_no_requirement_conflicts_with_comfyui(comfyui_path: Path) -> None:
    own = read_requirements(ROOT / "requirements.txt")
    theirs = read_requirements(comfyui_path / "requirements.txt")
    shared = own.keys() & theirs.keys()
    assert {"numpy", "pydantic", "safetensors"} <= shared
    assert not [name for name in shared if not fit_together(own[name], theirs[name])]


@pytest.mark.parametrize(
    ("own", "theirs", "fits"),
    [
        (">=1.26", ">=1.25.0", True),
        (">=2.7", "~=2.0", True),
        (">=3", "~=2.0", False),
        (">=0.2.27", "==0.2.26", False),
        (">=0.2", "==0.2.26", True),
        (">=6", "", True),
        (">=2", "<2", False),
    ],
)
def test_conflicts_are_seen(own: str, theirs: str, fits: bool) -> None:
    assert fit_together(SpecifierSet(own), SpecifierSet(theirs)) is fits
