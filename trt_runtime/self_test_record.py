"""What past self-tests left beside an engine."""

from __future__ import annotations

import json
import logging
from pathlib import Path

logger = logging.getLogger(__name__)

RECORD = "self_test.json"
"""The machines on which the engine has passed, by digest of machine and plans."""

REPORT = "self_test_failed.json"
"""What the last failed test found."""

MAX_RECORD_BYTES = 1 << 20


def passed_tests(engine_dir: Path) -> dict[str, object]:
    """Return the record of an engine; empty if there is none that can be read."""
    record = _read(engine_dir / RECORD)
    if record is None and (engine_dir / RECORD).is_file():
        logger.warning("%s cannot be used: the engine is tested again", RECORD)
    return record or {}


def failed_test(engine_dir: Path) -> dict[str, object] | None:
    """Return the report of the last failed test; None if there is none that can be read."""
    return _read(engine_dir / REPORT)


def _read(path: Path) -> dict[str, object] | None:
    if not path.is_file() or path.stat().st_size > MAX_RECORD_BYTES:
        return None
    try:
        record = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
