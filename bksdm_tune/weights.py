"""A part's weights on disk, under names that every release of transformers finds.

transformers 5 dropped the level ``text_model.`` of CLIP's text encoder and saves without it;
transformers 4 then finds no weight of such a file and goes on with random ones.  Both find what has
the level, as every published pipeline has.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

LEVEL = "text_model."


def save_part(model: Any, folder: Path) -> None:
    """A folder of diffusers or transformers with config.json and one safetensors file."""
    named: dict[str, Any] = {}
    if type(model).__name__ == "CLIPTextModel":
        own = model.state_dict()
        named = {"state_dict": {f"{LEVEL}{k.removeprefix(LEVEL)}": v for k, v in own.items()}}
    model.save_pretrained(folder, max_shard_size="100GB", **named)


def fill(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Put the weights into the model, which has the level itself or not.

    Raises:
        RuntimeError: as ``load_state_dict``, if some are missing or too many.
    """
    if type(model).__name__ == "CLIPTextModel":
        level = LEVEL if hasattr(model, "text_model") else ""
        tensors = {f"{level}{key.removeprefix(LEVEL)}": value for key, value in tensors.items()}
    model.load_state_dict(tensors)
