"""Optimisers and schedules by name, each from the library that owns it."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any, Literal

import torch

from bksdm_tune.config import ScheduleName
from bksdm_tune.errors import UsageError

OptimiserName = Literal["adamw", "adamw8bit", "adafactor", "prodigy"]


LIBRARIES = {"adamw8bit": ("bitsandbytes", "gpu"), "prodigy": ("prodigyopt", "prodigy")}


def check_optimiser(name: OptimiserName) -> None:
    """Raises UsageError: the optimiser's library is not installed, or does not load."""
    if name not in LIBRARIES:
        return
    library, extra = LIBRARIES[name]
    try:
        importlib.import_module(library)
    except ImportError as error:
        raise UsageError(
            f"--optimiser {name} needs a library that does not load here ({error}). "
            f"Type: pip install 'bksdm-tune[{extra}]', or choose --optimiser adamw."
        ) from None


def make_optimiser(
    name: OptimiserName,
    groups: list[dict[str, Any]],
    weight_decay: float = 1e-2,
    betas: tuple[float, float] = (0.9, 0.999),
) -> torch.optim.Optimizer:
    """``groups``: dicts with ``params`` and ``lr``.

    Raises:
        UsageError: the optimiser's library is not installed.
    """
    if name == "adamw":
        fused = all(p.is_floating_point() for group in groups for p in group["params"])
        return torch.optim.AdamW(groups, betas=betas, weight_decay=weight_decay, fused=fused)
    if name == "adafactor":
        from transformers import Adafactor

        return Adafactor(
            groups,
            lr=groups[0]["lr"],  # the polynomial schedule reads it
            scale_parameter=False,
            relative_step=False,
            weight_decay=weight_decay,
        )
    check_optimiser(name)
    if name == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, betas=betas, weight_decay=weight_decay)
    from prodigyopt import Prodigy

    return Prodigy(groups, betas=betas, weight_decay=weight_decay)


def make_all(
    training: Any, groups: list[dict[str, Any]]
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler, EMA | None]:
    """Optimiser, schedule and average as the training flags of a verb ask for them.

    Raises:
        UsageError: as ``make_optimiser``.
    """
    optimiser = make_optimiser(training.optimiser, groups, training.weight_decay)
    schedule = make_schedule(
        training.lr_scheduler, optimiser, training.lr_warmup_steps, training.steps
    )
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    return optimiser, schedule, EMA(parameters, training.ema) if training.ema else None


@torch.no_grad()
def align_state(optimiser: torch.optim.Optimizer) -> None:
    """Give loaded state the memory layout of its parameters.

    Fused optimisers walk both as flat memory, so a contiguous moment beside a channels-last weight
    would be read in the wrong order.
    """
    for parameter, state in optimiser.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def check_training(training: Any) -> None:
    """Raises UsageError: the optimiser does not load, or a flag would do nothing."""
    check_optimiser(training.optimiser)
    if training.lr_warmup_steps and training.lr_scheduler == "constant":
        raise UsageError(
            "--lr-warmup-steps does nothing with --lr-scheduler constant; "
            "choose --lr-scheduler constant_with_warmup."
        )


def make_schedule(
    name: ScheduleName, optimiser: torch.optim.Optimizer, warmup_steps: int, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Learning-rate schedule counted in optimiser steps, whatever the accumulation."""
    from diffusers.optimization import get_scheduler

    return get_scheduler(name, optimiser, num_warmup_steps=warmup_steps, num_training_steps=steps)


class EMA:
    """Exponential moving average of parameters, with the usual warm-up of the decay."""

    def __init__(self, parameters: list[torch.nn.Parameter], decay: float) -> None:
        self.parameters, self.decay, self.updates = parameters, decay, 0
        self.shadow = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.shadow, [p.detach() for p in self.parameters], 1 - decay)

    @torch.no_grad()
    def copy_to_parameters(self) -> None:
        torch._foreach_copy_([p.data for p in self.parameters], self.shadow)

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The averaged weights in the model, for a look at them."""
        raw = [p.detach().clone() for p in self.parameters]
        self.copy_to_parameters()
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_([p.data for p in self.parameters], raw)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "shadow": self.shadow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        for mine, saved in zip(self.shadow, state["shadow"], strict=True):
            mine.copy_(saved)
