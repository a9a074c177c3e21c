"""Scores on the way: one subject, a small fixed grid, the pictures and features in memory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from bksdm_tune.errors import ProtocolError
from bksdm_tune.evaluate.drawing import Grid, Order, Sitter, orders
from bksdm_tune.evaluate.encoders import Encoder, features
from bksdm_tune.evaluate.manifest import Generated
from bksdm_tune.evaluate.protocols import Judges
from bksdm_tune.evaluate.results import fingerprint
from bksdm_tune.evaluate.statistics import bootstrap_mean
from bksdm_tune.evaluate.subject_scores import unit
from subjects.photos import open_photo

ON_THE_WAY = "scores.jsonl"  # in a run folder
EVERY_THIRD = 3
GRID = Grid(images=2, class_images=0, seed=770_000)
"""Noises of its own: those of `score` stay unseen."""


@dataclass(frozen=True)
class Point:
    """A checkpoint's scores: means over prompts, with 95 % intervals over prompts."""

    step: int
    dino: float
    clip_t: float
    dino_ci95: tuple[float, float]
    clip_t_ci95: tuple[float, float]
    fingerprint: str = ""
    """Of the protocol."""


def watched(sitter: Sitter) -> list[Order]:
    """Every third prompt of the subject's list."""
    listed = enumerate(orders(sitter, GRID, sitter.identifier))
    return [order for number, order in listed if number // GRID.images % EVERY_THIRD == 0]


class Watch:
    """Scores pictures of a sitter against its photos; encodes photos and prompts once."""

    def __init__(self, judges: Judges, sitter: Sitter, device: str) -> None:
        self.judges, self.device = judges, device
        self.listed = watched(sitter)
        photos = [open_photo(photo.path) for photo in sitter.photos.photos]
        self.photos = self._encode(judges.dino, photos)
        assert judges.clip.texts is not None
        with torch.inference_mode():
            texts = judges.clip.texts([self._row(order).clip_text for order in self.listed])
        self.texts = unit(texts.float().cpu().numpy())

    @staticmethod
    def _row(order: Order) -> Generated:
        assert isinstance(order.row, Generated)
        return order.row

    def score(self, step: int, pictures: list[Image.Image]) -> Point:
        dino = (self._encode(self.judges.dino, pictures) @ self.photos.T).mean(1)
        clip_t = (self._encode(self.judges.clip, pictures) * self.texts).sum(1)
        dino, clip_t = (values.reshape(-1, GRID.images).mean(1) for values in (dino, clip_t))
        intervals = bootstrap_mean(dino), bootstrap_mean(clip_t)
        means = float(dino.mean()), float(clip_t.mean())
        return Point(step, *means, *intervals, fingerprint=fingerprint(self.judges.facts))

    def _encode(self, encoder: Encoder, pictures: list[Image.Image]) -> NDArray[np.float64]:
        return unit(features(encoder.images, encoder, pictures, self.device))


def check_protocol(points: list[Point], judges: Judges) -> None:
    """Raise ProtocolError if some were scored by other encoders than these."""
    mine = fingerprint(judges.facts)
    if any(point.fingerprint not in ("", mine) for point in points):
        raise ProtocolError(
            f"This run's {ON_THE_WAY} was scored by other encoders than can be had now "
            f"({judges.protocol}). Make those available again, or delete that file."
        )


def read_points(path: Path) -> list[Point]:
    """Those of a run; none if it scored none."""
    if not path.is_file():
        return []
    rows: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()]
    pairs = ("dino_ci95", "clip_t_ci95")
    return [Point(**row | {name: tuple(row[name]) for name in pairs}) for row in rows]


def curve(points: list[Point]) -> list[tuple[str, float, float]]:
    """For report.scatter."""
    return [(str(point.step), point.clip_t, point.dino) for point in points]
