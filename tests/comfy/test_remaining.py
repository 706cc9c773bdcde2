"""The time that is left, as nodes show it while they work."""

from __future__ import annotations

import time

import pytest
from comfy_in_process import import_comfyui

import_comfyui()

from flux_fp4.nodes.progress import NodeProgress  # noqa: E402
from flux_fp4.nodes.remaining import (  # noqa: E402
    PATIENCE_S,
    Remaining,
    duration_text,
    remaining_text,
)


def test_nothing_is_said_at_first() -> None:
    remaining = Remaining()
    assert remaining.seconds(0, 0, 57) is None
    assert remaining.seconds(PATIENCE_S / 2, 1, 57) is None
    # long enough, but no step has ended
    assert Remaining().seconds(0, 0, 57) is None


def test_equal_steps_are_counted_down() -> None:
    remaining = Remaining()
    for done in range(11):
        left = remaining.seconds(20.0 * done, done, 57)
    assert left == pytest.approx(20 * 47)
    # time goes on within a step, but never below zero
    assert remaining.seconds(215, 10, 57) == pytest.approx(20 * 47 - 15)
    assert remaining.seconds(5000, 10, 57) == 0


def test_finished_blocks_that_pass_at_once_do_not_promise_speed() -> None:
    remaining = Remaining()
    for done in range(40):
        remaining.seconds(0.01 * done, done, 57)
    for step in range(1, 9):
        left = remaining.seconds(0.4 + 30 * step, 39 + step, 57)
    assert left == pytest.approx(30 * 10, rel=0.01)


def test_steps_that_end_together_share_their_time() -> None:
    remaining = Remaining()
    remaining.seconds(0, 0, 12)
    assert remaining.seconds(40, 4, 12) == pytest.approx(80)


def test_next_part_starts_anew() -> None:
    remaining = Remaining()
    for done in range(11):
        remaining.seconds(20.0 * done, done, 11)
    assert remaining.seconds(221, 0, 11) is None
    assert remaining.seconds(222, 1, 11) is None
    assert remaining.seconds(236, 3, 11) == pytest.approx(5 * 8)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (20, "less than a minute"),
        (61, "about 1 min"),
        (89 * 60, "about 89 min"),
        (7200, "about 2.0 h"),
    ],
)
def test_words(seconds: float, text: str) -> None:
    assert remaining_text(seconds) == f"{text} left of this part"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (1.2, "1 s"),
        (59.9, "60 s"),
        (61.4, "1 min 1 s"),
        (3599.7, "1 h 0 min"),
        (9000, "2 h 30 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def test_only_work_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = NodeProgress("")
    monkeypatch.setattr(progress, "show", lambda text: None)
    # digests of what is up to date
    now[0] = 130.0
    assert progress.took() == ""
    progress("Building double_blocks.0", 0, 57)
    now[0] = 205.0
    progress("", 57, 57)
    # the engine is loaded
    now[0] = 210.0
    assert progress.took() == "\nmade in 1 min 15 s"
