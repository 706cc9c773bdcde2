"""What the picker of engines says of each: model, recipe, and whether it can be used."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from aiohttp import web
from server import PromptServer

from ..quant.inventory import stored_checkpoints
from ..trt_runtime.inventory import stored_engines
from . import paths

ROUTE = "/flux_fp4/engine_labels"


def register_route() -> None:
    """Let the frontend ask; web/js/engine_labels.js does. It is told names, and changes nothing."""

    @PromptServer.instance.routes.get(ROUTE)
    async def answer(request: web.Request) -> web.Response:
        # headers of many checkpoints are read from disk
        return web.json_response(await asyncio.to_thread(engine_labels))


def engine_labels() -> dict[str, str]:
    """Return what to show for each engine, by the name that workflows store."""
    return dict(_labels())


def _labels() -> Iterator[tuple[str, str]]:
    for checkpoint in stored_checkpoints(paths.model_folders()):
        metadata = checkpoint.metadata
        made = [metadata.variant, metadata.recipe] if metadata else []
        for engine in stored_engines(checkpoint.folder, checkpoint.content_digest):
            yield engine.name, " \u00b7 ".join([engine.name, *made, engine.status])
