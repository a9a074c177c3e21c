"""The forward of a linear layer with LoRA as training runs it: PEFT's function in fewer passes.

Where the rank is not small against the layer, ``W + scaling B A`` is made once and multiplied once;
elsewhere the scaling goes into B, which is small, and not into the rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FOLD_UP_TO = 8
"""Fold while ``in * out <= this * rank * (in + out)``: by the products alone it would be 3, but a
side path also reads and writes all rows several times (measured on pocket-base, two CPU cores)."""


def folds(base: nn.Linear, down: Tensor, rows: Tensor) -> bool:
    """Never in mixed precision, whose sum would round the update away, nor where the sums of a
    stack are more than the rows."""
    if casts(down.device):
        return False
    if down.dim() == 3 and len(down) * base.weight.numel() > rows.numel():
        return False
    return is_small(base, down)


def casts(device: torch.device) -> bool:
    """Whether autocast is on."""
    kind = device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def is_small(base: nn.Linear, down: Tensor) -> bool:
    out, width = base.weight.shape
    small = out * width <= FOLD_UP_TO * down.shape[-2] * (out + width)
    return small and base.weight.dtype == down.dtype


def adapted(rows: Tensor, base: nn.Linear, down: Tensor, up: Tensor, scaling: float) -> Tensor:
    """``base(rows) + scaling * rows A^T B^T``.

    ``down`` A is (rank, in) and ``up`` B (out, rank), or both with a leading number of subjects,
    whose rows then follow one another, equally many each.
    """
    stacked = down.dim() == 3
    if folds(base, down, rows):
        weight = torch.add(base.weight, up @ down, alpha=scaling)
        if not stacked:
            return F.linear(rows, weight, base.bias)
        answer = rows.reshape(len(down), -1, rows.shape[-1]) @ weight.mT
        answer = answer.view(*rows.shape[:-1], -1)
        return answer if base.bias is None else answer + base.bias
    plain = base(rows)
    return plain + side_path(rows, down, up, scaling).to(plain.dtype)


def side_path(rows: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
    own = rows.to(down.dtype)
    if down.dim() == 3:
        own = own.reshape(len(down), -1, rows.shape[-1])
    return (own @ down.mT @ (up * scaling).mT).view(*rows.shape[:-1], -1)


def lean_forward(layer: Any, adapter: str, rows: Tensor) -> Tensor:
    """In place of the ``forward`` of a PEFT linear layer."""
    down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    dropout, scaling = layer.lora_dropout[adapter], layer.scaling[adapter]
    if isinstance(dropout, nn.Identity):
        return adapted(rows, layer.base_layer, down, up, scaling)
    plain = layer.base_layer(rows)
    return plain + side_path(dropout(rows), down, up, scaling).to(plain.dtype)
