"""Stage ``clip``: a small CLIP pair on pictures and captions; for scoring."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from bksdm_tune.loop import shuffled
from scripts.pocket.common import pixels, restore, train
from scripts.pocket.data import MAX_TOKENS

STEPS, BATCH, WIDTH = 2_000, 96, 96


def make(work: Path) -> CLIPModel:
    vocabulary = json.loads((work / "data/tokenizer/vocab.json").read_text())
    start, end = vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]
    text = {
        "vocab_size": len(vocabulary),
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_TOKENS,
        "projection_dim": WIDTH,
        "bos_token_id": start,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 64,
        "patch_size": 8,
        "projection_dim": WIDTH,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))


def run(work: Path) -> None:
    torch.manual_seed(2)
    model = make(work)
    images = np.load(work / "data/train-images.npy", mmap_mode="r")
    tokens = np.load(work / "data/train-tokens.npy")

    def batches(start: int) -> Iterator[Any]:
        for number, chosen in enumerate(shuffled(len(images), BATCH, 4)(start), start):
            chosen = np.sort(chosen)
            which = np.random.default_rng((4, number)).integers(tokens.shape[1], size=BATCH)
            yield pixels(images[chosen]), torch.from_numpy(tokens[chosen, which].astype(np.int64))

    def objective(batch: Any) -> dict[str, torch.Tensor]:
        pictures, texts = batch
        # The same words make two captions of a batch equal; equal captions are no negatives.
        same = (texts[:, None] == texts[None]).all(-1).float()
        targets = same / same.sum(1, keepdim=True)
        output = model(input_ids=texts, pixel_values=pictures)
        logits = output.logits_per_image
        losses = {
            "image": F.cross_entropy(logits, targets),
            "text": F.cross_entropy(logits.T, targets),
        }
        return losses | {"loss": (losses["image"] + losses["text"]) / 2}

    train(work / "clip", objective, {"clip": model}, batches, STEPS, 1e-3, ema_decay=0.99)
    report(work)


def load(work: Path) -> CLIPModel:
    model = make(work)
    restore(work / "clip", {"clip": model})
    return model.eval()


@torch.inference_mode()
def report(work: Path) -> None:
    model = load(work)
    images = np.load(work / "data/heldout-images.npy")[:1000]
    tokens = torch.from_numpy(np.load(work / "data/heldout-tokens.npy")[:1000, 0].astype(np.int64))
    logits = model(input_ids=tokens, pixel_values=pixels(images)).logits_per_image
    own = logits.diagonal()[:, None]
    facts = {
        "caption_rank_percentile": float((logits < own).float().mean()),
        "caption_in_top_10_of_1000": float(((logits > own).sum(1) < 10).float().mean()),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    (work / "clip/report.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts))
