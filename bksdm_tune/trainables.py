"""What trains: a LoRA on the U-Net (and text encoder), or all their weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from bksdm_tune import adapters
from bksdm_tune.provenance import Provenance
from bksdm_tune.resolve import ADAPTER
from bksdm_tune.weights import fill, save_part


def _groups(
    unet: Any, text_encoder: Any | None, rates: tuple[float, float]
) -> list[dict[str, Any]]:
    models = [unet] + ([text_encoder] if text_encoder is not None else [])
    return [
        {"params": [p for p in model.parameters() if p.requires_grad], "lr": rate}
        for model, rate in zip(models, rates, strict=False)
    ]


@dataclass(frozen=True)
class LoraWeights:
    """An injected adapter; ``text_encoder`` is None where it stays frozen."""

    unet: Any
    text_encoder: Any | None
    learning_rates: tuple[float, float]
    provenance: Provenance

    def parameter_groups(self) -> list[dict[str, Any]]:
        return _groups(self.unet, self.text_encoder, self.learning_rates)

    def save(self, folder: Path) -> None:
        path = folder / ADAPTER
        adapters.save_adapter(path, self.unet, self.text_encoder, self.provenance)

    def load(self, folder: Path) -> None:
        adapters.load_adapter(folder / ADAPTER, self.unet, self.text_encoder)


@dataclass(frozen=True)
class FullWeights:
    """All weights of the U-Net, and of the text encoder where it trains; diffusers folders."""

    unet: Any
    text_encoder: Any | None
    learning_rates: tuple[float, float]

    def parts(self) -> dict[str, Any]:
        text = {} if self.text_encoder is None else {"text_encoder": self.text_encoder}
        return {"unet": self.unet} | text

    def parameter_groups(self) -> list[dict[str, Any]]:
        return _groups(self.unet, self.text_encoder, self.learning_rates)

    def save(self, folder: Path) -> None:
        for name, model in self.parts().items():
            save_part(model, folder / name)

    def load(self, folder: Path) -> None:
        with torch.no_grad():
            for name, model in self.parts().items():
                (file,) = (folder / name).glob("*.safetensors")
                fill(model, load_file(file))
