from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import pytest
import torch
from flux_fp4.quant.background import Background
from flux_fp4.quant.errors.files import DiskFullError


class Cancelled(BaseException):
    """Not an ``Exception``, as ComfyUI's."""


def full_disk() -> None:
    raise DiskFullError("q.safetensors", 2, 1)


def test_a_piece_begins_when_the_one_before_has_ended() -> None:
    order: list[str] = []
    go_on = threading.Event()

    def first() -> None:
        go_on.wait(10)
        order.append("first")

    with Background("work") as background:
        background.submit(first)
        threading.Timer(0.05, go_on.set).start()
        background.submit(lambda: order.append("second"))
        assert order[0] == "first"
    assert order == ["first", "second"]


def run(*pieces: Callable[[Background], None], name: str = "work") -> None:
    """Let an owner do steps inside of the context."""
    with Background(name) as background:
        for piece in pieces:
            piece(background)


def cancel(_background: Background) -> None:
    raise Cancelled


def test_failure_is_raised_as_it_is_and_nothing_more_is_begun() -> None:
    begun: list[str] = []
    with pytest.raises(DiskFullError):
        run(lambda b: b.submit(full_disk), lambda b: b.submit(lambda: begun.append("second")))
    assert not begun


def test_failure_of_the_last_piece_is_raised_at_the_end() -> None:
    with pytest.raises(DiskFullError):
        run(lambda b: b.submit(full_disk))


def test_cancel_waits_for_the_piece_in_work_and_asks_it_to_stop() -> None:
    ended: list[bool] = []
    with pytest.raises(Cancelled):
        run(lambda b: b.submit(lambda: ended.append(b.stopping.wait(10))), cancel)
    assert ended == [True]


def test_the_first_failure_counts_and_the_second_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING), pytest.raises(Cancelled):
        run(lambda b: b.submit(full_disk), cancel, name="Writing blocks")
    assert "Writing blocks failed as well" in caplog.text


def test_pieces_compute_in_the_mode_of_their_owner_on_one_thread() -> None:
    seen: list[tuple[bool, bool, int]] = []

    def look() -> None:
        modes = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        seen.append((*modes, torch.get_num_threads()))

    with torch.inference_mode(), Background("work") as background:
        background.submit(look)
    assert seen == [(True, False, 1)]
