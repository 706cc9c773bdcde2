"""Train a FLUX.1-dev transformer of the smallest width as a rectified flow."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from flux_fp4.quant.flux.config import FluxConfig
from flux_fp4.quant.flux.model import Flux, image_ids, patchify
from torch import Tensor, nn
from torch.nn import functional

logger = logging.getLogger(__name__)

CONFIG = FluxConfig(
    in_channels=16,
    out_channels=16,
    vec_in_dim=768,
    context_in_dim=768,
    hidden_size=128,
    mlp_ratio=4.0,
    num_heads=1,
    depth=2,
    depth_single_blocks=4,
    axes_dim=(16, 56, 56),
    theta=10_000,
    patch_size=2,
    qkv_bias=True,
    guidance_embed=True,
)

STEPS = 3000
BATCH = 64
LEARNING_RATE = 2e-3
WARMUP = 200
WEIGHT_DECAY = 0.01
EMA_DECAY = 0.998
CHECKPOINT_EVERY = 250

# The prompts take six tokens of the encoder's 77, the rest repeats the end token. Most steps see
# the first 8; the others, and all of the last ones, see everything as the sampler will.
SHORT_TEXT = 8
FULL_TEXT_EVERY = 16
FULL_TEXT_FROM = 0.96

# Logit-normal times (Esser et al. 2024, arXiv 2403.03206). ComfyUI samples FLUX with shift 1.15,
# which spends most steps at high noise, hence the positive mean.
TIME_MEAN = 0.3
TIME_STD = 1.2

# The model learns to ignore FluxGuidance within these values.
GUIDANCE = (1.0, 8.0)


@dataclass(frozen=True)
class TrainingSet:
    """Everything a step draws from.

    Attributes:
        patches: latents as patches ``[N, tokens, 64]``.
        labels: index of each latent's prompt ``[N]``.
        context: token states of each prompt ``[P, 77, 768]``.
        pooled: pooled vector of each prompt ``[P, 768]``.
        latent_size: height and width of a latent.
    """

    patches: Tensor
    labels: Tensor
    context: Tensor
    pooled: Tensor
    latent_size: tuple[int, int]


class TrainingState:
    """Model, average of its weights, optimizer and position in the random stream."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = Flux(CONFIG)
        _initialize(self.model)
        self.average = {name: t.clone() for name, t in self.model.state_dict().items()}
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), betas=(0.9, 0.99), weight_decay=WEIGHT_DECAY
        )
        self.random = torch.Generator().manual_seed(seed)
        self.step = 0

    def save(self, path: Path) -> None:
        """Write everything that the next step depends on."""
        partial = path.with_name(path.name + ".partial")
        torch.save(
            {
                "model": self.model.state_dict(),
                "average": self.average,
                "optimizer": self.optimizer.state_dict(),
                "random": self.random.get_state(),
                "step": self.step,
            },
            partial,
        )
        partial.replace(path)

    def load(self, path: Path) -> None:
        """Continue where ``save`` was called; the result is the same as without a break."""
        stored = torch.load(path, weights_only=True)
        self.model.load_state_dict(stored["model"])
        self.average = stored["average"]
        self.optimizer.load_state_dict(stored["optimizer"])
        self.random.set_state(stored["random"])
        self.step = stored["step"]


def _initialize(model: Flux) -> None:
    """Xavier for Linears; zero where a block, guidance or the output should start silent."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    silent = [
        *(block.img_mod.lin for block in model.double_blocks),
        *(block.txt_mod.lin for block in model.double_blocks),
        *(block.modulation.lin for block in model.single_blocks),
        model.final_layer.adaLN_modulation[1],
        model.final_layer.linear,
        model.guidance_in.out_layer,
    ]
    for linear in silent:
        nn.init.zeros_(linear.weight)


def training_set(latents: Tensor, labels: Tensor, context: Tensor, pooled: Tensor) -> TrainingSet:
    """Fold latents ``[N, 16, h, w]`` into patches and keep them with their conditioning."""
    return TrainingSet(patchify(latents), labels, context, pooled, tuple(latents.shape[-2:]))


def train_transformer(data: TrainingSet, seed: int, checkpoint: Path) -> dict[str, Tensor]:
    """Train, or continue from ``checkpoint``.

    Returns:
        The averaged weights, float32, in BFL's names.
    """
    state = TrainingState(seed)
    if checkpoint.exists():
        state.load(checkpoint)
        logger.info("Continue at step %d of %d", state.step, STEPS)
    mean_loss = 1.0
    while state.step < STEPS:
        for group in state.optimizer.param_groups:
            group["lr"] = _learning_rate(state.step)
        loss = _loss(state, data)
        state.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(state.model.parameters(), 1.0)
        state.optimizer.step()
        _update_average(state)
        state.step += 1
        mean_loss += 0.01 * (loss.item() - mean_loss)
        if state.step % 100 == 0:
            logger.info("Transformer: step %d of %d, loss %.4f", state.step, STEPS, mean_loss)
        if state.step % CHECKPOINT_EVERY == 0:
            state.save(checkpoint)
    return state.average


def _learning_rate(step: int) -> float:
    if step < WARMUP:
        return LEARNING_RATE * (step + 1) / WARMUP
    return LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))


def _text_tokens(step: int, available: int) -> int:
    full = step % FULL_TEXT_EVERY == 0 or step >= FULL_TEXT_FROM * STEPS
    return available if full else SHORT_TEXT


def _loss(state: TrainingState, data: TrainingSet) -> Tensor:
    """Mean squared error of the velocity at x_t = (1 - t) x0 + t eps."""
    index = torch.randint(len(data.patches), (BATCH,), generator=state.random)
    clean, labels = data.patches[index], data.labels[index]
    noise = torch.randn(clean.shape, generator=state.random)
    normal = torch.randn(BATCH, generator=state.random)
    time = torch.sigmoid(TIME_MEAN + TIME_STD * normal)
    uniform = torch.rand(BATCH, generator=state.random)
    guidance = GUIDANCE[0] + (GUIDANCE[1] - GUIDANCE[0]) * uniform
    text = data.context[labels, : _text_tokens(state.step, data.context.shape[1])]
    velocity = state.model(
        torch.lerp(clean, noise, time[:, None, None]),
        image_ids(*data.latent_size, batch=BATCH),
        text,
        torch.zeros(BATCH, text.shape[1], 3),
        time,
        data.pooled[labels],
        guidance,
    )
    return functional.mse_loss(velocity, noise - clean)


@torch.no_grad()
def _update_average(state: TrainingState) -> None:
    # A young average follows quickly, so that the random start does not linger in it.
    decay = min(EMA_DECAY, (1 + state.step) / (10 + state.step))
    for name, tensor in state.model.state_dict().items():
        state.average[name].lerp_(tensor, 1 - decay)


def transformer_tensors(average: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors to store, bfloat16."""
    return {name: tensor.bfloat16().contiguous() for name, tensor in average.items()}
