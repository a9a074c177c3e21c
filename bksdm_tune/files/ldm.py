"""The one-file layout of Stable Diffusion (CompVis LDM), for compressed U-Nets too.

Names are derived from the U-Net's config: blocks are numbered in the order in which they run, so a
student with one layer a stage has fewer, and one without a mid block has no ``middle_block``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bksdm_tune.weights import LEVEL

Tensors = dict[str, Tensor]
UNET, VAE = "model.diffusion_model.", "first_stage_model."
TEXT_V1, TEXT_V2 = "cond_stage_model.transformer.", "cond_stage_model.model."

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
TOP = {
    "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip


def unet_blocks(config: Mapping[str, Any]) -> dict[str, str]:
    """diffusers' block -> LDM's, for every resnet, attention and sampler of the U-Net."""
    layers, stages = config["layers_per_block"], len(config["down_block_types"])
    found, number = dict(TOP), 1
    for stage, kind in enumerate(config["down_block_types"]):
        for layer in range(layers):
            found[f"down_blocks.{stage}.resnets.{layer}"] = f"input_blocks.{number}.0"
            if "Cross" in kind:
                found[f"down_blocks.{stage}.attentions.{layer}"] = f"input_blocks.{number}.1"
            number += 1
        if stage < stages - 1:
            found[f"down_blocks.{stage}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1
    for place, name in enumerate(("resnets.0", "attentions.0", "resnets.1")):
        found[f"mid_block.{name}"] = f"middle_block.{place}"
    number = 0
    for stage, kind in enumerate(config["up_block_types"]):
        for layer in range(layers + 1):
            found[f"up_blocks.{stage}.resnets.{layer}"] = f"output_blocks.{number}.0"
            if "Cross" in kind:
                found[f"up_blocks.{stage}.attentions.{layer}"] = f"output_blocks.{number}.1"
            if stage < stages - 1 and layer == layers:
                place = 2 if "Cross" in kind else 1
                upsampler = f"up_blocks.{stage}.upsamplers.0.conv"
                found[upsampler] = f"output_blocks.{number}.{place}.conv"
            number += 1
    return found


def unet_names(config: Mapping[str, Any], keys: list[str]) -> dict[str, str]:
    """diffusers' key -> LDM's."""
    blocks = unet_blocks(config)
    return {key: UNET + _unet_name(key, blocks) for key in keys}


def _unet_name(key: str, blocks: Mapping[str, str]) -> str:
    block = max((b for b in blocks if key.startswith(f"{b}.")), key=len)
    rest = key.removeprefix(f"{block}.")
    if ".resnets." in f".{block}":
        part, _, kind = rest.rpartition(".")
        rest = f"{RESNET[part]}.{kind}"
    return f"{blocks[block]}.{rest}"


VAE_PARTS = (
    (r"(en|de)coder\.conv_norm_out\.", r"\1coder.norm_out."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.group_norm\.", ".mid.attn_1.norm."),
    (r"\.mid_block\.attentions\.0\.to_(q|k|v)\.", r".mid.attn_1.\1."),
    (r"\.mid_block\.attentions\.0\.to_out\.0\.", ".mid.attn_1.proj_out."),
    (r"\.down_blocks\.(\d+)\.resnets\.(\d+)\.", r".down.\1.block.\2."),
    (r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
)


def vae_names(config: Mapping[str, Any], keys: list[str]) -> dict[str, str]:
    """diffusers' key -> LDM's; the decoder's stages are numbered from the picture inwards."""
    last = len(config["block_out_channels"]) - 1

    def up(match: re.Match[str]) -> str:
        kind = "block." + match[3] if match[2] == "resnets" else "upsample"
        return f".up.{last - int(match[1])}.{kind}."

    found = {}
    for key in keys:
        name = key
        for pattern, new in VAE_PARTS:
            name = re.sub(pattern, new, name)
        name = re.sub(r"\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.", up, name)
        found[key] = VAE + name
    return found


