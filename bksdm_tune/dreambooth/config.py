"""The flags of ``bksdm-tune dreambooth``.  None means: what the recipe says (recipes.py)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg
from tyro.constructors import PrimitiveConstructorSpec

from bksdm_tune.config import ScheduleName, check_positive, check_range, group
from bksdm_tune.errors import UsageError

Prior = Literal["images", "prediction", "none"]


def read_switch(words: list[str]) -> bool:
    """Nothing after the flag, or true: on; false: off."""
    known = {(): True, ("true",): True, ("false",): False}
    given = tuple(word.lower() for word in words)
    if given not in known:
        raise ValueError("true or false is wanted; nothing after the flag means true")
    return known[given]


SWITCH = PrimitiveConstructorSpec(
    nargs=(0, 1),
    metavar="[true|false]",
    instance_from_str=read_switch,
    is_instance=lambda value: value is None or isinstance(value, bool),
    str_from_instance=lambda value: [str(value)],
)


@dataclass(frozen=True)
class Who:
    """whom to learn"""

    subject: str | None = None
    """One of the 30 DreamBooth subjects (bksdm-tune subjects list)."""
    photos: Path | None = None
    """Folder with 3 to 20 photos of your own subject; needs --class-noun."""
    class_noun: str | None = None
    """What the subject is: dog, "stuffed animal"."""
    name: str | None = None
    """Name of your own subject, for the run folder; default: the photo folder's name."""
    data_root: Path | None = None
    """Where the DreamBooth photos lie; default $BKSDM_DATA, then the download cache."""
    holdout: int = 0
    """Photos kept out of training, the last ones; scores are then against these alone."""

    def __post_init__(self) -> None:
        check_range("--holdout", self.holdout, 0)
        if (self.subject is None) == (self.photos is None):
            raise UsageError("Say whom to learn: --subject dog, or --photos DIR --class-noun dog.")
        if self.photos is not None and self.class_noun is None:
            raise UsageError("--photos needs --class-noun, what the subject is: --class-noun dog.")
        if self.class_noun is not None and not self.class_noun.strip():
            raise UsageError("--class-noun is empty; say what the subject is: --class-noun dog.")
        if self.subject is not None and self.name is not None:
            raise UsageError("--name is for your own --photos; --subject has its name.")


@dataclass(frozen=True)
class Model:
    """what to tune"""

    backbone: str | None = None
    """Registry name, diffusers folder, Hub id, run folder, or a U-Net with --base; default
    bk-base with an accelerator, pocket-base without."""
    base: str | None = None
    """Where the parts beside the U-Net come from, if --backbone is a U-Net alone."""
    lora: bool = False
    """Train a LoRA adapter; otherwise all weights."""
    recipe: Literal["default", "bksdm"] = "default"
    """Where unset flags come from; bksdm is the reference to the letter, text encoder trained."""


@dataclass(frozen=True)
class Prompts:
    """how to call it"""

    identifier: str = "sks11df"
    """A rare word that will mean the subject."""
    instance_prompt: str | None = None
    """Default: a <identifier> <class noun>."""
    class_prompt: str | None = None
    """Default: a <class noun>."""


@dataclass(frozen=True)
class Training:
    """how to train"""

    steps: Annotated[int | None, arg(aliases=("--max-train-steps",))] = None
    """Optimiser steps."""
    batch_size: Annotated[int | None, arg(aliases=("--train-batch-size",))] = None
    """Instance photos a step; as many class images come beside them."""
    accumulation: Annotated[int, arg(aliases=("--gradient-accumulation-steps",))] = 1
    """Micro-batches an optimiser step."""
    learning_rate: float | None = None
    """Of the U-Net."""
    text_encoder_lr: float | None = None
    """Of the text encoder; default: as the U-Net's."""
    lr_scheduler: ScheduleName | None = None
    """Learning-rate schedule."""
    lr_warmup_steps: int = 0
    """Optimiser steps of warm-up, for the schedules that have one."""
    resolution: int | None = None
    """Side of the training pictures in pixels; default: the backbone's own."""
    optimiser: Literal["adamw", "adamw8bit", "adafactor", "prodigy"] = "adamw"
    """The last three from bitsandbytes, transformers and prodigyopt."""
    weight_decay: float = 1e-2
    """Of the optimiser."""
    max_grad_norm: float = 1.0
    """Gradient clipping."""
    precision: Annotated[
        Literal["auto", "no", "bf16", "fp16"], arg(aliases=("--mixed-precision",))
    ] = "auto"
    """Mixed precision; auto is bf16 on an accelerator that has it, else fp16, and no on a CPU."""
    gradient_checkpointing: bool = False
    """Less memory, about a third more time."""
    memory: Literal["auto", "as-asked"] = "auto"
    """auto: where the run would not fit into the free memory, gradient checkpointing is switched
    on, and then, for a full run on a GPU, the 8-bit optimiser taken."""
    attention: Literal["sdpa", "xformers"] = "sdpa"
    """Attention backend."""
    train_text_encoder: Annotated[bool | None, SWITCH] = None
    """Train the text encoder too; default: on a miniature backbone and under --recipe bksdm."""
    min_snr_gamma: float | None = None
    """Min-SNR loss weights; 5 is usual. Default: none."""
    offset_noise: float = 0.0
    """Weight of a constant per channel added to the noise."""
    ema: float | None = None
    """Decay of an exponential moving average of the weights, 0.99 for short runs. Default: none."""
    seed: int = 1234
    """Of noise, order and weights."""

    def __post_init__(self) -> None:
        check_range("--steps", self.steps, 1)
        check_range("--batch-size", self.batch_size, 1)
        check_range("--accumulation", self.accumulation, 1)
        check_positive("--learning-rate", self.learning_rate)
        check_positive("--text-encoder-lr", self.text_encoder_lr)
        check_range("--lr-warmup-steps", self.lr_warmup_steps, 0)
        check_range("--resolution", self.resolution, 16)
        check_range("--weight-decay", self.weight_decay, 0)
        check_positive("--max-grad-norm", self.max_grad_norm)
        check_positive("--min-snr-gamma", self.min_snr_gamma)
        check_range("--offset-noise", self.offset_noise, 0, 1)
        check_range("--ema", self.ema, 0, 0.99999)
        check_range("--seed", self.seed, 0, 2**62)


