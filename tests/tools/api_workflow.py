"""Convert a workflow as the editor saves it into the form that POST /prompt takes.

The editor saves widget values by position, so the node definitions of a running server
(`/object_info`) say which value belongs to which input. A workflow that disagrees with the
definitions is an error here, not a shifted value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

WIDGET_TYPES = {"BOOLEAN", "COMBO", "FLOAT", "INT", "STRING"}
# Nodes that exist in the editor only.
NOTES = {"MarkdownNote", "Note"}
ALWAYS = 0
"""LiteGraph's mode of a node that runs; 2 is muted and 4 bypassed."""

ApiWorkflow = dict[str, dict[str, Any]]


class WorkflowFormatError(Exception):
    """A saved workflow cannot be converted with the given node definitions."""

    def __init__(self, node: Mapping[str, Any], reason: str) -> None:
        self.node_id, self.node_type, self.reason = node["id"], node["type"], reason
        super().__init__(f"node {self.node_id} ({self.node_type}): {reason}")


def api_from_ui(workflow: Mapping[str, Any], object_info: Mapping[str, Any]) -> ApiWorkflow:
    """Return the API form of `workflow`: node id -> class type, inputs and title."""
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    result: ApiWorkflow = {}
    for node in workflow["nodes"]:
        if node["type"] in NOTES:
            continue
        if node["type"] not in object_info:
            raise WorkflowFormatError(node, "the server has no such node")
        if node.get("mode", ALWAYS) != ALWAYS:
            raise WorkflowFormatError(node, "muted and bypassed nodes are not supported")
        inputs = dict(_widget_inputs(node, object_info[node["type"]]))
        for slot in node.get("inputs", []):
            if slot.get("link") is not None:
                inputs[slot["name"]] = links[slot["link"]]
        result[str(node["id"])] = {
            "class_type": node["type"],
            "inputs": inputs,
            "_meta": {"title": node.get("title", node["type"])},
        }
    return result


def _widget_inputs(node: Mapping[str, Any], info: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    values = list(node.get("widgets_values") or [])
    for group in ("required", "optional"):
        for name in info.get("input_order", {}).get(group, []):
            kind, *rest = info["input"][group][name]
            options = rest[0] if rest else {}
            if not is_widget(kind, options):
                continue
            if not values:
                raise WorkflowFormatError(node, f"no saved value for widget '{name}'")
            yield name, values.pop(0)
            # These options add a widget of the editor's own behind the input's.
            if options.get("control_after_generate") or options.get("image_upload"):
                values = values[1:]
    if values:
        raise WorkflowFormatError(node, f"saved values without a widget: {values}")


def is_widget(kind: str | list[Any], options: Mapping[str, Any]) -> bool:
    # A list of choices is the older spelling of COMBO.
    return (isinstance(kind, list) or kind in WIDGET_TYPES) and not options.get("forceInput")


def nodes_of_type(workflow: ApiWorkflow, class_type: str) -> list[str]:
    """Return the ids of all nodes of one type."""
    return [key for key, node in workflow.items() if node["class_type"] == class_type]


def the_node(workflow: ApiWorkflow, class_type: str) -> str:
    """Return the id of the only node of a type."""
    (node_id,) = nodes_of_type(workflow, class_type)
    return node_id
