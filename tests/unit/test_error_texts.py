"""Every error of the pack has one reviewed text, in docs/errors.md, that says what to do next."""

from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from error_examples import CORE_NODES, LAYERS
from pack_import import ROOT

PAGE = ROOT / "docs" / "errors.md"
INFO = json.loads((ROOT / "tests" / "golden" / "object_info.json").read_text())

INTRODUCTION = """# Errors

Every error that this pack raises on purpose, with an example of its text. ComfyUI shows the name
behind *Exception Type*. Each text says what failed and with which value, what the limit or the
reason is, and what to do next.

`UPDATE_GOLDEN=1 python -m pytest tests/unit/test_error_texts.py` writes this page.
"""
TITLES = {
    "nodes": "Nodes",
    "quant": "Quantization and export",
    "trt_runtime": "Building, loading and running engines",
    "cli": "Command line",
}

# Classes that others are derived from, and that are never raised themselves.
ROOTS = {"QuantError", "EngineError", "NodeError", "CommandError"}
ABSTRACT = ROOTS | {"EngineMismatchError", "QualityError", "StorageError"}

ACTIONS = (
    "Allow|Build|Bypass|Check|Choose|Close|Connect|Correct|Enter|Export|Free|Get|Install|Make|Merge|"
    "Name|Press|Put|Quantize|Queue|Raise|Remove|Run|Save|See|Set|Update|Use|Wait"
)
# At the start of a sentence, or behind a semicolon or a colon.
ACTION = re.compile(rf"(?:[.?] |\n|[;:] )(?:(?:{ACTIONS})\b|The command `)", re.IGNORECASE)

# What texts quote beside nodes, widgets and the values of fields.
OTHER_QUOTES = {
    ".statistics",  # a folder of the pack
    "diffusion_models",  # a folder of ComfyUI
    "flux1-dev-nvfp4",  # a name to imitate
    "flux_fp4",  # a folder of the pack
    "Free model and node cache",  # a button of ComfyUI
}

EXAMPLES = {
    (layer, type(error).__name__): error for layer, errors in LAYERS.items() for error in errors
}
EVERY = pytest.mark.parametrize("key", EXAMPLES, ids="-".join)


def defined_errors() -> Iterator[tuple[str, str, Path]]:
    """Yield layer, name and file of every exception class in the source."""
    for layer in LAYERS:
        for path in sorted((ROOT / layer).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if (
                    isinstance(node, ast.ClassDef)
                    and any(
                        ast.unparse(base).endswith(("Error", "Exception")) for base in node.bases
                    )
                    and not node.name.startswith("_")
                ):
                    # a name with an underscore is a signal inside of one file, which shows no text
                    yield layer, node.name, path


def quotes(text: str) -> set[str]:
    """Return what a text puts in single quotes."""
    return set(re.findall(r"(?<![\w'])'([^'\n]+)'(?!\w)", text))


def field_texts(error: Exception) -> str:
    """Return the values of all fields as text: what they quote is not the text's own."""
    values = [str(value) for value in vars(error).values()]
    # a block and its Linear are two fields and one name
    return ".".join(values + [Path(value).name for value in values])


def golden_page() -> str:
    """Return docs/errors.md as the examples make it."""
    parts = [INTRODUCTION]
    for layer, errors in LAYERS.items():
        parts.append(f"## {TITLES[layer]}\n")
        for error in errors:
            cause = " ".join((type(error).__doc__ or "").split("\n\n")[0].split())
            text = "\n".join(f"> {line}" for line in str(error).split("\n"))
            cause = cause.replace("``", "`")
            parts.append(f"### {type(error).__name__}\n\n{cause}\n\n{text}\n")
    return "\n".join(parts)


def test_every_class_has_one_example() -> None:
    names = [(layer, name) for layer, name, _ in defined_errors() if name not in ABSTRACT]
    assert sorted(names) == sorted(EXAMPLES)
    assert len(EXAMPLES) == sum(len(errors) for errors in LAYERS.values())


def test_errors_are_defined_where_they_are_looked_for() -> None:
    for layer, name, path in defined_errors():
        folder = ROOT / layer / "errors"
        assert path == folder.with_suffix(".py") or path.parent == folder, name


def test_texts_are_the_reviewed_ones() -> None:
    if os.environ.get("UPDATE_GOLDEN"):
        PAGE.write_text(golden_page(), encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == golden_page()


@EVERY
def test_fields_rebuild_the_text(key: tuple[str, str]) -> None:
    """Fields are all that crosses from a build process, and what callers may look at."""
    error = EXAMPLES[key]
    assert vars(error)
    assert str(type(error)(**vars(error))) == str(error)


@EVERY
def test_text_says_what_to_do_next(key: tuple[str, str]) -> None:
    assert ACTION.search(str(EXAMPLES[key]))


def test_text_without_a_next_step_would_be_noticed() -> None:
    assert not ACTION.search("The adapter for 'x.linear1' cannot be used: rank 600 is too large.")
    assert not ACTION.search("Block 'x' cannot run: its use of 'y' is no choice.")


@EVERY
def test_quoted_nodes_and_widgets_exist(key: tuple[str, str]) -> None:
    own_nodes = {info["display_name"] for info in INFO.values()}
    inputs = [
        (name, spec[1])
        for info in INFO.values()
        for group in ("required", "optional")
        for name, spec in info["input"].get(group, {}).items()
    ]
    widgets = {options.get("display_name", name) for name, options in inputs}
    choices = {
        str(choice)
        for _, options in inputs
        for choice in options.get("options", ())
        if isinstance(choice, str)
    }
    error = EXAMPLES[key]
    if key[0] == "cli":
        known = OTHER_QUOTES
    else:
        known = own_nodes | CORE_NODES | widgets | choices | OTHER_QUOTES
    fields = field_texts(error)
    others = quotes(str(error)) - known
    assert not [quote for quote in others if quote.removesuffix(".onnx") not in fields]


@EVERY
def test_text_is_readable(key: tuple[str, str]) -> None:
    text = str(EXAMPLES[key])
    assert not re.search(r"\b[A-Z]\w+Error\b|<class|\bNone\b|\d{7,} bytes", text)
    # behind a command a point would be copied with it
    assert text.endswith(".") or "python -m " in text.splitlines()[-1]
    # in ComfyUI's dialog; only a list of problems may be longer
    assert len(text) <= 450 or "\n" in text