@dataclass(frozen=True)
class Lora:
    """the adapter"""

    rank: int | None = None
    """Of the U-Net's adapter."""
    alpha: float | None = None
    """Scale numerator: the update is alpha / rank times B A."""
    text_encoder_rank: int | None = None
    """Of the text encoder's adapter."""
    text_encoder_alpha: float | None = None
    """As --alpha, for the text encoder."""
    dropout: float = 0.0
    """Of the adapter's input."""
    targets: tuple[str, ...] | None = None
    """Ends of the U-Net's module names that get an adapter: to_q to_v."""
    text_encoder_targets: tuple[str, ...] | None = None
    """The same for the text encoder: q_proj v_proj."""

    def __post_init__(self) -> None:
        check_range("--rank", self.rank, 1)
        check_range("--text-encoder-rank", self.text_encoder_rank, 1)
        check_positive("--alpha", self.alpha)
        check_positive("--text-encoder-alpha", self.text_encoder_alpha)
        check_range("--dropout", self.dropout, 0, 0.99)


@dataclass(frozen=True)
class PriorPreservation:
    """keeping the class"""

    prior: Prior | None = None
    """images: the backbone's own class pictures; prediction: its own output on the photos' noised
    latents under the class prompt; none."""
    prior_weight: Annotated[float | None, arg(aliases=("--prior-loss-weight",))] = None
    """Weight of the prior loss."""
    class_images: Annotated[int | None, arg(aliases=("--num-class-images",))] = None
    """How many, for --prior images."""

    def __post_init__(self) -> None:
        check_range("--prior-weight", self.prior_weight, 0)
        check_range("--class-images", self.class_images, 1)


@dataclass(frozen=True)
class Output:
    """what to leave behind"""

    out: Annotated[Path | None, arg(aliases=("--output-dir",))] = None
    """Run folder; default runs/<subject>-<backbone>-<lora|full>."""
    checkpoint_every: Annotated[int | None, arg(aliases=("--checkpointing-steps",))] = None
    """Steps between checkpoints."""
    keep: Annotated[int, arg(aliases=("--checkpoints-total-limit",))] = 2
    """Checkpoints to keep."""
    preview_prompts: tuple[str, ...] | None = None
    """Prompts with {subject}, drawn before and after tuning; default: four of the subject's.
    The flag without a word after it: none."""
    preview_every: int = 0
    """Also draw them every so many steps; 0 is not."""
    preview_images: int = 2
    """Pictures a preview prompt."""
    score_every: int = 0
    """Draw a fixed grid and score it every so many steps (DINO, CLIP-T); 0 is not."""
    keep_best: bool = False
    """Deliver the scored step that is most like the photos and no less like the words than the last
    one's 95 % interval. Default: the last step."""
    patience: int = 0
    """Stop after so many scorings in a row without a better one; 0 is never."""
    dry_run: bool = False
    """Check everything, measure two steps, say time, memory and disk, and stop."""

    def __post_init__(self) -> None:
        check_range("--checkpoint-every", self.checkpoint_every, 1)
        check_range("--keep", self.keep, 1)
        check_range("--preview-every", self.preview_every, 0)
        check_range("--preview-images", self.preview_images, 1)
        check_range("--score-every", self.score_every, 0)
        check_range("--patience", self.patience, 0)
        if (self.keep_best or self.patience) and not self.score_every:
            raise UsageError("--keep-best and --patience go by scores; add --score-every 100.")


@dataclass(frozen=True)
class Config:
    """Teach a backbone one subject from a few photos, and draw it in new scenes."""

    who: Who
    model: Model = group(Model)
    prompts: Prompts = group(Prompts)
    training: Training = group(Training)
    lora: Lora = group(Lora)
    prior: PriorPreservation = group(PriorPreservation)
    output: Output = group(Output)
