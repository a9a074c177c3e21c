"""What a subject looks like, apart from where it stands: kind, colours, marking, proportions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

KINDS = (
    "backpack", "stuffed animal", "bowl", "can", "candle", "cat", "clock", "sneaker",
    "dog", "toy", "boot", "glasses", "cartoon", "teapot", "vase",
)  # fmt: skip
LIVE_KINDS = ("cat", "dog")

COLOURS = {
    "red": (214, 40, 40),
    "orange": (245, 133, 24),
    "yellow": (250, 214, 40),
    "green": (46, 160, 67),
    "blue": (38, 92, 214),
    "purple": (134, 56, 190),
    "pink": (250, 140, 190),
    "brown": (125, 74, 38),
    "black": (38, 38, 44),
    "white": (248, 248, 246),
    "grey": (140, 144, 150),
    "teal": (24, 170, 170),
}
MARKINGS = ("plain", "spots", "stripes", "patches", "band", "checks")


@dataclass(frozen=True)
class Look:
    """One appearance.  ``width``, ``height`` and ``feature`` (ears, handles, soles) are factors
    near 1; ``layout`` seeds where the marking's pieces lie, so that a subject keeps its spots."""

    kind: str
    colour: str
    marking: str
    marking_colour: str
    width: float
    height: float
    feature: float
    layout: int

    def paint(self) -> tuple[str, str, str, str]:
        """What a caption could tell: two looks with equal paint count as the same look."""
        return self.kind, self.colour, self.marking, self.marking_colour


def random_look(
    rng: np.random.Generator,
    kind: str | None = None,
    forbidden: frozenset[tuple[str, str, str, str]] = frozenset(),
) -> Look:
    """A look drawn at random whose paint is not in ``forbidden``."""
    while True:
        colour, second = (str(name) for name in rng.choice(list(COLOURS), 2, replace=False))
        marking = "plain" if rng.random() < 0.3 else str(rng.choice(MARKINGS[1:]))
        look = Look(
            kind=kind or str(rng.choice(KINDS)),
            colour=colour,
            marking=marking,
            marking_colour=colour if marking == "plain" else second,
            width=float(rng.uniform(0.82, 1.18)),
            height=float(rng.uniform(0.82, 1.18)),
            feature=float(rng.uniform(0.75, 1.35)),
            layout=int(rng.integers(1 << 30)),
        )
        if look.paint() not in forbidden:
            return look
