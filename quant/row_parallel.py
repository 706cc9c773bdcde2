"""Spreading independent pieces of work over the cores, each piece on threads of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import partial
from typing import TypeVar

import torch

_Result = TypeVar("_Result")

_ELEMENTS = 1 << 18
"""Of a piece on a CPU: 1 MB in fp32, near a core's second-level cache. A quarter takes a fifth
more time for the calls of torch, twice as much a tenth for the cache."""

_ELEMENTS_ON_GPU = 1 << 26
"""There each piece costs kernel launches; memory bounds it: 256 MB of fp32."""


def for_row_chunks(
    work: Callable[[slice], None], shape: Sequence[int], device: torch.device
) -> None:
    """Call ``work`` for consecutive slices that cover the rows of a matrix, in any order.

    Args:
        work: Reads and writes rows of its slice only.
        shape: Rows and columns of the matrix.
        device: Where it lies.
    """
    rows, columns = shape
    elements = _ELEMENTS if device.type == "cpu" else _ELEMENTS_ON_GPU
    size = max(1, elements // max(1, columns))
    chunks = [slice(start, start + size) for start in range(0, rows, size)]
    side_by_side([partial(work, chunk) for chunk in chunks], device)


def side_by_side(works: Sequence[Callable[[], _Result]], device: torch.device) -> list[_Result]:
    """Call pieces of work that do not depend on each other, in any order; return their results.

    On a CPU every piece runs on its share of torch's threads. torch's own threads meet after each
    step, which costs as much as a step on a small tensor, and many times more where other processes
    want the cores; threads that each take whole pieces meet once.

    Args:
        works: The pieces. What the first of them raises is raised.
        device: Where their tensors lie; on a GPU they run one after the other.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or len(works) < 2:
        return [work() for work in works]
    inference, gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    # one iterator for all: a future for each of thousands of pieces costs as much as they do
    pending = iter(range(len(works)))
    results: dict[int, _Result] = {}

    def run_pending() -> None:
        with torch.inference_mode(inference), torch.set_grad_enabled(gradients):
            for index in pending:
                results[index] = works[index]()

    # the number of threads, like the modes, belongs to the calling thread
    busy = min(threads, len(works))
    share = max(1, threads // len(works))
    with ThreadPoolExecutor(busy, initializer=torch.set_num_threads, initargs=(share,)) as pool:
        futures = [pool.submit(run_pending) for _ in range(busy)]
        wait(futures, return_when=FIRST_EXCEPTION)
        for _ in pending:  # after a failure the others need not go on
            pass
    for future in futures:
        future.result()
    return [results[index] for index in range(len(works))]
