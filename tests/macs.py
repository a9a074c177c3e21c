"""Multiply-accumulates of a U-Net's convolution, linear and norm modules, on meta tensors."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

TOKENS = 77


def module_macs(module: nn.Module, output: Tensor) -> int:
    """Norms count two a value: normalise, then scale and shift."""
    if isinstance(module, nn.Conv2d):
        height, width = module.kernel_size
        return output.numel() * module.in_channels // module.groups * height * width
    if isinstance(module, nn.Linear):
        return output.numel() * module.in_features
    return 2 * output.numel()


def unet_macs(unet: UNet2DConditionModel) -> int:
    """One forward pass of a meta-device U-Net at batch 1, 77 tokens, its native size."""
    counted = 0

    def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
        nonlocal counted
        counted += module_macs(module, output)

    for module in unet.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.GroupNorm | nn.LayerNorm):
            module.register_forward_hook(count)
    side, width = unet.config.sample_size, unet.config.cross_attention_dim
    with torch.device("meta"):
        unet(torch.empty(1, 4, side, side), torch.empty(1), torch.empty(1, TOKENS, width))
    return counted
