"""ImageReward: how people would like a picture of a prompt (Xu et al. 2023, arXiv:2304.05977)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from PIL import Image

from ..errors.quality import (
    PYTHON_VARIABLE,
    ImageRewardFailedError,
    MetricLibraryError,
    MetricWeightsError,
)
from ..progress import Progress
from . import image_reward_process as process
from .pictures import Pictures

INSTALL = (
    "python -m venv imagereward && imagereward/bin/pip install image-reward openai-clip "
    f'"setuptools<80" "transformers<4.49", then set {PYTHON_VARIABLE} to imagereward/bin/python'
)
_TITLE = "ImageReward"


class ImageReward:
    """Rewards from a child process, which frees its memory when it ends."""

    def __init__(self, device: str = "cpu") -> None:
        self._device = device
        self._python = os.environ.get(PYTHON_VARIABLE) or sys.executable
        # Both cost more than all that follows; a run must not fail after the other metrics.
        list(self._rewards([]))

    def values(self, pictures: Pictures, prompts: Sequence[str], progress: Progress) -> list[float]:
        """Return one reward per picture, about 0 on average over the package's training data.

        Raises:
            MetricLibraryError: The package cannot be imported.
            MetricWeightsError: Its weights cannot be fetched.
        """
        rewards = []
        with tempfile.TemporaryDirectory() as folder:
            pairs = []
            for index, prompt in enumerate(prompts):
                file = Path(folder, f"{index}.png")
                Image.fromarray(pictures[index].permute(1, 2, 0).numpy()).save(
                    file, compress_level=1
                )
                pairs.append((str(file), prompt))
            for reward in self._rewards(pairs):
                rewards.append(reward)
                progress(f"{_TITLE} of {pictures.name}", len(rewards), len(prompts))
        return rewards

    def _rewards(self, pairs: Sequence[tuple[str, str]]) -> Iterator[float]:
        with tempfile.TemporaryFile("w+") as log:
            child = self._started(log)
            assert child.stdin is not None
            assert child.stdout is not None
            try:
                json.dump({"device": self._device, "pictures": pairs}, child.stdin)
                child.stdin.close()
                for line in child.stdout:
                    yield float(json.loads(line))
                code = child.wait()
            finally:
                # a cancel must not leave it behind
                child.kill()
                child.wait()
                child.stdout.close()
            if code:
                log.seek(0)
                _raise(code, (log.read().strip().splitlines() or ["no message"])[-1])

    def _started(self, log: IO[str]) -> subprocess.Popen[str]:
        command = [self._python, process.__file__]
        try:
            return subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        except OSError as error:
            raise MetricLibraryError(_TITLE, str(error), INSTALL) from error


def _raise(code: int, last_line: str) -> None:
    if code == process.LIBRARY_MISSING:
        raise MetricLibraryError(_TITLE, last_line, INSTALL)
    if code == process.WEIGHTS_MISSING:
        raise MetricWeightsError(_TITLE, "THUDM/ImageReward", "huggingface.co", last_line)
    raise ImageRewardFailedError(code, last_line)
