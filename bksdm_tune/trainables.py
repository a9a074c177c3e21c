"""What trains: a LoRA on the U-Net (and text encoder), or all their weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from bksdm_tune import adapters
from bksdm_tune.folded import Folded, store_apart
from bksdm_tune.provenance import Provenance
from bksdm_tune.resolve import ADAPTER
from bksdm_tune.weights import fill, save_part


def _groups(models: dict[str, Any], rates: tuple[float, float]) -> list[dict[str, Any]]:
    return [
        {"params": [p for p in model.parameters() if p.requires_grad], "lr": rate}
        for model, rate in zip(models.values(), rates, strict=False)
    ]


def _parts(unet: Any, text_encoder: Any | None) -> dict[str, Any]:
    text = {} if text_encoder is None else {"text_encoder": text_encoder}
    return {"unet": unet} | text


@dataclass(frozen=True)
class LoraWeights:
    """An injected adapter; ``text_encoder`` is None where it stays frozen."""

    unet: Any
    text_encoder: Any | None
    learning_rates: tuple[float, float]
    provenance: Provenance
    folded: tuple[Folded, ...] = ()
    """Of the U-Net, then of the text encoder."""

    def fold(self) -> LoraWeights:
        """The same with small layers trained as one tensor a model; for AdamW without autocast."""
        models = _parts(self.unet, self.text_encoder).values()
        return replace(self, folded=tuple(adapters.fold_small(model) for model in models))

    def parameter_groups(self) -> list[dict[str, Any]]:
        groups = _groups(_parts(self.unet, self.text_encoder), self.learning_rates)
        for group, folded in zip(groups, self.folded, strict=False):
            group["params"] += folded.parameters()
        return groups

    def store_apart(self, optimiser: torch.optim.Optimizer) -> None:
        """Checkpoints of this optimiser are to be those of layers that are not folded."""
        if self.folded:
            store_apart(optimiser, self.folded)

    def save(self, folder: Path) -> None:
        self._show()
        path = folder / ADAPTER
        adapters.save_adapter(path, self.unet, self.text_encoder, self.provenance)

    def load(self, folder: Path) -> None:
        self._show()
        adapters.load_adapter(folder / ADAPTER, self.unet, self.text_encoder)

    def _show(self) -> None:
        for folded in self.folded:
            folded.show()


@dataclass(frozen=True)
class FullWeights:
    """All weights of the U-Net, and of the text encoder where it trains; diffusers folders."""

    unet: Any
    text_encoder: Any | None
    learning_rates: tuple[float, float]

    def parts(self) -> dict[str, Any]:
        return _parts(self.unet, self.text_encoder)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return _groups(self.parts(), self.learning_rates)

    def save(self, folder: Path) -> None:
        for name, model in self.parts().items():
            save_part(model, folder / name)

    def load(self, folder: Path) -> None:
        with torch.no_grad():
            for name, model in self.parts().items():
                (file,) = (folder / name).glob("*.safetensors")
                fill(model, load_file(file))
