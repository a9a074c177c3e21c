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
from bksdm_tune.loop import shuffled
from bksdm_tune.seeds import reseed, seed_for

Predict = Callable[[Tensor, Tensor], Tensor]
Moments = tuple[Tensor, Tensor | None]
"""Latent moments (N, 2, C, h, w) of a subject's photos and of its class images, or None."""

Clean = Callable[[int], Iterator[list[Moments]]]
"""Micro-batches from a number on, a list of one part a subject."""

OWN_STREAM = 1
"""Sets the noise's seed apart from the loop's, which dropout follows."""


@dataclass(frozen=True)
class Noised:
    """A subject's rows of a micro-batch, or a share of them: its instances, then the prior's."""

    noisy: Tensor
    """NCHW; prior prediction has the instances' once more."""
    timesteps: Tensor
    """(N,)"""
    target: Tensor
    """NCHW; for the rows of prior prediction eps_0's answer."""
    instances: int
    """Of these rows."""
    whole: tuple[int, int]
    """Instances and prior rows of the micro-batch, whatever the share."""


@dataclass(frozen=True)
class Ahead:
    """``batches(i)``: micro-batches from number ``i`` on, a list of one ``Noised`` a subject, each
    with the noise it would have alone.

    ``untuned(noisy, timesteps)`` is eps_0 under the class prompts, given all rows of the first
    subject, then those of the next; it answers ``window`` micro-batches at a time, whose borders do
    not depend on where a run resumes.  ``share``: (i, n) takes row i and every n-th after it.
    """

    clean: Clean
    noising: Noising
    scaling_factor: float
    seed: int
    accumulation: int = 1
    untuned: Predict | None = None
    window: int = 1
    share: tuple[int, int] = (0, 1)

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
        reseed(seed_for(self.seed, step, micro, OWN_STREAM))
        instance, class_images = own
        moments = instance if class_images is None else torch.cat([instance, class_images])
        noisy, timesteps, target = self.noising(sample_latents(moments, self.scaling_factor))
        order = torch.arange(len(moments), device=moments.device)
        if self.untuned is not None:
            order = order.repeat(2)
        which, of = self.share
        mine, whole = order[which::of], (len(instance), len(order) - len(instance))
        instances = len(range(which, len(instance), of))
        return Noised(noisy[mine], timesteps[mine], target[mine], instances, whole)

    def answered(self, span: list[list[Noised]]) -> list[list[Noised]]:
        """With eps_0's answers; all parts have equally many rows."""
        parts = [part for subject in zip(*span, strict=True) for part in subject]
        if self.untuned is None or parts[0].instances == len(parts[0].noisy):
            return span
        noisy = torch.cat([part.noisy[part.instances :] for part in parts])
        timesteps = torch.cat([part.timesteps[part.instances :] for part in parts])
        answers = self.untuned(noisy, timesteps).chunk(len(parts))
        told = [_told(part, answer) for part, answer in zip(parts, answers, strict=True)]
        return [told[number :: len(span)] for number in range(len(span))]


def _told(part: Noised, answer: Tensor) -> Noised:
    own = part.target[: part.instances]
    return replace(part, target=torch.cat([own, answer.to(own.dtype)]))


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
