from __future__ import annotations

import re
import time

import pytest
from flux_fp4.trt_runtime.part_times import PartTimes


def test_parts_add_up_and_the_rest_is_told() -> None:
    times = PartTimes()
    for _ in range(2):
        with times.part("digests"):
            time.sleep(0.02)
    time.sleep(0.02)
    assert list(times.seconds) == ["digests"]
    assert 0.04 <= times.seconds["digests"] <= times.total - 0.02
    assert re.fullmatch(r"\d+\.\d s \(digests \d+\.\d, rest \d+\.\d\)", str(times))


def test_time_of_a_part_that_fails_is_counted() -> None:
    times = PartTimes()
    with pytest.raises(ValueError, match="no"), times.part("deserialization"):
        raise ValueError("no")
    assert "deserialization" in times.seconds
