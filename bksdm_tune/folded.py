"""The small LoRA layers of a model, trained as one tensor.

Hundreds of small operations take longer to begin than to compute.  So the sums ``W + scaling B A``
are made right before the model's forward, those of one shape by one batched product, and optimiser
and clipping have one tensor to pass over.  Files and checkpoints are those of separate layers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bksdm_tune.adapted import casts, is_small

State = dict[str, Tensor]
"""What an optimiser knows of a parameter: numbers, and tensors of its shape."""


class Folded:
    """``layers``: PEFT linear layers of the model.  Those that are not small, or have dropout, stay
    as they are.  Not for autocast, nor for optimisers that look at a tensor's shape.
    """

    def __init__(self, model: nn.Module, layers: list[Any], adapter: str) -> None:
        self._adapter = adapter
        trained = [id(p) for p in model.parameters() if p.requires_grad]
        alike: dict[tuple[torch.Size, torch.Size, float], list[Any]] = defaultdict(list)
        for layer in layers:
            down, up = self._own(layer)
            drops = not isinstance(layer.lora_dropout[adapter], nn.Identity)
            if is_small(layer.base_layer, down) and not drops:
                alike[down.shape, up.shape, layer.scaling[adapter]].append(layer)
        self._groups = [(group, scaling) for (*_, scaling), group in alike.items()]
        owned = [zip(*map(self._own, group), strict=True) for group, _ in self._groups]
        sides = list(chain(*owned))
        self._shapes = [(len(side), *side[0].shape) for side in sides]
        self._places = [trained.index(id(parameter)) for parameter in chain(*sides)]
        self._others = [n for n in range(len(trained)) if n not in set(self._places)]
        flat = [parameter.detach().flatten() for parameter in chain(*sides)]
        self._whole = nn.Parameter(torch.cat(flat or [torch.empty(0)]))
        self._made: dict[Any, Tensor] = {}
        for group, _ in self._groups:
            for layer in group:
                layer.requires_grad_(False)
                layer.forward = partial(self._forward, layer)
        self.show()
        model.register_forward_pre_hook(self._fold)

    def parameters(self) -> list[nn.Parameter]:
        """In place of the layers' own, after the model's others."""
        return [self._whole] if self._groups else []

    def show(self) -> None:
        """Let PEFT's own parameters be views of what trains, to be read or overwritten."""
        for (group, _), stacks in zip(self._groups, self._stacks(self._whole.data), strict=True):
            for layer, *sides in zip(group, *stacks, strict=True):
                for parameter, side in zip(self._own(layer), sides, strict=True):
                    parameter.data = side

    def apart(self, states: list[State | None]) -> list[State | None]:
        """Of this model's parameters as they train -> as they were before they were folded."""
        count = len(self._others) + len(self._places)
        found: dict[int, State | None] = dict(zip(self._others, states, strict=False))
        whole = states[-1] if self._groups else None
        for key, value in (whole or {}).items():
            pieces = list(chain(*chain(*self._stacks(value)))) if value.dim() else None
            for number, place in enumerate(self._places):
                own = found.setdefault(place, {})
                assert own is not None
                own[key] = value.clone() if pieces is None else pieces[number]
        return [found.get(place) for place in range(count)]

    def together(self, states: list[State | None]) -> list[State | None]:
        """The other way round; moments that a layer lacks are zero."""
        others = [states[place] for place in self._others]
        own = [states[place] for place in self._places]
        known = next((state for state in own if state), None)
        if known is None:
            return others + [None] * len(self.parameters())
        sizes = [shape[1] * shape[2] for shape in self._shapes for _ in range(shape[0])]
        whole = {
            key: value
            if not value.dim()
            else torch.cat(
                [
                    state[key].flatten() if state else value.new_zeros(size)
                    for state, size in zip(own, sizes, strict=True)
                ]
            )
            for key, value in known.items()
        }
        return [*others, whole]

    def _own(self, layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
        return layer.lora_A[self._adapter].weight, layer.lora_B[self._adapter].weight

    def _stacks(self, whole: Tensor) -> list[tuple[Tensor, Tensor]]:
        """For each group A (layers, rank, in) and B (layers, out, rank), as views."""
        pieces = whole.split([size * rows * columns for size, rows, columns in self._shapes])
        views = [piece.view(shape) for piece, shape in zip(pieces, self._shapes, strict=True)]
        return list(zip(views[::2], views[1::2], strict=True))

    def _fold(self, *_: Any) -> None:
        assert not casts(self._whole.device), "the sums would round the update away"
        stacks = self._stacks(self._whole)
        for (group, scaling), (downs, ups) in zip(self._groups, stacks, strict=True):
            bases = [layer.base_layer.weight for layer in group]
            sums = torch._foreach_add(bases, (ups * scaling @ downs).unbind())
            self._made.update(zip(group, sums, strict=True))

    def _forward(self, layer: Any, rows: Tensor) -> Tensor:
        return F.linear(rows, self._made[layer], layer.base_layer.bias)


def store_apart(optimiser: torch.optim.Optimizer, folded: tuple[Folded, ...]) -> None:
    """Have the state of an optimiser, whose groups are the models', stored as if nothing were
    folded, so that a run can go on where nothing is."""
    optimiser.register_state_dict_post_hook(
        lambda _, state: _changed(state, [one.apart for one in folded])
    )
    optimiser.register_load_state_dict_pre_hook(
        lambda _, state: _changed(state, [one.together for one in folded])
    )


Change = Callable[[list[State | None]], list[State | None]]


def _changed(state: dict[str, Any], changes: list[Change]) -> dict[str, Any]:
    """An optimiser's ``state_dict`` with other parameters in its groups."""
    states: list[State | None] = []
    groups = []
    for group, change in zip(state["param_groups"], changes, strict=True):
        own = change([state["state"].get(number) for number in group["params"]])
        groups.append(group | {"params": list(range(len(states), len(states) + len(own)))})
        states += own
    return {"state": {n: own for n, own in enumerate(states) if own}, "param_groups": groups}
