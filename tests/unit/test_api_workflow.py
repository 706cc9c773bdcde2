"""The converter from saved workflows to API workflows, against hand-written definitions."""

from __future__ import annotations

from typing import Any

import pytest
from api_workflow import WorkflowFormatError, api_from_ui

INFO: dict[str, Any] = {
    "Load": {
        "input": {"required": {"name": [["a", "b"]], "image": ["COMBO", {"image_upload": True}]}},
        "input_order": {"required": ["name", "image"]},
    },
    "Sample": {
        "input": {
            "required": {
                "model": ["MODEL"],
                "seed": ["INT", {"control_after_generate": True}],
                "steps": ["INT", {}],
            },
            "optional": {"strength": ["FLOAT", {"forceInput": True}], "note": ["STRING"]},
        },
        "input_order": {"required": ["model", "seed", "steps"], "optional": ["strength", "note"]},
    },
}


def workflow() -> dict[str, Any]:
    return {
        "nodes": [
            {"id": 1, "type": "Load", "widgets_values": ["b", "x.png", "image"]},
            {
                "id": 2,
                "type": "Sample",
                "title": "Sampler",
                "inputs": [{"name": "model", "link": 5}, {"name": "steps", "link": None}],
                "widgets_values": [7, "fixed", 20, "hello"],
            },
            {"id": 3, "type": "Note", "widgets_values": ["text"]},
        ],
        "links": [[5, 1, 0, 2, 0, "MODEL"]],
    }


def test_values_are_matched_by_position() -> None:
    api = api_from_ui(workflow(), INFO)
    assert api["1"]["inputs"] == {"name": "b", "image": "x.png"}
    assert api["2"]["inputs"] == {"model": ["1", 0], "seed": 7, "steps": 20, "note": "hello"}
    assert api["2"]["_meta"]["title"] == "Sampler"


def test_notes_are_left_out() -> None:
    assert set(api_from_ui(workflow(), INFO)) == {"1", "2"}


def test_link_into_a_widget_replaces_its_value() -> None:
    saved = workflow()
    saved["nodes"][1]["inputs"][1]["link"] = 5
    assert api_from_ui(saved, INFO)["2"]["inputs"]["steps"] == ["1", 0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"widgets_values": [7, "fixed", 20]}, "no saved value for widget 'note'"),
        ({"widgets_values": [7, "fixed", 20, "a", 1]}, "saved values without a widget: [1]"),
        ({"type": "Gone"}, "the server has no such node"),
        ({"mode": 4}, "muted and bypassed nodes are not supported"),
    ],
    ids=["too few", "too many", "unknown type", "bypassed"],
)
def test_disagreement_with_the_definitions_is_an_error(change: Any, reason: str) -> None:
    saved = workflow()
    saved["nodes"][1] |= change
    with pytest.raises(WorkflowFormatError) as caught:
        api_from_ui(saved, INFO)
    assert (caught.value.node_id, caught.value.reason) == (2, reason)
