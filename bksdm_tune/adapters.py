"""LoRA adapters: inject, save, load, refuse on another architecture.

The file is diffusers' ``pytorch_lora_weights.safetensors``: U-Net keys ``unet.<path>.lora.down``,
text-encoder keys with the ``text_model.`` level that transformers 5 dropped, alpha and rank in
``lora_adapter_metadata`` so that a reload is exact, and our provenance beside it.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import convert_state_dict_to_diffusers, convert_unet_state_dict_to_peft
from diffusers.utils.state_dict_utils import convert_state_dict_to_peft
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import Linear as LoraLinear
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from bksdm_tune.adapted import lean_forward
from bksdm_tune.errors import DataError, UsageError
from bksdm_tune.folded import Folded
from bksdm_tune.precision import at_least_single
from bksdm_tune.provenance import Provenance
from bksdm_tune.weights import LEVEL

ADAPTER_NAME = "default"
# Of PEFT's configuration what a reader needs; an older PEFT refuses fields that it does not know.
SAID = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern")


def inject(
    model: Any, rank: int, alpha: float, dropout: float, targets: tuple[str, ...]
) -> list[nn.Parameter]:
    """Add a LoRA to a U-Net or text encoder; return its parameters, the only ones trained, in
    float32 or more.

    Raises:
        UsageError: a target matches no module of the model.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise UsageError(
                f"LoRA target {target!r} matches no linear layer of the {type(model).__name__}. "
                "Targets are ends of module names, such as to_q to_k to_v to_out.0."
            )
    model.requires_grad_(False)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        init_lora_weights="gaussian",
        target_modules=list(targets),
    )
    model.add_adapter(config, adapter_name=ADAPTER_NAME)
    for layer in injected(model):
        layer.forward = partial(lean_forward, layer, ADAPTER_NAME)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.data = at_least_single(parameter.data)
    return parameters


def injected(model: Any) -> list[Any]:
    """The model's layers that carry an adapter."""
    return [module for module in model.modules() if isinstance(module, LoraLinear)]


def fold_small(model: Any) -> Folded:
    """Train the small layers of an injected model as one tensor."""
    return Folded(model, injected(model), ADAPTER_NAME)


def adapter_metadata(part: str, config: LoraConfig) -> dict[str, Any]:
    """What ``lora_adapter_metadata`` says of a part; without it every alpha is read as the rank."""
    whole = config.to_dict()
    whole["target_modules"] = sorted(whole["target_modules"])
    return {f"{part}.{key}": whole[key] for key in SAID}


def _state(model: Any) -> dict[str, torch.Tensor]:
    return convert_state_dict_to_diffusers(get_peft_model_state_dict(model))


def save_adapter(path: Path, unet: Any, text_encoder: Any | None, provenance: Provenance) -> None:
    """Write one file that stock ``load_lora_weights`` reads to the same picture."""
    tensors = {f"unet.{key}": value for key, value in _state(unet).items()}
    adapter = adapter_metadata("unet", unet.peft_config[ADAPTER_NAME])
    if text_encoder is not None:
        for key, value in _state(text_encoder).items():
            tensors[f"text_encoder.{LEVEL}{key.removeprefix(LEVEL)}"] = value
        adapter |= adapter_metadata("text_encoder", text_encoder.peft_config[ADAPTER_NAME])
    metadata = {
        "format": "pt",
        "lora_adapter_metadata": json.dumps(adapter, sort_keys=True),
        **provenance.metadata(),
    }
    contiguous = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    path.write_bytes(canonical(save(contiguous, metadata)))


def canonical(data: bytes) -> bytes:
    """The same safetensors file with a sorted header: equal content gives equal bytes."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    ordered = {"__metadata__": dict(sorted(metadata.items()))} | dict(sorted(header.items()))
    text = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def load_adapter(path: Path, unet: Any, text_encoder: Any | None) -> None:
    """Put a saved adapter's weights into models that were injected with the same settings.

    Raises:
        DataError: as ``read_adapter``, or the file lacks some of the models' tensors.
    """
    tensors, _ = read_adapter(path)
    parts = {"unet": unet} | ({"text_encoder": text_encoder} if text_encoder is not None else {})
    for prefix, model in parts.items():
        own = {
            key.removeprefix(f"{prefix}."): value
            for key, value in tensors.items()
            if key.startswith(f"{prefix}.")
        }
        if prefix == "unet":
            own = convert_unet_state_dict_to_peft(own)
        else:
            own = convert_state_dict_to_peft(own)
            if not hasattr(model, "text_model"):
                own = {key.removeprefix(LEVEL): value for key, value in own.items()}
        result = set_peft_model_state_dict(model, own, adapter_name=ADAPTER_NAME)
        assert not result.unexpected_keys, result.unexpected_keys
        wanted = len(get_peft_model_state_dict(model))
        if len(own) != wanted:
            raise DataError(
                f"{path} lacks {wanted - len(own)} of {wanted} tensors of the {prefix}."
            )


def read_adapter(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of an adapter file.

    Raises:
        DataError: it is missing, truncated, not safetensors, or holds no LoRA.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} is not a readable safetensors file: {error}") from None
    if not any("lora" in key for key in tensors):
        raise DataError(f"{path} holds no LoRA weights.")
    return tensors, metadata
