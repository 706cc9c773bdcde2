"""Distilling one quantized block from the block that it was made from.

A block learns to give, from what the quantized blocks before it hand on, what the original gives
from what the original blocks hand on: it takes up errors made before it, and does not only copy.
That is layer-wise reconstruction as in BRECQ (Li et al. 2021, arXiv:2102.05426) and QDrop (Wei et
al. 2022, arXiv:2203.05740), with the straight-through estimate in place of learned rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ..calibration import SampleState
from ..quantized_checkpoint import TrainingReport, finite_or_limit
from ..recipe import TrainingOptions
from ..sqnr import SQNR
from ..stack import Block, placed, run_block, tokens
from .optimizer import BETAS, parameter_groups, rate
from .states import StateFiles, batched, batches

BATCH_TOKENS = 4096
"""Tokens that are enough for one step: a sample of 1024 x 1024 pixels alone has 4,608. Smaller ones
are joined, because a step takes the same time for a few tokens as for many."""


class BlockSamples:
    """What one block learns from, and what it is judged by.

    Attributes:
        inputs: States that the quantized blocks before this one hand on.
        targets: States that the original hands on behind this one.
        energies: By sample, mean square of what the original block adds to its input, for the
            picture's and the text's tokens.
        learned: Numbers of the samples to learn from.
        held_out: Numbers of the others.
    """

    def __init__(
        self, inputs: StateFiles, targets: StateFiles, held_out: Sequence[int], teacher: Block
    ) -> None:
        """Carry the original's states through its block.

        Args:
            inputs: See above.
            targets: Before the block; afterwards, behind it.
            held_out: Numbers of the samples to judge by.
            teacher: The original block.
        """
        self.inputs, self.targets = inputs, targets
        self.held_out = list(held_out)
        self.learned = [index for index in range(len(inputs)) if index not in set(held_out)]
        self.energies: list[tuple[Tensor, ...]] = []
        with torch.no_grad():
            for index, state in enumerate(targets):
                before = placed(state, teacher)
                after = run_block(teacher, before)
                self.energies.append(_energies(before, after))
                targets.write(index, after)

    def batches(self, steps: int) -> Iterator[list[int]]:
        """Yield the samples of each step; every sample comes once before any comes again."""
        generator = torch.Generator().manual_seed(0)
        done = 0
        while done < steps:
            order = torch.randperm(len(self.learned), generator=generator).tolist()
            shuffled = [self.learned[place] for place in order]
            for group in batches(self.targets, shuffled, BATCH_TOKENS)[: steps - done]:
                yield group
                done += 1

    def tokens(self, steps: int) -> list[int]:
        """Return the tokens of every sample that runs through the block in training."""
        return [tokens(self.targets[i]).shape[1] for group in self.batches(steps) for i in group]

    def loss(self, student: Block, group: Sequence[int]) -> Tensor:
        """Return noise by signal of some samples' outputs, mean over samples and streams."""
        state = placed(batched([self.inputs[i] for i in group]), student)
        target = placed(batched([self.targets[i] for i in group]), student)
        actual = run_block(student, state)
        losses = [
            _stream(actual, target, n).square().mean(dim=(1, 2))
            / torch.stack([self.energies[i][n] for i in group])
            for n in range(len(self.energies[group[0]]))
        ]
        return torch.stack(losses).mean()

    @torch.no_grad()
    def sqnr_db(self, student: Block) -> float:
        """Return the SQNR on the held-out samples, all tokens taken together."""
        ratio = SQNR()
        for index in self.held_out:
            target = tokens(placed(self.targets[index], student)).float()
            actual = tokens(run_block(student, placed(self.inputs[index], student))).float()
            signal = sum(e.item() * n for e, n in zip(*self._sizes(index), strict=True))
            ratio.add_energies(signal, (actual - target).double().square().sum().item())
        return ratio.db

    def _sizes(self, index: int) -> tuple[tuple[Tensor, ...], list[int]]:
        state = self.targets[index]
        streams = [state.img] if state.txt is None else [state.img, state.txt]
        return self.energies[index], [stream.numel() for stream in streams]


@torch.no_grad()
def train_block(
    student: Block,
    samples: BlockSamples,
    options: TrainingOptions,
    heartbeat: Callable[[], None],
) -> TrainingReport:
    """Train a quantized block in place; a block that gains nothing gets its first values back.

    Args:
        student: Made by ``trainable_block``.
        samples: To learn from.
        options: Steps and learning rates.
        heartbeat: Called before each step; may raise to cancel.
    """
    first = {name: parameter.detach().clone() for name, parameter in _trained(student)}
    before = samples.sqnr_db(student)
    optimizer = torch.optim.Adam(parameter_groups(student, options), betas=BETAS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, options.steps))
    for group in samples.batches(options.steps):
        heartbeat()
        optimizer.zero_grad()
        with torch.enable_grad():
            samples.loss(student, group).backward()
        optimizer.step()
        schedule.step()
    training = TrainingReport(
        before_db=finite_or_limit(before),
        after_db=finite_or_limit(samples.sqnr_db(student)),
        steps=options.steps,
    )
    if not training.helped:
        for name, parameter in _trained(student):
            parameter.copy_(first[name])
    return training


def held_out_samples(count: int, timesteps: int, share: int = 8) -> list[int]:
    """Choose the samples that a block is judged by: whole pictures, evenly spread.

    Args:
        count: Of all samples; those of a picture follow each other.
        timesteps: Samples of one picture.
        share: One picture in so many is held out, at least one.
    """
    pictures = count // timesteps
    chosen = range(min(share, pictures) - 1, pictures, share)
    return [picture * timesteps + level for picture in chosen for level in range(timesteps)]


def _trained(student: Block) -> Iterator[tuple[str, nn.Parameter]]:
    return ((n, p) for n, p in student.named_parameters() if p.requires_grad)


def _energies(before: SampleState, after: SampleState) -> tuple[Tensor, ...]:
    if after.txt is None or before.txt is None:
        return ((after.img - tokens(before)).float().square().mean(),)
    pairs = ((before.img, after.img), (before.txt, after.txt))
    return tuple((a - b).float().square().mean() for b, a in pairs)


def _stream(actual: SampleState, target: SampleState, number: int) -> Tensor:
    """Return the error of the picture's (0) or the text's (1) tokens."""
    if number == 0:
        return actual.img.float() - target.img.float()
    assert actual.txt is not None
    assert target.txt is not None
    return actual.txt.float() - target.txt.float()
