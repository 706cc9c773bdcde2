"""The public interface of the nodes: ids, inputs, outputs and texts as ComfyUI serves them.

A difference here is a compatibility question for every saved workflow. After an intended change:
`make golden`, review the diff, and write it into the changelog.
"""

from __future__ import annotations

import json
import os
from typing import Any

from pack_import import ROOT

GOLDEN = ROOT / "tests" / "golden" / "object_info.json"
NODE_IDS = {
    "FluxFP4Benchmark",
    "FluxFP4BuildEngine",
    "FluxFP4CalibrationSamples",
    "FluxFP4EngineFromCheckpoint",
    "FluxFP4CompareImages",
    "FluxFP4CompareModels",
    "FluxFP4EngineManager",
    "FluxFP4ExportONNX",
    "FluxFP4Inspect",
    "FluxFP4LoadEngine",
    "FluxFP4Preflight",
    "FluxFP4Quantize",
    "FluxFP4QuantizeModel",
    "FluxFP4SaveNative",
    "FluxFP4SpeedLimit",
}


def own_nodes(object_info: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in sorted(object_info.items()) if key.startswith("FluxFP4")}


def test_node_ids_are_the_frozen_ones(object_info: dict[str, Any]) -> None:
    assert set(own_nodes(object_info)) == NODE_IDS


def test_object_info_equals_golden(object_info: dict[str, Any]) -> None:
    text = json.dumps(own_nodes(object_info), indent=1, sort_keys=False) + "\n"
    if os.environ.get("UPDATE_GOLDEN") == "1":
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(text)
    assert json.loads(text) == json.loads(GOLDEN.read_text())


def test_every_input_and_output_has_a_tooltip(object_info: dict[str, Any]) -> None:
    missing = []
    for node_id, info in own_nodes(object_info).items():
        for group in ("required", "optional"):
            for name, spec in info["input"].get(group, {}).items():
                if not (len(spec) > 1 and spec[1].get("tooltip")):
                    missing.append(f"{node_id}.{name}")
        tooltips = info.get("output_tooltips") or [None] * len(info["output"])
        missing += [
            f"{node_id} output {name}"
            for name, tooltip in zip(info["output_name"], tooltips, strict=True)
            if not tooltip
        ]
    assert not missing


def test_every_node_has_description_category_and_aliases(object_info: dict[str, Any]) -> None:
    for node_id, info in own_nodes(object_info).items():
        assert info["description"], node_id
        assert info["category"].startswith("FLUX FP4"), node_id
        assert info["search_aliases"], node_id
