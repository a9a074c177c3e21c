"""Mixed precision: what a run computes in, and what its frozen weights are kept in."""

from __future__ import annotations

import torch

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def at_least_single(tensor: torch.Tensor) -> torch.Tensor:
    """float32, or float64 where it is that already: losses are means in no less."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def choose(asked: str, device: str) -> str:
    """no, bf16 or fp16; ``auto`` is bf16 on an accelerator that has it, else fp16, no on a CPU."""
    if asked != "auto":
        return asked
    if device == "cpu":
        return "no"
    return "bf16" if device.startswith("cuda") and torch.cuda.is_bf16_supported() else "fp16"


def autocast(asked: str, device: str) -> torch.autocast:
    """The context that a run computes in; it does nothing in float32."""
    dtype = frozen_dtype(asked, device)
    return torch.autocast(device.split(":")[0], dtype, enabled=dtype != torch.float32)


def frozen_dtype(asked: str, device: str) -> torch.dtype:
    """Frozen weights are kept in half precision under mixed precision; trained ones never are."""
    return DTYPES[choose(asked, device)]
