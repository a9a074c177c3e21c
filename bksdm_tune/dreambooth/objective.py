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

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
Batch = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class DreamBooth:
    """Objective over batches of latent moments (N, 2, C, h, w): instance, class images or None.

    ``conditions()`` gives the instance and class prompt embeddings, each (1, tokens, width), with
    gradients if the text encoder trains.  ``untuned(noisy, timesteps, kind)`` is eps_0 under the
    class prompt, without gradients, for prior prediction; None without.
    """

    unet: Any
    noising: Noising
    scaling_factor: float
    conditions: Callable[[], tuple[Tensor, Tensor]]
    untuned: Predict | None = None
    prior_weight: float = 1.0
    min_snr_gamma: float | None = None

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        instance, class_images = batch
        moments = instance if class_images is None else torch.cat([instance, class_images])
        noisy, timesteps, target = self.noising(sample_latents(moments, self.scaling_factor))
        subject, kind = self.conditions()
        prompts = [subject] * len(instance) + [kind] * (len(moments) - len(instance))
        if self.untuned is not None:
            target = torch.cat([target, self.untuned(noisy, timesteps, kind).to(target.dtype)])
            prompts += [kind] * len(noisy)
            noisy, timesteps = noisy.repeat(2, 1, 1, 1), timesteps.repeat(2)
        predicted = self.unet(noisy, timesteps, torch.cat(prompts)).sample
        return self.weigh(predicted, target, timesteps, len(instance))

    def weigh(
        self, predicted: Tensor, target: Tensor, timesteps: Tensor, n: int
    ) -> dict[str, Tensor]:
        """Losses from predictions whose first ``n`` rows are instances, the others the prior's."""
        errors = F.mse_loss(predicted.float(), target.float(), reduction="none").mean((1, 2, 3))
        if self.min_snr_gamma is not None:
            errors = errors * self.noising.min_snr_weights(timesteps, self.min_snr_gamma)
        losses = {"instance": errors[:n].mean()}
        if len(errors) > n:
            losses["prior"] = errors[n:].mean()
            return losses | {"loss": losses["instance"] + self.prior_weight * losses["prior"]}
        return losses | {"loss": losses["instance"]}
