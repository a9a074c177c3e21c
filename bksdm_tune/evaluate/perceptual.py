"""LPIPS (Zhang et al. 2018, VGG-16) through torch-fidelity, where its weights are on disk."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bksdm_tune.artifacts import content_key, sha256_file
from subjects.photos import open_photo

FILES = ("weights-vgg16-lpips.pth", "vgg16-397923af.pth")  # as torch.hub keeps them


@dataclass(frozen=True)
class Lpips:
    """The loaded network."""

    model: Any
    weights: str
    device: str

    @torch.inference_mode()
    def to_the_others(self, paths: list[Path]) -> NDArray[np.float64]:
        """Each picture's mean distance to all others, (N,), N of 2 or more; at the first's size."""
        photos = [open_photo(path) for path in paths]
        images = [
            torch.from_numpy(np.array(photo.resize(photos[0].size))).permute(2, 0, 1)[None]
            for photo in photos
        ]
        table = np.zeros((len(paths), len(paths)))
        for a, b in itertools.combinations(range(len(paths)), 2):
            pair = (images[a].to(self.device), images[b].to(self.device))
            table[a, b] = table[b, a] = float(self.model(*pair))
        return np.asarray(table.sum(1) / (len(paths) - 1))


def load(device: str) -> tuple[Lpips | None, str | None]:
    """The network, or None and why."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    absent = [name for name in FILES if not (folder / name).is_file()]
    if absent:
        return None, f"LPIPS's weights are not in torch.hub's folder: {', '.join(absent)}"
    try:
        from torch_fidelity.sample_similarity_lpips import SampleSimilarityLPIPS
    except ImportError:
        return None, "LPIPS needs torch-fidelity: pip install 'bksdm-tune[scores]'"
    for name in FILES:  # torch-fidelity would run whatever a pickle says
        torch.load(folder / name, "meta", weights_only=True)
    model = SampleSimilarityLPIPS("lpips-vgg16").to(device)
    return Lpips(model, content_key([sha256_file(folder / name) for name in FILES]), device), None
