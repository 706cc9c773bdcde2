"""Node: engine to MODEL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from comfy_api.latest import io, ui

from . import paths
from .engine_labels import engine_labels
from .failures import told
from .fingerprint import OwnChanges, file_state
from .schema import CATEGORY, description

if TYPE_CHECKING:
    from .engine_model import EngineOptions

BACKENDS = ("auto", "tensorrt_rtx", "tensorrt", "reference")
RUNTIME, BAKED = "runtime", "baked"

BACKEND = io.Combo.Input(
    "backend",
    options=list(BACKENDS),
    default="auto",
    tooltip="What runs the blocks. auto takes the library the engine was built for, and the slow "
    "CPU reference where no GPU can run it; the log says why.",
)
LORA = io.Combo.Input(
    "lora",
    options=[RUNTIME, BAKED],
    default=RUNTIME,
    optional=True,
    tooltip="How LoRAs behind this node work. runtime: another LoRA or strength acts at once, at "
    "some cost per step. baked: no cost per step, but blocks that a LoRA touches are quantized "
    "again from the original checkpoint and rebuilt when LoRA or strength changes; kept for later.",
)
MAIN_MEMORY = "main memory"
MODULATION = io.Combo.Input(
    "modulation_memory",
    display_name="modulation weights",
    options=[MAIN_MEMORY, "GPU"],
    default=MAIN_MEMORY,
    tooltip="Where FLUX.1's modulation weights stay, 6.5 GB in bf16. main memory: they visit the "
    "GPU once per prompt and compute the vectors of all steps; the pictures are the same. GPU: "
    "they stay there like other weights, as far as there is room.",
    optional=True,
    advanced=True,
)
ENGINE_MEMORY = io.Float.Input(
    "engine_memory",
    display_name="engine memory limit",
    default=0.0,
    min=0.0,
    max=96.0,
    step=0.1,
    tooltip="GB on the GPU for the engine's weights; 0 is no limit. Plans beyond it are loaded "
    "again in every step, which is slow. ComfyUI does the same by itself when memory is short.",
    optional=True,
    advanced=True,
)
CUDA_GRAPHS = io.Boolean.Input(
    "cuda_graphs",
    display_name="CUDA graphs",
    default=False,
    tooltip="TensorRT-RTX launches each block as one CUDA graph. May help where the GPU waits for "
    "a slow CPU; never measured. Costs memory, and time at every new size of picture.",
    optional=True,
    advanced=True,
)
REFUSE, REBUILD = "refuse", "rebuild"
IF_STALE = io.Combo.Input(
    "if_stale",
    display_name="if stale",
    options=[REFUSE, REBUILD],
    default=REFUSE,
    optional=True,
    tooltip="What to do with an engine that an update of TensorRT, another export or another "
    "quantization has made unusable. refuse: an error that says why. rebuild: export and build it "
    "again for what it was built for, then load it; the node shows how far it is.",
)
MODEL_OUTPUT = "MODEL for any sampler. Works with ControlNet, references and block patches."


class LoadEngine(io.ComfyNode):
    """Loads a FLUX FP4 engine as MODEL. Engines are executable code: load only those that were
    built on this machine."""

    rebuilds = OwnChanges()

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FluxFP4LoadEngine",
            display_name="Load FLUX FP4 Engine",
            category=CATEGORY,
            description=description(LoadEngine),
            search_aliases=["fp4", "nvfp4", "tensorrt", "trt", "rtx", "unet loader", "load flux"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Combo.Input(
                    "engine",
                    options=paths.engines(),
                    extra_dict=engine_labels(),
                    tooltip="Engine in models/flux_fp4, newest first; choose one, or connect "
                    "'Build TensorRT Engine'.",
                ),
                BACKEND,
                LORA,
                MODULATION,
                ENGINE_MEMORY,
                CUDA_GRAPHS,
                IF_STALE,
            ],
            outputs=[io.Model.Output(display_name="model", tooltip=MODEL_OUTPUT)],
        )

    @classmethod
    def fingerprint_inputs(cls, engine: str | None, **_options: Any) -> Any:
        if engine is None:
            return None
        folder = paths.engine_folder(engine)
        manifest = cls.rebuilds.state(cls.hidden.unique_id, folder / paths.MANIFEST)
        return [manifest, file_state(paths.engine_checkpoint(folder))]

    @classmethod
    @told
    def execute(
        cls,
        engine: str,
        backend: str,
        lora: str = RUNTIME,
        modulation_memory: str = MAIN_MEMORY,
        engine_memory: float = 0.0,
        cuda_graphs: bool = False,
        if_stale: str = REFUSE,
    ) -> io.NodeOutput:
        from . import reports, stages
        from .progress import NodeProgress

        folder, progress = paths.engine_folder(engine), NodeProgress(cls.hidden.unique_id)
        if if_stale == REBUILD:
            with cls.rebuilds.watched(cls.hidden.unique_id, folder / paths.MANIFEST):
                stages.rebuild_if_stale(folder, progress)
        options = engine_options(lora, modulation_memory, engine_memory, cuda_graphs)
        model = stages.load(folder, backend, options)
        text = reports.model_summary(engine, model)
        progress.show(text)
        return io.NodeOutput(model, ui=ui.PreviewText(text))


def engine_options(
    lora: str, modulation_memory: str, engine_memory: float, cuda_graphs: bool
) -> EngineOptions:
    """Return what the widgets say."""
    from .engine_model import EngineOptions

    return EngineOptions(
        precompute_modulation=modulation_memory == MAIN_MEMORY,
        engine_limit=round(engine_memory * 10**9) if engine_memory else None,
        bakes_lora=lora == BAKED,
        cuda_graphs=cuda_graphs,
    )
