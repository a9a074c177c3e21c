"""Facts about diffusers pipeline folders, and new ones in which the parts that stay are copied."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from bksdm_tune import licences
from bksdm_tune.backbones import OPENRAIL_PP_LICENCE
from bksdm_tune.errors import UsageError
from bksdm_tune.resolve import INDEX, Parts, read_json, unet_config

UNUSED_WEIGHTS = shutil.ignore_patterns("*.bin", "*.ckpt", "*.msgpack", "*.fp16.*", "*.non_ema.*")

# For the header of a model card.
HUB_LICENCE_IDS = {
    licences.OPENRAIL_LICENCE: licences.OPENRAIL_HUB_ID,
    OPENRAIL_PP_LICENCE: "openrail++",
    licences.POCKET_LICENCE: "apache-2.0",
}


def copy_other_parts(root: Path, folder: Path, own: tuple[str, ...] = ("unet",)) -> None:
    """Copy every part that the pipeline lists but ``own``, the licence, and the list itself.

    A listed part that is not there (some downloads leave out the safety checker) is unlisted.
    """
    index = read_json(root / INDEX)
    for name, entry in index.items():
        if name in own or not isinstance(entry, list):
            continue
        if (root / name).is_dir():
            shutil.copytree(root / name, folder / name, ignore=UNUSED_WEIGHTS, dirs_exist_ok=True)
        else:
            index[name] = [None, None]
    for path in root.glob("LICENSE*"):
        shutil.copy(path, folder)
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def licence_of(parts: Parts) -> tuple[str, str, str]:
    """(Hub id, name, notice) of the licence of what is made from ``parts``; an unregistered
    backbone is taken to be Stable Diffusion's."""
    row = parts.backbone
    licence = row.licence if row else licences.OPENRAIL_LICENCE
    pocket = licence == licences.POCKET_LICENCE
    stated = licence if row else "not registered with this program, so see where you had it from"
    notice = licences.POCKET_NOTICE if pocket else licences.OPENRAIL_NOTICE
    return HUB_LICENCE_IDS[licence], stated, notice


def native_resolution(parts: Parts) -> int:
    """Pixels: the U-Net's latent size times the VAE's downsampling."""
    return int(unet_config(parts)["sample_size"]) * vae_factor(parts)


def vae_factor(parts: Parts) -> int:
    """Pixels per latent, along one side."""
    blocks = read_json(parts.root / "vae" / "config.json")["block_out_channels"]
    return 2 ** (len(blocks) - 1)


def check_resolution(side: int, parts: Parts) -> None:
    """Raise UsageError, naming a near one, unless the U-Net can halve its latents as it must."""
    stages = len(unet_config(parts)["block_out_channels"])
    multiple = vae_factor(parts) * 2 ** (stages - 1)
    if side % multiple:
        nearest = max(multiple, round(side / multiple) * multiple)
        raise UsageError(
            f"--resolution {side} does not divide by {multiple}; try --resolution {nearest}."
        )


def scaling_factor(folder: Path) -> float:
    """Of a VAE's config; the class's own default where an old config, SD-v1.4's, names none."""
    import torch
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder))
    return float(vae.config.scaling_factor)
