"""Which words drew which pixels: cross-attention averaged over heads, layers and denoising steps.

As DAAM (Tang et al. 2023, arXiv 2210.04885), by which the BK-SDM cards compare a student's maps
with its teacher's: of the guided half of the batch, each layer's map at the latents' size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from bksdm_tune.errors import UsageError
from bksdm_tune.pipeline import OnStep, Shot, draw

TINT = (255, 64, 0)


class Maps(NamedTuple):
    """``shares``: (words, height, width) at the latents' size, float32; how much of the attention
    that the words of the prompt get at a place goes to each: they sum to 1 there."""

    picture: Image.Image
    words: list[str]
    shares: NDArray[np.float32]

    def overlay(self, index: int) -> Image.Image:
        """The picture, dark where the word had no part, tinted where it had most."""
        share = self.shares[index]
        low, high = float(share.min()), float(share.max())
        heat = (share - low) / max(high - low, 1e-8)
        size = self.picture.size
        mask = Image.fromarray((255 * heat).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
        dim = Image.blend(self.picture, Image.new("RGB", size), 0.65)
        tinted = Image.blend(self.picture, Image.new("RGB", size, TINT), 0.25)
        return Image.composite(tinted, dim, mask)


class Recorder:
    """An attention processor that adds up what the cross-attention layers look at."""

    def __init__(self, tokens: slice) -> None:
        self.tokens, self.total, self.count = tokens, torch.zeros(()), 0
        self.side: tuple[int, int] = (0, 0)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            attn.head_to_batch_dim(x)
            for x in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        if encoder_hidden_states is None:
            mixed = F.scaled_dot_product_attention(q, k, v, scale=attn.scale)
        else:
            shares = attn.get_attention_scores(q, k)
            self.add(shares.float())
            mixed = shares @ v
        return attn.to_out[0](attn.batch_to_head_dim(mixed))

    def add(self, shares: Tensor) -> None:
        """(batch * heads, pixels, tokens), the batch being one picture, without and with words."""
        guided = shares[len(shares) // 2 :].mean(0)[:, self.tokens]
        high, wide = self.side
        shrink = round((high * wide / len(guided)) ** 0.5)
        small = guided.T.reshape(1, -1, high // shrink, wide // shrink)
        large = F.interpolate(small, self.side, mode="bilinear", align_corners=False)[0]
        self.total, self.count = self.total.to(large.device) + large, self.count + 1


def words_of(prompt: str, tokenizer: Any) -> tuple[list[str], list[int]]:
    """The words between blanks, and how many tokens each has.

    Raises:
        UsageError: there are none, or more than the text encoder reads.
    """
    words = prompt.split()
    counts = [len(tokenizer(word, add_special_tokens=False).input_ids) for word in words]
    room = tokenizer.model_max_length - 2
    if not words or sum(counts) > room:
        raise UsageError(f"The prompt has {sum(counts)} tokens; 1 to {room} are wanted.")
    return words, counts


def attention_maps(
    pipe: Any, shot: Shot, size: int | None = None, on_step: OnStep | None = None
) -> Maps:
    """Draw ``shot`` and see who looked at which word.

    Raises:
        UsageError: no guidance, or a prompt too long.
    """
    if shot.guidance_scale <= 1:
        raise UsageError("Attention maps need a guidance scale above 1.")
    words, counts = words_of(shot.prompt, pipe.tokenizer)
    recorder = Recorder(slice(1, 1 + sum(counts)))
    side = size or pipe.unet.config.sample_size * pipe.vae_scale_factor
    recorder.side = (side // pipe.vae_scale_factor,) * 2
    before = pipe.unet.attn_processors
    pipe.unet.set_attn_processor(recorder)
    try:
        (picture,) = draw(pipe, [shot], 1, size, "attention", on_step=on_step)
    finally:
        pipe.unet.set_attn_processor(before)
    tokens = (recorder.total / recorder.count).cpu()
    of_word = torch.stack([part.sum(0) for part in tokens.split(counts)])
    shares = of_word / of_word.sum(0, keepdim=True).clamp(min=1e-12)
    return Maps(picture, words, shares.numpy())
