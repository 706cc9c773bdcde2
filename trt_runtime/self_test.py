"""Does an engine compute on this machine what its ONNX files say?

On the first load with a GPU, driver and library, one double and one single block run on fixed
inputs, and on the reference backend. An engine that disagrees is refused: nobody shall see a black
picture without a reason.
"""

from __future__ import annotations

import json
import logging
import math
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .contract import OUTPUTS
from .digest import digest_of_fields
from .errors.run import SelfTestError
from .errors.storage import StorageError
from .manifest import EngineManifest, PlanEntry
from .reference_session import BlockSession
from .self_test_record import RECORD, REPORT, passed_tests
from .signature import read_signature
from .spec import ShapeProfile
from .store import write_atomic

logger = logging.getLogger(__name__)

LIMIT_DB = 10.0
"""Smallest SQNR of what a block adds to its input. The same blocks in torch with bf16 in the place
of fp32 measure 17 dB and more (tests/unit/test_self_test.py): rounding moves values across FP4
edges. Wrong kernels leave nothing, 0 dB or less."""

IMG_TOKENS, TXT_TOKENS = 128, 64
"""Enough for every tile shape of a kernel, few enough for a second on the CPU at FLUX's size."""

RunBlock = Callable[[str, dict[str, torch.Tensor]], Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class Machine:
    """What compiled kernels depend on."""

    gpu: str
    driver: str
    library: str
    """Name and version."""


class SelfTest:
    """The self-test of one engine.

    Args:
        engine_dir: Folder of the plans; the ONNX files are in its parent.
        manifest: The verified manifest.
    """

    def __init__(self, engine_dir: Path, manifest: EngineManifest) -> None:
        self.engine_dir, self.manifest = engine_dir, manifest

    def has_passed(self, machine: Machine) -> bool:
        """Tell whether these plans have passed on this machine before."""
        return self._key(machine) in passed_tests(self.engine_dir)

    def run(self, machine: Machine, run_block: RunBlock) -> dict[str, float]:
        """Compare the first block of each kind with the reference and remember that it passed.

        Args:
            machine: Where the engine runs.
            run_block: Runs a block of the loaded engine.

        Returns:
            SQNR in dB by block; empty if the ONNX files to compare with are not there.

        Raises:
            SelfTestError: A block differs too much; a report is written beside the engine.
        """
        started, results = time.monotonic(), {}
        for entry in self._blocks():
            onnx = self.engine_dir.parent / f"{entry.block}.onnx"
            if not onnx.is_file():
                logger.warning("Engine not tested on this GPU: '%s' is missing", onnx.name)
                return {}
            inputs = fixed_inputs(entry, self.manifest.profile)
            expected = _reference(onnx, entry, inputs)
            results[entry.block] = _update_sqnr_db(
                inputs, expected, run_block(entry.block, dict(inputs))
            )
        seconds = time.monotonic() - started
        logger.info("Self-test on %s in %.1f s: %s", machine.gpu, seconds, _listed(results))
        worst = min(results, key=lambda block: results[block])
        if results[worst] < LIMIT_DB:
            report = self._write_report(machine, results)
            raise SelfTestError(worst, results[worst], LIMIT_DB, report)
        self._remember(machine, results)
        return results

    def _blocks(self) -> list[PlanEntry]:
        first: dict[str, PlanEntry] = {}
        for entry in self.manifest.blocks:
            first.setdefault(entry.kind, entry)
        return list(first.values())

    def _key(self, machine: Machine) -> str:
        plans = {entry.block: entry.digest for entry in self.manifest.blocks}
        return digest_of_fields({"machine": asdict(machine), "plans": plans})

    def _remember(self, machine: Machine, results: Mapping[str, float]) -> None:
        entry = {**asdict(machine), "sqnr_db": results}
        passed = {**passed_tests(self.engine_dir), self._key(machine): entry}
        try:
            write_atomic(self.engine_dir / RECORD, json.dumps(passed, indent=1).encode())
        except StorageError as error:
            logger.warning("The self-test will run again with the next start: %s", error)

    def _write_report(self, machine: Machine, results: Mapping[str, float]) -> Path:
        report = {
            **asdict(machine),
            "engine": f"{self.engine_dir.parent.name}/{self.engine_dir.name}",
            "built_with": self.manifest.built_with,
            "targets": self.manifest.targets,
            "recipe": self.manifest.recipe,
            "update_sqnr_db": {block: str(round(db, 2)) for block, db in results.items()},
            "limit_db": LIMIT_DB,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
            "system": platform.platform(),
        }
        path = self.engine_dir / REPORT
        try:
            write_atomic(path, json.dumps(report, indent=1).encode())
        except StorageError as error:
            # the refusal of the engine matters more
            logger.warning("The report on the failed self-test is lost: %s", error)
        return path


def fixed_inputs(entry: PlanEntry, profile: ShapeProfile) -> dict[str, torch.Tensor]:
    """Return the inputs that a block is tested on: always the same ones, fp32 on the CPU."""
    img = min(max(IMG_TOKENS, profile.min_img_tokens), profile.max_img_tokens)
    txt = min(max(TXT_TOKENS, profile.min_txt_tokens), profile.max_txt_tokens)
    return example_inputs(entry, {"B": 1, "N": img, "T": txt, "S": img + txt})


def example_inputs(entry: PlanEntry, sizes: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """Return random inputs of a block, always the same ones, fp32 on the CPU.

    Args:
        entry: The block's plan.
        sizes: By dynamic axis: B, N, T and S.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = {}
    for spec in entry.inputs:
        shape = [sizes[dim] if isinstance(dim, str) else dim for dim in spec.shape]
        value = torch.randn(shape, generator=generator)
        if spec.name in ("cos", "sin"):
            angles = torch.arange(shape[1])[:, None] * torch.logspace(0, -3, shape[2])
            value = getattr(torch, spec.name)(angles).expand(shape).contiguous()
        elif spec.name.endswith(("_shift", "_scale")):
            value = 0.1 * value
        inputs[spec.name] = value
    return inputs


def _reference(
    onnx: Path, entry: PlanEntry, inputs: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    read_signature(onnx)  # refuses files that ONNX Runtime must not see
    names = list(OUTPUTS[entry.kind])
    feed = {name: tensor.numpy() for name, tensor in inputs.items()}
    results = BlockSession(onnx).run(names, feed)
    return {name: torch.from_numpy(value) for name, value in zip(names, results, strict=True)}


def _update_sqnr_db(
    inputs: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    actual: Mapping[str, torch.Tensor],
) -> float:
    """Return the smallest SQNR of what the block adds to its streams."""
    found = []
    for name, value in expected.items():
        update = (value - inputs[name.removesuffix("_out")]).double()
        noise = (actual[name].detach().cpu().double() - value.double()).square().sum().item()
        if not math.isfinite(noise):
            return -math.inf
        found.append(10 * math.log10(update.square().sum().item() / max(noise, 1e-30)))
    return min(found)


def _listed(results: Mapping[str, float]) -> str:
    return ", ".join(f"{block} {db:.1f} dB" for block, db in results.items())
