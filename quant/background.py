"""Work on a thread beside the caller's: reading what comes next, writing what is done."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch

logger = logging.getLogger(__name__)


class Background:
    """A thread that works while its owner goes on, at most one piece ahead; a context manager.

    One piece bounds the memory: what it holds is that of one block. Leaving the context waits for
    the piece in work, so that what was begun is whole.

    Attributes:
        stopping: Set when the owner failed or was cancelled: pieces whose results nobody needs
            then may end early.
    """

    def __init__(self, name: str) -> None:
        """Prepare the thread.

        Args:
            name: What it does, for logs.
        """
        self.stopping = threading.Event()
        self._name = name
        # the caller's own steps keep the other cores busy
        self._pool = ThreadPoolExecutor(1, name, initializer=torch.set_num_threads, initargs=(1,))
        self._piece: Future[None] | None = None

    def __enter__(self) -> Background:
        """Start with nothing to do."""
        return self

    def submit(self, piece: Callable[[], None]) -> None:
        """Begin a piece once the one before has ended.

        Raises:
            Exception: What the one before raised, as it was; this one is not begun then.
        """
        self.wait()
        inference = torch.is_inference_mode_enabled()

        def run() -> None:
            with torch.inference_mode(inference), torch.set_grad_enabled(False):
                piece()

        self._piece = self._pool.submit(run)

    def wait(self) -> None:
        """Wait for the piece in work.

        Raises:
            Exception: What it raised, as it was.
        """
        piece, self._piece = self._piece, None
        if piece is not None:
            piece.result()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Wait for the piece in work; its failure is raised unless the owner failed first."""
        if error is not None:
            self.stopping.set()
        try:
            self.wait()
        except Exception as second:
            if error is None:
                raise
            logger.warning("%s failed as well: %s", self._name, second)
        finally:
            self._pool.shutdown()
