"""Variations of the shipped workflows on the small model, and what their runs leave behind."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from api_workflow import ApiWorkflow, api_from_ui, the_node
from comfy_server import PROGRESS_TEXT, ComfyClient, PromptResult
from pack_import import ROOT
from PIL import Image
from small_workflow import ENGINE as ENGINE
from small_workflow import for_small_model, with_prompt

FULL_PIPELINE = "flux_fp4_full_pipeline"
LOAD_ENGINE = "flux_fp4_load_engine"
MERGE_LORA = "flux_fp4_merge_lora"
PROMPT = "a handwritten digit three"


def shipped(name: str, object_info: dict[str, Any]) -> ApiWorkflow:
    saved = json.loads((ROOT / "workflows" / f"{name}.json").read_text())
    workflow = for_small_model(api_from_ui(saved, object_info))
    return with_prompt(workflow, PROMPT, seed=7)


def changed(workflow: ApiWorkflow, class_type: str, **inputs: Any) -> ApiWorkflow:
    result = copy.deepcopy(workflow)
    result[the_node(result, class_type)]["inputs"].update(inputs)
    return result


def up_to(workflow: ApiWorkflow, class_type: str) -> ApiWorkflow:
    """Keep one output node and what it depends on."""
    wanted = [the_node(workflow, class_type)]
    for node_id in wanted:
        values = workflow[node_id]["inputs"].values()
        wanted += [value[0] for value in values if isinstance(value, list)]
    return {node_id: workflow[node_id] for node_id in dict.fromkeys(wanted)}


def picture(client: ComfyClient, result: PromptResult) -> np.ndarray:
    assert (result.status, result.error_message) == ("success", "")
    (entry,) = result.images()
    return np.asarray(Image.open(BytesIO(client.image(entry))).convert("RGB"), np.float64)


def executed(workflow: ApiWorkflow, result: PromptResult) -> set[str]:
    return {workflow[node_id]["class_type"] for node_id in result.node_seconds}


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def psnr_db(first: np.ndarray, second: np.ndarray) -> float:
    mean_square = float(np.mean((first - second) ** 2))
    return math.inf if mean_square == 0 else 10 * math.log10(255**2 / mean_square)


def interrupt_at(client: ComfyClient, node_id: str, value: int) -> Any:
    """Return an event handler that cancels when a node reports a progress value."""
    return _interrupt_when(
        client,
        lambda event: (
            event["type"] == "progress"
            and event["data"]["node"] == node_id
            and event["data"]["value"] >= value
        ),
    )


def interrupt_at_text(client: ComfyClient, node_id: str, text: str) -> Any:
    """Return an event handler that cancels when a node shows a phase."""

    def is_moment(event: dict[str, Any]) -> bool:
        if event["type"] != PROGRESS_TEXT or event["data"]["node"] != node_id:
            return False
        return bool(event["data"]["text"].partition("\n")[0] == text)

    return _interrupt_when(client, is_moment)


def _interrupt_when(client: ComfyClient, is_moment: Callable[[dict[str, Any]], bool]) -> Any:
    times: dict[str, float] = {}

    def handle(event: dict[str, Any]) -> None:
        if not times and is_moment(event):
            times["interrupt"] = time.monotonic()
            client.interrupt()
        if event["type"] == "execution_interrupted":
            times["ended"] = time.monotonic()

    handle.times = times  # type: ignore[attr-defined]
    return handle
