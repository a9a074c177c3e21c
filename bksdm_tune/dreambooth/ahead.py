"""The stream of batches: pictures in their order, noised, with what eps_0 makes of them.

Nothing of this depends on what is trained, so the untuned backbone answers for several
micro-batches in one forward: a small batch leaves most of a machine idle (docs/performance.md).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bksdm_tune.diffusion import Noising, sample_latents
from bksdm_tune.loop import seed_for, shuffled

Predict = Callable[[Tensor, Tensor], Tensor]
Moments = tuple[Tensor, Tensor | None]
"""Latent moments (N, 2, C, h, w) of a subject's photos and of its class images, or None."""

Clean = Callable[[int], Iterator[list[Moments]]]
"""Micro-batches from a number on, a list of one part a subject."""

OWN_STREAM = 1
"""Sets the noise's seed apart from the loop's, which dropout follows."""


@dataclass(frozen=True)
class Noised:
    """A subject's part of a micro-batch, its instances first: NCHW, (N,), NCHW."""

    instances: int
    noisy: Tensor
    timesteps: Tensor
    target: Tensor
    taught: Tensor | None = None
    """eps_0's answer, for prior prediction."""


@dataclass(frozen=True)
class Ahead:
    """``batches(i)``: micro-batches from number ``i`` on, a list of one ``Noised`` a subject, each
    with the noise it would have alone.

    ``untuned(noisy, timesteps)`` is eps_0 under the class prompts, given all rows of the first
    subject, then those of the next; it answers ``window`` micro-batches at a time, whose borders do
    not depend on where a run resumes.
    """

    clean: Clean
    noising: Noising
    scaling_factor: float
    seed: int
    accumulation: int = 1
    untuned: Predict | None = None
    window: int = 1

    def __call__(self, start: int) -> Iterator[list[Noised]]:
        first = start - start % self.window
        stream = self.clean(first)
        for number in itertools.count(first, self.window):
            span = [self.noised(next(stream), number + i) for i in range(self.window)]
            yield from self.answered(span)[max(0, start - number) :]

    def noised(self, batch: list[Moments], number: int) -> list[Noised]:
        return [self.draw(own, number) for own in batch]

    def draw(self, own: Moments, number: int) -> Noised:
        step, micro = divmod(number, self.accumulation)
        torch.manual_seed(seed_for(self.seed, step, micro, OWN_STREAM))
        instance, class_images = own
        moments = instance if class_images is None else torch.cat([instance, class_images])
        return Noised(len(instance), *self.noising(sample_latents(moments, self.scaling_factor)))

    def answered(self, span: list[list[Noised]]) -> list[list[Noised]]:
        """With eps_0's answers; all parts have equally many rows."""
        if self.untuned is None:
            return span
        parts = [part for subject in zip(*span, strict=True) for part in subject]
        noisy, timesteps = (torch.cat(rows) for rows in zip(*map(_input, parts), strict=True))
        answers = iter(self.untuned(noisy, timesteps).chunk(len(parts)))
        told = [replace(part, taught=next(answers)) for part in parts]
        return [told[number :: len(span)] for number in range(len(span))]


def _input(part: Noised) -> tuple[Tensor, Tensor]:
    return part.noisy, part.timesteps


def clean_batches(data: list[Moments], size: int, seed: int) -> Clean:
    """Micro-batches of ``size`` photos, and as many class images, of each subject, each in the
    order it would have alone."""

    def subject(start: int, instance: Tensor, others: Tensor | None) -> Iterator[Moments]:
        mine = shuffled(len(instance), size, seed)(start)
        theirs = shuffled(1 if others is None else len(others), size, seed + 1)(start)
        for a, b in zip(mine, theirs, strict=True):
            yield instance[a], None if others is None else others[b]

    def batches(start: int) -> Iterator[list[Moments]]:
        streams = [subject(start, *pair) for pair in data]
        while True:
            yield [next(stream) for stream in streams]

    return batches


def window(device: str, rows: int, side: int) -> int:
    """Micro-batches of ``rows`` latents ``side`` squared whose eps_0 fills the machine in one
    forward, 16 at most: a CPU has enough to do with one 64 x 64 latent, an accelerator with
    eight."""
    enough = 64 * 64 * (1 if device == "cpu" else 8)
    return max(1, min(16, enough // (rows * side * side)))
