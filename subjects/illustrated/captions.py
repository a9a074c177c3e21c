"""Pictures drawn at random for pre-training, and captions in the grammar of the prompts."""

from __future__ import annotations

import string

import numpy as np

from subjects.illustrated.accessories import ACCESSORIES
from subjects.illustrated.looks import COLOURS, LIVE_KINDS, random_look
from subjects.illustrated.render import Picture
from subjects.illustrated.scenes import SCENES

MODIFIERS = ("red", "purple", "shiny", "wet", "cube shaped")
Paint = tuple[str, str, str, str]


def visible_paint(picture: Picture) -> Paint:
    """The paint as drawn: a red or purple modifier replaces the body's colour."""
    kind, colour, marking, marking_colour = picture.look.paint()
    shown = picture.modifier if picture.modifier in COLOURS else colour
    return kind, shown, marking, shown if marking == "plain" else marking_colour


def random_picture(rng: np.random.Generator, forbidden: frozenset[Paint]) -> Picture:
    """A picture whose subject does not look like any in ``forbidden``."""
    while True:
        look = random_look(rng, forbidden=forbidden)
        live = look.kind in LIVE_KINDS
        accessory = str(rng.choice(list(ACCESSORIES))) if live and rng.random() < 0.5 else ""
        modifier = str(rng.choice(MODIFIERS)) if rng.random() < 0.15 else ""
        picture = Picture(look, str(rng.choice(list(SCENES))), accessory, modifier)
        if visible_paint(picture) not in forbidden:
            return picture


def nonsense(rng: np.random.Generator) -> str:
    """A word that means nothing, so that an unknown identifier before tuning means nothing too."""
    letters = list(string.ascii_lowercase + string.digits)
    return "".join(rng.choice(letters, int(rng.integers(3, 8))))


def caption(picture: Picture, rng: np.random.Generator, keep: float = 0.7) -> str:
    """What the picture shows; colour, marking and scene are each told with probability ``keep``."""
    kind, colour, marking, marking_colour = visible_paint(picture)
    words = ["a"]
    if rng.random() < 0.15:
        words.append(nonsense(rng))
    if picture.modifier and picture.modifier not in COLOURS:
        words.append(picture.modifier)
    if picture.modifier in COLOURS or rng.random() < keep:
        words.append(colour)
    words.append(kind)
    if marking != "plain" and rng.random() < keep:
        words += ["with", "a" if marking == "band" else "", marking_colour, marking]
    words.append(picture.accessory)
    if rng.random() < max(keep, 0.8):
        words.append(picture.scene)
    return " ".join(word for word in words if word)
