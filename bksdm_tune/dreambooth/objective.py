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

from bksdm_tune.diffusion import Noising
from bksdm_tune.dreambooth.ahead import Noised
from bksdm_tune.precision import at_least_single


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
    """Objective over noised pictures, a part a subject.  One subject, or many of a stacked model
    (bksdm_tune.stacked) in one forward: the loss is their sum, whose gradients do not meet.

    ``conditions()`` gives each subject's instance and class prompt embeddings, (1, tokens, width),
    with gradients if the text encoder trains.
    """

    unet: Any
    noising: Noising
    conditions: Callable[[], list[tuple[Tensor, Tensor]]]
    prior_weight: float = 1.0
    min_snr_gamma: float | None = None

    def __call__(self, batch: list[Noised]) -> dict[str, Tensor]:
        pairs = zip(batch, self.conditions(), strict=True)
        parts = [self.rows(part, *prompts) for part, prompts in pairs]
        rows = Rows.together(parts)
        predicted = self.unet(rows.noisy, rows.timesteps, rows.prompts).sample
        answers = zip(predicted.chunk(len(parts)), parts, batch, strict=True)
        losses = [self.weigh(answer, own, part) for answer, own, part in answers]
        means = {name: torch.stack([loss[name] for loss in losses]).mean() for name in losses[0]}
        return means | {"loss": torch.stack([loss["loss"] for loss in losses]).sum()}

    def rows(self, part: Noised, subject: Tensor, kind: Tensor) -> Rows:
        """A subject's instances first, then the prior's rows."""
        prompts = [subject] * part.instances + [kind] * (len(part.noisy) - part.instances)
        return Rows(part.noisy, part.timesteps, torch.cat(prompts), part.target)

    def weigh(self, predicted: Tensor, rows: Rows, part: Noised) -> dict[str, Tensor]:
        """Losses from predictions for a part; of a share, what it adds to the whole's means."""
        predicted, target = at_least_single(predicted), at_least_single(rows.target)
        errors = F.mse_loss(predicted, target, reduction="none").mean((1, 2, 3))
        if self.min_snr_gamma is not None:
            errors = errors * self.noising.min_snr_weights(rows.timesteps, self.min_snr_gamma)
        own, others = part.whole
        losses = {"instance": errors[: part.instances].sum() / own}
        if others:
            losses["prior"] = errors[part.instances :].sum() / others
            return losses | {"loss": losses["instance"] + self.prior_weight * losses["prior"]}
        return losses | {"loss": losses["instance"]}
