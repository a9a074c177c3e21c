"""From parts on disk to pictures: load, draw with a seed per picture, keep settings in PNGs."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from bksdm_tune.device import best_device
from bksdm_tune.errors import DataError, UsageError
from bksdm_tune.lora import fit, layouts
from bksdm_tune.lora.adapter import Adapter
from bksdm_tune.lora.fold import fold
from bksdm_tune.resolve import Parts, unet_config

# diffusers warns about the safety checker that small and compressed pipelines do not ship.
logging.getLogger("diffusers").setLevel(logging.ERROR)
disable_progress_bar()  # transformers' own, one for each part that loads


OnStep = Callable[[float], None]


@dataclass(frozen=True)
class Shot:
    """Everything that decides one picture, beside the model."""

    prompt: str
    seed: int
    steps: int = 25
    guidance_scale: float = 7.5
    negative_prompt: str = ""


def load_part(parts: Parts, name: str, dtype: torch.dtype = torch.float32) -> Any:
    """One component of the pipeline (unet, vae, text_encoder, tokenizer, scheduler)."""
    if name == "unet":
        from diffusers import UNet2DConditionModel

        return UNet2DConditionModel.from_pretrained(parts.unet, torch_dtype=dtype).eval()
    index = json.loads((parts.root / "model_index.json").read_text())
    library, class_name = index[name]
    owner = __import__(library)
    loader = getattr(owner, class_name)
    if name in ("tokenizer", "scheduler"):
        return loader.from_pretrained(parts.root / name)
    return loader.from_pretrained(parts.root / name, torch_dtype=dtype).eval()


def assemble(unet: Any, vae: Any, scheduler: Any, text: tuple[Any, Any] = (None, None)) -> Any:
    """A pipeline around loaded parts; ``text`` is (tokenizer, text encoder)."""
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text[1],
        tokenizer=text[0],
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_pipeline(parts: Parts, device: str | None = None) -> Any:
    """The whole pipeline on a device, in float32 on a CPU and float16 elsewhere, adapter included.

    Raises:
        DataError: the adapter belongs to another architecture, or does not fit.
    """
    device = device or best_device()
    dtype = torch.float32 if device == "cpu" else torch.float16
    config = unet_config(parts)
    # The adapter before gigabytes are loaded.
    whole = None if parts.adapter is None else fit.check(parts.adapter, config)
    unet, vae, text_encoder = (load_part(parts, p, dtype) for p in ("unet", "vae", "text_encoder"))
    text = (load_part(parts, "tokenizer"), text_encoder)
    pipe = assemble(unet, vae, load_part(parts, "scheduler"), text).to(device)
    if whole is not None and parts.adapter is not None:
        put_on(pipe, whole, parts.adapter, parts.name)
    return pipe


def load_for_drawing(parts: Parts, device: str | None = None) -> Any:
    """As ``load_pipeline``, faster: channels last, and the adapter folded into the weights in
    float32 (float16 would round the sum).

    Raises:
        DataError: as ``load_pipeline``.
    """
    device = device or best_device()
    if parts.adapter is None or device != "cpu":
        pipe = load_pipeline(parts, device)
    else:
        whole = fit.check(parts.adapter, unet_config(parts))
        pipe = load_pipeline(replace(parts, adapter=None), device)
        fold({"unet": pipe.unet, "text_encoder": pipe.text_encoder}, whole, parts.adapter)
    pipe.unet.to(memory_format=torch.channels_last)
    return pipe


def put_on(pipe: Any, whole: Adapter, adapter: Path, name: str) -> None:
    """Load an adapter, ``whole`` as ``fit.check`` read it from the file ``adapter``, into a
    pipeline of the backbone ``name``: LoRAs through diffusers' own loader, the rest (LoHa, LoKr,
    DoRA) folded into the weights.

    Raises:
        DataError: it does not fit.
    """
    if not whole.plain:
        fold({"unet": pipe.unet, "text_encoder": pipe.text_encoder}, whole, adapter)
        return
    # Every alpha the rank, and one rank: diffusers gives a file without metadata one alpha.
    even = whole.with_alpha(None).with_rank(whole.largest_rank)
    try:
        pipe.load_lora_weights(layouts.diffusers_tensors(even))
    except (RuntimeError, ValueError, TypeError) as error:
        raise DataError(f"{adapter} does not fit {name}: {str(error).splitlines()[0]}") from None


@torch.inference_mode()
def draw(
    pipe: Any,
    shots: Sequence[Shot],
    batch_size: int = 8,
    size: int | None = None,
    title: str = "drawing",
    embeds: dict[str, torch.Tensor] | None = None,
    on_step: OnStep | None = None,
) -> list[Image.Image]:
    """One RGB picture a shot, in order.

    Each shot has its own generator on the CPU, so neither batch size nor device changes the noise.
    ``embeds`` replaces the text encoder: prompt -> (1, tokens, width), '' for no prompt.
    ``on_step`` is told the share that is done after every denoising step; what it raises ends it.
    """
    settings = {(shot.steps, shot.guidance_scale) for shot in shots}
    if len(settings) > 1:
        raise UsageError("Pictures drawn together need the same steps and guidance scale.")
    pictures: list[Image.Image] = []
    batches = -(-len(shots) // batch_size)
    with tqdm(total=len(shots), desc=title, unit="img", disable=None) as bar:
        for start in range(0, len(shots), batch_size):
            batch = shots[start : start + batch_size]
            text: dict[str, Any] = {
                "prompt": [shot.prompt for shot in batch],
                "negative_prompt": [shot.negative_prompt for shot in batch],
            }
            if embeds is not None:
                text = {
                    "prompt_embeds": torch.cat([embeds[shot.prompt] for shot in batch]),
                    "negative_prompt_embeds": torch.cat(
                        [embeds[shot.negative_prompt] for shot in batch]
                    ),
                }
            pictures += pipe(
                **text,
                num_inference_steps=batch[0].steps,
                guidance_scale=batch[0].guidance_scale,
                generator=[torch.Generator().manual_seed(shot.seed) for shot in batch],
                height=size,
                width=size,
                callback_on_step_end=_telling(
                    on_step, start // batch_size, batches, batch[0].steps
                ),
            ).images
            bar.update(len(batch))
    return pictures


def _telling(on_step: OnStep | None, batch: int, batches: int, steps: int) -> Any:
    if on_step is None:
        return None

    def tell(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        on_step((batch + min(1.0, (step + 1) / steps)) / batches)
        return given

    return tell


def expand(shot: Shot, count: int) -> list[Shot]:
    """``count`` shots with consecutive seeds."""
    return [replace(shot, seed=shot.seed + i) for i in range(count)]


def settings_text(shot: Shot, facts: dict[str, str]) -> str:
    return json.dumps(asdict(shot) | facts, sort_keys=True)


def save_png(path: Path, image: Image.Image, shot: Shot, **facts: str) -> None:
    """PNG with its settings in text chunks: ``prompt``, ``seed``, ... and all as JSON."""
    info = PngInfo()
    for key, value in (asdict(shot) | facts).items():
        info.add_text(key, str(value))
    info.add_text("bksdm_tune", settings_text(shot, facts))
    write_png(path, image, info)


def write_png(path: Path, image: Image.Image, info: PngInfo | None = None) -> None:
    """Save so that a picture that is there is whole."""
    scratch = path.with_name(f".{path.name}.tmp")
    image.save(scratch, "PNG", pnginfo=info)
    scratch.replace(path)
