"""Stage ``looks``: a self-supervised encoder that tells subjects of one class apart.

No label is used: two pictures of one look in different scenes are the two views of a contrastive
pair (NT-Xent, SimCLR equation 1), and half the batches hold one kind only, so that the kind alone
does not solve them.  Half of the views went through the VAE, so that its softness is no feature.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from transformers import ResNetConfig, ResNetModel

from scripts.pocket import vae
from scripts.pocket.common import pixels, restore, train
from scripts.pocket.data import VIEWS

STEPS, LOOKS_PER_BATCH, TEMPERATURE, SOFT_LOOKS = 2_200, 48, 0.1, 8_000


def make() -> ResNetModel:
    return ResNetModel(
        ResNetConfig(
            embedding_size=24,
            hidden_sizes=[24, 48, 96, 128],
            depths=[1, 1, 1, 1],
            layer_type="basic",
            downsample_in_first_stage=False,
        )
    )


def embed(model: ResNetModel, images: torch.Tensor) -> torch.Tensor:
    """NCHW in -1..1 -> unit vectors (N, 128)."""
    return F.normalize(model(images).pooler_output.flatten(1), dim=1)


def soften(work: Path, images: np.ndarray) -> np.ndarray:
    """The pictures as the VAE gives them back, uint8 NHWC; computed once."""
    path = work / "looks/soft.npy"
    if not path.exists():
        model = vae.load(work)
        pieces = (images[i : i + 512] for i in range(0, len(images), 512))
        soft = [
            vae.reconstruct(model, piece).permute(0, 2, 3, 1).byte().numpy() for piece in pieces
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.concatenate(soft))
    return np.load(path)


def run(work: Path) -> None:
    torch.manual_seed(3)
    model = make().to(memory_format=torch.channels_last)
    sharp = np.load(work / "data/train-images.npy", mmap_mode="r")[: SOFT_LOOKS * VIEWS]
    versions = (sharp, soften(work, sharp))
    labels = np.load(work / "data/train-labels.npy")[: SOFT_LOOKS * VIEWS]
    kinds = labels[::VIEWS, 0]
    natural = labels[:, 3].reshape(-1, VIEWS) == 0

    def batches(start: int) -> Iterator[torch.Tensor]:
        number = start
        while True:
            rng = np.random.default_rng((5, number))
            enough = natural.sum(1) >= 2
            if number % 2:
                enough = enough & (kinds == rng.integers(kinds.max() + 1))
            chosen = rng.choice(np.flatnonzero(enough), LOOKS_PER_BATCH, replace=False)
            views = [
                look * VIEWS + rng.choice(np.flatnonzero(natural[look]), 2, replace=False)
                for look in chosen
            ]
            numbers = np.stack(views, 1).reshape(-1)
            soft = rng.random(len(numbers)) < 0.5
            chosen_views = np.stack(
                [versions[int(s)][n] for s, n in zip(soft, numbers, strict=True)]
            )
            yield pixels(chosen_views)
            number += 1

    def objective(views: torch.Tensor) -> dict[str, torch.Tensor]:
        features = embed(model, views)
        logits = features @ features.T / TEMPERATURE
        logits = logits.masked_fill(torch.eye(len(features), dtype=torch.bool), -1e9)
        targets = (torch.arange(len(features)) + LOOKS_PER_BATCH) % len(features)
        return {"loss": F.cross_entropy(logits, targets)}

    train(work / "looks", objective, {"looks": model}, batches, STEPS, 2e-3)
    report(work)


def load(work: Path) -> ResNetModel:
    model = make()
    restore(work / "looks", {"looks": model})
    return model.eval()


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Probability that a positive pair scores above a negative one (ties count half)."""
    order = np.argsort(np.concatenate([positive, negative]), kind="stable")
    ranks = np.empty(len(order))
    ranks[order] = np.arange(1, len(order) + 1)
    n, m = len(positive), len(negative)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def same_class_auc(features: np.ndarray, subject: np.ndarray, kind: np.ndarray) -> float:
    """AUC of cosine: pairs of one subject against pairs of other subjects of its class."""
    cosine = features @ features.T
    upper = np.triu(np.ones_like(cosine, bool), 1)
    same = subject[:, None] == subject[None]
    rivals = ~same & (kind[:, None] == kind[None])
    return auc(cosine[upper & same], cosine[upper & rivals])


@torch.inference_mode()
def report(work: Path) -> None:
    from subjects.illustrated.twins import TWINS, twin_photos

    model = load(work)
    images = np.load(work / "data/heldout-images.npy")
    labels = np.load(work / "data/heldout-labels.npy")
    keep = labels[:, 3] == 0
    decoder = vae.load(work)
    soft = vae.reconstruct(decoder, images[keep]).permute(0, 2, 3, 1).byte().numpy()
    sharp_features, soft_features = (
        torch.cat([embed(model, pixels(b)) for b in np.array_split(pictures, 16)]).numpy()
        for pictures in (images[keep], soft)
    )
    subject = np.repeat(np.arange(len(images) // VIEWS), VIEWS)[keep]
    photos = {name: np.stack([np.asarray(p) for p in twin_photos(name, 64)]) for name in TWINS}
    twin = embed(model, pixels(np.concatenate(list(photos.values())))).numpy()
    names = np.repeat(np.arange(len(photos)), [len(p) for p in photos.values()])
    twin_kinds = np.array([TWINS[list(photos)[n]].kind for n in names])
    facts = {
        "auc_unseen_looks": same_class_auc(sharp_features, subject, labels[keep, 0]),
        "auc_unseen_looks_through_the_vae": same_class_auc(soft_features, subject, labels[keep, 0]),
        "auc_twins": same_class_auc(twin, names, twin_kinds),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    (work / "looks/report.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts))
