"""The BK-SDM distillation objective (BK-SDM, section 3.2, equations 1 to 4).

loss = lambda_task MSE(eps_S, target) + lambda_out MSE(eps_S, eps_T)
       + lambda_feat sum_l MSE(f_S,l, f_T,l),

each MSE a float32 mean over its tensor, the feature term a plain sum over the layer pairs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.nn import functional as F

from bksdm_tune.diffusion import Noising
from bksdm_tune.precision import at_least_single


class Features:
    """Outputs of named modules of a U-Net, collected while it runs (of a tuple, the first)."""

    def __init__(self, unet: UNet2DConditionModel, paths: list[str]) -> None:
        self.collected: dict[str, Tensor] = {}
        self.wanted = True  # not while gradient checkpointing runs layers a second time
        for path in paths:
            unet.get_submodule(path).register_forward_hook(self._hook(path))

    def _hook(self, path: str) -> Any:
        def keep(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            if self.wanted:
                self.collected[path] = output[0] if isinstance(output, tuple) else output

        return keep

    def start(self) -> None:
        self.wanted = True

    def take(self) -> dict[str, Tensor]:
        taken, self.collected, self.wanted = self.collected, {}, False
        return taken


@dataclass
class Distillation:
    """Objective over batches ``(latents, prompt_embeds)``: NCHW scaled latents, (N, tokens, width).

    ``teacher`` is frozen here and stays in eval; a lambda of 0 removes its term and its cost.
    """

    student: UNet2DConditionModel
    teacher: UNet2DConditionModel
    noising: Noising
    pairs: list[tuple[str, str]]
    lambda_task: float = 1.0
    lambda_out: float = 1.0
    lambda_feat: float = 1.0
    min_snr_gamma: float | None = None
    """Min-SNR weights of the task and output terms, which are errors of predictions."""
    _features: tuple[Features, Features] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.teacher.requires_grad_(False).eval()
        if self.lambda_feat:
            teacher_paths, student_paths = (list(side) for side in zip(*self.pairs, strict=True))
            self._features = (
                Features(self.teacher, teacher_paths),
                Features(self.student, student_paths),
            )

    def __call__(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        latents, prompt_embeds = batch
        noisy, timesteps, target = self.noising(latents)
        for side in self._features or ():
            side.start()
        predicted = at_least_single(self.student(noisy, timesteps, prompt_embeds).sample)
        losses, total = {}, torch.zeros((), device=latents.device)
        if self.lambda_task:
            losses["task"] = self.error(predicted, at_least_single(target), timesteps)
            total = total + self.lambda_task * losses["task"]
        if self.lambda_out or self.lambda_feat:
            dtype = self.teacher.dtype
            with torch.no_grad():  # not inference_mode: the losses save what it gives
                taught = self.teacher(noisy.to(dtype), timesteps, prompt_embeds.to(dtype)).sample
            taught = at_least_single(taught)
        if self.lambda_out:
            losses["out"] = self.error(predicted, taught, timesteps)
            total = total + self.lambda_out * losses["out"]
        if self._features is not None:
            losses["feat"] = self.feature_loss()
            total = total + self.lambda_feat * losses["feat"]
        return losses | {"loss": total}

    def error(self, predicted: Tensor, wanted: Tensor, timesteps: Tensor) -> Tensor:
        if self.min_snr_gamma is None:
            return F.mse_loss(predicted, wanted)
        weights = self.noising.min_snr_weights(timesteps, self.min_snr_gamma)
        return (weights * (predicted - wanted).square().mean((1, 2, 3))).mean()

    def feature_loss(self) -> Tensor:
        assert self._features is not None
        taught, learned = (side.take() for side in self._features)
        terms = [
            F.mse_loss(at_least_single(learned[student]), at_least_single(taught[teacher]))
            for teacher, student in self.pairs
        ]
        return torch.stack(terms).sum()
