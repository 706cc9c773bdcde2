"""CLIPScore and CLIP-IQA through torchmetrics, against transformers alone, on a random CLIP."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from flux_fp4.quant.errors.quality import MetricWeightsError
from flux_fp4.quant.quality.clip_metrics import CLIPIQA, MODEL, CLIPScore, clip_of, load_clip
from flux_fp4.quant.quality.pictures import BatchPictures
from PIL import Image
from quality_pictures import picture_batch, silent

PROMPTS = ["a cat", "a photo of a tiny dog"]
LONG = "a good cat " * 60


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A CLIP of random weights, and its processor with a tokenizer of single letters."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz."
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary = {word: index for index, word in enumerate(words)}
    vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"] = len(words), len(words) + 1
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=77)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    ends = {"bos_token_id": len(words), "eos_token_id": len(words) + 1}
    config = CLIPConfig(
        text_config={**size, **ends, "num_hidden_layers": 2, "vocab_size": len(vocabulary)},
        vision_config={**size, "num_hidden_layers": 2, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    torch.manual_seed(0)
    pictures = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    network = CLIPModel(config).eval()
    # Texts nearly alike, as two prompts of the real CLIP are: else every softmax is 0 or 1.
    torch.nn.init.constant_(network.text_model.final_layer_norm.bias, 20.0)
    return network, CLIPProcessor(pictures, tokenizer)


@pytest.fixture(scope="module")
def pictures() -> BatchPictures:
    return BatchPictures("small", picture_batch(2, 0.3, seed=1))


def embeddings(clip: tuple[Any, Any], pictures: BatchPictures, texts: list[str]) -> Any:
    """What transformers computes itself, from pictures as Pillow has them."""
    network, processor = clip
    shown = [Image.fromarray(pictures[index].permute(1, 2, 0).numpy()) for index in range(2)]
    inputs = processor(images=shown, text=texts, return_tensors="pt", padding=True, truncation=True)
    with torch.no_grad():
        found = network(**inputs)
    return found.image_embeds, found.text_embeds


def test_clip_score_is_a_hundred_cosines(clip: Any, pictures: BatchPictures) -> None:
    images, texts = embeddings(clip, pictures, PROMPTS)
    expected = (100 * (images * texts).sum(-1)).clamp(min=0).tolist()
    found = CLIPScore(clip_of(*clip), "cpu").values(pictures, PROMPTS, silent)
    assert found == pytest.approx(expected, abs=1e-2)


def test_long_prompt_is_cut_before_its_end_token(clip: Any, pictures: BatchPictures) -> None:
    images, texts = embeddings(clip, pictures, [LONG, PROMPTS[1]])
    expected = max(0.0, 100 * float((images[0] * texts[0]).sum()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = CLIPScore(clip_of(*clip), "cpu").values(pictures, [LONG, PROMPTS[1]], silent)
    assert found[0] == pytest.approx(expected, abs=1e-2)


def test_clip_iqa_is_the_softmax_of_two_prompts(clip: Any, pictures: BatchPictures) -> None:
    images, texts = embeddings(clip, pictures, ["Good photo.", "Bad photo."])
    expected = (100 * images @ texts.T).softmax(-1)[:, 0].tolist()
    found = CLIPIQA(clip_of(*clip), "cpu").values(pictures, ["", ""], silent)
    assert found == pytest.approx(expected, abs=1e-2)
    assert found[0] != pytest.approx(found[1], abs=1e-4)


def test_missing_weights_name_repository_and_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(tmp_path), raising=False)
    with pytest.raises(MetricWeightsError, match="CLIP-IQA cannot be computed") as caught:
        load_clip("clip_iqa", "cpu")
    assert (caught.value.weights, caught.value.host) == (MODEL, "huggingface.co")