def is_vae_matrix(name: str) -> bool:
    """LDM keeps the VAE's attention as 1 x 1 convolutions."""
    return bool(re.search(r"\.mid\.attn_1\.(q|k|v|proj_out)\.weight$", name))


OPEN_CLIP = (
    ("encoder.layers.", "transformer.resblocks."), ("self_attn.out_proj.", "attn.out_proj."),
    ("layer_norm1.", "ln_1."), ("layer_norm2.", "ln_2."), ("mlp.fc1.", "mlp.c_fc."),
    ("mlp.fc2.", "mlp.c_proj."), ("final_layer_norm.", "ln_final."),
    ("embeddings.token_embedding.", "token_embedding."),
    ("embeddings.position_embedding.weight", "positional_embedding"),
)  # fmt: skip
QKV = re.compile(r"(.*)self_attn\.(q|k|v)_proj\.(weight|bias)")


def text_to_ldm(tensors: Tensors, v2: bool) -> Tensors:
    """The text encoder: transformers' names in v1, open_clip's in v2, whose q, k, v are one."""
    levelled = {f"{LEVEL}{key.removeprefix(LEVEL)}": v for key, v in tensors.items()}
    if not v2:
        return {TEXT_V1 + key: value for key, value in levelled.items()}
    found: Tensors = {}
    for key, value in levelled.items():
        name = key.removeprefix(LEVEL)
        match = QKV.fullmatch(name)
        if match is None:
            found[TEXT_V2 + _open_clip(name)] = value
        elif match[2] == "q":
            parts = [levelled[key.replace("q_proj", f"{side}_proj")] for side in "qkv"]
            place = f"{_open_clip(match[1])}attn.in_proj_{match[3]}"
            found[TEXT_V2 + place] = torch.cat(parts)
    return found


def _open_clip(name: str) -> str:
    for ours, theirs in OPEN_CLIP:
        name = name.replace(ours, theirs)
    return name


def text_from_ldm(tensors: Tensors) -> Tensors:
    """Back, without the level ``text_model``."""
    found: Tensors = {}
    for key, value in tensors.items():
        if key.startswith(TEXT_V1):
            found[key.removeprefix(f"{TEXT_V1}{LEVEL}")] = value
        elif key.startswith(TEXT_V2):
            name = key.removeprefix(TEXT_V2)
            for ours, theirs in OPEN_CLIP:
                name = name.replace(theirs, ours)
            if ".attn.in_proj_" in name:
                layer, kind = name.split("attn.in_proj_")
                for side, part in zip("qkv", value.chunk(3), strict=True):
                    found[f"{layer}self_attn.{side}_proj.{kind}"] = part
            else:
                found[name] = value
    return found


def to_ldm(unet: tuple[Any, Tensors], vae: tuple[Any, Tensors], text: Tensors, v2: bool) -> Tensors:
    """One dictionary for one file; (config, tensors) of the U-Net and of the VAE."""
    found = {name: unet[1][key] for key, name in unet_names(unet[0], list(unet[1])).items()}
    for key, name in vae_names(vae[0], list(vae[1])).items():
        value = vae[1][key]
        found[name] = value[:, :, None, None] if is_vae_matrix(name) else value
    return {k: v.contiguous() for k, v in (found | text_to_ldm(text, v2)).items()}


def from_ldm(
    tensors: Tensors, unet_config: Any, unet_keys: list[str], vae_config: Any, vae_keys: list[str]
) -> tuple[Tensors, Tensors, Tensors]:
    """U-Net, VAE and text encoder from one file's dictionary, for models of those keys."""
    unet = {key: tensors[name] for key, name in unet_names(unet_config, unet_keys).items()}
    vae = {}
    for key, name in vae_names(vae_config, vae_keys).items():
        vae[key] = tensors[name][:, :, 0, 0] if is_vae_matrix(name) else tensors[name]
    return unet, vae, text_from_ldm(tensors)
