"""What Python itself raises in a node, told like the pack's own errors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from comfy_api.latest import io

from .errors import FileAccessError, PackageMissingError

Execute = Callable[..., io.NodeOutput]


def told(execute: Execute) -> Execute:
    """Wrap a node's `execute`, below `@classmethod`.

    `torch.OutOfMemoryError` passes: ComfyUI unloads models and has advice of its own.
    """

    @functools.wraps(execute)
    def run(*args: Any, **inputs: Any) -> io.NodeOutput:
        try:
            return execute(*args, **inputs)
        except ImportError as error:
            raise PackageMissingError(error.name or "unknown", str(error)) from error
        except OSError as error:
            reason = error.strerror or str(error)
            raise FileAccessError(str(error.filename or ""), reason) from error

    return run
