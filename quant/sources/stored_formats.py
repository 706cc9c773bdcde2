"""Which encoding each stored tensor has, told by what the file says about it.

ComfyUI marks a quantized layer with a ``<layer>.comfy_quant`` tensor or in the header's
``_quantization_metadata`` (0.30: ``utils.py::convert_old_quants``, ``ops.py``); BFL's published FP8
and NVFP4 files carry the latter. Older ``fp8_scaled`` files have one ``scaled_fp8`` tensor and
``scale_weight`` per layer. ModelOpt 0.47 exports (``export/unified_export_hf.py``) have the same
tensors as ComfyUI's NVFP4 but the other nibble first and scales row by row; shapes do not tell the
two apart, so a file whose producer cannot be told is refused rather than guessed at.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping

from safetensors import SafetensorError

from ..errors.sources import DamagedCheckpointError, UnknownCheckpointError, UnsupportedWeightError
from ..native_nvfp4 import native_shapes
from ..nvfp4 import NVFP4_BLOCK
from ..safetensors_header import StoredTensor, parse_json_object
from .encodings import FP8, FP8_DTYPES, NVFP4, PLAIN_DTYPES, Encoding, Plain
from .files import CheckpointFiles

_OLD_FP8_MARK = "scaled_fp8"
_COMPANIONS = (
    "weight_scale",
    "weight_scale_2",
    "scale_weight",
    "input_scale",
    "scale_input",
    "pre_quant_scale",
    "comfy_quant",
)
_FP8_FORMATS = ("float8_e4m3fn", "float8_e5m2")
_MAX_CONFIG_BYTES = 2**20
_MAX_MARK_BYTES = 4096
_MODELOPT_NVFP4 = ("NVFP4", "NVFP4_AWQ", "W4A16_NVFP4")
"""Algorithms of ModelOpt whose weight is code * block scale * global scale."""

_READABLE = "bf16, fp16, fp32, FP8 and NVFP4 can be read"


def model_tensors(stored: Mapping[str, StoredTensor], prefix: str) -> list[str]:
    """Return the stored names below a prefix without marks and companions of quantized tensors."""
    return [
        name
        for name in stored
        if name.startswith(prefix)
        and name != prefix + _OLD_FP8_MARK
        and not _is_companion(name, stored)
    ]


class StoredFormats:
    """Tells the encoding of tensors from a checkpoint's marks."""

    def __init__(self, files: CheckpointFiles, prefix: str) -> None:
        """Read all marks.

        Raises:
            DamagedCheckpointError: A mark cannot be read.
        """
        self._name, self._stored, self._prefix = files.path.name, files.stored, prefix
        self._formats = _header_formats(files)
        self._header_marks = bool(self._formats)
        self._formats |= _tensor_formats(files, prefix)
        self._post_processed = any("quantization_config" in data for data in files.metadata)
        self._modelopt = _modelopt_algorithm(files)
        self._scaled_fp8 = any(
            name.endswith((".scale_weight", ".weight_scale", _OLD_FP8_MARK))
            for name in files.stored
            if name.startswith(prefix)
        )

    def encoding(self, name: str) -> Encoding:
        """Return the encoding of a stored tensor.

        Raises:
            DamagedCheckpointError: A companion is missing or does not fit.
            UnknownCheckpointError: The order of NVFP4 codes cannot be told.
            UnsupportedWeightError: It is stored in a format that cannot be read.
        """
        place = self._stored[name]
        layer = name.removesuffix(".weight")
        marked = self._mark(layer) if name.endswith(".weight") else None
        if marked == "nvfp4" or (marked is None and self._looks_like_nvfp4(layer, place)):
            return self._nvfp4(name, layer, native=self._is_native(layer))
        if marked is not None and marked not in _FP8_FORMATS:
            raise UnsupportedWeightError(layer, f"it is stored as '{marked}'", _READABLE)
        if marked is not None and place.dtype not in FP8_DTYPES:
            self._refuse(f"'{name}' is marked as {marked}, but is stored as {place.dtype}")
        if place.dtype in FP8_DTYPES:
            return self._fp8(name, layer)
        if place.dtype not in PLAIN_DTYPES:
            raise UnsupportedWeightError(layer, f"it is stored as {place.dtype}", _READABLE)
        for companion in ("weight_scale", "scale_weight"):
            if name.endswith(".weight") and f"{layer}.{companion}" in self._stored:
                self._refuse(f"'{name}' is {place.dtype}, but has a scale '{layer}.{companion}'")
        return Plain(self._name, name, place.shape, PLAIN_DTYPES[place.dtype])

    def _mark(self, layer: str) -> str | None:
        # ComfyUI accepts the header's names with and without the prefix of the tensors
        return self._formats.get(layer) or self._formats.get(layer.removeprefix(self._prefix))

    def _fp8(self, name: str, layer: str) -> FP8:
        place = self._stored[name]
        for scale in (f"{layer}.weight_scale", f"{layer}.scale_weight"):
            if name.endswith(".weight") and scale in self._stored:
                rows = place.shape[0] if place.shape else 1
                self._check_scale(scale, ((), (1,), (1, 1), (rows, 1)), tuple(PLAIN_DTYPES))
                return FP8(self._name, name, place.shape, scale)
        if len(place.shape) == 2 and self._scaled_fp8:
            self._refuse(f"'{name}' is FP8, but its scale '{layer}.weight_scale' is missing")
        return FP8(self._name, name, place.shape, None)

    def _nvfp4(self, name: str, layer: str, *, native: bool) -> NVFP4:
        place = self._stored[name]
        if place.dtype != "U8" or len(place.shape) != 2 or 2 * place.shape[1] % NVFP4_BLOCK:
            self._refuse(
                f"'{name}' is marked as NVFP4, but is {place.dtype} of shape {list(place.shape)}"
            )
        rows, columns = place.shape[0], 2 * place.shape[1]
        scale_shape = native_shapes(rows, columns)[1] if native else (rows, columns // NVFP4_BLOCK)
        self._check_scale(f"{layer}.weight_scale", (scale_shape,), ("F8_E4M3", "U8"))
        self._check_scale(f"{layer}.weight_scale_2", ((), (1,)), ("F32",))
        factor = f"{layer}.pre_quant_scale"
        if factor not in self._stored:
            return NVFP4(self._name, name, (rows, columns), native, None)
        self._check_scale(factor, ((columns,),), tuple(PLAIN_DTYPES))
        return NVFP4(self._name, name, (rows, columns), native, factor)

    def _looks_like_nvfp4(self, layer: str, place: StoredTensor) -> bool:
        return place.dtype == "U8" and f"{layer}.weight_scale" in self._stored

    def _is_native(self, layer: str) -> bool:
        """Tell ComfyUI's layout from ModelOpt's, or refuse.

        ModelOpt's post-processing writes ComfyUI's mark into the header around its own codes and
        may reorder their scales; then nothing in the file tells what was done. It always leaves its
        ``quantization_config`` in the header too, which a plain export does not.
        """
        if f"{layer}.comfy_quant" in self._stored:
            return True
        if self._header_marks and not self._post_processed and self._modelopt is None:
            return True
        if self._modelopt is not None and self._modelopt not in _MODELOPT_NVFP4:
            found = f"ModelOpt exported it with the algorithm {self._modelopt[:80]}"
            raise UnsupportedWeightError(layer, found, _READABLE)
        if self._modelopt is not None and not (self._header_marks or self._post_processed):
            return False
        raise UnknownCheckpointError(
            self._name,
            f"its weight '{layer}' is NVFP4, but the file does not say who packed it, and "
            "ComfyUI and ModelOpt put a different half of each byte first",
            next_step="Choose the bf16 or FP8 file of the same model; or, for a ModelOpt export, "
            "export it without swizzling and padding and keep its config.json beside it.",
        )

    def _check_scale(
        self, name: str, shapes: Iterable[tuple[int, ...]], dtypes: tuple[str, ...]
    ) -> None:
        place = self._stored.get(name)
        if place is None:
            self._refuse(f"its scale '{name}' is missing")
        elif place.shape not in shapes:
            expected = " or ".join(str(list(shape)) for shape in shapes)
            self._refuse(f"its scale '{name}' has shape {list(place.shape)} instead of {expected}")
        elif place.dtype not in dtypes:
            self._refuse(f"its scale '{name}' is {place.dtype} instead of {' or '.join(dtypes)}")

    def _refuse(self, reason: str) -> None:
        raise DamagedCheckpointError(self._name, reason)


def _is_companion(name: str, stored: Mapping[str, StoredTensor]) -> bool:
    layer, _, kind = name.rpartition(".")
    return kind in _COMPANIONS and f"{layer}.weight" in stored


def _header_formats(files: CheckpointFiles) -> dict[str, str]:
    """Read the format of each layer from ``_quantization_metadata`` in the headers."""
    formats: dict[str, str] = {}
    for metadata in files.metadata:
        text = metadata.get("_quantization_metadata")
        if text is None:
            continue
        subject = "its '_quantization_metadata'"
        try:
            layers = parse_json_object(text.encode(), subject).get("layers")
        except SafetensorError as error:
            raise DamagedCheckpointError(files.path.name, str(error)) from None
        if not isinstance(layers, dict):
            raise DamagedCheckpointError(files.path.name, f"{subject} lists no layers")
        for layer, mark in layers.items():
            formats[layer] = _mark_format(files, layer, mark)
    return formats


def _tensor_formats(files: CheckpointFiles, prefix: str) -> dict[str, str]:
    """Read the format of each layer from its ``comfy_quant`` tensor, JSON in bytes."""
    suffix = ".comfy_quant"
    names = [name for name in files.stored if name.startswith(prefix) and name.endswith(suffix)]
    formats = {}
    with files.reader("cpu") as reader:
        for name in names:
            place = files.stored[name]
            if place.dtype != "U8" or place.length > _MAX_MARK_BYTES:
                reason = (
                    f"'{name}' is {place.dtype} of {place.length} bytes, not a mark of a format"
                )
                raise DamagedCheckpointError(files.path.name, reason)
            try:
                mark = parse_json_object(reader.tensor(name).numpy().tobytes(), f"'{name}'")
            except SafetensorError as error:
                raise DamagedCheckpointError(files.path.name, str(error)) from None
            layer = name.removesuffix(suffix)
            formats[layer] = _mark_format(files, layer, mark)
    return formats


def _mark_format(files: CheckpointFiles, layer: str, mark: object) -> str:
    found = mark.get("format") if isinstance(mark, dict) else None
    if not isinstance(found, str):
        reason = f"the mark of '{layer}' is {reprlib.repr(mark)}, without a format"
        raise DamagedCheckpointError(files.path.name, reason)
    return found


def _modelopt_algorithm(files: CheckpointFiles) -> str | None:
    """Read which algorithm ModelOpt names in the configuration beside a Hugging Face export."""
    for name, section in (("config.json", "quantization_config"), ("hf_quant_config.json", None)):
        path = files.path.parent / name
        if not path.is_file() or path.stat().st_size > _MAX_CONFIG_BYTES:
            continue
        try:
            entries = parse_json_object(path.read_bytes(), f"'{name}'")
        except (OSError, SafetensorError) as error:
            raise DamagedCheckpointError(files.path.name, str(error)) from error
        config = entries.get(section) if section else entries
        if isinstance(config, dict) and _names_modelopt(config):
            details = config.get("quantization")
            found = details if isinstance(details, dict) else config
            return str(found.get("quant_algo"))
    return None


def _names_modelopt(config: Mapping[str, object]) -> bool:
    producer = config.get("producer")
    by_producer = isinstance(producer, dict) and producer.get("name") == "modelopt"
    return by_producer or config.get("quant_method") == "modelopt"
