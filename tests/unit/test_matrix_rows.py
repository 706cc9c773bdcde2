"""Which packages the rows of the version matrix install."""

from __future__ import annotations

import pytest
from matrix_rows import (
    ROWS,
    Row,
    UnknownRowError,
    constraints_of,
    overrides_of,
    requirement_names,
    select_rows,
)

PINNED = [
    "numpy==2.4.6 ; python_full_version == '3.11.*'",
    "nvidia-cublas==13.1.0.3 ; sys_platform == 'linux'",
    "nvidia-modelopt==0.47.0",
    "tensorrt-rtx==1.7.1.116",
    "tensorrt-rtx-cu13-libs==1.7.1.116",
    "torch==2.11.0",
    "torchsde==0.2.6",
    "torchvision==0.26.0",
]


def test_every_row_is_selected_without_a_pattern() -> None:
    assert select_rows([]) == list(ROWS)


def test_patterns_select_in_the_order_of_the_rows() -> None:
    names = [row.name for row in select_rows(["torch2.1?", "python3.10"])]
    assert names == ["python3.10", *(r.name for r in ROWS if r.name.startswith("torch2.1"))]
    assert len(names) > 3


def test_pattern_without_a_row_is_refused_with_the_names() -> None:
    with pytest.raises(UnknownRowError, match=r"'python2.7'.*python3\.12, python3\.10") as caught:
        select_rows(["python3.12", "python2.7"])
    assert caught.value.pattern == "python2.7"


def test_names_of_rows_are_unique() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)


def test_names_of_requirements_are_normalized() -> None:
    assert requirement_names(["PyYAML>=6", "av==18 ; python_version > '3'"]) == ["pyyaml", "av"]


def test_row_without_pins_takes_the_pinned_versions() -> None:
    assert constraints_of(Row("a"), PINNED, []) == PINNED


def test_pinned_package_frees_its_own_parts_only() -> None:
    row = Row("a", pins={"tensorrt-rtx": "1.5.0.114"})
    kept = [line for line in PINNED if not line.startswith("tensorrt")]
    assert constraints_of(row, PINNED, []) == [*kept, "tensorrt-rtx==1.5.0.114"]


def test_pinned_torch_frees_what_goes_with_it() -> None:
    row = Row("a", pins={"torch": "2.9.1"})
    names = requirement_names(constraints_of(row, PINNED, []))
    assert names == [
        *("numpy", "nvidia-modelopt", "tensorrt-rtx", "tensorrt-rtx-cu13-libs", "torchsde", "torch")
    ]


def test_lowest_and_newest_rows_ignore_the_pinned_versions() -> None:
    pins = {"torch": "2.9.1"}
    lowest = constraints_of(Row("a", pins=pins, others="lowest"), PINNED, ["numpy==1.26.0"])
    newest = constraints_of(Row("a", pins=pins, others="newest"), PINNED, ["numpy==1.26.0"])
    assert lowest == ["numpy==1.26.0", "torch==2.9.1"]
    assert newest == ["torch==2.9.1"]


def test_only_pins_on_own_requirements_override_them() -> None:
    row = Row("a", pins={"torch": "2.9.1", "tensorrt-rtx": "1.5.0.114"})
    assert overrides_of(row, ["numpy", "tensorrt-rtx"]) == ["tensorrt-rtx==1.5.0.114"]
