"""ImageReward in a process of its own: prints one reward per picture.

Run by path, with any Python that has the package ``image-reward``; nothing else of the pack is
imported. Release 1.5 of the package pins timm 0.6 and does not import under transformers 5, which
ComfyUI installs, so it usually lives in an environment of its own.
"""

from __future__ import annotations

import contextlib
import json
import sys

LIBRARY_MISSING = 3
WEIGHTS_MISSING = 4
"""Exit codes."""


def main() -> int:
    """Read ``{"device": ..., "pictures": [[file, prompt], ...]}`` from standard input."""
    job = json.load(sys.stdin)
    # the package prints where it loads from
    with contextlib.redirect_stdout(sys.stderr):
        try:
            import ImageReward
        except ImportError as error:
            return _failed(error, LIBRARY_MISSING)
        try:
            model = ImageReward.load("ImageReward-v1.0", device=job["device"])
        except OSError as error:
            return _failed(error, WEIGHTS_MISSING)
    for file, prompt in job["pictures"]:
        with contextlib.redirect_stdout(sys.stderr):
            reward = float(model.score(prompt, file))
        sys.stdout.write(f"{json.dumps(reward)}\n")
        sys.stdout.flush()
    return 0


def _failed(error: Exception, code: int) -> int:
    first_line = (str(error).splitlines() or [""])[0]
    sys.stderr.write(f"{type(error).__name__}: {first_line}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
