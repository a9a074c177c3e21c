"""The forward of a linear layer with LoRA as training runs it: PEFT's function in fewer passes.

Where the rank is not small against the layer, ``W + scaling B A`` is made once and multiplied once;
elsewhere the scaling goes into B, which is small, and not into the rows.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial
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


class Folded:
    """The small LoRA layers of a model, trained as one tensor: their sums are made right before its
    forward, those of one shape by one batched product, and optimiser and clipping have one tensor
    to pass over.  Hundreds of small operations take longer to begin than to compute.

    Layers that are not small, or have dropout, stay as they are.  Not for autocast, nor for
    optimisers that look at a tensor's shape.
    """

    def __init__(self, model: nn.Module, layers: list[Any], adapter: str) -> None:
        self.adapter = adapter
        alike: dict[tuple[torch.Size, torch.Size, float], list[Any]] = defaultdict(list)
        for layer in layers:
            down, up = self._own(layer)
            drops = not isinstance(layer.lora_dropout[adapter], nn.Identity)
            if is_small(layer.base_layer, down) and not drops:
                alike[down.shape, up.shape, layer.scaling[adapter]].append(layer)
        self._groups = [(group, scaling) for (*_, scaling), group in alike.items()]
        stacks = [torch.stack(side) for group, _ in self._groups for side in self._sides(group)]
        self._shapes = [stack.shape for stack in stacks]
        flat = torch.cat([stack.detach().flatten() for stack in stacks] or [torch.empty(0)])
        self._whole = nn.Parameter(flat)
        self._made: dict[Any, Tensor] = {}
        for group, _ in self._groups:
            for layer in group:
                layer.requires_grad_(False)
                layer.forward = partial(self._forward, layer)
        model.register_forward_pre_hook(self._fold)

    def parameters(self) -> list[nn.Parameter]:
        """In place of the layers' own."""
        return [self._whole] if self._groups else []

    def show(self) -> None:
        """Let PEFT's own parameters be views of what trains, to be read or overwritten."""
        for (group, _), stacks in zip(self._groups, self._stacks(self._whole.data), strict=True):
            for layer, *sides in zip(group, *stacks, strict=True):
                for parameter, side in zip(self._own(layer), sides, strict=True):
                    parameter.data = side

    def _own(self, layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
        return layer.lora_A[self.adapter].weight, layer.lora_B[self.adapter].weight

    def _sides(self, group: list[Any]) -> list[tuple[Tensor, ...]]:
        """All A, all B."""
        return list(zip(*(self._own(layer) for layer in group), strict=True))

    def _stacks(self, whole: Tensor) -> list[tuple[Tensor, Tensor]]:
        """For each group A (layers, rank, in) and B (layers, out, rank), as views."""
        pieces = whole.split([shape.numel() for shape in self._shapes])
        views = [piece.view(shape) for piece, shape in zip(pieces, self._shapes, strict=True)]
        return list(zip(views[::2], views[1::2], strict=True))

    def _fold(self, *_: Any) -> None:
        assert not casts(self._whole.device), "the sums would round the update away"
        for (group, scaling), (downs, ups) in zip(
            self._groups, self._stacks(self._whole), strict=True
        ):
            bases = [layer.base_layer.weight for layer in group]
            sums = torch._foreach_add(bases, (ups * scaling @ downs).unbind())
            self._made.update(zip(group, sums, strict=True))

    def _forward(self, layer: Any, rows: Tensor) -> Tensor:
        return F.linear(rows, self._made[layer], layer.base_layer.bias)
