"""Building graphs node by node, in the form that POST /prompt takes."""

from __future__ import annotations

from typing import Any

from api_workflow import ApiWorkflow

Link = list[Any]


class Graph:
    """A prompt under construction."""

    def __init__(self) -> None:
        self.nodes: ApiWorkflow = {}

    def add(self, class_type: str, output: int = 0, **inputs: Any) -> Link:
        """Add a node and return a link to one of its outputs."""
        node_id = str(len(self.nodes) + 1)
        self.nodes[node_id] = {"class_type": class_type, "inputs": inputs}
        return [node_id, output]

    def output_of(self, link: Link, output: int) -> Link:
        """Return a link to another output of the same node."""
        return [link[0], output]
