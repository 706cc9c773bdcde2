"""Draws workflows as the editor saves them, from node definitions of a running server.

Nodes stand in columns, one below the other; links, slots, widget values and frames follow from
what is put where, so nothing of a workflow is counted or measured by hand.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from api_workflow import is_widget

TITLE = 30
"""Height of a node's title, which stands above its position."""
GAP = 20
"""Between the bottom of a node and the title of the next."""
MARGIN = 20
"""Between a frame and its nodes, and between frames."""

WIDTHS = {
    "CLIPTextEncode": 400,
    "ControlNetLoader": 440,
    "DualCLIPLoader": 440,
    "FluxFP4CalibrationSamples": 340,
    "FluxFP4EngineFromCheckpoint": 420,
    "FluxFP4LoadEngine": 400,
    "LoadImage": 320,
    "LoraLoaderModelOnly": 400,
    "PreviewAny": 460,
    "PreviewImage": 420,
    "SamplerCustomAdvanced": 280,
    "SaveImage": 420,
    "SetUnionControlNetType": 440,
    "UNETLoader": 400,
    "VAEDecode": 280,
    "VAELoader": 440,
}
"""By type, where it is not the usual one: what takes a picture, a long name or a text is wider."""
WIDTH = 330

VIEWS = {
    "CLIPTextEncode": 100,
    "FluxFP4Benchmark": 320,
    "FluxFP4BuildEngine": 90,
    "FluxFP4CalibrationSamples": 50,
    "FluxFP4CompareImages": 360,
    "FluxFP4CompareModels": 320,
    "FluxFP4EngineFromCheckpoint": 110,
    "FluxFP4ExportONNX": 50,
    "FluxFP4Inspect": 320,
    "FluxFP4LoadEngine": 70,
    "FluxFP4Quantize": 110,
    "FluxFP4QuantizeModel": 110,
    "FluxFP4SpeedLimit": 320,
    "LoadImage": 260,
    "PreviewAny": 280,
    "PreviewImage": 280,
    "SaveImage": 420,
}
"""Height of what a node shows or takes besides its widgets, by type: pictures, texts, results."""

SLOT, WIDGET, EDGE = 20, 24, 16
"""Heights of a row of sockets, of a widget, and of what is around both: LiteGraph's."""

COLOURS = {"calibrate": "#3f789e", "make": "#8A8", "sample": "#a1309b", "compare": "#b58b2a"}
"""Of frames, by what happens in them: the editor's own palette."""

OPTIONAL = 7
"""LiteGraph's shape of a slot that may stay empty."""


@dataclass(frozen=True)
class Output:
    """One output of a node: what an input is linked to."""

    node: Node
    slot: int


@dataclass
class Node:
    """A node on a sheet.

    Attributes:
        saved: It, as the editor saves it.
        names: Of its outputs.
    """

    saved: dict[str, Any]
    names: list[str]

    def __getitem__(self, name: str) -> Output:
        return Output(self, self.names.index(name))


@dataclass
class Column:
    """Nodes one below the other."""

    sheet: Sheet
    x: int
    y: int
    width: int = 0
    top: int = field(init=False)

    def __post_init__(self) -> None:
        self.top = self.y

    def put(
        self,
        kind: str,
        title: str | None = None,
        size: tuple[int, int] | None = None,
        **inputs: Any,
    ) -> Node:
        """Put a node below the others; inputs are values of widgets, or outputs to link."""
        node = self.sheet.node(kind, (self.x, self.y), size, title, inputs)
        width, height = node.saved["size"]
        self.y += height + TITLE + GAP
        self.width = max(self.width, width)
        return node


