"""Stage ``vae``: AutoencoderKL, f = 4, four latent channels, on renders and on real photos."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL

from bksdm_tune.loop import shuffled
from scripts.pocket.common import pixels, restore, train

STEPS, WORLD, REAL = 2_000, 8, 8


def make() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
    ).to(memory_format=torch.channels_last)  # type: ignore[call-arg]


def reconstruct(vae: AutoencoderKL, images: np.ndarray) -> torch.Tensor:
    """uint8 NHWC -> reconstruction from the latent mean, float32 NCHW in 0..255."""
    with torch.inference_mode():
        parts = [
            vae.decode(vae.encode(pixels(images[i : i + 64])).latent_dist.mean).sample
            for i in range(0, len(images), 64)
        ]
    return ((torch.cat(parts).clamp(-1, 1) + 1) * 127.5).round()


def psnr(a: torch.Tensor, images: np.ndarray) -> float:
    """Mean over images of 10 log10(255^2 / MSE), dB."""
    b = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    return float((10 * torch.log10(255**2 / (a - b).square().mean((1, 2, 3)))).mean())


def linear_baseline(images: np.ndarray, components: int = 4) -> float:
    """PSNR of PCA on 4x4 patches (48 numbers -> ``components``), fitted on the images."""
    n, side = len(images), images.shape[1] // 4
    patches = images.reshape(n, side, 4, side, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 48)
    mean = patches.mean(0)
    basis = np.linalg.svd(patches - mean, full_matrices=False)[2][:components]
    back = np.clip((patches - mean) @ basis.T @ basis + mean, 0, 255)
    back = back.reshape(n, side, side, 4, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(images.shape)
    return psnr(torch.from_numpy(back).permute(0, 3, 1, 2).float(), images)


def run(work: Path) -> None:
    torch.manual_seed(0)
    vae = make()
    world = np.load(work / "data/train-images.npy", mmap_mode="r")
    real = np.load(work / "data/real-train.npy")

    def batches(start: int) -> Iterator[torch.Tensor]:
        streams = shuffled(len(world), WORLD, 1)(start), shuffled(len(real), REAL, 2)(start)
        for ours, photos in zip(*streams, strict=True):
            yield pixels(np.concatenate([world[np.sort(ours)], real[photos]]))

    def objective(images: torch.Tensor) -> dict[str, Any]:
        posterior = vae.encode(images).latent_dist
        error = vae.decode(posterior.sample()).sample - images
        losses = {"l1": error.abs().mean(), "mse": error.square().mean()}
        losses["kl"] = posterior.kl().mean() / posterior.mean[0].numel()
        return losses | {"loss": 0.3 * losses["l1"] + 2 * losses["mse"] + 1e-4 * losses["kl"]}

    train(work / "vae", objective, {"vae": vae}, batches, STEPS, 2e-3, ema_decay=0.998)
    report(work)


def load(work: Path) -> AutoencoderKL:
    vae = make()
    restore(work / "vae", {"vae": vae})
    facts = work / "vae/report.json"
    if facts.exists():
        vae.register_to_config(scaling_factor=json.loads(facts.read_text())["scaling_factor"])
    return vae.eval()


def report(work: Path) -> None:
    vae = load(work)
    heldout = np.load(work / "data/real-heldout.npy")
    renders = np.load(work / "data/heldout-images.npy")[:512]
    with torch.inference_mode():
        latents = vae.encode(pixels(renders)).latent_dist.mean
    facts = {
        "psnr_real_heldout": psnr(reconstruct(vae, heldout), heldout),
        "psnr_real_linear_4_of_48": linear_baseline(heldout),
        "psnr_renders_heldout": psnr(reconstruct(vae, renders), renders),
        "scaling_factor": round(1 / float(latents.std()), 4),
        "parameters": sum(p.numel() for p in vae.parameters()),
    }
    (work / "vae/report.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts))
