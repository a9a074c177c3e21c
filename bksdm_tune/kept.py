"""What autograd keeps of a U-Net's forward, with and without gradient checkpointing, counted.

On the ``meta`` device tensors have shapes and no data, so a count of a full-size model costs a
second and no memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.overrides import TorchFunctionMode

CHECKPOINTED = (ResnetBlock2D, BasicTransformerBlock)
"""What diffusers recomputes, a module at a time, under gradient checkpointing."""


class Fused(torch.autograd.Function):
    """Attention as fused kernels keep it: without the matrix of all pairs."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out)
        return out


class FusedAttention(TorchFunctionMode):
    """The ``meta`` device has no fused kernel of its own."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is functional.scaled_dot_product_attention:
            return Fused.apply(*args[:3])
        return function(*args, **(kwargs or {}))


@dataclass
class Kept:
    """Bytes that autograd keeps of a forward: a storage counts once, weights do not."""

    weights: set[int]
    seen: dict[int, Tensor] = field(default_factory=dict)
    """Storage -> a tensor in it, so that its number is not given to another one."""

    def add(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        if storage._cdata in self.weights or storage._cdata in self.seen:
            return 0
        self.seen[storage._cdata] = tensor
        return storage.nbytes()


@dataclass
class Count:
    """``plain`` bytes without gradient checkpointing; with it the modules' inputs stay and one
    module at a time is recomputed."""

    plain: int = 0
    outside: int = 0
    inputs: int = 0
    largest: int = 0

    def bytes(self, checkpointing: bool) -> int:
        return self.outside + self.inputs + self.largest if checkpointing else self.plain


def count(unet: nn.Module, inputs: tuple[Any, ...]) -> Count:
    """What a forward of the U-Net, on the ``meta`` device, keeps for its backward."""
    kept, found, open_ = Kept(_storages(unet)), Count(), list[list[Any]]()

    def pack(tensor: Tensor) -> Tensor:
        size = kept.add(tensor)
        found.plain += size
        if open_:
            open_[-1][1] += size
        else:
            found.outside += size
        return tensor

    def enter(module: nn.Module, given: tuple[Any, ...]) -> None:
        open_.append([module, 0])
        found.inputs += sum(t.untyped_storage().nbytes() for t in given if torch.is_tensor(t))

    def leave(module: nn.Module, *_: Any) -> None:
        found.largest = max(found.largest, open_.pop()[1])

    with contextlib.ExitStack() as stack:
        for module in unet.modules():
            if isinstance(module, CHECKPOINTED):
                stack.enter_context(_removed(module.register_forward_pre_hook(enter)))
                stack.enter_context(_removed(module.register_forward_hook(leave)))
        stack.enter_context(saved_tensors_hooks(pack, lambda tensor: tensor))
        stack.enter_context(FusedAttention())
        unet(*inputs)
    return found


@contextlib.contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _storages(unet: nn.Module) -> set[int]:
    return {p.untyped_storage()._cdata for p in [*unet.parameters(), *unet.buffers()]}
