"""CLIPScore and CLIP-IQA: what CLIP says about one picture.

Network and arithmetic are those of NVIDIA's published numbers for FLUX in FP4: torchmetrics with
ViT-L/14, mean over pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..progress import Progress
from .catalog import METRICS
from .loading import loaded
from .pictures import Pictures

MODEL = "openai/clip-vit-large-patch14"

Clip = Callable[[], tuple[Any, Any]]
"""Returns a CLIP network and its processor, in the form that torchmetrics takes."""


def load_clip(metric: str, device: str) -> Clip:
    """Load CLIP once for several metrics.

    Raises:
        MetricLibraryError: transformers is missing.
        MetricWeightsError: The weights are neither here nor can be fetched.
    """
    network, processor = loaded(METRICS[metric].title, _pretrained, MODEL, "huggingface.co")
    return clip_of(network, processor, device)


def clip_of(network: nn.Module, processor: Any, device: str = "cpu") -> Clip:
    """Make a CLIP of transformers usable by torchmetrics."""
    adapted = _FeatureTensors(network).eval().to(device)
    return lambda: (adapted, _Truncating(processor))


class CLIPScore:
    """100 times the cosine of picture and prompt, not below 0 (Hessel et al. 2021)."""

    def __init__(self, clip: Clip, device: str) -> None:
        self._clip, self._device = clip, device

    def values(self, pictures: Pictures, prompts: Sequence[str], progress: Progress) -> list[float]:
        """Return one score per picture; a prompt counts as far as CLIP's 77 tokens reach."""
        from torchmetrics.functional.multimodal import clip_score

        scores = []
        for index, prompt in enumerate(prompts):
            picture = pictures[index].to(self._device)
            with torch.no_grad():
                score = clip_score(picture, prompt, model_name_or_path=self._clip)
            scores.append(score.item())
            progress(f"CLIPScore of {pictures.name}", index + 1, len(prompts))
        return scores


class CLIPIQA:
    """How much more "Good photo." fits a picture than "Bad photo.", 0 to 1 (Wang et al. 2023)."""

    def __init__(self, clip: Clip, device: str) -> None:
        from torchmetrics.multimodal import CLIPImageQualityAssessment

        self._device = device
        self._metric: Any = CLIPImageQualityAssessment(model_name_or_path=clip)  # type: ignore[arg-type]
        self._metric.to(device)

    def values(self, pictures: Pictures, prompts: Sequence[str], progress: Progress) -> list[float]:
        """Return one value per picture; prompts do not matter."""
        values = []
        for index in range(len(pictures)):
            # From 0 to 255: the processor of CLIP divides by 255 itself.
            self._metric.update(pictures[index][None].to(self._device).float())
            value: Any = self._metric.compute()
            values.append(float(value))
            self._metric.reset()
            progress(f"CLIP-IQA of {pictures.name}", index + 1, len(pictures))
        return values


class _FeatureTensors(nn.Module):
    """torchmetrics 1.9 expects tensors, which transformers 5 puts into an object."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network: Any = network
        self.config = network.config

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        return _features(self.network.get_image_features(pixel_values))

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return _features(self.network.get_text_features(input_ids, attention_mask))


class _Truncating:
    """Cuts long prompts in the tokenizer, which keeps CLIP's token of the end.

    torchmetrics 1.9 cuts the tokens afterwards and loses it; CLIP reads the text's features there.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __call__(self, **inputs: Any) -> Any:
        truncation = {"truncation": True} if "text" in inputs else {}
        return self._processor(**inputs, **truncation)


def _features(found: Any) -> Tensor:
    features: Tensor = found if isinstance(found, Tensor) else found.pooler_output
    return features


def _pretrained() -> tuple[Any, Any]:
    from transformers import CLIPModel, CLIPProcessor

    return CLIPModel.from_pretrained(MODEL), CLIPProcessor.from_pretrained(MODEL)
