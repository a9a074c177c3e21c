"""An adapter folded into the weights of the models it is for; any kind that can be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bksdm_tune.errors import DataError
from bksdm_tune.lora.adapter import Adapter
from bksdm_tune.weights import LEVEL


@torch.no_grad()
def fold(models: dict[str, Any], adapter: Adapter, path: Path) -> None:
    """``models``: part -> model, changed in place; ``path``: for the error.

    Raises:
        DataError: a layer is not there, or of another size.
    """
    for part, model in models.items():
        modules = dict(model.named_modules())
        for name, update in adapter.of(part).items():
            layer = modules.get(name) or modules.get(name.removeprefix(LEVEL))
            try:
                assert layer is not None
                layer.weight.copy_(update.merged(layer.weight))
            except (AssertionError, RuntimeError, AttributeError):
                raise DataError(f"{path} does not fit the {part}'s layer {name}.") from None
