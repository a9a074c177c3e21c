"""Stage ``probe``: a classifier of kind, colour and background that judges generated pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from bksdm_tune.loop import shuffled
from scripts.pocket.common import pixels, train
from subjects.illustrated.looks import COLOURS, KINDS
from subjects.illustrated.scenes import SCENES

FILE = Path(__file__).with_name("probe.safetensors")  # kept, so that tables need no pre-training
STEPS, BATCH = 3_200, 64
HEADS = {"kind": len(KINDS), "colour": len(COLOURS), "scene": len(SCENES)}


class Probe(nn.Module):
    """NCHW float32 in -1..1, 64 px -> logits per attribute."""

    def __init__(self) -> None:
        super().__init__()
        widths, layers = (3, 24, 48, 96, 160), []
        for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False)):
            layers += [nn.Conv2d(a, b, 3, 2, 1), nn.GroupNorm(8, b), nn.SiLU()]
            if i:
                layers += [nn.Conv2d(b, b, 3, 1, 1), nn.GroupNorm(8, b), nn.SiLU()]
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(160 * 16, 256), nn.SiLU())
        self.heads = nn.ModuleDict({name: nn.Linear(256, n) for name, n in HEADS.items()})

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.trunk(images)
        return {name: head(features) for name, head in self.heads.items()}


def blur(images: torch.Tensor) -> torch.Tensor:
    """Soft edges at random, so that a decoder's softness is not mistaken for a wrong attribute."""
    if torch.rand(()) < 0.5:
        images = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), "replicate"), 3, 1)
    return images + 0.1 * torch.rand(()) * torch.randn_like(images)


def run(work: Path) -> None:
    torch.manual_seed(1)
    probe = Probe().to(memory_format=torch.channels_last)  # type: ignore[call-arg]
    images = np.load(work / "data/train-images.npy", mmap_mode="r")
    labels = np.load(work / "data/train-labels.npy").astype(np.int64)

    def batches(start: int) -> Iterator[Any]:
        for chosen in shuffled(len(images), BATCH, 3)(start):
            yield pixels(images[np.sort(chosen)]), torch.from_numpy(labels[np.sort(chosen)])

    def objective(batch: Any) -> dict[str, torch.Tensor]:
        logits = probe(blur(batch[0]))
        losses = {
            name: F.cross_entropy(logits[name], batch[1][:, i], label_smoothing=0.02)
            for i, name in enumerate(HEADS)
        }
        return losses | {"loss": torch.stack(list(losses.values())).sum()}

    train(work / "probe", objective, {"probe": probe}, batches, STEPS, 2e-3, ema_decay=0.99)
    save_file({key: value.half().contiguous() for key, value in probe.state_dict().items()}, FILE)
    report(work)


def load() -> Probe:
    probe = Probe()
    probe.load_state_dict({key: value.float() for key, value in load_file(FILE).items()})
    return probe.eval()


@torch.inference_mode()
def classify(probe: Probe, images: np.ndarray) -> np.ndarray:
    """uint8 NHWC -> int64 (N, 3): kind, colour, scene."""
    parts = [probe(pixels(images[i : i + 256])) for i in range(0, len(images), 256)]
    columns = [torch.cat([part[name].argmax(1) for part in parts]) for name in HEADS]
    return torch.stack(columns, 1).numpy()


def report(work: Path) -> None:
    images = np.load(work / "data/heldout-images.npy")
    labels = np.load(work / "data/heldout-labels.npy")[:, :3]
    right = (classify(load(), images) == labels).mean(0)
    facts = dict(zip(HEADS, right.tolist(), strict=True)) | {"pictures": len(images)}
    (work / "probe/report.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts))
