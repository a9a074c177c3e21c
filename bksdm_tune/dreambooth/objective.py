"""The DreamBooth objective, with prior preservation by class images or by prior prediction.

images      loss = MSE(instance) + w MSE(class images)                 (DreamBooth, equation 2)
prediction  loss = MSE(instance) + w MSE(eps(x_t, c_class), eps_0(x_t, c_class))
            on the noised instance latents x_t, with eps_0 the untuned backbone
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bksdm_tune.diffusion import Noising, sample_latents
from bksdm_tune.precision import at_least_single

Predict = Callable[[Tensor, Tensor], Tensor]
Batch = tuple[Tensor, Tensor | None]
Noised = tuple[Tensor, Tensor, Tensor]
"""Noisy latents NCHW, timesteps (N,), targets NCHW."""


@dataclass(frozen=True)
class Rows:
    """What the U-Net is given, and what it should say: NCHW, (N,), (N, tokens, width), NCHW."""

    noisy: Tensor
    timesteps: Tensor
    prompts: Tensor
    target: Tensor

    @staticmethod
    def together(parts: list[Rows]) -> Rows:
        names = ("noisy", "timesteps", "prompts", "target")
        return Rows(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


@dataclass(frozen=True)
class DreamBooth:
    """Objective over a batch a subject, of latent moments (N, 2, C, h, w): instance, class images
    or None.  One subject, or many of a stacked model (bksdm_tune.stacked) in one forward: each has
    the noise it would have alone, and the loss is their sum, whose gradients do not meet.

    ``conditions()`` gives each subject's instance and class prompt embeddings, (1, tokens, width),
    with gradients if the text encoder trains.  ``untuned(noisy, timesteps)`` is eps_0 under the
    class prompts, without gradients, for prior prediction; None without.
    """

    unet: Any
    noising: Noising
    scaling_factor: float
    conditions: Callable[[], list[tuple[Tensor, Tensor]]]
    untuned: Predict | None = None
    prior_weight: float = 1.0
    min_snr_gamma: float | None = None

    def __call__(self, batch: list[Batch]) -> dict[str, Tensor]:
        noised = [self.draw(own) for own in batch]
        sizes = [len(instance) for instance, _ in batch]
        given = zip(noised, sizes, self.taught(noised), self.conditions(), strict=True)
        parts = [self.rows(drawn, n, eps, *pair) for drawn, n, eps, pair in given]
        rows = Rows.together(parts)
        predicted = self.unet(rows.noisy, rows.timesteps, rows.prompts).sample
        answers = zip(predicted.chunk(len(parts)), parts, sizes, strict=True)
        losses = [self.weigh(answer, part, n) for answer, part, n in answers]
        means = {name: torch.stack([loss[name] for loss in losses]).mean() for name in losses[0]}
        return means | {"loss": torch.stack([loss["loss"] for loss in losses]).sum()}

    def draw(self, batch: Batch) -> Noised:
        """Noise a subject's pictures, with the global generator as it was seeded last."""
        torch.manual_seed(torch.initial_seed())  # starts again from that seed
        instance, class_images = batch
        moments = instance if class_images is None else torch.cat([instance, class_images])
        return self.noising(sample_latents(moments, self.scaling_factor))

    def taught(self, noised: list[Noised]) -> tuple[Tensor | None, ...]:
        """What eps_0 makes of the pictures, a part a subject."""
        if self.untuned is None:
            return (None,) * len(noised)
        noisy, timesteps = (torch.cat([drawn[i] for drawn in noised]) for i in (0, 1))
        return self.untuned(noisy, timesteps).chunk(len(noised))

    def rows(
        self, noised: Noised, n: int, taught: Tensor | None, subject: Tensor, kind: Tensor
    ) -> Rows:
        """A subject's ``n`` instances first, then the prior's rows."""
        noisy, timesteps, target = noised
        prompts = [subject] * n + [kind] * (len(noisy) - n)
        if taught is not None:
            target = torch.cat([target, taught.to(target.dtype)])
            prompts += [kind] * len(noisy)
            noisy, timesteps = noisy.repeat(2, 1, 1, 1), timesteps.repeat(2)
        return Rows(noisy, timesteps, torch.cat(prompts), target)

    def weigh(self, predicted: Tensor, rows: Rows, n: int) -> dict[str, Tensor]:
        """Losses from predictions whose first ``n`` rows are instances, the others the prior's."""
        predicted, target = at_least_single(predicted), at_least_single(rows.target)
        errors = F.mse_loss(predicted, target, reduction="none").mean((1, 2, 3))
        if self.min_snr_gamma is not None:
            errors = errors * self.noising.min_snr_weights(rows.timesteps, self.min_snr_gamma)
        losses = {"instance": errors[:n].mean()}
        if len(errors) > n:
            losses["prior"] = errors[n:].mean()
            return losses | {"loss": losses["instance"] + self.prior_weight * losses["prior"]}
        return losses | {"loss": losses["instance"]}
