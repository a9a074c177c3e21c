"""What the stages share: where their state lies, and modules as something ``fit`` can store."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model

from bksdm_tune.loop import Batches, Event, LoopSettings, Objective, fit
from bksdm_tune.optim import EMA, make_optimiser


@dataclass(frozen=True)
class Modules:
    """Named modules that train together; a :class:`bksdm_tune.loop.Trainable`."""

    modules: dict[str, torch.nn.Module]
    learning_rates: dict[str, float]

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [
            {"params": list(module.parameters()), "lr": self.learning_rates[name]}
            for name, module in self.modules.items()
        ]

    def save(self, folder: Path) -> None:
        for name, module in self.modules.items():
            save_model(module, str(folder / f"{name}.safetensors"))

    def load(self, folder: Path) -> None:
        for name, module in self.modules.items():
            load_model(module, folder / f"{name}.safetensors")


def trapezoid(step: int, steps: int) -> float:
    """Learning-rate factor: 2 % warm-up, constant, linear to zero over the last 35 %.  A run can be
    made longer or shorter while it is in the constant part."""
    return max(0.0, min(1.0, (step + 1) / (0.02 * steps), (steps - step) / (0.35 * steps)))


def train(
    folder: Path,
    objective: Objective,
    modules: dict[str, torch.nn.Module],
    batches: Batches,
    steps: int,
    learning_rates: dict[str, float] | float,
    ema_decay: float | None = None,
    events: tuple[Event, ...] = (),
) -> None:
    """Train to the end (EMA copied in) and leave ``final/<module>.safetensors`` in ``folder``.

    Begins from ``folder/start`` where stage ``warm`` left weights there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(learning_rates, float):
        learning_rates = dict.fromkeys(modules, learning_rates)
    trainable = Modules(modules, learning_rates)
    if (folder / "start").exists():
        trainable.load(folder / "start")
    groups = trainable.parameter_groups()
    optimiser = make_optimiser("adamw", groups)
    decay = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: trapezoid(step, steps))
    parameters = [p for group in groups for p in group["params"]]
    ema = EMA(parameters, ema_decay) if ema_decay else None
    settings = LoopSettings(steps, checkpoint_every=100, seed=7)
    fit(objective, trainable, batches, optimiser, decay, settings, folder, ema, events, folder.name)
    (folder / "final").mkdir(exist_ok=True)
    trainable.save(folder / "final")


def training(folder: Path) -> dict[str, float]:
    """Steps and hours that the weights in ``folder/final`` have seen, earlier versions included."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    hours = sum(json.loads(line)["seconds"] for line in lines) / 3600
    start = folder / "start/training.json"
    before = json.loads(start.read_text()) if start.exists() else {"steps": 0, "hours": 0.0}
    return {"steps": before["steps"] + len(lines), "hours": round(before["hours"] + hours, 2)}


def restore(folder: Path, modules: dict[str, torch.nn.Module]) -> None:
    Modules(modules, {}).load(folder / "final")


def pixels(images: Any) -> torch.Tensor:
    """uint8 NHWC array in 0..255 -> float32 NCHW in -1..1, channels-last."""
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    return tensor.contiguous(memory_format=torch.channels_last)
