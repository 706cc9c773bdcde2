"""Translations: complete, and naming each other's nodes as they are shown."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from pack_import import ROOT

LOCALES = ROOT / "locales"
LANGUAGES = ("zh", "zh-TW", "ja", "ko", "fr", "es", "ru", "de")
FILES = ("main.json", "nodeDefs.json")

VERBATIM = re.compile(
    r"nvfp4(?:-[a-z0-9]+)+|\bsm\d+\b|tensorrt-[a-z0-9]+|[\w<>.]+(?:/[\w<>.]+)+|\.\w{3,}|\d+(?:[.,\u202f]\d+)?",
    re.ASCII,
)
"""Names of recipes, targets and files, and numbers: the same in every language."""

SEPARATORS = re.compile(r"(?<=\d)[.,\u202f](?=\d)")
"""In numbers, where languages differ."""


def read(language: str, name: str) -> Any:
    return json.loads((LOCALES / language / name).read_text(encoding="utf-8"))


def texts(tree: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield every text of a file with its path."""
    if isinstance(tree, str):
        yield path, tree
        return
    for key, value in tree.items():
        yield from texts(value, f"{path}.{key}" if path else key)


def test_no_other_language_is_there() -> None:
    assert {path.name for path in LOCALES.iterdir()} == {"en", *LANGUAGES}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("language", LANGUAGES)
def test_nothing_is_missing(language: str, name: str) -> None:
    english, translated = dict(texts(read("en", name))), dict(texts(read(language, name)))
    assert translated.keys() == english.keys()
    assert [path for path, text in translated.items() if not text.strip()] == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_texts_are_translated(language: str) -> None:
    english = dict(texts(read("en", "nodeDefs.json")))
    translated = dict(texts(read(language, "nodeDefs.json")))
    sentences = [path for path, text in english.items() if len(text) > 40]
    assert [path for path in sentences if translated[path] == english[path]] == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_nodes_are_called_by_their_names(language: str) -> None:
    english, translated = read("en", "nodeDefs.json"), read(language, "nodeDefs.json")
    names = {node["display_name"]: translated[key]["display_name"] for key, node in english.items()}
    assert len(set(names.values())) == len(names)
    others = dict(texts(translated))
    wrong = [
        f"{path} has no '{name}'"
        for path, text in texts(english)
        for shown, name in names.items()
        if f"'{shown}'" in text and f"'{name}'" not in others[path]
    ]
    assert wrong == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_names_and_numbers_are_kept(language: str) -> None:
    translated = dict(texts(read(language, "nodeDefs.json")))
    wrong = []
    for path, text in texts(read("en", "nodeDefs.json")):
        missing = Counter(_kept(text)) - Counter(_kept(translated[path]))
        if missing:
            wrong.append(f"{path} lacks {dict(missing)}")
    assert wrong == []


def _kept(text: str) -> list[str]:
    return [SEPARATORS.sub("", item.rstrip(".")) for item in VERBATIM.findall(text)]
