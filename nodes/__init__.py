"""The only layer that imports ComfyUI: reads inputs, calls down, reports."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .all_in_one import EngineFromCheckpoint
from .benchmark import Benchmark
from .build import BuildEngine
from .calibration import CalibrationSamples
from .compare_images import CompareImages
from .compare_models import CompareModels
from .engine_manager import EngineManager
from .export import ExportONNX
from .inspect_checkpoint import Inspect
from .load import LoadEngine
from .native import SaveNative
from .paths import register_model_folder
from .preflight import Preflight
from .quantize import Quantize, QuantizeModel
from .speed_limit import SpeedLimit


class FluxFP4Extension(ComfyExtension):
    """Registers the model folder and the node classes with ComfyUI."""

    async def on_load(self) -> None:
        register_model_folder()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            Preflight,
            CalibrationSamples,
            Quantize,
            QuantizeModel,
            ExportONNX,
            BuildEngine,
            LoadEngine,
            EngineFromCheckpoint,
            Inspect,
            CompareModels,
            CompareImages,
            SpeedLimit,
            Benchmark,
            SaveNative,
            EngineManager,
        ]
