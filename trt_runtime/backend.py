"""The only importer of TensorRT: one Backend object per library, and the choice between them.

TensorRT-RTX and TensorRT 11 share the Python API that this pack uses. What only one of them has is
probed here once, so that no other file asks.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors.backend import BackendMissingError, BackendUnusableError, EngineTargetError

if TYPE_CHECKING:
    import torch

PACKAGES = {"tensorrt_rtx": "tensorrt-rtx>=1.7", "tensorrt": "tensorrt>=11"}
REFERENCE = "reference"
KEPT_ERRORS = 8

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backend:
    """One TensorRT library, imported."""

    name: str
    """"tensorrt_rtx" or "tensorrt"."""
    version: str
    module: Any
    chooses_targets: bool
    """Plans are built for named compute capabilities, without such a GPU (TensorRT-RTX)."""
    has_runtime_cache: bool
    """Kernels are compiled at run time and can be kept (TensorRT-RTX)."""

    @property
    def has_cuda_graphs(self) -> bool:
        """Blocks can be launched as CUDA graphs by the library itself."""
        return self.has_runtime_cache and hasattr(self.module, "CudaGraphStrategy")

    @property
    def label(self) -> str:
        """Library and version for messages."""
        return f"{self.name} {self.version}"


class RuntimeLog:
    """The one logger of a library in this process.

    TensorRT keeps the first logger for as long as any of its objects lives and ignores others, so
    all engines share it.
    """

    def __init__(self, backend: Backend) -> None:
        self._errors: deque[str] = deque(maxlen=KEPT_ERRORS)
        log = self
        interface: Any = backend.module.ILogger
        levels = {
            int(interface.INTERNAL_ERROR): logging.ERROR,
            int(interface.ERROR): logging.ERROR,
            int(interface.WARNING): logging.WARNING,
        }

        class ForwardingLogger(interface):
            def log(self, severity: Any, message: str) -> None:
                level = levels.get(int(severity), logging.DEBUG)
                logger.log(level, "%s: %s", backend.name, message)
                if level == logging.ERROR:
                    log._errors.append(message)

        self.interface: Any = ForwardingLogger()
        """What TensorRT's constructors take."""

    def take_errors(self) -> list[str]:
        """Return the errors since the last call."""
        errors = list(self._errors)
        self._errors.clear()
        return errors


@dataclass(frozen=True)
class Gpu:
    """The CUDA device that torch would use, or why there is none."""

    sm: str
    """Compute capability such as "sm120"; empty without a device."""
    name: str
    problem: str
    """Why no CUDA device is usable; empty when one is."""


@dataclass(frozen=True)
class BackendChoice:
    """Where an engine runs and why."""

    backend: Backend | None
    """None: the reference backend."""
    reason: str
    """One line for the log; empty when the plans run as asked."""

    @property
    def name(self) -> str:
        """Name of the chosen backend."""
        return self.backend.name if self.backend else REFERENCE


@functools.cache
def load_backend(name: str) -> Backend:
    """Import a TensorRT library.

    Raises:
        BackendMissingError: it is not installed or does not load; the message holds the pip
            command.
    """
    try:
        module = importlib.import_module(name)
    except (ImportError, OSError) as error:
        # OSError: the bindings are installed but their native library is not
        raise BackendMissingError(
            name, PACKAGES[name], str(error) or type(error).__name__
        ) from error
    return Backend(
        name=name,
        version=module.__version__,
        module=module,
        chooses_targets=hasattr(module.IBuilderConfig, "set_compute_capability"),
        has_runtime_cache=hasattr(module, "IRuntimeCache"),
    )


@functools.cache
def runtime_log(backend: Backend) -> RuntimeLog:
    """Return the process's logger for a library."""
    return RuntimeLog(backend)


def network_flags(backend: Backend) -> int:
    """Return the creation flags of a strongly typed network.

    TensorRT 11 networks are always strongly typed; the flag remains only where it must be given.
    """
    flag = getattr(backend.module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def probe_gpu(device: torch.device | None = None) -> Gpu:
    """Ask torch for the CUDA device at `device`, or for the current one."""
    import torch

    if torch.version.cuda is None:
        return Gpu("", "", f"no CUDA device: torch {torch.__version__} is a build without CUDA")
    if not torch.cuda.is_available():
        return Gpu("", "", "no CUDA device: no NVIDIA driver or GPU was found")
    if device is not None and device.type != "cuda":
        return Gpu("", "", f"no CUDA device: ComfyUI runs on '{device}'")
    major, minor = torch.cuda.get_device_capability(device)
    return Gpu(f"sm{major}{minor}", torch.cuda.get_device_name(device), "")


def choose_backend(
    requested: str, plans_for: str, targets: tuple[str, ...], gpu: Gpu
) -> BackendChoice:
    """Decide where plans of library `plans_for` run.

    "auto" takes the library of the plans when this GPU can run them, else the reference with a
    reason.

    Raises:
        BackendUnusableError: a library was requested by name and there is no GPU, or other plans.
        EngineTargetError: a library was requested by name and the plans target another GPU.
        BackendMissingError: the GPU could run the plans, but their library is not installed.
    """
    if requested == REFERENCE:
        return BackendChoice(None, "")
    if requested not in ("auto", plans_for):
        raise BackendUnusableError(requested, f"the plans of this engine are for '{plans_for}'")
    if gpu.problem:
        if requested != "auto":
            raise BackendUnusableError(requested, gpu.problem)
        return BackendChoice(None, gpu.problem)
    if gpu.sm not in targets:
        if requested != "auto":
            raise EngineTargetError(gpu.name, gpu.sm, targets)
        wanted = " and ".join(target.upper() for target in targets)
        return BackendChoice(
            None, f"GPU is {gpu.sm.upper()}, the plan targets {wanted}: {gpu.name}"
        )
    return BackendChoice(load_backend(plans_for), "")
