"""Boot a real ComfyUI on the CPU with a base folder of its own, and talk to it over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp

# ComfyUI derives nothing from the folder's name; a hyphen proves that the pack does not either.
PACK_FOLDER = "ComfyUI-FLUX-FP4"
BOOT_SECONDS = 180
PROGRESS_TEXT = "progress_text"
_BINARY_TEXT = 3
"""``protocol.BinaryEventTypes.TEXT``."""
END_EVENTS = {
    "execution_success": "success",
    "execution_error": "error",
    "execution_interrupted": "interrupted",
}


class ComfyServerError(Exception):
    """ComfyUI did not start, or answered a request with an error."""


@dataclass(frozen=True)
class PromptResult:
    """What became of one prompt."""

    prompt_id: str
    status: str
    """`success`, `error` or `interrupted`."""
    seconds: float
    node_seconds: dict[str, float]
    """Time between the start of a node and the start of the next one; cached nodes are absent."""
    events: list[dict[str, Any]]
    """Every websocket message except previews, in order; texts of nodes as `progress_text`."""
    outputs: dict[str, dict[str, Any]]
    """`ui` results by node id."""

    @property
    def error_message(self) -> str:
        """The text that ComfyUI's error dialog would show, empty without an error."""
        for event in self.events:
            if event["type"] == "execution_error":
                return str(event["data"]["exception_message"])
        return ""

    def images(self) -> list[dict[str, str]]:
        """Return the saved images' `filename`, `subfolder`, `type` in node order; no previews."""
        images = [image for output in self.outputs.values() for image in output.get("images", [])]
        return [image for image in images if image["type"] == "output"]

    def previews(self, node_id: str) -> list[dict[str, str]]:
        """Return the images that a node shows on itself."""
        return list(self.outputs[node_id]["images"])

    def progress_texts(self, node_id: str) -> list[str]:
        """Return what a node showed on itself while it ran, in order."""
        found = (event["data"] for event in self.events if event["type"] == PROGRESS_TEXT)
        return [data["text"] for data in found if data["node"] == node_id]

    def phases(self, node_id: str) -> list[str]:
        """Return what a node said it was doing, without the time that is left: it is shown when
        work takes long, again and again."""
        firsts = [text.partition("\n")[0] for text in self.progress_texts(node_id)]
        return [phase for phase, _ in itertools.groupby(firsts)]

    def text(self, node_id: str) -> str:
        """Return the preview text of a node."""
        return "\n".join(self.outputs[node_id]["text"])


@dataclass
class _NodeClock:
    """Turns `executing` messages into seconds per node."""

    seconds: dict[str, float] = field(default_factory=dict)
    _node: str | None = None
    _since: float = 0.0

    def start(self, node: str | None) -> None:
        now = time.monotonic()
        if self._node is not None:
            self.seconds[self._node] = self.seconds.get(self._node, 0.0) + now - self._since
        self._node, self._since = node, now


