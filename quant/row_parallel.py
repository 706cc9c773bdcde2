"""Working through the rows of a matrix in pieces that fit the cache, on every core."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

_ROWS = 64
"""64 rows of FLUX.1's widths take 0.8 to 4 MB in fp32: near a core's second-level cache."""

_ROWS_ON_GPU = 4096
"""There each piece costs kernel launches; memory bounds it: 250 MB of fp32 at 15,360 columns."""


def for_row_chunks(work: Callable[[slice], None], rows: int, device: torch.device) -> None:
    """Call ``work`` for consecutive slices that cover ``rows``, in any order.

    A step on one piece takes a tenth of a millisecond. torch's own threads meet after each step,
    which costs as much again, and many times more where other processes want the cores; threads
    that each take whole pieces meet once.

    Args:
        work: Reads and writes rows of its slice only.
        rows: How many there are.
        device: Where the rows lie.
    """
    size = _ROWS if device.type == "cpu" else _ROWS_ON_GPU
    chunks = [slice(start, start + size) for start in range(0, rows, size)]
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or len(chunks) == 1:
        for chunk in chunks:
            work(chunk)
        return
    inference = torch.is_inference_mode_enabled()

    def run(chunk: slice) -> None:
        with torch.inference_mode(inference):
            work(chunk)

    # the number of threads, like inference mode, belongs to the calling thread
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for _ in pool.map(run, chunks):
            pass
