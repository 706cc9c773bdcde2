"""What ComfyUI serves for the pack besides the nodes: help pages, texts, workflow templates."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import pytest
from comfy_server import PACK_FOLDER, ComfyClient
from pack_import import ROOT

WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))


def test_every_node_has_a_help_page(client: ComfyClient, object_info: dict[str, Any]) -> None:
    for node_id in (name for name in object_info if name.startswith("FluxFP4")):
        page = client.get_bytes(f"/extensions/{PACK_FOLDER}/docs/{node_id}.md").decode()
        assert len(page) > 200, node_id


def test_texts_name_only_existing_nodes_and_inputs(
    client: ComfyClient, object_info: dict[str, Any]
) -> None:
    texts = client.get("/i18n")["en"]["nodeDefs"]
    own = {name: info for name, info in object_info.items() if name.startswith("FluxFP4")}
    assert {name for name in texts if name.startswith("FluxFP4")} == set(own)
    for node_id, info in own.items():
        inputs = {name for group in info["input"].values() for name in group}
        assert set(texts[node_id].get("inputs", {})) <= inputs, node_id


def test_workflows_are_templates(client: ComfyClient) -> None:
    names = set(client.get("/workflow_templates")[PACK_FOLDER])
    assert names == {path.stem for path in WORKFLOWS}
    assert len(names) == 15


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_template_has_a_thumbnail(client: ComfyClient, path: Any) -> None:
    url = f"/api/workflow_templates/{PACK_FOLDER}/{quote(path.stem)}.jpg"
    assert client.get_bytes(url).startswith(b"\xff\xd8")


def test_frontend_loads_what_labels_engines(client: ComfyClient) -> None:
    script = f"/extensions/{PACK_FOLDER}/js/engine_labels.js"
    assert script in client.get("/extensions")
    assert b"flux_fp4_labels" in client.get_bytes(script)
