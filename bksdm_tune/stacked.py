"""LoRAs of many subjects on one frozen model, each applied to its own rows of the batch.

The frozen weights are the same for every subject, so one forward serves all: a batch holds equally
many rows of each subject, one subject after the other, and a layer adds to each row its own
subject's update, two batched matrix products.  Nothing couples the subjects: their gradients,
clipping and optimiser states are what they would be alone.  PEFT's mixed batches only infer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bksdm_tune.adapted import adapted
from bksdm_tune.adapters import ADAPTER_NAME

WEIGHTS = "stacked.safetensors"


class StackedLora(nn.Module):
    """A frozen linear layer with ``count`` adapters: A (count, rank, in), B (count, out, rank).

    Starts as ``count`` copies of one injected adapter.
    """

    def __init__(self, layer: LoraLinear, count: int) -> None:
        super().__init__()
        self.base, self.scaling = layer.base_layer, layer.scaling[ADAPTER_NAME]
        down, up = (side[ADAPTER_NAME].weight for side in (layer.lora_A, layer.lora_B))
        self.down = nn.Parameter(down.detach().repeat(count, 1, 1))
        self.up = nn.Parameter(up.detach().repeat(count, 1, 1))

    def forward(self, rows: Tensor) -> Tensor:
        """(count * n, ..., in) -> (count * n, ..., out), subject after subject."""
        return adapted(rows, self.base, self.down, self.up, self.scaling)


@dataclass(frozen=True)
class Place:
    """Where a stacked layer stands in for an injected one."""

    parent: nn.Module
    name: str
    alone: LoraLinear
    stacked: StackedLora


class Stack:
    """The stacked layers of models that carry an injected adapter (adapters.inject)."""

    def __init__(self, models: list[Any], count: int) -> None:
        self.count = count
        self.places = {
            f"{number}.{path}.{name}": Place(parent, name, layer, StackedLora(layer, count))
            for number, model in enumerate(models)
            for path, parent in model.named_modules()
            for name, layer in parent.named_children()
            if isinstance(layer, LoraLinear)
        }
        self.owners = [[p for key, p in self.places.items() if key.startswith(f"{number}.")]
                       for number in range(len(models))]  # fmt: skip
        self._put(stacked=True)

    def _put(self, stacked: bool) -> None:
        for place in self.places.values():
            setattr(place.parent, place.name, place.stacked if stacked else place.alone)

    def parameters(self, model: int) -> list[nn.Parameter]:
        """Of the numbered model, each with the subjects first."""
        layers = [place.stacked for place in self.owners[model]]
        return [side for layer in layers for side in (layer.down, layer.up)]

    @contextmanager
    @torch.no_grad()
    def alone(self, subject: int) -> Iterator[None]:
        """The models as they are after that subject's own training, for the time of the block."""
        for place in self.places.values():
            layer, stacked = place.alone, place.stacked
            layer.lora_A[ADAPTER_NAME].weight.copy_(stacked.down[subject])
            layer.lora_B[ADAPTER_NAME].weight.copy_(stacked.up[subject])
        self._put(stacked=False)
        try:
            yield
        finally:
            self._put(stacked=True)

    def tensors(self) -> dict[str, Tensor]:
        return {
            f"{key}.{side}": getattr(place.stacked, side).detach()
            for key, place in self.places.items()
            for side in ("down", "up")
        }


@dataclass(frozen=True)
class StackedWeights:
    """What trains: all subjects' adapters, with a learning rate a model."""

    stack: Stack
    learning_rates: tuple[float, float]

    def parameter_groups(self) -> list[dict[str, Any]]:
        numbered = range(len(self.stack.owners))
        return [
            {"params": self.stack.parameters(n), "lr": r}
            for n, r in zip(numbered, self.learning_rates, strict=False)
        ]

    def save(self, folder: Path) -> None:
        save_file({k: v.contiguous() for k, v in self.stack.tensors().items()}, folder / WEIGHTS)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        for key, tensor in self.stack.tensors().items():
            tensor.copy_(found[key])


@torch.no_grad()
def clip_each(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """Scale each subject's gradients to a norm of at most ``max_norm``, as ``clip_grad_norm_``
    would alone; the largest norm before."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    squares = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0)
    norms = squares.sqrt()
    factors = (max_norm / (norms + 1e-6)).clamp(max=1)
    for gradient in gradients:
        gradient.mul_(factors[:, None, None])
    return norms.max()
