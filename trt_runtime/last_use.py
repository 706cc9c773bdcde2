"""When an engine or a bake ran last, so that those that nobody uses can make room.

A use is the time of the empty file ``last_used`` beside the plans. The manifest's own time stays
that of the build: ComfyUI orders engines by it and notices new ones.
"""

from __future__ import annotations

import logging
from pathlib import Path

logger = logging.getLogger(__name__)

LAST_USED = "last_used"


def mark_used(folder: Path) -> None:
    """Note that a folder is used now; in a read-only folder nothing is noted."""
    try:
        (folder / LAST_USED).touch()
    except OSError as error:
        logger.debug("The use of %s is not noted: %s", folder.name, error)


def last_used(folder: Path) -> float:
    """Return when a folder was used last, or else when its files were written.

    Raises:
        OSError: It is gone.
    """
    # locks are written to by whoever asks whether a build is running
    files = (path for path in folder.iterdir() if path.is_file() and path.suffix != ".lock")
    times = [path.stat().st_mtime for path in files]
    return max(times) if times else folder.stat().st_mtime