@dataclass
class Sheet:
    """A workflow that is being drawn."""

    object_info: Mapping[str, Any]
    name: str
    nodes: list[Node] = field(default_factory=list)
    links: list[list[Any]] = field(default_factory=list)
    groups: list[dict[str, Any]] = field(default_factory=list)

    def column(self, x: int, y: int = 0) -> Column:
        """Begin a column at a position."""
        return Column(self, x, y)

    def note(self, text: str, height: int, width: int = 440) -> None:
        """Put the note that says what the workflow does, top left."""
        node = self.node("MarkdownNote", (0, 0), (width, height), "Read me", {})
        node.saved["widgets_values"] = [text]
        node.saved |= {"color": "#432", "bgcolor": "#653", "properties": {}}

    @contextmanager
    def frame(self, title: str, colour: str) -> Iterator[None]:
        """Frame all nodes that are put meanwhile."""
        first = len(self.nodes)
        yield
        boxes = [(*node.saved["pos"], *node.saved["size"]) for node in self.nodes[first:]]
        left, top = min(box[0] for box in boxes), min(box[1] for box in boxes)
        right = max(x + width for x, _, width, _ in boxes)
        bottom = max(y + height for _, y, _, height in boxes)
        # two titles: the frame's and that of the topmost nodes
        x, y = left - MARGIN, top - 2 * TITLE - MARGIN
        size = [right + MARGIN - x, bottom + MARGIN - y]
        group = {"id": len(self.groups) + 1, "title": title, "bounding": [x, y, *size]}
        self.groups.append({**group, "color": COLOURS[colour], "flags": {}})

    def node(
        self,
        kind: str,
        position: tuple[int, int],
        size: tuple[int, int] | None,
        title: str | None,
        inputs: Mapping[str, Any],
    ) -> Node:
        """Put a node at a position; see ``Column.put``."""
        info = self.object_info.get(kind, {"output": [], "output_name": [], "input": {}})
        number = len(self.nodes) + 1
        saved: dict[str, Any] = {"id": number, "type": kind}
        saved |= {"pos": list(position), "size": [0, 0], "flags": {}, "order": number - 1}
        saved["mode"] = 0
        node = Node(saved, list(info["output_name"]))
        saved["inputs"], saved["widgets_values"] = self._inputs(number, kind, info, dict(inputs))
        saved["outputs"] = [
            {"localized_name": name, "name": name, "type": output, "links": None}
            for name, output in zip(info["output_name"], info["output"], strict=True)
        ]
        saved["properties"] = {"Node name for S&R": kind}
        saved["size"] = list(size or (WIDTHS.get(kind, WIDTH), _height(saved)))
        if title:
            saved["title"] = title
        self.nodes.append(node)
        return node

    def saved(self) -> dict[str, Any]:
        """Return the whole workflow as the editor saves it."""
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, self.name)),
            "revision": 0,
            "last_node_id": len(self.nodes),
            "last_link_id": len(self.links),
            "nodes": [node.saved for node in self.nodes],
            "links": self.links,
            "groups": self.groups,
            "config": {},
            "extra": {},
            "version": 0.4,
        }

    def _inputs(
        self, number: int, kind: str, info: Mapping[str, Any], given: dict[str, Any]
    ) -> tuple[list[dict[str, Any]], list[Any]]:
        slots: list[dict[str, Any]] = []
        widgets: list[dict[str, Any]] = []
        values: list[Any] = []
        for group in ("required", "optional"):
            for name in info.get("input_order", {}).get(group, []):
                type_, *rest = info["input"][group][name]
                options = rest[0] if rest else {}
                chosen = given.pop(name, None)
                slot = {"localized_name": options.get("display_name", name), "name": name}
                slot |= {"shape": OPTIONAL} if group == "optional" else {}
                slot["type"] = "COMBO" if isinstance(type_, list) else type_
                if is_widget(type_, options):
                    slot["widget"] = {"name": name}
                    values += _widget_values(kind, name, type_, options, chosen)
                    widgets.append(slot)
                else:
                    slots.append(slot)
                slot["link"] = chosen if isinstance(chosen, Output) else None
        if given:
            raise KeyError(f"{kind} has no inputs {sorted(given)}")
        # the editor puts sockets above widgets
        for place, slot in enumerate(slots + widgets):
            if slot["link"] is not None:
                slot["link"] = self._link(slot["link"], number, place)
        return slots + widgets, values

    def _link(self, output: Output, target: int, slot: int) -> int:
        number, source = len(self.links) + 1, output.node.saved
        kept = source["outputs"][output.slot]
        kept["links"] = [*(kept["links"] or []), number]
        self.links.append([number, source["id"], output.slot, target, slot, kept["type"]])
        return number


def _height(saved: Mapping[str, Any]) -> int:
    """Return what the editor would stretch a node to."""
    widgets = [slot for slot in saved["inputs"] if "widget" in slot]
    rows = max(len(saved["inputs"]) - len(widgets), len(saved["outputs"]))
    values = len(saved["widgets_values"])
    return SLOT * rows + WIDGET * values + VIEWS.get(saved["type"], 0) + EDGE


def _widget_values(
    kind: str, name: str, type_: Any, options: Mapping[str, Any], chosen: Any
) -> Iterator[Any]:
    if chosen is None or isinstance(chosen, Output):
        choices = type_ if isinstance(type_, list) else options.get("options", [])
        default = options.get("default", choices[0] if choices else "")
        if "default" not in options and not choices and not isinstance(chosen, Output):
            raise KeyError(f"{kind} needs a value for '{name}'")
        chosen = default
    yield chosen
    # widgets of the editor's own behind the input's
    if options.get("control_after_generate"):
        yield "fixed"
    if options.get("image_upload"):
        yield "image"
