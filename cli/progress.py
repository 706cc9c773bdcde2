"""Progress on standard error, and Ctrl-C as a cancel that keeps what is finished."""

from __future__ import annotations

import signal
import sys
from types import FrameType, TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class CommandProgress:
    """The ``progress(phase, done, total)`` callback of a command; a context manager.

    The first Ctrl-C is felt at the next call, like a cancel in ComfyUI; the second one at once. On
    a terminal a bar is shown, anywhere else a line for each phase.
    """

    def __init__(self, shown: bool = True) -> None:
        """Prepare to show progress.

        Args:
            shown: False for a process beside another one that shows the same.
        """
        console = Console(stderr=True)
        self._bar: Progress | None = None
        self._shown = shown
        if shown and console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task("", total=None)
        self._phase = ""
        self._cancelled = False

    def __enter__(self) -> CommandProgress:
        self._former = signal.signal(signal.SIGINT, self._interrupt)
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        signal.signal(signal.SIGINT, self._former)

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Show how far a stage is.

        Raises:
            KeyboardInterrupt: The user cancelled.
        """
        if self._cancelled:
            raise KeyboardInterrupt
        if self._bar is not None:
            self._bar.update(self._task, description=phase, completed=done, total=max(total, 1))
        elif self._shown and phase != self._phase:
            print(f"[{done}/{total}] {phase}", file=sys.stderr, flush=True)
        self._phase = phase

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._cancelled:
            raise KeyboardInterrupt
        self._cancelled = True
        if self._shown:
            print("Stopping; press Ctrl-C again to stop at once.", file=sys.stderr, flush=True)
