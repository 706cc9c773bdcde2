"""Builds one plan inside the worker process: ONNX in, linted and stored plan out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .backend import Backend, load_backend, network_flags
from .build_log import LAYERS_HEADER, activation_bytes, layers_from_log, lint_build
from .digest import digest_of_bytes
from .errors.build import PlanBuildError
from .store import write_atomic

SETTINGS_VERSION = 1
"""Part of every plan's key: raise it when the way plans are built changes."""


@dataclass(frozen=True)
class BuildJob:
    """One block to build; travels to the worker as JSON."""

    block: str
    backend: str
    onnx: str
    plan: str
    targets: tuple[str, ...]
    profile: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
    """Shapes (min, opt, max) of every input with a dynamic axis."""
    fp4_linears: tuple[str, ...]
    fp8_linears: tuple[str, ...]
    fp8_attention: bool


@dataclass(frozen=True)
class BuiltPlan:
    """What the worker reports of a stored plan."""

    block: str
    bytes: int
    digest: str
    activation_bytes: int
    build_seconds: float
    fp4_gemms_expected: int
    fp4_gemms_found: int
    fp8_gemms_expected: int
    fp8_gemms_found: int
    fp8_mha_expected: int
    fp8_mha_found: int


class PlanFactory:
    """Builds plans one after the other with the process's one TensorRT logger.

    TensorRT keeps the first logger for as long as any of its objects lives, so a second one would
    be ignored.
    """

    def __init__(
        self,
        backend: str,
        report: Callable[[str], None],
        heartbeat: Callable[[], None] = lambda: None,
    ) -> None:
        """Load the library.

        Args:
            backend: Its name.
            report: Takes warnings and errors of the library.
            heartbeat: Called with every message of the library, from any thread.
        """
        self.backend = load_backend(backend)
        self.report, self.heartbeat = report, heartbeat
        self.messages: list[str] = []
        self.faults: list[str] = []
        self.logger = self._logger()

    def _logger(self) -> Any:
        factory = self
        interface: Any = self.backend.module.ILogger

        class BuildLogger(interface):
            def log(self, severity: Any, message: str) -> None:
                factory.record(int(severity), message)

        return BuildLogger()

    def record(self, severity: int, message: str) -> None:
        """Keep what the lint reads and what explains a failure; the rest is thousands of lines."""
        self.heartbeat()
        levels = self.backend.module.ILogger
        if severity <= int(levels.ERROR):
            self.faults.append(message)
        if severity <= int(levels.WARNING):
            self.report(message)
        if severity == int(levels.INFO) or message.startswith(LAYERS_HEADER):
            self.messages.append(message)

    def build(self, job: BuildJob) -> BuiltPlan:
        """Build, check and store one plan.

        Raises:
            PlanBuildError: the parser or the builder refused the block.
            EngineLintError: the plan would not run in its formats; nothing was written.
            StorageError: nothing with the plan's name was written.
        """
        self.messages.clear()
        self.faults.clear()
        started = time.monotonic()
        plan = memoryview(self._serialized(job)).cast("B")
        layers = layers_from_log(self.messages)
        counts = lint_build(job.block, layers, job.fp4_linears, job.fp8_linears, job.fp8_attention)
        write_atomic(Path(job.plan), plan)
        return BuiltPlan(
            block=job.block,
            bytes=plan.nbytes,
            digest=digest_of_bytes(plan),
            activation_bytes=activation_bytes(self.messages),
            build_seconds=round(time.monotonic() - started, 3),
            **asdict(counts),
        )

    def _serialized(self, job: BuildJob) -> Any:
        trt = self.backend.module
        builder = trt.Builder(self.logger)
        network = builder.create_network(network_flags(self.backend))
        parser = trt.OnnxParser(network, self.logger)
        # from the file, not from bytes: the parser resolves external data against the file's folder
        if not parser.parse_from_file(job.onnx):
            errors = [parser.get_error(i) for i in range(parser.num_errors)]
            raise PlanBuildError(
                job.block, [f"node '{e.node_name()}': {e.desc()}" for e in errors] or self.faults
            )
        plan = builder.build_serialized_network(network, self._config(builder, job))
        if plan is None:
            raise PlanBuildError(job.block, self.faults)
        return plan

    def _config(self, builder: Any, job: BuildJob) -> Any:
        trt = self.backend.module
        config = builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        _set_targets(self.backend, config, job.targets)
        profile = builder.create_optimization_profile()
        for name, (minimum, optimum, maximum) in job.profile.items():
            profile.set_shape(name, minimum, optimum, maximum)
        config.add_optimization_profile(profile)
        return config


def _set_targets(backend: Backend, config: Any, targets: tuple[str, ...]) -> None:
    if not backend.chooses_targets:
        return
    config.num_compute_capabilities = len(targets)
    for i, target in enumerate(targets):
        capability = getattr(backend.module.ComputeCapability, target.upper())
        config.set_compute_capability(capability, i)
