"""``--memory auto``: what a run needs, and the savings that make it fit into what is free.

What autograd keeps is counted for the run's own architecture, resolution, batch and adapter
(bksdm_tune/kept.py); the rest is arithmetic: weights, gradients, the optimiser's moments, the
frozen copy of a full run's prior prediction.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from bksdm_tune import adapters
from bksdm_tune.artifacts import IDENTITY
from bksdm_tune.dreambooth.ahead import window
from bksdm_tune.dreambooth.job import Job, with_training
from bksdm_tune.errors import UsageError
from bksdm_tune.kept import Count, count
from bksdm_tune.memory import free_bytes
from bksdm_tune.optim import check_optimiser
from bksdm_tune.pipeline import load_part
from bksdm_tune.pipeline_folder import vae_factor
from bksdm_tune.precision import choose, frozen_dtype
from bksdm_tune.resolve import unet_config

USABLE = 0.9
"""Of what is free; allocators leave gaps."""

WORKSPACE = 0.7e9
"""Bytes of the libraries, their kernels' scratch space and a CUDA context."""

HEAP = 1.5
"""What the heap of a CPU takes over what is kept in it: gaps, and what passes
(scripts/memory_estimate.py)."""

NEGLIGIBLE = 1 / 200
"""A U-Net whose weights are this share of what is free needs no count."""


@dataclass(frozen=True)
class Need:
    """What a run's memory is made of."""

    weights: int
    """Parameters of the U-Net."""
    trained: int
    """Parameters that train."""
    text: int
    """Bytes of the text encoder, where it trains."""
    half: bool
    """Mixed precision."""
    heap: float
    """Bytes taken to a byte that is kept."""
    full: bool
    copied: bool
    """eps_0 is a frozen copy."""
    ema: bool
    kept: Count
    ahead: float
    """Rows of eps_0 in one forward, which keeps nothing, to a row of training."""

    def bytes(self, checkpointing: bool, optimiser: str) -> float:
        small = 2 if self.half else 4
        frozen = self.weights * (4 + 2 * self.half if self.full else small)
        frozen += self.weights * small * self.copied
        moments = {"adamw8bit": 2, "adafactor": 0.1}.get(optimiser, 8)
        own = self.trained * (4 * (not self.full) + 4 + moments + 4 * self.ema)
        kept = max(self.kept.bytes(checkpointing), self.kept.largest * self.ahead)
        kept *= self.heap * (1.3 if self.half else 1)  # norms stay in float32
        return frozen + own + self.text + kept + WORKSPACE


def need(job: Job) -> Need:
    config, training, lora = job.config, job.config.training, job.config.lora
    assert training.resolution and training.batch_size
    half = choose(training.precision, job.device) != "no"
    dtype, shape = frozen_dtype(training.precision, job.device), unet_config(job.parts)
    rows = training.batch_size * (1 if config.prior.prior == "none" else 2)
    side = training.resolution // vae_factor(job.parts)
    tokens = load_part(job.parts, "tokenizer").model_max_length
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(shape).to(dtype).train()
        weights = trained = sum(p.numel() for p in unet.parameters())
        if config.model.lora:
            assert lora.rank and lora.alpha and lora.targets
            own = adapters.inject(unet, lora.rank, lora.alpha, lora.dropout, lora.targets)
            trained = sum(p.numel() for p in own)
        noisy = torch.randn(rows, shape["in_channels"], side, side, dtype=dtype)
        text = torch.randn(rows, tokens, shape["cross_attention_dim"], dtype=dtype)
        kept = count(unet, (noisy, torch.zeros(rows, dtype=torch.int64), text))
    full = not config.model.lora
    encoder = stored(job.parts.root / "text_encoder") * (4 if full else 1)
    return Need(
        weights,
        trained,
        text=encoder if training.train_text_encoder else 0,
        half=half,
        heap=HEAP if job.device == "cpu" else 1,
        full=full,
        copied=full and config.prior.prior == "prediction",
        ema=training.ema is not None,
        kept=kept,
        ahead=window(job.device, training.batch_size, side) * training.batch_size / rows
        if config.prior.prior == "prediction"
        else 0,
    )


def stored(part: Path) -> int:
    """Bytes of a part's weights on disk."""
    return sum(path.stat().st_size for path in part.glob("*.safetensors"))


def settle(job: Job) -> tuple[Job, str | None]:
    """The job with the first savings that make it fit, and a line that says so; None where nothing
    had to be saved.

    Gradient checkpointing first, which changes no result; then, of full runs on a GPU, the 8-bit
    optimiser.  A run that has begun keeps its optimiser.
    """
    training = job.config.training
    if training.memory != "auto":
        return job, None
    begun = optimiser_before(job)
    if begun == "adamw8bit" and training.optimiser == "adamw":
        job = with_training(job, optimiser="adamw8bit")
    free = free_bytes(job.device)
    if stored(job.parts.unet) < NEGLIGIBLE * free:
        return job, None
    wanted, usable = need(job), USABLE * free
    for checkpointing, optimiser in levels(job, begun):
        bytes_ = wanted.bytes(checkpointing, optimiser)
        if bytes_ <= usable:
            break
    changes = {"gradient_checkpointing": checkpointing, "optimiser": optimiser}
    told = f"Memory: about {bytes_ / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free"
    if bytes_ > usable:
        told += "; it may not fit, with all savings that there are"
    saved = [_WORDS[key] for key, value in changes.items() if value != getattr(training, key)]
    if not saved and bytes_ <= usable:
        return job, None
    return with_training(job, **changes), "; ".join([told, *saved])


_WORDS = {
    "gradient_checkpointing": "gradient checkpointing is on",
    "optimiser": "the optimiser is adamw8bit",
}


def levels(job: Job, begun: str | None) -> list[tuple[bool, str]]:
    """Gradient checkpointing and optimiser, in the order in which they are tried."""
    training = job.config.training
    found = [(training.gradient_checkpointing, training.optimiser), (True, training.optimiser)]
    changeable = training.optimiser == "adamw" and begun is None and job.device != "cpu"
    if changeable and not job.config.model.lora:
        with contextlib.suppress(UsageError):
            check_optimiser("adamw8bit")
            found.append((True, "adamw8bit"))
    return list(dict.fromkeys(found))


def optimiser_before(job: Job) -> str | None:
    """Of the run that has begun in the job's folder."""
    noted = job.folder / IDENTITY
    if not noted.is_file():
        return None
    found: str | None = json.loads(noted.read_text())["config"]["training"].get("optimiser")
    return found
