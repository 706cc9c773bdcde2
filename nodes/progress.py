"""Progress bar, phase text and cancel of a running node."""

from __future__ import annotations

import time

import comfy.model_management
import comfy.utils
from comfy_execution.utils import get_executing_context
from server import PromptServer

from .remaining import Remaining, duration_text, remaining_text

REFRESH_S = 5.0
"""Between two changes of the time that is left, while the phase stays."""

WORTH_SAYING_S = 1.0
"""Finding that everything is up to date takes less."""


class NodeProgress:
    """Shows a stage's progress on its node; raises ComfyUI's interrupt when the user cancels.

    An instance is the ``progress(phase, done, total)`` callback of the layers below. The node id
    is explicit, because a callback may come from a thread that ComfyUI's context does not reach.
    """

    def __init__(self, node_id: str) -> None:
        self.node_id = node_id
        self._phase = ""
        self._first = self._last = 0.0
        self._remaining, self._shown = Remaining(), 0.0
        self._bar = comfy.utils.ProgressBar(1, node_id=node_id)

    def __call__(self, phase: str, done: int, total: int) -> None:
        # The bar only looks at the interrupt when it sends something, which it does rarely.
        comfy.model_management.throw_exception_if_processing_interrupted()
        now = self._last = time.monotonic()
        self._first = self._first or now
        left = self._remaining.seconds(now, done, total)
        if phase != self._phase or (left is not None and now - self._shown > REFRESH_S):
            self._phase, self._shown = phase, now
            # a phase without words clears the node
            self.show(f"{phase}\n{remaining_text(left)}" if phase and left is not None else phase)
        self._bar.update_absolute(done, max(total, 1))

    def took(self) -> str:
        """Return a line that says how long the work took; nothing where there was none to do.

        Reading what is already there, before the first step and after the last, is not work.
        """
        seconds = self._last - self._first
        return f"\nmade in {duration_text(seconds)}" if seconds >= WORTH_SAYING_S else ""

    def show(self, text: str) -> None:
        """Write text on the node; it stays there when the node has finished."""
        PromptServer.instance.send_progress_text(text, self.node_id)


def progress_of_running_node() -> NodeProgress:
    """Return the progress of whatever node is being executed, which may be another pack's.

    Outside of a prompt the progress is nobody's, and only a cancel is felt.
    """
    context = get_executing_context()
    return NodeProgress(context.node_id if context else "")
