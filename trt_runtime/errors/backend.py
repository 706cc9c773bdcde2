"""Errors about libraries, GPUs and drivers."""

from __future__ import annotations

from collections.abc import Sequence

from . import BUILD_NODE, REBUILD, EngineError


class BackendMissingError(EngineError):
    """The library of a backend is not installed or does not load."""

    def __init__(self, backend: str, package: str, reason: str) -> None:
        self.backend, self.package, self.reason = backend, package, reason
        super().__init__(
            f"Backend '{backend}' needs the Python package '{package}', which does not import here "
            f"({reason}). Install it into ComfyUI's Python with: "
            f"python -m pip install {package!r}"
        )


class BackendUnusableError(EngineError):
    """A backend was asked for by name on a machine that cannot run it."""

    def __init__(self, backend: str, reason: str) -> None:
        self.backend, self.reason = backend, reason
        super().__init__(
            f"Backend '{backend}' cannot run here: {reason}. Choose 'auto' or 'reference', which "
            "runs slowly on the CPU, as 'backend' in 'Load FLUX FP4 Engine'."
        )


class EngineVersionError(EngineError):
    """Plans of another library or release: they never run on this one."""

    def __init__(self, built_with: str, installed: str) -> None:
        self.built_with, self.installed = built_with, installed
        super().__init__(
            f"The engine was built with {built_with}; installed is {installed}, and plans do not "
            f"move between releases. {REBUILD}"
        )


class EngineTargetError(EngineError):
    """Plans for another GPU generation."""

    def __init__(self, gpu: str, sm: str, targets: Sequence[str]) -> None:
        self.gpu, self.sm, self.targets = gpu, sm, tuple(targets)
        super().__init__(
            f"The engine targets {', '.join(t.upper() for t in targets)}; this GPU is {sm.upper()} "
            f"({gpu}). Build it for this GPU with {BUILD_NODE}."
        )
