"""The flags of ``bksdm-tune distill`` and ``bksdm-tune cache``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from bksdm_tune.config import check_positive, check_range, group
from bksdm_tune.errors import UsageError
from bksdm_tune.unet_configs import PLANS, TEACHER


@dataclass(frozen=True)
class Models:
    """what learns from what"""

    size: str
    """Which blocks the student keeps: base, small or tiny."""
    teacher: str
    """Registry name, diffusers pipeline folder, Hub id, or a U-Net alone together with --base."""
    base: str | None = None
    """Where the parts beside the U-Net come from, if the teacher is a U-Net alone."""
    init: Literal["inherit", "random"] = "inherit"
    """Where the student begins: at the teacher's weights, or at random ones."""

    def __post_init__(self) -> None:
        sizes = [name for name in PLANS if name != TEACHER.name]
        if self.size not in sizes:
            raise UsageError(f"--size {self.size} is unknown; choose from {', '.join(sizes)}.")


@dataclass(frozen=True)
class Data:
    """what it is shown"""

    data: str
    """Image folder with metadata.csv/.jsonl/.parquet (file_name, text), folder of parquet or arrow
    files, WebDataset shards ('shards/{000..131}.tar', local or URL), Hub id, or a latent cache."""
    image_column: str | None = None
    """Column with the image; default: image, jpg, png, ..."""
    caption_column: str | None = None
    """Column with the caption; default: text, caption, txt."""
    resolution: int | None = None
    """Side of the pictures in pixels, centre crop; default: the teacher's own."""
    workers: int = 2
    """Processes that decode images."""
    max_broken: float = 0.01
    """Share of broken images at which the run stops."""

    def __post_init__(self) -> None:
        check_range("--resolution", self.resolution, 16)
        check_range("--workers", self.workers, 1)
        check_range("--max-broken", self.max_broken, 0, 1)


@dataclass(frozen=True)
class Loss:
    """what it minimises"""

    lambda_task: float = 1.0
    """Weight of the error against the noise (or velocity); 0 removes the term."""
    lambda_out: float = 1.0
    """Weight of the error against the teacher's output; 0 removes the term."""
    lambda_feat: float = 1.0
    """Weight of the error against the teacher's features; 0 removes the term."""
    features: tuple[str, ...] | None = None
    """Student layers whose features are compared, such as up_blocks.0; default: the plan's."""
    min_snr_gamma: float | None = None
    """Min-SNR weights of the task and output terms; 5 is usual. Default: none."""
    offset_noise: float = 0.0
    """Weight of a constant per channel added to the noise."""
    caption_dropout: float = 0.0
    """Share of captions replaced by the empty one."""
    flip: bool = True
    """Mirror half of the pictures."""

    def __post_init__(self) -> None:
        for name in ("task", "out", "feat"):
            check_range(f"--lambda-{name}", getattr(self, f"lambda_{name}"), 0)
        if not (self.lambda_task or self.lambda_out or self.lambda_feat):
            raise UsageError("All three --lambda are 0, so there is nothing to learn.")
        check_positive("--min-snr-gamma", self.min_snr_gamma)
        check_range("--offset-noise", self.offset_noise, 0, 1)
        check_range("--caption-dropout", self.caption_dropout, 0, 1)


@dataclass(frozen=True)
class Training:
    """how to train (BK-SDM, section 4.1)"""

    steps: Annotated[int, arg(aliases=("--max-train-steps",))] = 50_000
    """Optimiser steps."""
    batch_size: Annotated[int, arg(aliases=("--train-batch-size",))] = 64
    """Pictures a micro-batch in each process."""
    accumulation: Annotated[int, arg(aliases=("--gradient-accumulation-steps",))] = 4
    """Micro-batches an optimiser step; batch x accumulation x processes is 256 in the paper."""
    learning_rate: float = 5e-5
    """Of the student."""
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant"
    """Learning-rate schedule."""
    lr_warmup_steps: int = 0
    """Optimiser steps of warm-up, for the schedules that have one."""
    optimiser: Literal["adamw", "adamw8bit", "adafactor"] = "adamw"
    """The last two from bitsandbytes and transformers."""
    weight_decay: float = 1e-2
    """Of the optimiser."""
    max_grad_norm: float = 1.0
    """Gradient clipping."""
    ema: float | None = 0.9999
    """Decay of the moving average that is delivered; none is not."""
    precision: Annotated[
        Literal["auto", "no", "bf16", "fp16"], arg(aliases=("--mixed-precision",))
    ] = "auto"
    """Mixed precision; auto is bf16 on an accelerator that has it, else fp16, and no on a CPU."""
    gradient_checkpointing: bool = False
    """Less memory, about a third more time."""
    seed: int = 1234
    """Of noise, order and weights."""

    def __post_init__(self) -> None:
        check_range("--steps", self.steps, 1)
        check_range("--batch-size", self.batch_size, 1)
        check_range("--accumulation", self.accumulation, 1)
        check_positive("--learning-rate", self.learning_rate)
        check_range("--lr-warmup-steps", self.lr_warmup_steps, 0)
        check_range("--weight-decay", self.weight_decay, 0)
        check_positive("--max-grad-norm", self.max_grad_norm)
        check_range("--ema", self.ema, 0, 0.999999)
        check_range("--seed", self.seed, 0, 2**62)


@dataclass(frozen=True)
class Output:
    """what to leave behind"""

    out: Path
    """Run folder; in the end a whole diffusers pipeline."""
    checkpoint_every: Annotated[int, arg(aliases=("--checkpointing-steps",))] = 500
    """Steps between checkpoints."""
    keep: Annotated[int, arg(aliases=("--checkpoints-total-limit",))] = 2
    """Checkpoints to keep."""
    preview_prompts: tuple[str, ...] = ()
    """Prompts drawn by teacher and student at the same seeds."""
    preview_every: int = 0
    """Also draw them every so many steps; 0 is only at the ends."""
    tracker: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    """Where the losses go beside log.jsonl."""
    dry_run: bool = False
    """Check everything, find the largest batch that fits, say time, memory and disk, and stop."""

    def __post_init__(self) -> None:
        check_range("--checkpoint-every", self.checkpoint_every, 1)
        check_range("--keep", self.keep, 1)
        check_range("--preview-every", self.preview_every, 0)


@dataclass(frozen=True)
class Config:
    """Train a compressed Stable Diffusion to do what its teacher does (BK-SDM)."""

    models: Models
    data: Data
    output: Output
    loss: Loss = group(Loss)
    training: Training = group(Training)


@dataclass(frozen=True)
class CacheConfig:
    """Compute the latents of a data set once, so that training never decodes a picture again."""

    data: Data
    teacher: str
    """Whose VAE (and text encoder) is used: a name, pipeline folder or Hub id."""
    out: Path
    """Folder of the cache."""
    base: str | None = None
    """Where VAE and text encoder come from, if the teacher is a U-Net alone."""
    embeds: bool = False
    """Keep prompt embeddings too; they are larger than the latents."""
    batch_size: int = 16
    """Pictures encoded at once."""

    def __post_init__(self) -> None:
        check_range("--batch-size", self.batch_size, 1)