class ComfyClient:
    """A browser's view of a ComfyUI server: prompts, progress messages, images."""

    def __init__(self, url: str) -> None:
        self.url = url

    def get_bytes(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=60) as response:
            return bytes(response.read())

    def get(self, path: str) -> Any:
        return json.loads(self.get_bytes(path))

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Send JSON; a refusal raises `ComfyServerError` with the server's whole explanation."""
        data = json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                answer = response.read()
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            raise ComfyServerError(f"POST {path} answered {error.code}: {text}") from error
        return json.loads(answer) if answer else {}

    def interrupt(self) -> None:
        self.post("/interrupt", {})

    def free(self, *, unload_models: bool = True, free_memory: bool = False) -> None:
        self.post("/free", {"unload_models": unload_models, "free_memory": free_memory})

    def object_info(self) -> dict[str, Any]:
        return dict(self.get("/object_info"))

    def image(self, entry: Mapping[str, str]) -> bytes:
        """Return the file of one entry of `PromptResult.images`."""
        return self.get_bytes("/view?" + urllib.parse.urlencode(entry))

    def run(
        self,
        prompt: Mapping[str, Any],
        timeout: float = 300,
        on_event: Callable[[dict[str, Any]], None] | None = None,
    ) -> PromptResult:
        """Queue an API-format prompt and wait for its end.

        Args:
            prompt: node id -> `{"class_type": ..., "inputs": ...}`.
            timeout: seconds until `TimeoutError`.
            on_event: called with every event, for example to interrupt at the right moment.
        """
        return asyncio.run(self._run(prompt, timeout, on_event or (lambda _: None)))

    async def _run(
        self,
        prompt: Mapping[str, Any],
        timeout: float,
        on_event: Callable[[dict[str, Any]], None],
    ) -> PromptResult:
        client_id = uuid.uuid4().hex
        websocket_url = f"{self.url.replace('http', 'ws', 1)}/ws?clientId={client_id}"
        events: list[dict[str, Any]] = []
        clock = _NodeClock()
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(websocket_url, max_msg_size=0) as websocket,
        ):
            start = time.monotonic()
            body = {"prompt": prompt, "client_id": client_id}
            prompt_id = (await asyncio.to_thread(self.post, "/prompt", body))["prompt_id"]
            status = ""
            while not status:
                left = timeout - (time.monotonic() - start)
                message = await asyncio.wait_for(websocket.receive(), max(left, 0.01))
                if message.type is aiohttp.WSMsgType.BINARY:
                    event = _progress_text(message.data)
                    if event is None:
                        continue
                elif message.type is aiohttp.WSMsgType.TEXT:
                    event = json.loads(message.data)
                else:
                    raise ComfyServerError(f"the websocket ended with {message.type.name}")
                events.append(event)
                if event["type"] == "executing":
                    clock.start(event["data"]["node"])
                await asyncio.to_thread(on_event, event)
                if event["data"].get("prompt_id") == prompt_id:
                    status = END_EVENTS.get(event["type"], "")
            clock.start(None)
            seconds = time.monotonic() - start
        outputs = (await asyncio.to_thread(self._history, prompt_id)).get("outputs", {})
        return PromptResult(prompt_id, status, seconds, clock.seconds, events, outputs)

    def _history(self, prompt_id: str) -> dict[str, Any]:
        """Return the history entry, which the server writes just after the last message."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry is not None:
                return dict(entry)
            time.sleep(0.05)
        raise ComfyServerError(f"prompt {prompt_id} has no history")


class ComfyServer:
    """A ComfyUI process on a free loopback port; use it as a context manager."""

    def __init__(self, comfyui: Path, base: Path, pack: Path, others: Sequence[Path] = ()) -> None:
        """Prepare `base` (models, input, output, custom_nodes) with the pack linked into it.

        Args:
            comfyui: folder with ComfyUI's `main.py`.
            base: folder of this server's own; created if absent.
            pack: root of the node pack.
            others: further node packs, under the names of their folders.
        """
        self.comfyui, self.base = comfyui, base
        self.log_path = base / "comfyui.log"
        for name in ("custom_nodes", "input", "models", "output", "user"):
            (base / name).mkdir(parents=True, exist_ok=True)
        packs = {PACK_FOLDER: pack, **{other.name: other for other in others}}
        for name, folder in packs.items():
            link = base / "custom_nodes" / name
            if not link.is_symlink():
                link.symlink_to(folder, target_is_directory=True)

    def __enter__(self) -> ComfyServer:
        port = _free_port()
        command = [sys.executable, "main.py", "--cpu", "--port", str(port), "--disable-api-nodes"]
        command += ["--base-directory", str(self.base), "--database-url", "sqlite:///:memory:"]
        # Nothing in a test may go to a model hub, not even by accident.
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=self.comfyui, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        self.client = ComfyClient(f"http://127.0.0.1:{port}")
        with contextlib.ExitStack() as cleanup:
            cleanup.callback(self._stop)
            self._wait_until_ready()
            cleanup.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop()

    def log(self) -> str:
        """Return what the server has printed."""
        return self.log_path.read_text(errors="replace")

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + BOOT_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise ComfyServerError(f"ComfyUI ended while starting:\n{self.log()[-4000:]}")
            try:
                self.client.get("/system_stats")
            except OSError:
                time.sleep(0.2)
            else:
                return
        raise ComfyServerError(f"ComfyUI did not answer in {BOOT_SECONDS} s:\n{self.log()[-4000:]}")

    def _stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _progress_text(message: bytes) -> dict[str, Any] | None:
    """Return a node's text as an event (0.30, ``server.send_progress_text``), None for previews."""
    kind, node_bytes = struct.unpack_from(">II", message)
    if kind != _BINARY_TEXT:
        return None
    node, text = message[8 : 8 + node_bytes].decode(), message[8 + node_bytes :].decode()
    return {"type": PROGRESS_TEXT, "data": {"node": node, "text": text}}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
