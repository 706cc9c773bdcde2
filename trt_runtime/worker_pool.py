"""Builds blocks in several processes; a block whose process is lost is built once more, alone."""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable, Iterable

from .errors.build import WorkerDiedError
from .plan import BuildJob, BuiltPlan
from .worker_process import BuildWorker, Events, LostWorker, plan_from_answer

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.1
"""How often the callback is called, and so how fast a cancel is felt."""


class _Pending:
    """Jobs in their order; the next one is looked for while processes are busy with others.

    Finding a job may take a while: the digests of a block's weights tell whether there is one.
    """

    def __init__(self, jobs: Iterable[BuildJob]) -> None:
        self._rest = iter(jobs)
        self._next: BuildJob | None = None

    def look_ahead(self) -> bool:
        """Find the next job; False if there is none."""
        if self._next is None:
            self._next = next(self._rest, None)
        return self._next is not None

    def take(self) -> BuildJob:
        """Return the job that `look_ahead` has found."""
        job, self._next = self._next, None
        assert job is not None
        return job


def build_plans(
    jobs: Iterable[BuildJob],
    workers: int,
    built: Callable[[BuiltPlan], None],
    heartbeat: Callable[[str], None],
) -> None:
    """Build all jobs; whatever is raised, by a worker or by a callback, no process is left.

    A process that dies or hangs costs one worker: if memory was short, fewer need less of it.

    Args:
        jobs: The blocks to build; iterated over while others are built, in this thread.
        workers: Number of processes.
        built: Called for each stored plan, in the order they finish.
        heartbeat: Called at least every 0.1 s with the blocks in work; it may raise to cancel.

    Raises:
        WorkerDiedError: The process of a block was lost, and a second one as well.
        EngineError: What a worker reported; such a block is not tried again.
    """
    pending = _Pending(jobs)
    while pending.look_ahead():
        for first in _build_until_loss(pending, workers, built, heartbeat):
            workers = max(1, workers - 1)
            block = first.job.block
            logger.warning(
                "The build process of block %s was lost (%s); it is built again, alone. Last "
                "output: %s",
                block,
                first.cause,
                " | ".join(first.log_tail) or "none",
            )
            again = _build_until_loss(
                _Pending([first.job]), 1, built, lambda name: heartbeat(f"{name} again, alone")
            )
            for second in again:
                raise WorkerDiedError(block, first.cause, second.cause, second.log_tail)


def _build_until_loss(
    pending: _Pending,
    workers: int,
    built: Callable[[BuiltPlan], None],
    heartbeat: Callable[[str], None],
) -> list[LostWorker]:
    """Take jobs from `pending` until there are none or a worker is lost; finish what is in work."""
    events, lost = Events(), []
    pool: list[BuildWorker] = []
    try:
        while len(pool) < workers and pending.look_ahead():
            worker = BuildWorker(events)
            pool.append(worker)
            worker.submit(pending.take())
        while busy := [worker for worker in pool if worker.job]:
            heartbeat(", ".join(worker.job.block for worker in busy if worker.job))
            lost += [loss for worker in busy if (loss := worker.hung()) is not None]
            pending.look_ahead()
            try:
                worker, answer = events.get(timeout=POLL_SECONDS)
            except queue.Empty:
                continue
            if worker.job is None:
                # the end of one that was ended as hung
                continue
            if answer is None:
                lost.append(worker.died())
                continue
            built(plan_from_answer(answer))
            worker.job = None
            if not lost and pending.look_ahead():
                worker.submit(pending.take())
    finally:
        for worker in pool:
            worker.signal()
        for worker in pool:
            worker.kill()
    return lost
