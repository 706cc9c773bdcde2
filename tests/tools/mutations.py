"""Hypothesis strategies that damage a valid document: byte by byte, or one value of its JSON."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

NUMBERS = (0, 1, -1, 2**31, 2**63, 2**64, 10**12, -(10**12), 10**400, 0.5, 1e308)
"""Where integers overflow, sizes that no memory holds, and what no size is."""

TEXTS = (
    "",
    ".",
    "..",
    "../x",
    "..\\x",
    "/etc/passwd",
    "C:\\x",
    "NUL",
    "a\0b",
    "a\nb",
    "\ud800",
    "\u2044x",
    "٣",
    "x" * 5000,
    "[" * 5000,
)

values = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(NUMBERS),
    st.sampled_from((math.nan, math.inf, -math.inf)),
    st.sampled_from(TEXTS),
    st.text(max_size=6),
    st.sampled_from(([], {}, [[]], [0], [{}], {"": None}, [None] * 3, [2**62, 2**62])),
)
"""JSON values that a reader does not expect."""


@st.composite
def damaged_bytes(draw: st.DrawFn, valid: bytes) -> bytes:
    """Change, cut out, insert or repeat some bytes, up to four times."""
    data = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        # early bytes say how the others are read
        end = draw(st.sampled_from((16, 256, len(data))))
        at = draw(st.integers(0, max(0, min(end, len(data)) - 1)))
        length = draw(st.sampled_from((1, 1, 2, 8, 64)))
        match draw(st.sampled_from(("flip", "overwrite", "insert", "delete", "repeat", "cut"))):
            case "flip" if data:
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "overwrite":
                data[at : at + length] = (
                    draw(st.sampled_from((b"\xff", b"\0", b'"', b"9"))) * length
                )
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=16))
            case "delete":
                del data[at : at + length]
            case "repeat":
                data[at:at] = data[at : at + length] * draw(st.sampled_from((1, 2, 200)))
            case "cut":
                del data[at:]
    return bytes(data)


@st.composite
def changed_json(draw: st.DrawFn, valid: Any) -> Any:
    """Replace, remove, add or move up to three values anywhere in a document."""
    document = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(document))
        if not places:
            return document
        parent, key = draw(st.sampled_from(places))
        action = draw(st.sampled_from(("replace", "replace", "scale", "remove", "add", "move")))
        if action == "remove":
            del parent[key]
        elif action == "add":
            _add(parent, draw(st.sampled_from(TEXTS)), copy.deepcopy(draw(values)))
        elif action == "move":
            other, name = draw(st.sampled_from(places))
            parent[key] = copy.deepcopy(other[name])
        elif action == "scale" and isinstance(parent[key], int):
            parent[key] = parent[key] * draw(st.sampled_from((-1, 2, 8))) + draw(st.integers(-1, 1))
        else:
            # a copy: a list that is drawn again must not hold itself
            parent[key] = copy.deepcopy(draw(values))
    return document


def _places(document: Any) -> Iterator[tuple[Any, Any]]:
    """Yield container and key of every value, except in what mutation made of itself."""
    if isinstance(document, dict | list):
        keys = list(document) if isinstance(document, dict) else range(len(document))
        for key in keys:
            yield document, key
            yield from _places(document[key])


def _add(parent: Any, name: str, value: Any) -> None:
    if isinstance(parent, dict):
        parent[name] = value
    else:
        parent.append(value)


_NAME_PARTS = (
    "..",
    ".",
    "/",
    "\\",
    "//",
    "C:",
    "\\\\server\\share",
    "NUL",
    "con",
    "COM¹",
    "~",
    "$HOME",
    "%2e%2e",
    "%00",
    "x",
    "outside",
    "secret",
    "sm120",
    "recipes",
    "samples",
    ".statistics",
    ".yaml",
    ".safetensors",
    " ",
    "\0",
    "\n",
    "\u2215",  # division slash
    "\uff0f",  # full-width slash
    "\uff0e\uff0e",  # full-width dots
    "\u2025",  # two dot leader
    "\u202e",  # writes from right to left
    "\u200b",  # takes no room
    "e\u0301",
    "\u00e9",
    "\ud800",
    "\udc80",
    "\U0001f600",
    "y" * 101,
    "z" * 5000,
)

names = st.one_of(
    st.lists(st.sampled_from(_NAME_PARTS), min_size=1, max_size=6).map("".join),
    st.text(st.characters(exclude_categories=()), max_size=8),
)
"""Texts that a widget, a link or the command line can carry, and that should be a name."""
