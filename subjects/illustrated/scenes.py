"""The 20 backgrounds of the DreamBooth prompts and four homely ones, drawn on a 128 px canvas.

The homely ones serve as the places where a twin's "photos" were taken, so that every DreamBooth
background is new to a personalised model.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

SIZE = 128
HORIZON = 70  # pixels from the top, before jitter

Rng = np.random.Generator
Colour = tuple[int, int, int]


class Scene:
    """A canvas in the making: picture, pen, the row of the horizon."""

    def __init__(self, rng: Rng, sky: Colour, ground: Colour) -> None:
        self.rng = rng
        self.horizon = HORIZON + int(rng.integers(-6, 7))
        self.image = Image.new("RGB", (SIZE, SIZE), jitter(rng, sky))
        self.pen = ImageDraw.Draw(self.image)
        self.pen.rectangle((0, self.horizon, SIZE, SIZE), fill=jitter(rng, ground))

    def dots(
        self, n: int, colour: Colour, radius: tuple[float, float], top: int, bottom: int
    ) -> None:
        for _ in range(n):
            x, y = self.rng.uniform(0, SIZE), self.rng.uniform(top, bottom)
            r = self.rng.uniform(*radius)
            self.pen.ellipse((x - r, y - r, x + r, y + r), fill=jitter(self.rng, colour))

    def blades(self, n: int, colour: Colour, top: int, bottom: int, length: float) -> None:
        for _ in range(n):
            x, y = self.rng.uniform(0, SIZE), self.rng.uniform(top, bottom)
            tip = (x + self.rng.uniform(-4, 4), y - length * self.rng.uniform(0.6, 1.2))
            self.pen.line((x, y, *tip), fill=jitter(self.rng, colour, 20), width=2)


def jitter(rng: Rng, colour: Colour, spread: int = 10) -> Colour:
    shift = rng.integers(-spread, spread + 1, 3)
    r, g, b = (int(np.clip(c + s, 0, 255)) for c, s in zip(colour, shift, strict=True))
    return r, g, b


def jungle(rng: Rng) -> Scene:
    s = Scene(rng, (24, 84, 40), (44, 70, 26))
    for _ in range(26):
        x, y = rng.uniform(0, SIZE), rng.uniform(0, 90)
        a, length = rng.uniform(0, 2 * np.pi), rng.uniform(14, 34)
        tip, side = (
            (x + length * np.cos(a), y + length * np.sin(a)),
            6 * np.array([-np.sin(a), np.cos(a)]),
        )
        mid = ((x + tip[0]) / 2, (y + tip[1]) / 2)
        leaf = [
            (x, y),
            (mid[0] + side[0], mid[1] + side[1]),
            tip,
            (mid[0] - side[0], mid[1] - side[1]),
        ]
        s.pen.polygon(leaf, fill=jitter(rng, (38, 128, 48), 26))
    for _ in range(3):
        x = rng.uniform(0, SIZE)
        s.pen.line((x, 0, x + rng.uniform(-12, 12), 86), fill=(74, 56, 30), width=4)
    return s


def snow(rng: Rng) -> Scene:
    s = Scene(rng, (176, 200, 224), (238, 243, 250))
    for x in rng.uniform(0, SIZE, 4):
        h = rng.uniform(18, 34)
        s.pen.polygon(
            [(x - 10, s.horizon), (x, s.horizon - h), (x + 10, s.horizon)], fill=(62, 104, 92)
        )
        s.pen.polygon(
            [(x - 5, s.horizon - h / 2), (x, s.horizon - h), (x + 5, s.horizon - h / 2)],
            fill=(244, 248, 252),
        )
    s.dots(40, (255, 255, 255), (1, 2.2), 0, SIZE)
    return s


def beach(rng: Rng) -> Scene:
    s = Scene(rng, (134, 206, 246), (240, 218, 160))
    s.pen.rectangle((0, s.horizon - 22, SIZE, s.horizon), fill=jitter(rng, (28, 130, 190)))
    s.pen.line((0, s.horizon, SIZE, s.horizon + 2), fill=(250, 252, 252), width=3)
    x = rng.uniform(14, 114)
    s.pen.ellipse((x - 9, 8, x + 9, 26), fill=(255, 236, 120))
    s.dots(30, (214, 186, 124), (0.6, 1.4), s.horizon + 6, SIZE)
    return s


def cobblestone_street(rng: Rng) -> Scene:
    s = Scene(rng, (168, 140, 112), (92, 90, 92))
    for row, y in enumerate(range(s.horizon, SIZE, 9)):
        for x in range(-14 + 7 * (row % 2), SIZE, 14):
            s.pen.rounded_rectangle((x, y, x + 12, y + 7), 3, fill=jitter(rng, (146, 144, 148), 22))
    for x in range(int(rng.integers(-8, 8)), SIZE, 36):
        s.pen.rectangle((x, 12, x + 16, 44), fill=(84, 66, 56))
    return s


def pink_fabric(rng: Rng) -> Scene:
    s = Scene(rng, (252, 176, 206), (252, 176, 206))
    for _ in range(9):
        x, w = rng.uniform(-20, SIZE), rng.uniform(5, 12)
        lean = rng.uniform(10, 40)
        s.pen.polygon(
            [(x, 0), (x + w, 0), (x + w + lean, SIZE), (x + lean, SIZE)],
            fill=jitter(rng, (236, 136, 178), 14),
        )
    return s


def wooden_floor(rng: Rng) -> Scene:
    s = Scene(rng, (182, 126, 74), (182, 126, 74))
    for row, y in enumerate(range(0, SIZE, 16)):
        s.pen.rectangle((0, y, SIZE, y + 14), fill=jitter(rng, (186, 128, 74), 16))
        s.pen.line((0, y + 15, SIZE, y + 15), fill=(104, 66, 36), width=2)
        x = (row * 53 + int(rng.integers(0, 40))) % SIZE
        s.pen.line((x, y, x, y + 15), fill=(104, 66, 36), width=2)
    return s


def city(rng: Rng) -> Scene:
    s = Scene(rng, (176, 196, 220), (118, 118, 122))
    x = -4
    while x < SIZE:
        w, h = int(rng.integers(16, 26)), int(rng.integers(26, 62))
        s.pen.rectangle((x, s.horizon - h, x + w, s.horizon), fill=jitter(rng, (84, 92, 112), 24))
        for wy in range(s.horizon - h + 4, s.horizon - 4, 8):
            for wx in range(x + 4, x + w - 3, 7):
                s.pen.rectangle((wx, wy, wx + 3, wy + 3), fill=(250, 226, 130))
        x += w + 2
    return s


def mountain(rng: Rng) -> Scene:
    s = Scene(rng, (150, 200, 240), (104, 158, 84))
    for x in (rng.uniform(10, 50), rng.uniform(70, 120)):
        h, w = rng.uniform(46, 62), rng.uniform(40, 56)
        top = s.horizon - h
        s.pen.polygon(
            [(x - w, s.horizon), (x, top), (x + w, s.horizon)], fill=jitter(rng, (112, 108, 124))
        )
        s.pen.polygon(
            [(x - w * 0.3, top + h * 0.3), (x, top), (x + w * 0.3, top + h * 0.3)],
            fill=(250, 250, 252),
        )
    return s


def blue_house(rng: Rng) -> Scene:
    s = Scene(rng, (196, 224, 240), (110, 170, 90))
    x, y = rng.uniform(6, 40), s.horizon - 42
    s.pen.rectangle((x, y, x + 78, s.horizon + 4), fill=jitter(rng, (52, 104, 206)))
    s.pen.polygon([(x - 8, y), (x + 39, y - 26), (x + 86, y)], fill=jitter(rng, (136, 62, 50)))
    for wx in (x + 8, x + 54):
        s.pen.rectangle(
            (wx, y + 10, wx + 16, y + 26), fill=(250, 246, 214), outline=(255, 255, 255), width=2
        )
    return s


def rug_in_forest(rng: Rng) -> Scene:
    s = Scene(rng, (46, 104, 62), (94, 82, 48))
    for x in rng.uniform(0, SIZE, 7):
        s.pen.rectangle((x - 4, 0, x + 4, s.horizon + 4), fill=jitter(rng, (88, 62, 40)))
    s.dots(10, (40, 122, 60), (8, 14), 0, 22)
    s.pen.ellipse(
        (8, s.horizon + 10, 120, 126),
        fill=jitter(rng, (128, 50, 176)),
        outline=(214, 160, 240),
        width=3,
    )
    return s


def wheat_field(rng: Rng) -> Scene:
    s = Scene(rng, (142, 200, 240), (222, 178, 70))
    s.blades(90, (240, 204, 96), s.horizon, SIZE, 18)
    s.blades(30, (186, 140, 44), s.horizon, SIZE, 16)
    return s


def autumn_tree(rng: Rng) -> Scene:
    s = Scene(rng, (206, 218, 226), (176, 140, 84))
    x = rng.choice([rng.uniform(10, 34), rng.uniform(94, 118)])
    s.pen.rectangle((x - 6, 20, x + 6, s.horizon + 8), fill=(92, 60, 36))
    for _ in range(22):
        cx, cy, r = x + rng.normal(0, 18), rng.uniform(0, 40), rng.uniform(6, 12)
        s.pen.ellipse((cx - r, cy - r, cx + r, cy + r), fill=jitter(rng, (226, 106, 30), 28))
    s.dots(36, (220, 96, 28), (1.5, 3), s.horizon, SIZE)
    return s


def eiffel_tower(rng: Rng) -> Scene:
    s = Scene(rng, (190, 214, 240), (128, 174, 104))
    x = rng.uniform(30, 98)
    for side in (-1, 1):
        s.pen.line(
            (x + side * 26, s.horizon + 2, x + side * 9, 36, x, 2), fill=(96, 80, 70), width=6
        )
    for y, w in ((s.horizon - 16, 23), (36, 12)):
        s.pen.rectangle((x - w, y, x + w, y + 4), fill=(96, 80, 70))
    return s


def water(rng: Rng) -> Scene:
    s = Scene(rng, (190, 226, 244), (36, 120, 186))
    s.pen.rectangle((0, 46, SIZE, SIZE), fill=jitter(rng, (36, 124, 190)))
    for _ in range(26):
        x, y, w = rng.uniform(0, SIZE), rng.uniform(50, SIZE), rng.uniform(8, 20)
        s.pen.arc((x - w, y - 3, x + w, y + 3), 180, 360, fill=(130, 200, 236), width=2)
    return s


def ocean_of_milk(rng: Rng) -> Scene:
    s = Scene(rng, (206, 184, 226), (250, 248, 240))
    s.pen.rectangle((0, 46, SIZE, SIZE), fill=(250, 248, 240))
    for _ in range(20):
        x, y, w = rng.uniform(0, SIZE), rng.uniform(50, SIZE), rng.uniform(10, 22)
        s.pen.arc((x - w, y - 4, x + w, y + 4), 180, 360, fill=(222, 212, 200), width=2)
    return s


def sunflowers(rng: Rng) -> Scene:
    s = Scene(rng, (150, 208, 246), (66, 160, 58))
    s.blades(60, (48, 136, 44), s.horizon, SIZE, 9)
    for _ in range(9):
        x, y, r = rng.uniform(4, 124), rng.uniform(s.horizon - 6, 120), rng.uniform(6, 9)
        s.pen.line((x, y, x, y + 14), fill=(40, 110, 40), width=2)
        s.pen.ellipse((x - r, y - r, x + r, y + r), fill=(252, 206, 30))
        s.pen.ellipse((x - r / 2, y - r / 2, x + r / 2, y + r / 2), fill=(96, 58, 24))
    return s


def mirror(rng: Rng) -> Scene:
    s = Scene(rng, (66, 66, 80), (66, 66, 80))
    box = (8, s.horizon - 6, 120, 124)
    s.pen.ellipse(box, fill=jitter(rng, (190, 220, 232)), outline=(214, 176, 84), width=5)
    for x in rng.uniform(24, 90, 3):
        s.pen.line((x, 112, x + 18, 84), fill=(240, 250, 254), width=3)
    return s


def crowded_street(rng: Rng) -> Scene:
    s = Scene(rng, (152, 158, 170), (190, 188, 184))
    for x in range(-6, SIZE, 13):
        x, h = x + int(rng.integers(-3, 4)), int(rng.integers(34, 46))
        shirt = tuple(int(c) for c in rng.integers(40, 240, 3))
        s.pen.rectangle((x, s.horizon - h + 12, x + 11, s.horizon - 8), fill=shirt)
        s.pen.rectangle((x + 2, s.horizon - 8, x + 9, s.horizon + 4), fill=(50, 50, 66))
        s.pen.ellipse(
            (x + 1, s.horizon - h, x + 10, s.horizon - h + 11),
            fill=jitter(rng, (222, 176, 140), 24),
        )
    for y in (s.horizon + 18, s.horizon + 42):
        s.pen.line((0, y, SIZE, y), fill=(150, 148, 146), width=2)
    return s


def dirt_road(rng: Rng) -> Scene:
    s = Scene(rng, (170, 206, 232), (104, 142, 66))
    s.pen.polygon(
        [(48, s.horizon), (80, s.horizon), (132, SIZE), (-4, SIZE)],
        fill=jitter(rng, (156, 108, 66)),
    )
    s.dots(26, (120, 80, 48), (1, 2.4), s.horizon + 14, SIZE)
    s.dots(12, (60, 116, 50), (6, 10), s.horizon - 8, s.horizon)
    return s


def white_rug(rng: Rng) -> Scene:
    s = Scene(rng, (206, 190, 168), (128, 92, 64))
    s.pen.ellipse((4, s.horizon + 2, 124, 127), fill=(246, 244, 238))
    for a in np.linspace(0, 2 * np.pi, 44):
        x = 64 + 58 * np.cos(a)
        y = (s.horizon + 129) / 2 + (125 - s.horizon) / 2 * np.sin(a)
        s.pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill=jitter(rng, (240, 238, 230), 8))
    return s


def table(rng: Rng) -> Scene:
    s = Scene(rng, (224, 214, 190), (150, 96, 58))
    s.pen.rectangle((0, s.horizon, SIZE, s.horizon + 5), fill=(186, 130, 86))
    return s


def room(rng: Rng) -> Scene:
    s = Scene(rng, (150, 176, 160), (112, 104, 124))
    x = rng.uniform(8, 84)
    s.pen.rectangle((x, 8, x + 34, 40), fill=(212, 236, 250), outline=(250, 250, 250), width=4)
    s.pen.rectangle((0, s.horizon - 4, SIZE, s.horizon), fill=(240, 238, 232))
    return s


def garden(rng: Rng) -> Scene:
    s = Scene(rng, (206, 232, 246), (92, 184, 74))
    for x in range(-4, SIZE, 12):
        s.pen.rectangle((x, s.horizon - 26, x + 8, s.horizon), fill=(246, 242, 232))
    s.dots(14, (236, 90, 120), (2, 3), s.horizon + 4, SIZE)
    return s


def white_wall(rng: Rng) -> Scene:
    s = Scene(rng, (236, 234, 230), (206, 202, 198))
    return s


SCENES: dict[str, Callable[[Rng], Scene]] = {
    "in the jungle": jungle,
    "in the snow": snow,
    "on the beach": beach,
    "on a cobblestone street": cobblestone_street,
    "on top of pink fabric": pink_fabric,
    "on top of a wooden floor": wooden_floor,
    "with a city in the background": city,
    "with a mountain in the background": mountain,
    "with a blue house in the background": blue_house,
    "on top of a purple rug in a forest": rug_in_forest,
    "with a wheat field in the background": wheat_field,
    "with a tree and autumn leaves in the background": autumn_tree,
    "with the Eiffel Tower in the background": eiffel_tower,
    "floating on top of water": water,
    "floating in an ocean of milk": ocean_of_milk,
    "on top of green grass with sunflowers around it": sunflowers,
    "on top of a mirror": mirror,
    "on top of the sidewalk in a crowded street": crowded_street,
    "on top of a dirt road": dirt_road,
    "on top of a white rug": white_rug,
    "on a table": table,
    "in a room": room,
    "in a garden": garden,
    "in front of a white wall": white_wall,
}
HOME_SCENES = ("on a table", "in a room", "in a garden", "in front of a white wall")
DREAMBOOTH_SCENES = tuple(name for name in SCENES if name not in HOME_SCENES)
LIQUID = {
    "floating on top of water": (36, 124, 190),
    "floating in an ocean of milk": (250, 248, 240),
}
